"""reward_model.py and dpo.py with a model and comparisons of the user's own, on tiny models."""

import json
import math
import pathlib
import shutil
import types as types_lib
from typing import Any

import dpo
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reward_model
from finetune import comparisons, direct_training, preference_settings, reward_training, training
from launch import initial_model
from launch.run_settings import SettingError

from rlhf_jax import lm, metrics, types
from rlhf_jax.data import errors, packing

WORDS = ("tea", "milk", "bread", "salt", "rice", "fish", "corn", "plum")


@pytest.fixture(scope="session")
def pairs(tmp_path_factory) -> pathlib.Path:
    """An easy preference: answers that like something are preferred to answers that refuse."""
    path = tmp_path_factory.mktemp("own_pairs") / "pairs.jsonl"
    records = [
        {"prompt": f"Do you like {a} and {b}?", "chosen": f"I like {b}.", "rejected": f"No, not {a}, I hate it."}
        for a in WORDS
        for b in WORDS
    ]
    path.write_text("\n".join(map(json.dumps, records)))
    return path


def train(script: Any, out: pathlib.Path, *arguments: object) -> dict[str, Any]:
    script.main([*map(str, arguments), "--out", str(out)])
    return json.loads((out / "results.json").read_text())


def losses(run: pathlib.Path) -> list[float]:
    return [row["loss"] for row in metrics.read(run) if "loss" in row]


NEW = ("--model", "tiny", "--data.vocab-size", 300)
SHORT = ("--steps", 3, "--batch", 8)


@pytest.fixture(scope="session")
def reward_run(pairs, tmp_path_factory) -> pathlib.Path:
    out = tmp_path_factory.mktemp("own_reward") / "run"
    train(reward_model, out, *NEW, "--data.path", pairs, "--epochs", 3, "--batch", 8)
    return out


def test_a_reward_model_is_trained_on_its_own(reward_run):
    results = json.loads((reward_run / "results.json").read_text())
    facts = results["reward_model"]
    assert facts["accuracy"][0] > 0.9 and facts["gap"]["train_accuracy"][0] > 0.9
    assert results["comparisons"] == {"training": 58, "held_out": 6} and results["steps"] == 22
    assert {row["stage"] for row in metrics.read(reward_run)} == {"reward_model"}, "no SFT model is trained first"
    assert any("validation_loss" in row for row in metrics.read(reward_run))
    assert results["packing"]["share_of_unpacked_tokens"] < 0.9 and facts["normalisation"]["gain"] == 1
    assert (reward_run / "report.html").stat().st_size > 1000


def test_the_saved_reward_model_prefers_chosen_answers_whose_mean_score_is_0(reward_run):
    model = initial_model.load(str(reward_run), kind=initial_model.REWARD_MODEL)
    scores = []
    for answer in ("I like milk.", "No, not tea, I hate it."):
        turns = [{"role": "user", "content": "Do you like tea and milk?"}, {"role": "assistant", "content": answer}]
        ids = jnp.array([model.fmt.tokenizer.apply_chat_template(turns, return_dict=False)])
        scores.append(float(lm.score(model.params, ids, mask_BL=jnp.ones(ids.shape, bool), cfg=model.cfg)[0]))
    assert scores[0] > scores[1] + 1 and abs(scores[0]) < 1


def test_transformers_loads_the_saved_reward_model(reward_run):
    pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    loaded = transformers.AutoModelForSequenceClassification.from_pretrained(reward_run / "model")
    assert loaded.config.num_labels == 1


