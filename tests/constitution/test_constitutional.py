"""constitutional.py: its settings, the labels of the preference model, and whole runs."""

import dataclasses
import json
import pathlib
import types as types_lib
from typing import Any
from unittest import mock

import constitutional
import jax
import numpy as np
import pytest
from constitution import ai_stages, harm_evaluation, own_settings, red_team
from finetune import comparisons, demonstrations
from launch import settings as instructgpt_settings
from launch.run_settings import SettingError
from recipe import jobs, tasks

from rlhf_jax import feedback, lm, losses, types
from rlhf_jax.data import errors, readers, tokenizers


def rows(n=3, K=4, L=6):
    rng = np.random.default_rng(0)
    tokens_BKL = rng.integers(4, 9, size=(n, K, L)).astype(np.int32)
    ranks_BK = np.tile(np.arange(1, K + 1, dtype=np.int32), (n, 1))
    arrays: Any = (tokens_BKL, tokens_BKL > 0, ranks_BK, np.ones((n, K), bool))
    return types.Comparisons(*arrays)


def sampled(n, L=6):
    tokens_N2L = np.arange(n * 2 * L, dtype=np.int32).reshape(n, 2, L)
    pairs = [feedback.Pair("p", f"a{i}", f"b{i}") for i in range(n)]
    harmless_N2 = np.tile([1.0, 0.0], (n, 1))
    asked: Any = types_lib.SimpleNamespace(asked_B=np.arange(n) // 2)
    return ai_stages.SampledPairs(asked, pairs, tokens_N2L, tokens_N2L >= 0, harmless_N2)


def test_the_targets_of_judged_pairs_are_the_probabilities_of_the_preferred_answers():
    preference_N = np.array([0.9, 0.2, np.nan, 0.5])
    joined = ai_stages.preference_rows(rows(), sampled(4), preference_N)
    assert joined.ranks_BK.shape == (6, 4)
    np.testing.assert_allclose(joined.loss_inputs["target"], [1, 1, 1, 0.9, 0.8, 0.5], rtol=1e-6)
    assert joined.ranks_BK[3:, :2].tolist() == [[1, 2], [2, 1], [1, 2]]
    assert joined.where_BK[3:].tolist() == [[True, True, False, False]] * 3
    scores_K: Any = np.array([0.3, -0.4, 9.0, 9.0])
    for b, p in ((3, 0.9), (4, 0.2), (5, 0.5)):
        given = {"where_K": joined.where_BK[b], "target": joined.loss_inputs["target"][b]}
        loss = losses.ranking(scores_K, joined.ranks_BK[b], **given)
        expected = p * np.log1p(np.exp(-0.7)) + (1 - p) * np.log1p(np.exp(0.7))
        np.testing.assert_allclose(loss, expected, rtol=1e-5)


def test_hard_labels_have_no_ties_and_no_probabilities():
    preference_N = np.array([0.9, 0.2, np.nan, 0.5, np.nextafter(0.5, 0)])
    joined = ai_stages.preference_rows(rows(), sampled(5), preference_N, hard=True)
    assert joined.loss_inputs["target"].tolist() == [1.0] * 5
    assert joined.ranks_BK[3:, :2].tolist() == [[1, 2], [2, 1]]


def test_the_agreement_is_that_of_pairs_that_differ_in_harmlessness():
    pairs = sampled(4)
    pairs.harmless_N2[3] = 0.4
    labels = feedback.Labels(np.array([0.9, 0.8, 0.2, 0.1]), 0.1, 8, 0, 0, 0, 0, {})
    agreed = ai_stages.agreement(pairs, labels)
    assert agreed["agreement"][0] == pytest.approx(2 / 3) and agreed["pairs"] == 3
    expected = feedback.agreement(labels._replace(preference_N=labels.preference_N[:3]), [True] * 3, clusters=[0, 0, 1])
    assert agreed["agreement"] == list(expected)


def test_red_team_prompts_are_harmful_and_held_out():
    settings = constitutional.parse(["--preset", "smoke"])
    train = red_team.draw(settings, 200, stream=red_team.RED_TEAM, harmful=True)
    test = red_team.draw(settings, 200, stream=red_team.EVALUATE, harmful=True, split="test")
    assert {prompt.kind for prompt in train} == {"harmful"}
    assert not {prompt.asked for prompt in train} & {prompt.asked for prompt in test}
    benign = red_team.draw(settings, 200, stream=red_team.RED_TEAM, harmful=False)
    assert "harmful" not in {prompt.kind for prompt in benign}


def test_the_random_streams_differ():
    settings = constitutional.parse(["--preset", "smoke"])
    numbers = [
        red_team._rng(settings, stream, number).random()
        for stream in range(red_team.DEMONSTRATIONS, red_team.EVALUATE + 1)
        for number in range(4)
    ]
    numbers += [np.random.default_rng([settings.seed, stream]).random() for stream in range(40, 48)]
    assert len(set(numbers)) == len(numbers)
    kinds = [
        [prompt.turns for prompt in red_team.draw(settings, 50, stream=red_team.RL, harmful=harmful)]
        for harmful in (None, False, True)
    ]
    assert kinds[0] != kinds[1] != kinds[2]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--model DIR", r"--model without --data.path"),
        ("--revision.rounds 0", r"--revision.rounds"),
        ("--revision.principles 17", r"--revision.principles"),
        ("--revision.miss 1", r"--revision.miss"),
        ("--judge.clamp 0.6 0.9", r"--judge.clamp"),
        ("--red-team 0", r"--red-team"),
        ("--evaluation.prompts 1", r"--evaluation.prompts 1 .* no red-team"),
        ("--evaluation.prompts 64 --red-team 0.999", r"--evaluation.prompts 64 .* no benign"),
        ("--ppo.ptx-coef 2", r"--ppo.ptx-coef has no effect"),
        ("--sft.mix 0.2", r"--sft.mix has no effect"),
        ("--evaluation.best-of 4", r"--evaluation.best-of has no effect"),
        ("--published hh", r"--published"),
    ],
)
def test_wrong_settings_are_refused_by_name(arguments, message):
    with pytest.raises(SettingError, match=message):
        constitutional.parse(arguments.split())


