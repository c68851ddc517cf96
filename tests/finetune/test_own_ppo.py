"""The command that trains a user's own policy by reinforcement learning, on tiny models."""

import dataclasses
import functools
import json
import pathlib
import shutil
import time
from typing import Any

import jax
import numpy as np
import ppo
import pytest
import word_models
from finetune import policy_data, policy_rewards, policy_samples, policy_settings, reward_functions
from launch import initial_model, process_setup, run_folder
from launch.run_settings import SettingError

from rlhf_jax import generation, lm
from rlhf_jax.data import errors
from rlhf_jax.diagnostics import alarms

WORDS = ("tea", "milk", "bread", "salt", "rice", "fish", "corn", "plum", "papaya", "yes")
SHORT = ("--max-new-tokens", 6, "--ppo.batch", 16, "--ppo.iterations", 3, "--show-every", 0, "--held-out", 0.25)
REWARDS = """
def count_a(prompts, answers):
    assert prompts[0][-1]["role"] == "user"
    return [answer.count("a") for answer in answers]


def each_a(prompts, answers, *, tokens, records):
    assert all("number" in record for record in records)
    return [[token.count("a") for token in answer] for answer in tokens]


def number(prompts, answers, records):
    return [record["number"] for record in records]


def broken(prompts, answers):
    return [1 / 0 for answer in answers]


def short(prompts, answers):
    return [1.0]
"""