@pytest.mark.parametrize(
    ("script", "flags"),
    [
        (reward_model, ()),
        (dpo, ("--learning-rate", 1e-3)),
        pytest.param(dpo, ("--loss", "kto"), marks=pytest.mark.slow),
        pytest.param(dpo, ("--loss", "simpo"), marks=pytest.mark.slow),
    ],
    ids=["reward_model", "dpo", "kto", "simpo"],
)
def test_packing_and_micro_batches_do_not_change_the_losses(script, flags, pairs, tmp_path):
    runs = {"whole": ("--packing", "False"), "packed": ("--packing", "True"), "parts": ("--micro-batches", 2)}
    found = {}
    for name, chosen in runs.items():
        results = train(script, tmp_path / name, *NEW, "--data.path", pairs, *SHORT, *flags, *chosen)
        found[name] = losses(tmp_path / name)
        assert (results["packing"] is None) == (name == "whole") and results["tokens_per_second"] > 0
    np.testing.assert_allclose(found["packed"], found["whole"], rtol=1e-4)
    np.testing.assert_allclose(found["parts"], found["whole"], rtol=1e-4)


def test_packing_depends_on_the_computation_that_it_saves():
    """Of 4 rows of 32 tokens, half are real; 2 packed rows suffice."""
    mask_BKL = np.broadcast_to(np.arange(32) < 16, (4, 1, 32))
    planned = training.Schedule(np.arange(4)[None], 1, 4)
    options: dict[str, Any] = dict(pack=packing.pack_preferences, masks=[mask_BKL], pad_id=0)
    rows: Any = types.Preferences(np.ones((4, 1, 32), np.int32), mask_BKL, mask_BKL)  # type: ignore[arg-type]
    for chosen, mesh, cost, packed in (
        (None, None, 1.0, True),
        (None, None, 1.9, False),
        (None, jax.make_mesh((1, 1), ("data", "fsdp")), 1.0, False),
        (True, None, 1.9, True),
        (False, None, 1.0, False),
    ):
        settings = types_lib.SimpleNamespace(packing=chosen, micro_batches=1)
        batch_at, saving = comparisons.packed_batches(settings, mesh, rows, planned, cost=cost, **options)
        assert (batch_at is not None) == packed == (saving is not None)
        if batch_at is not None:
            assert saving == {"width": 32, "rows": 2, "share_of_unpacked_tokens": 0.5}
            assert batch_at(0).answer_RL.all() and batch_at(0).tokens_RL.shape == (2, 32)


@pytest.mark.parametrize("rule", ["held-out", pytest.param("chosen", marks=pytest.mark.slow)])
def test_the_heads_of_an_ensemble_can_be_kept(pairs, tmp_path, rule):
    heads = ("--training.heads", 3, "--training.keep-heads", "--training.normalise", rule)
    results = train(reward_model, tmp_path / "run", *NEW, "--data.path", pairs, *SHORT, *heads)
    model = initial_model.load(str(tmp_path / "run"), kind=initial_model.REWARD_MODEL)
    assert model.params["head"]["kernel_HD"].shape == (3, model.cfg.d_model)
    assert len(set(results["reward_model"]["normalisation"]["bias"])) == 3, "each head is shifted by its own mean"
    assert len(results["reward_model"]["accuracy"]) == 3, "the report is that of the average"


@pytest.mark.slow
def test_adapters_heads_and_partial_training_leave_the_rest_of_the_model_as_it_was(pairs, reward_run, tmp_path):
    base = tmp_path / "base"
    saved = initial_model.load(str(reward_run), kind=initial_model.REWARD_MODEL)
    params = lm.init(jax.random.key(3), saved.cfg)
    lm.save(base, saved.cfg, params, tokenizer=saved.fmt.tokenizer, stop_ids=saved.fmt.stop_ids)
    common = ("--model", base, "--data.path", pairs, *SHORT)
    train(reward_model, tmp_path / "lora", *common, "--lora.rank", 2, "--training.heads", 2, "--learning-rate", 1e-2)
    train(reward_model, tmp_path / "head", *common, "--training.trains", "^head/", "--training.loss", "pairs")
    for name, same in (("lora", False), ("head", True)):
        cfg, trained = lm.load(tmp_path / name / "model")
        assert cfg.n_layers == saved.cfg.n_layers and trained["head"]["kernel_D"].ndim == 1
        np.testing.assert_array_equal(trained["embed"]["tokens"], params["embed"]["tokens"])
        equal = jax.tree.map(lambda a, b: bool((a == b).all()), params["layers"], trained["layers"])
        assert all(jax.tree.leaves(equal)) == same