OWN = ["--model", "DIR", "--data.path", "FILE"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--rounds 0", r"there is nothing to write"),
        ("--judge http://x/v1", r"--judge-model is missing"),
        ("--judge J --judge-model NAME", r"--judge-model has no effect"),
        ("--judge J --think-tokens 9", r"--think-tokens has no effect"),
        ("--clamp 0.4 0.6", r"--clamp has no effect without --judge"),
        ("--judge J --rounds 0 --no-critique", r"--no-critique has no effect with --rounds 0"),
        ("--saves 9", r"--saves has no effect"),
        ("--n 3", r"--n is 3"),
    ],
)
def test_wrong_settings_of_own_models_are_refused_by_name(arguments, message):
    with pytest.raises(SettingError, match=message):
        constitutional.parse([*OWN, *arguments.split()])


def test_two_sentences_state_the_gain_and_the_cost():
    change = {"harmlessness": [0.5, 0.4, 0.6], "helpfulness": [-0.1, -0.2, 0.1]}
    policies = {name: {"harmlessness": [0.2], "helpfulness": [0.8]} for name in harm_evaluation.POLICIES}
    first, second = harm_evaluation.headlines({"changes": {"rl_cai − helpful": change}, "policies": policies})
    assert "raises the gold harmlessness" in first and "+0.400 to +0.600" in first
    assert "does not significantly change the gold helpfulness" in second


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> tuple[pathlib.Path, pathlib.Path]:
    """A folder of a model with random weights, and a file of prompts."""
    folder = tmp_path_factory.mktemp("own_constitutional")
    texts = [f"How do I make {x}? (A) yes (B) no. Answer:" for x in ("tea", "fire", "glue")]
    tokenizer = tokenizers.train_bpe(texts, vocab_size=300)
    cfg = dataclasses.replace(lm.LMConfig.preset("tiny", vocab_size=len(tokenizer)), max_length=2048)
    lm.save(folder / "model", cfg, lm.init(jax.random.key(0), cfg), tokenizer=tokenizer)
    (folder / "prompts.jsonl").write_text("".join(json.dumps({"prompt": text}) + "\n" for text in texts))
    return folder / "model", folder / "prompts.jsonl"