save_model = functools.partial(word_models.save, words=WORDS, scale=2.0)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Returns the paths of a policy, reward models, prompts and reward functions."""
    folder = tmp_path_factory.mktemp("ppo")
    records = [{"prompt": f"{a} {b}", "number": i} for i, a in enumerate(WORDS) for b in WORDS[:4]]
    (folder / "prompts.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    (folder / "rewards.py").write_text(REWARDS)
    return {
        "policy": save_model(folder / "policy", seed=0),
        "reward": save_model(folder / "reward", seed=5, head=True),
        "wide": save_model(folder / "wide", seed=6, head=True, width=24),
        "foreign": save_model(folder / "foreign", seed=7, head=True, words=(*WORDS[1:], WORDS[0])),
        "prompts": str(folder / "prompts.jsonl"),
        "functions": str(folder / "rewards.py"),
    }


def settings(files, out, *flags, reward: str | None = "count_a"):
    given = () if reward is None else ("--reward", f"{files['functions']}:{reward}")
    arguments = ("--policy", files["policy"], "--prompts", files["prompts"], "--out", out, *SHORT, *given, *flags)
    return ppo.parse([str(each) for each in arguments])


def test_training_raises_the_count_of_a_letter(files, tmp_path, capsys):
    rates = ("--ppo.learning-rate", 0.02, "--ppo.critic-learning-rate", 0.02, "--ppo.kl-coef", 0.0, "--ppo.ema", 0.5)
    flags = ("--ppo.iterations", 16, "--ppo.batch", 32, "--ppo.warmup", 1, "--show-every", 8, *rates)
    results = ppo.run(settings(files, tmp_path / "run", *flags))
    before, after = results["policies"]["initial_policy"], results["policies"]["trained_policy"]
    assert after["reward"][0] > 2 * before["reward"][0] and after["win_rate"][1] > 0.5
    assert before["kl"][0] == 0 and after["kl"][1] > 0
    assert after["entropy_ratio"][2] < 1 and after["diversity"] < before["diversity"]
    assert after["self_bleu"] > before["self_bleu"] and "entropy_ratio" not in before
    assert isinstance(results["diversity_pairs"], int) and results["diversity_pairs"] > 1
    cfg, params = lm.load(tmp_path / "run" / "model")
    assert cfg.n_layers == 1 and "head" not in params
    lines = [json.loads(line) for line in (tmp_path / "run" / "samples.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [8, 8, 16, 16]
    assert all(line["reward"] == line["response"].count("a") == line["count_a"] for line in lines)
    report = (tmp_path / "run" / "report.html").read_text()
    assert "papaya" in report and "trained policy beats initial policy on" in report
    assert "step 16, reward" in capsys.readouterr().err


def weights(run):
    return jax.tree.leaves(lm.load(pathlib.Path(run) / "model")[1])


@pytest.mark.slow
def test_resumed_run_has_the_bits_of_an_uninterrupted_one(files, tmp_path, monkeypatch):
    flags = ("--show-every", 1, "--saves", 3, "--ppo.learning-rate", 0.01)
    ppo.run(settings(files, tmp_path / "whole", *flags))
    make_show = ppo.policy_samples.make_show

    def make_interrupted(*args, **options):
        show = make_show(*args, **options)

        def interrupted(done, state, metrics):
            show(done, state, metrics)
            if done == 2:
                raise KeyboardInterrupt

        return interrupted

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(ppo.policy_samples, "make_show", make_interrupted)
        ppo.run(settings(files, tmp_path / "cut", *flags))
    earlier = json.loads((tmp_path / "cut" / "seconds.json").read_text())["seconds"]
    monkeypatch.setattr(process_setup, "START_TIME", time.time())  # as in a new process
    began = time.time()
    resumed = ppo.run(ppo.parse(["--resume", str(tmp_path / "cut")]))
    assert earlier < resumed["seconds"] <= earlier + time.time() - began
    for whole, cut in zip(weights(tmp_path / "whole"), weights(tmp_path / "cut"), strict=True):
        np.testing.assert_array_equal(whole, cut)
    texts = [(tmp_path / name / "samples.jsonl").read_text() for name in ("whole", "cut")]
    assert texts[0] == texts[1]


def test_a_run_is_not_resumed_with_other_code_of_its_rewards(files, tmp_path, monkeypatch):
    code = "def score(prompts, answers):\n    return [1.0 for _ in answers]\n"
    for name in ("a.py", "rewards_of_b.py"):
        (tmp_path / name).write_text(code)
    monkeypatch.chdir(tmp_path)
    given = ("--reward", f"{tmp_path}/a.py:score", "rewards_of_b:score", "--reward-model", files["reward"])
    chosen = settings(files, tmp_path / "run", *given, reward=None)
    run_folder.create(tmp_path / "run", chosen)
    resumed = ppo.parse(["--resume", str(tmp_path / "run")])
    run_folder.check_inputs_unchanged(str(tmp_path / "run"), resumed)
    for name in ("a.py", "rewards_of_b.py"):
        (tmp_path / name).write_text(code.replace("1.0", "2.0"))
        with pytest.raises(SettingError, match=rf"run: \S*{name.removesuffix('.py')}\S* has changed since") as caught:
            ppo.run(resumed)
        assert "\n" not in str(caught.value)
        (tmp_path / name).write_text(code)
    (tmp_path / "a.py").unlink()
    with pytest.raises(SettingError, match=r"a\.py does not exist; restore it or start a new run with --out"):
        run_folder.check_inputs_unchanged(str(tmp_path / "run"), resumed)
    (tmp_path / "a.py").write_text(code)
    shutil.copytree(files["reward"], tmp_path / "other")
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    config["reward_model"] = [str(tmp_path / "other")]
    del config["input_digests"]["reward"]  # as in runs of earlier versions
    (tmp_path / "run" / "config.json").write_text(json.dumps(config))
    resumed = ppo.parse(["--resume", str(tmp_path / "run")])
    run_folder.check_inputs_unchanged(str(tmp_path / "run"), resumed)
    (tmp_path / "other" / "config.json").write_text("{}")
    with pytest.raises(SettingError, match=r"the files in \S*other have changed since the run started; restore them"):
        run_folder.check_inputs_unchanged(str(tmp_path / "run"), resumed)


@pytest.mark.parametrize(
    "flags",
    [
        pytest.param(("--reward-model", "wide"), id="larger reward model and critic"),
        pytest.param(("--reward-model", "reward", "wide", "--reward-weights", 1, 0.5, 2, "--lora.rank", 2), id="lora"),
        pytest.param(("--ppo.method", "grpo", "--ppo.samples", 4), id="grpo"),
        pytest.param(("--critic", "zero-head", "--optimizer", "muon"), id="zero head", marks=pytest.mark.slow),
        pytest.param(
            ("--reward-model", "reward", "--no-normalise", "--ptx", "prompts"), id="ptx", marks=pytest.mark.slow
        ),
    ],
)
@pytest.mark.slow
def test_kinds_of_runs(files, tmp_path, flags):
    text = tmp_path / "text.jsonl"
    text.write_text("".join(json.dumps({"text": " ".join(WORDS[i:] + WORDS[:i])}) + "\n" for i in range(10)))
    flags = [text if each == "prompts" else files.get(each, each) for each in flags]
    results = ppo.run(settings(files, tmp_path / "run", *flags, reward="each_a"))
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    last = rows[-1]
    assert results["iterations"] == 3 and np.isfinite(last["reward"])
    assert ("explained_variance" in last) == ("grpo" not in flags)
    assert ("ptx_loss" in last) == ("--ptx" in flags)
    if "--reward-weights" in flags:
        parts = last["reward_model"] + 0.5 * last["reward_model_2"] + 2 * last["reward_each_a"]
        assert last["reward"] == pytest.approx(parts, abs=1e-5)
    assert all(np.isfinite(x).all() for x in weights(tmp_path / "run"))


@pytest.mark.slow
def test_normalised_scores_have_mean_0_and_deviation_1_on_answers_of_the_policy(files, tmp_path):
    flags = ("--reward-model", files["wide"], "--held-out", 0.9, "--ppo.learning-rate", 1e-6)
    results = ppo.run(settings(files, tmp_path / "run", *flags, reward=None))
    low, high = results["policies"]["initial_policy"]["reward"][1:]
    assert low < 0 < high


@pytest.mark.slow
def test_training_ends_at_the_kl_limit_and_the_policy_is_saved(files, tmp_path):
    flags = ("--stop-at-kl", 0.05, "--ppo.iterations", 12, "--ppo.learning-rate", 0.05, "--ppo.kl-coef", 0)
    results = ppo.run(settings(files, tmp_path / "run", *flags))
    assert results["stopped_at_kl"] == 0.05 and 1 < results["iterations"] < 12
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    over = [row["step"] for row in rows if row.get("kl", 0) > 0.05]
    assert over[0] in (results["iterations"] - 1, results["iterations"])
    assert "above --stop-at-kl 0.05" in results["incidents"][0]["text"]
    saved = weights(tmp_path / "run")
    (tmp_path / "run" / "results.json").unlink()  # as if the run had been killed during the evaluation
    again = ppo.run(ppo.parse(["--resume", str(tmp_path / "run")]))
    assert again["iterations"] == results["iterations"] and again["policies"] == results["policies"]
    for first, second in zip(saved, weights(tmp_path / "run"), strict=True):
        np.testing.assert_array_equal(first, second)


def test_equal_prompts_are_kept_with_the_columns_of_each(files, tmp_path):
    """A reward function gets the columns of the prompt that was answered, also if other prompts have its tokens."""
    model = initial_model.load(files["policy"], flag="--policy")
    path = tmp_path / "prompts.jsonl"
    long = " ".join(WORDS[:8])
    prompts = [("tea", 1), ("tea", 1), ("tea", 2), (" ".join(WORDS[:9]), 3), ("milk", 4), (long, 5), (long, 6)]
    path.write_text("".join(json.dumps({"prompt": text, "number": n}) + "\n" for text, n in prompts))

    def read(width, max_new_tokens=4):
        counts = errors.DropCount()
        options = {"width": width, "max_new_tokens": max_new_tokens, "counts": counts}
        return policy_data.read_prompts(model, str(path), **options)[0], counts.dropped

    found, dropped = read(11)
    assert [record.metadata["number"] for record in found.records] == [1, 1, 2, 4, 5, 6]
    assert dropped == {"prompt too long": 1}
    assert found.tokens_BP.shape == (6, 12), "a column of padding, because the longest prompts have 11 tokens"
    full, dropped = read(11, max_new_tokens=model.cfg.max_length - 11)
    assert [record.metadata["number"] for record in full.records] == [1, 1, 2, 4, 5]
    assert dropped == {"prompt too long": 1, "same tokens as another prompt with other columns": 1}
    wide, dropped = read(None)
    assert wide.tokens_BP.shape == (7, 16) and list(wide.asked_B) == [0, 0, 0, 1, 2, 3, 3] and not dropped

    keys = jax.random.split(jax.random.key(0), 6)
    spec = generation.Sampling(max_new_tokens=4, stop_ids=model.fmt.stop_ids)
    sample: Any = functools.partial(generation.generate, model.params, keys, cfg=model.cfg, sampling=spec)
    rollout = sample(found.tokens_BP, found.mask_BP)
    function = reward_functions.RewardFunction(f"{files['functions']}:number")
    rewards = policy_rewards.Rewards({}, {"number": function}, {"number": 1.0})
    scores = policy_rewards.Scorer(rewards, model.fmt, found, None).measure({"parts": {}}, rollout, size=4)
    np.testing.assert_array_equal(scores["reward"], [1, 1, 2, 4, 5, 6])
    junk = np.where(found.mask_BP, found.tokens_BP, 0)
    same = sample(junk, found.mask_BP)
    np.testing.assert_array_equal(rollout.tokens_BL[:, 12:], same.tokens_BL[:, 12:])


def test_the_split_is_printed_and_too_few_training_prompts_are_a_warning(files, tmp_path, capsys):
    ppo.run(settings(files, tmp_path / "run", "--held-out", 0.97, "--ppo.iterations", 1))
    printed = " ".join(capsys.readouterr())
    assert "data: 1 training prompt, 39 held-out prompts;" in printed
    assert "39 of 40 prompts are held out, so the policy is trained on 1; lower --held-out" in printed
    with pytest.raises(SettingError, match=r"--held-out is 0\.99, which leaves none of 40 prompts to train"):
        ppo.run(settings(files, tmp_path / "none", "--held-out", 0.99))


def test_rows_of_the_pretraining_loss(files, tmp_path):
    fmt = initial_model.load(files["policy"], flag="--policy").fmt
    demonstrations, text = tmp_path / "d.jsonl", tmp_path / "t.txt"
    demonstrations.write_text(json.dumps({"prompt": "tea milk", "response": "yes"}) + "\n")
    rows = policy_data.read_ptx(fmt, str(demonstrations), width=12)
    learnt = np.asarray(rows.tokens_BL)[np.asarray(rows.loss_mask_BL)]
    assert fmt.tokenizer.decode(learnt, skip_special_tokens=True) == "yes" and learnt[-1] in fmt.stop_ids
    text.write_text(" ".join(WORDS * 3))
    rows = policy_data.read_ptx(fmt, str(text), width=12)
    assert rows.tokens_BL.shape == (2, 12) and not rows.loss_mask_BL[:, 0].any() and rows.loss_mask_BL[:, 1:].all()
    with pytest.raises(errors.DataError, match="has 31 tokens, fewer than a row"):
        policy_data.read_ptx(fmt, str(text), width=50)


def test_errors_of_reward_functions_name_the_line(files, tmp_path):
    with pytest.raises(SettingError, match=r'failed on .* ZeroDivisionError.*rewards.py, line 17: "return \[1 / 0'):
        ppo.run(settings(files, tmp_path / "a", reward="broken"))
    with pytest.raises(SettingError, match="returned 1 value for 8 answers"):
        ppo.run(settings(files, tmp_path / "b", reward="short"))
    with pytest.raises(SettingError, match="has no function missing"):
        ppo.run(settings(files, tmp_path / "c", reward="missing"))
    assert not (tmp_path / "c").exists()
    with pytest.raises(SettingError, match="must have the form module:function"):
        reward_functions.RewardFunction("count")
    with pytest.raises(SettingError, match="cannot import nowhere"):
        reward_functions.RewardFunction("nowhere:count")


@pytest.mark.slow
def test_an_error_within_a_step_is_that_of_the_function(files, tmp_path):
    path = tmp_path / "late.py"
    path.write_text("n = [0]\ndef late(prompts, answers):\n    n[0] += 1\n    return [0.0] * (len(answers) // n[0])\n")
    chosen = dataclasses.replace(settings(files, tmp_path / "run"), reward=(f"{path}:late",))
    with pytest.raises(SettingError, match="returned 8 values for 16 answers"):
        ppo.run(chosen)


def test_models_with_other_tokens_are_refused(files, tmp_path):
    with pytest.raises(SettingError, match="its tokenizer differs from that of --policy"):
        ppo.run(settings(files, tmp_path / "run", "--reward-model", files["foreign"]))
    with pytest.raises(SettingError, match="not a reward model"):
        ppo.run(settings(files, tmp_path / "run", "--reward-model", files["policy"]))
    with pytest.raises(errors.DataError, match=r"no prompt is left \(.*\); --prompt-width is 2: raise it"):
        ppo.run(settings(files, tmp_path / "run", "--prompt-width", 2))
    with pytest.raises(SettingError, match="must be below 64"):
        ppo.run(settings(files, tmp_path / "run", "--max-new-tokens", 70))


def test_the_alarm_of_unfinished_answers_names_its_flags():
    message = alarms.unfinished_answers([{"step": 1, "stopped": 0.0}])
    assert message is not None and ppo._with_flags(message).endswith(
        " (flags: --max-new-tokens and --ppo.missing-stop-score)"
    )
    assert ppo._with_flags("KL is negative") == "KL is negative"


def test_names_of_functions_keep_their_underscores():
    policy = {"reward": 1.0, "reward_each_a": 2.0, "reward_model": 3.0, "length": 4.0, "stopped": 1.0}
    policies = {"initial_policy": policy, "trained_policy": policy | {"win_rate": 0.5, "kl": 0.0}}
    results = {"policies": policies, "reward_change": 0.0, "iterations": 1, "tokens_per_second": None}
    names = [name for name, _ in policy_samples.table(results)]
    assert "reward each_a before" in names and "reward each_a after" in names and "reward model after" in names


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--reward-weights", 1, 2), "the number of --reward-weights is 2; it must be 1, the number of rewards"),
        (("--no-normalise",), "--no-normalise has no effect without --reward-model"),
        (("--ppo.ptx-coef", 2), "--ppo.ptx-coef has no effect without --ptx"),
        (("--ppo.value-coef", 2), "--ppo.value-coef has no effect with a separate critic"),
        (("--ppo.method", "reinforce", "--critic", "new-head"), "--critic has no effect with --ppo.method reinforce"),
        (("--ppo.method", "grpo"), "--ppo.samples is 1; it must be at least 2"),
        (("--ppo.minibatches", 3), "--ppo.minibatches is 3; it must divide"),
        (("--lora.alpha", 2), "--lora.alpha has no effect without --lora.rank"),
        (("--lora.rank", 2, "--critic", "zero-head"), "leave it out with --lora.rank"),
        (("--optimizer", "lion", "--epsilon", 1e-3), "--epsilon has no effect with --optimizer lion"),
        (("--ppo.top-p", 0.9), "--ppo.top-p is 0.9; it must be used together with --ppo.correct-sampler"),
        (("--stop-at-kl", 0), "--stop-at-kl is 0.0; it must be above 0"),
        (("--mesh.data", 3), "--ppo.batch is 16; it must be a multiple of 3"),
    ],
)
def test_settings_without_effect_or_out_of_range_are_refused(files, tmp_path, flags, message):
    with pytest.raises(SettingError) as caught:
        settings(files, tmp_path / "run", *flags)
    assert message in str(caught.value)


def test_a_reward_is_required_and_defaults_depend_on_the_rewards(files, tmp_path):
    with pytest.raises(SettingError, match="no reward is given"):
        settings(files, tmp_path / "run", reward=None)
    function = policy_settings.method(settings(files, tmp_path / "run"))
    assert (function.missing_stop_score, function.missing_stop, function.learning_rate) == (0.0, "subtract", 2e-5)
    model = settings(files, tmp_path / "run", "--reward-model", files["reward"], "--lora.rank", 2, reward=None)
    model = policy_settings.method(model)
    assert (model.missing_stop_score, model.missing_stop, model.learning_rate) == (-3.0, "replace", 2e-4)
    assert run_folder.finite({"coef": function.ptx_coef}) == {"coef": 0.0}


# ------------------------------------------------------------------------------------------------------------ Ensembles


@pytest.fixture(scope="module")
def ensemble(files, tmp_path_factory):
    """Returns the path of a reward model with three heads."""
    model = initial_model.load(files["policy"])
    path = tmp_path_factory.mktemp("heads") / "model"
    params = lm.with_head(jax.random.key(8), model.params, model.cfg, heads=3)
    lm.save(path, model.cfg, params, tokenizer=model.fmt.tokenizer, stop_ids=model.fmt.stop_ids)
    return str(path)


@pytest.mark.parametrize("flags", [("--ppo.uncertainty", 0.5), ("--ppo.worst-case",)])
def test_the_reward_of_an_ensemble_falls_with_its_disagreement(files, ensemble, tmp_path, flags):
    models = ("--reward-model", ensemble, files["wide"])
    made = settings(files, tmp_path, *models, "--reward-weights", 2.0, 3.0, *flags)
    policy = initial_model.load(made.policy)
    found = policy_rewards.load(made, policy_rewards.find_functions(made), policy, None)
    assert found.weights == {"model": 2.0, "count_a": 3.0}
    prompts, _ = policy_data.read_prompts(policy, made.prompts, width=8, max_new_tokens=4, counts=errors.DropCount())
    prompts = prompts.at(range(6))
    spec = generation.Sampling(max_new_tokens=4, stop_ids=policy.fmt.stop_ids)
    keys = jax.random.split(jax.random.key(0), 6)
    inputs: Any = (policy.params, keys, prompts.tokens_BP, prompts.mask_BP)
    rollout: Any = generation.generate(*inputs, cfg=policy.cfg, sampling=spec)
    scorer = policy_rewards.Scorer(found, policy.fmt, prompts, None)
    params = {"parts": {name: each.params for name, each in found.models.items()}, "penalty": np.float32(0.5)}
    measured = scorer.measure(params, rollout, size=4)

    heads, one = (
        lm.score(each.params, rollout.tokens_BL, cfg=each.cfg, mask_BL=rollout.mask_BL)
        for each in found.models.values()
    )
    scores = np.concatenate([np.asarray(heads), np.asarray(one)[:, None]], axis=1)
    assert scores.shape == (6, 4)
    expected = scores.min(axis=1) if made.ppo.worst_case else scores.mean(axis=1) - 0.5 * scores.std(axis=1)
    counts = np.array([text.count("a") for text in policy_samples.texts(scorer, rollout)])
    np.testing.assert_allclose(measured["model"], expected, rtol=1e-4)
    np.testing.assert_allclose(measured["reward"], 2 * expected + 3 * counts, rtol=1e-4)
    np.testing.assert_allclose(measured["disagreement"], scores.std(axis=1), rtol=1e-4)
    total, parts = jax.jit(scorer.score)(params, rollout)  # as in the train step
    np.testing.assert_allclose(total, measured["reward"], rtol=1e-4)
    np.testing.assert_allclose(parts["reward_disagreement"], measured["disagreement"], rtol=1e-4)


def test_a_policy_is_trained_on_an_ensemble_whose_average_is_the_critic(files, ensemble, tmp_path):
    flags = ("--reward-model", ensemble, "--ppo.iterations", 1, "--ppo.uncertainty")
    results = [ppo.run(settings(files, tmp_path / str(coef), *flags, coef, reward=None)) for coef in (0.5, 2.0)]
    rows = [json.loads((tmp_path / str(coef) / "metrics.jsonl").read_text().splitlines()[0]) for coef in (0.5, 2.0)]
    assert rows[0]["reward_disagreement"] == rows[1]["reward_disagreement"] > 0, "the same answers are scored"
    assert rows[0]["reward"] - rows[1]["reward"] == pytest.approx(1.5 * rows[0]["reward_disagreement"], rel=1e-4)
    before = results[0]["policies"]["initial_policy"]
    assert before["reward_model"] == before["reward"] and before["reward_disagreement"][0] > 0


def test_errors_about_ensembles_name_the_flag(files, ensemble, tmp_path):
    make = functools.partial(settings, files, tmp_path / "run", reward=None)
    for flags, match in (
        (("--reward-model", ensemble, "--ppo.uncertainty", 1, "--ppo.worst-case"), r"--ppo\.uncertainty has no effect"),
        (("--reward-model", ensemble, "--ppo.uncertainty", -1), r"--ppo\.uncertainty is -1"),
        (("--reward-model", ensemble, ensemble, "--ppo.worst-case", "--reward-weights", 1, 1), "it must be 1"),
    ):
        with pytest.raises(SettingError, match=match):
            make(*flags)
    with pytest.raises(SettingError, match=r"--ppo\.worst-case needs an ensemble of reward models"):
        settings(files, tmp_path / "run", "--ppo.worst-case")
    with pytest.raises(SettingError, match=r"--ppo\.uncertainty needs an ensemble, but --reward-model .* has one head"):
        ppo.run(make("--reward-model", files["reward"], "--ppo.uncertainty", 1))
    with pytest.raises(SettingError, match=r"it has 3 heads; use them as an ensemble with --ppo\.uncertainty"):
        ppo.run(make("--reward-model", ensemble))