def test_a_reward_run_resumes_with_the_same_results(pairs, reward_run, tmp_path, capsys):
    run = tmp_path / "run"
    shutil.copytree(reward_run, run)
    first = json.loads((run / "results.json").read_text())
    (run / "results.json").unlink()
    reward_model.main(["--resume", str(run)])
    again = json.loads((run / "results.json").read_text())
    assert {name: again[name] for name in ("reward_model", "steps")} == {
        name: first[name] for name in ("reward_model", "steps")
    }
    reward_model.main(["--resume", str(run)])
    assert "already finished" in capsys.readouterr().out


# ----------------------------------------------------------------------------------------------------------------- DPO


@pytest.fixture(scope="session")
def dpo_run(pairs, tmp_path_factory) -> pathlib.Path:
    out = tmp_path_factory.mktemp("own_dpo") / "run"
    train(dpo, out, *NEW, "--data.path", pairs, "--epochs", 2, "--batch", 8, "--learning-rate", 1e-3)
    return out


def test_a_policy_is_trained_on_its_own_from_its_reference(dpo_run):
    results = json.loads((dpo_run / "results.json").read_text())
    assert results["implicit_accuracy_before"][0] == 0.5 and results["implicit_accuracy"][0] == 1
    assert results["margin"][1] > 0 and results["steps"] == 15
    assert {row["stage"] for row in metrics.read(dpo_run)} == {"dpo"}, "no other stage is trained first"
    assert losses(dpo_run)[0] == pytest.approx(math.log(2), rel=1e-5), "the policy starts as the reference"
    assert (dpo_run / "reference" / "dpo.npz").exists() and not (dpo_run / "policy").exists()
    assert initial_model.load(str(dpo_run)).cfg.n_layers == 2


@pytest.mark.slow
def test_the_reported_log_probabilities_are_those_of_the_saved_policy(dpo_run, pairs):
    model = initial_model.load(str(dpo_run))
    settings = dpo.parse(["--model", str(dpo_run), "--data.path", str(pairs)])
    _, data = comparisons.load(settings, None, errors.DropCount())
    rows, P = jax.tree.map(np.asarray, data.held_out.rows), data.prompt_width
    tokens_BL, mask_BL = rows.tokens_BKL[:, 0], rows.mask_BKL[:, 0]
    logprobs_BT = lm.token_logprobs(
        model.params, jnp.asarray(tokens_BL), mask_BL=jnp.asarray(mask_BL), cfg=model.cfg, prompt_width=P
    )
    mean = float(np.where(mask_BL[:, P:], logprobs_BT, 0.0).sum(axis=1).mean())
    results = json.loads((dpo_run / "results.json").read_text())
    assert mean == pytest.approx(results["logprobs"]["chosen"]["after"][0], rel=1e-4)


@pytest.mark.parametrize(
    "flags",
    [("kto",), ("orpo", "--pairs", 1), ("ipo", "--lora.rank", 4, "--learning-rate", 2e-2, "--micro-batches", 2)],
    ids=lambda flags: flags[0],
)
@pytest.mark.slow
def test_other_losses_and_adapters_raise_the_implicit_accuracy(flags, pairs, tmp_path):
    rate = () if "--learning-rate" in flags else ("--learning-rate", 2e-3)
    common = (*NEW, "--data.path", pairs, "--batch", 8, "--steps", 12, *rate)
    results = train(dpo, tmp_path / "run", *common, "--loss", *flags)
    assert results["implicit_accuracy"][0] > 0.9 and results["incidents"] == []
    assert (tmp_path / "run" / "reference").exists() == (flags[0] != "orpo")