def own_arguments(tiny, out, *more):
    model, prompts = map(str, tiny)
    short = ("--max-new-tokens", "8", "--no-few-shot", "--style", "text", "--rounds", "1", "--batch", "4")
    return ["--model", model, "--data.path", prompts, "--judge", model, *short, "--out", str(out), *more]


def test_own_models_write_demonstrations_and_comparisons_that_other_commands_read(tiny, tmp_path):
    out = tmp_path / "run"
    constitutional.main(own_arguments(tiny, out))
    results = json.loads((out / "results.json").read_text())
    assert results["judge"]["comparisons"] <= 3 and results["complete"]
    found, preferred = demonstrations.read(str(out / "demonstrations.jsonl"), errors.DropCount(max_dropped=0.0))
    assert len(found) == results["revisions"]["demonstrations"] and not preferred
    rankings, _ = readers.read_rankings(str(out / "comparisons.jsonl"), counts=errors.DropCount(max_dropped=0.0))
    lines = [json.loads(line) for line in (out / "comparisons.jsonl").read_text().splitlines()]
    assert [comparisons.soft_label(each) for each in rankings] == [line["preference"] for line in lines]
    assert all(0.5 <= line["preference"] <= 1 for line in lines)
    assert (out / "report.html").read_text().count("<svg") == 2


def test_a_run_from_the_files_asks_nothing_and_writes_the_same(tiny, tmp_path):
    out = tmp_path / "run"
    constitutional.main(own_arguments(tiny, out, "--max-requests", "2"))
    first = json.loads((out / "results.json").read_text())
    assert not first["complete"] and first["revisions"]["asked"] == 2
    for _ in range(5):
        constitutional.main(["--resume", str(out)])
    last = json.loads((out / "results.json").read_text())
    assert last["complete"]
    whole = tmp_path / "whole"
    constitutional.main(own_arguments(tiny, whole))
    for name in ("demonstrations.jsonl", "comparisons.jsonl"):
        assert (out / name).read_bytes() == (whole / name).read_bytes()


def test_the_judge_is_asked_about_held_out_pairs_within_the_same_budget(tiny, tmp_path):
    held_out = tmp_path / "held_out.jsonl"
    asked = [("tea?", "Boil."), ("tea?", "Heat."), ("fire?", "Rub.")]
    lines = [json.dumps({"prompt": prompt, "chosen": chosen, "rejected": "No."}) + "\n" for prompt, chosen in asked]
    held_out.write_text("".join(lines))
    out = tmp_path / "run"
    constitutional.main(own_arguments(tiny, out, "--held-out", str(held_out), "--max-requests", "5"))
    results = json.loads((out / "results.json").read_text())
    first, notes = results["judge"], " ".join(each["text"] for each in results["incidents"])
    assert first["asked"] == 5 and first["held_out"] == 2  # both orders of two pairs, and one order of the third
    assert first["open"] == 1 + 3 - first["comparisons"] - first["equal_answers"]
    assert "of 2 held-out labels" in notes and "1 held-out pairs have no label" in notes
    constitutional.main(["--resume", str(out)])
    second = json.loads((out / "results.json").read_text())["judge"]
    assert second["held_out"] == 3 and second["asked"] == 5
    constitutional.main(["--resume", str(out)])
    last = json.loads((out / "results.json").read_text())
    assert last["complete"] and last["judge"]["open"] == 0
    mean, low, high = last["judge"]["agreement"]
    preferred = 3 * mean
    assert preferred == pytest.approx(round(2 * preferred) / 2) and low <= mean <= high