def test_a_dpo_run_resumes_with_the_same_results(dpo_run, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(dpo_run, run)
    first = json.loads((run / "results.json").read_text())
    (run / "results.json").unlink()
    dpo.main(["--resume", str(run)])
    again = json.loads((run / "results.json").read_text())
    same = ("implicit_accuracy", "margin", "logprobs", "steps")
    assert {name: again[name] for name in same} == {name: first[name] for name in same}


def test_transformers_computes_the_logits_of_the_saved_policy(dpo_run):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    model = initial_model.load(str(dpo_run))
    ids = np.array([model.fmt.tokenizer("Do you like tea?")["input_ids"]])
    with torch.no_grad():
        theirs = transformers.AutoModelForCausalLM.from_pretrained(dpo_run / "model")(torch.tensor(ids)).logits.numpy()
    ours = lm.forward(model.params, jnp.asarray(ids), cfg=model.cfg)
    np.testing.assert_allclose(lm.logits(model.params, ours.hidden_BLD, cfg=model.cfg), theirs, atol=1e-3)


# ---------------------------------------------------------------------------------------------------- data and settings


LENGTHS = (np.array([10] * 99 + [500]), np.array([70] * 80 + [300] * 20))


def chosen_widths(max_length: int, **widths: int) -> tuple[int, int]:
    data = preference_settings.Comparisons("x", **widths)  # type: ignore[arg-type]
    return comparisons.choose_widths(LENGTHS, data, max_length=max_length)


def test_widths_hold_99_percent_within_the_length_of_the_model():
    assert chosen_widths(4096) == (512, 320), "the 99th of 100 numbers, rounded up to a multiple of 32"
    assert chosen_widths(700) == (380, 320) and chosen_widths(600) == (300, 300), (
        "answers get what prompts leave, at least half"
    )
    assert chosen_widths(700, prompt_width=64) == (64, 320) and chosen_widths(700, response_width=600) == (100, 600)
    assert chosen_widths(200, prompt_width=150) == (150, 50)
    with pytest.raises(SettingError, match=r"width 150 plus --data\.response-width 64 exceeds 200"):
        chosen_widths(200, prompt_width=150, response_width=64)
    assert comparisons.cut_warnings(LENGTHS, (32, 320)) == []
    assert comparisons.cut_warnings(LENGTHS, (32, 64)) == [
        "100 of 100 answers (100%) exceed the width of 64 tokens and are shortened or dropped; "
        "--data.response-width 320 would hold 99 % of them"
    ]


def test_cut_answers_are_an_incident(pairs, tmp_path):
    flags = ("--data.response-width", 8, "--training.normalise", "none")
    results = train(reward_model, tmp_path / "run", *NEW, "--data.path", pairs, *SHORT, *flags)
    (incident,) = results["incidents"]
    assert incident["stage"] == "data" and "--data.response-width 32 would hold 99 %" in incident["text"]
    assert results["widths"]["response"] == 8 and "normalisation" not in results["reward_model"]


@pytest.mark.parametrize(
    ("script", "flags", "message"),
    [
        (reward_model, ("--training.trains", "^head/", "--lora.rank", "2"), "--training.trains has no effect with"),
        (reward_model, ("--training.loss", "best", "--training.margin", "1"), "--training.margin has no effect with"),
        (reward_model, ("--training.heads", "0"), "--training.heads is 0"),
        (reward_model, ("--training.keep-heads",), "--training.keep-heads has no effect with one head"),
        (reward_model, ("--data.held-out", "0"), "--data.held-out is 0.0; it must be above 0"),
        (reward_model, ("--lora.alpha", "4"), "--lora.alpha has no effect without --lora.rank"),
        (reward_model, ("--data.prompt-width", "0"), "--data.prompt-width is 0"),
        (dpo, ("--label-smoothing", "0.1"), "--label-smoothing has no effect with --loss dpo"),
        (dpo, ("--loss", "orpo", "--beta", "0.1"), "--beta has no effect with --loss orpo"),
        (dpo, ("--beta", "0"), "--beta is 0.0; it must be above 0"),
        (dpo, ("--micro-batches", "3"), "--micro-batches is 3; it must divide"),
    ],
)
def test_invalid_settings_are_refused_by_flag(script, flags, message):
    with pytest.raises(SettingError, match=message):
        script.parse(["--model", "MODEL", "--data.path", "FILE", *flags])


@pytest.mark.parametrize(
    ("script", "flags", "message"),
    [
        (reward_model, "--model M --steps 2", "--steps needs --data.path; add it"),
        (reward_model, "--data.path F --lora.rank=2", "--lora.rank needs --model; add it"),
        (reward_model, "--no-packing", "--no-packing needs --model and --data.path; add them"),
        (
            reward_model,
            "--model M --data.path F --steps 2 --folds 5",
            "--steps has no effect with --folds; leave out one",
        ),
        (dpo, "--model M --max_grad_norm 2", "--max-grad-norm needs --data.path; add it"),
        (
            dpo,
            "--model M --data.path F --lora.rank 2 --rounds 2",
            "--lora.rank has no effect with --rounds; leave out one",
        ),
    ],
)
def test_flags_of_own_data_name_what_they_need(script, flags, message):
    with pytest.raises(SettingError, match=f"^{message}"):
        script.parse(flags.split())


@pytest.mark.parametrize("script", [reward_model, dpo])
def test_a_model_without_data_is_a_warning(script, tmp_path, monkeypatch, capsys):
    (tmp_path / "own").mkdir()
    monkeypatch.setattr(script, "Console", lambda: 1 / 0)
    for model, warned in ((tmp_path / "own", True), ("tiny", False)):
        with pytest.raises(ZeroDivisionError):
            script.run(script.parse(["--model", str(model)]))
        text = capsys.readouterr().err
        assert ("warning: --data.path is missing" in text) == warned and ("add --data.path FILE" in text) == warned


def test_other_commands_of_the_scripts_keep_their_settings(capsys):
    assert not isinstance(reward_model.parse(["--data.path", "FILE"]), preference_settings.OwnRewardSettings)
    assert isinstance(dpo.parse(["--model", "M", "--data.path", "F", "--rounds", "2"]), dpo.DPOSettings)
    for flags, shown, hidden in (
        (["--model", "M", "--data.path", "F"], "--lora.rank", "--preset"),
        ([], "--preset", "--lora.rank"),
    ):
        with pytest.raises(SystemExit):
            reward_model.parse([*flags, "--help"])
        text = capsys.readouterr().out
        assert shown in text and hidden not in text and "--model MODEL --data.path FILE" in text


def test_the_time_left_follows_the_size_of_the_data(pairs):
    """Stages are weighted by the forward passes of an answer; backward passes count twice."""
    work = {}
    for flags in ((), ("--epochs", 3), ("--loss", "kto"), ("--loss", "orpo")):
        settings = dpo.parse([*map(str, (*NEW, "--data.path", pairs, "--batch", 8, *flags))])
        work[flags] = dict(direct_training._prepare(settings, None, errors.DropCount()).stages)
    rows, held_out = 58, 6
    steps = math.ceil(rows / 8)
    assert work[()] == {"reference": 2 * rows, "dpo": 6 * 8 * steps, "evaluate": 4 * held_out}
    assert work["--epochs", 3]["dpo"] == 6 * 8 * math.ceil(3 * rows / 8)
    assert work["--loss", "kto"]["dpo"] == 4 * 8 * math.ceil(2 * rows / 8) and work["--loss", "orpo"]["reference"] == 0
    chosen = reward_model.parse([*map(str, (*NEW, "--data.path", pairs, "--batch", 8))])
    stages = dict(reward_training._prepare(chosen, None, errors.DropCount()).stages)
    assert stages["reward_model"] == 3 * 2 * 8 * steps + 8 * 2 * held_out