def test_soft_labels_that_contradict_the_order_are_refused(tmp_path):
    path = tmp_path / "pairs.jsonl"
    values = (0.8, 0.5, None, "B", 1, 0.3)
    path.write_text(
        "".join(json.dumps({"prompt": "p", "chosen": "a", "rejected": "b", "preference": v}) + "\n" for v in values)
    )
    rankings, _ = readers.read_rankings(str(path), counts=errors.DropCount(max_dropped=0.0))
    assert [comparisons.soft_label(each) for each in rankings[:5]] == [0.8, 0.5, None, None, None]
    with pytest.raises(errors.DataError, match=r"pairs.jsonl.*'preference' is 0.3.*exchange the answers"):
        comparisons.soft_label(rankings[5])


def test_policies_are_evaluated_on_both_kinds_of_prompts():
    asked = instructgpt_settings.preset("smoke")
    asked = dataclasses.replace(
        asked,
        net=dataclasses.replace(asked.net, layers=1, width=32, mlp=64, heads=2),
        pretrain=dataclasses.replace(asked.pretrain, documents=400),
        sft=dataclasses.replace(asked.sft, demonstrations=16),
        evaluation=dataclasses.replace(asked.evaluation, prompts=8, transcripts=2),
    )
    silent: Any = mock.MagicMock()
    job = jobs.make_job(asked, tasks.make_task(asked), model=None, checkpoints=silent, log=silent, progress=silent)
    start = jax.jit(lambda key: lm.init(key, cfg=job.cfg))(jax.random.key(0))
    reward = lm.with_head(jax.random.key(1), start, job.cfg)
    policies: Any = dict.fromkeys(harm_evaluation.POLICIES, start)
    results = harm_evaluation.evaluate(job, policies, reward, red_team_share=0.5)
    for row in results["policies"].values():
        assert {"harmlessness", "helpfulness", "reward", "diversity", "self_bleu"} <= set(row)
    assert results["policies"]["rl_cai"]["kl"][0] == pytest.approx(0, abs=1e-4)
    assert results["diversity_pairs"] > 1 and len(results["transcripts"]) == 2


def smoke(out):
    constitutional.main(["--preset", "smoke", "--out", str(out)])
    return json.loads((out / "results.json").read_text())


@pytest.mark.slow
def test_a_smoke_run_is_complete_and_resumes_in_the_same_bits(tmp_path):
    results = smoke(tmp_path / "run")
    assert results["changes"]["rl_cai − helpful"]["harmlessness"][1] > 0
    assert len(results["revisions"]["steps"]) == 5 and results["headlines"]
    for name in ("helpful", "sl_cai", "rl_cai", "preference_model"):
        lm.load(tmp_path / "run" / name)
    (tmp_path / "run" / "results.json").unlink()
    before = (tmp_path / "run" / "rl_cai" / "model.safetensors").read_bytes()
    constitutional.main(["--resume", str(tmp_path / "run")])
    again = json.loads((tmp_path / "run" / "results.json").read_text())
    assert (tmp_path / "run" / "rl_cai" / "model.safetensors").read_bytes() == before
    changing = {"seconds", "peak_rss_mb", "programs", "incidents"}
    assert {k: v for k, v in again.items() if k not in changing} == {
        k: v for k, v in results.items() if k not in changing
    }


def test_the_help_explains_both_forms(capsys):
    for arguments in ([], OWN):
        with pytest.raises(SystemExit):
            constitutional.main([*arguments, "--help"])
        shown = capsys.readouterr().out
        assert "Constitutional AI" in shown
        assert ("--revision.rounds" in shown) == (not arguments) and ("--few-shot" in shown) == bool(arguments)
    assert own_settings.is_own(OWN) and not own_settings.is_own(OWN[:2])
