"""Sweeps and comparisons: training in one program, compilation, results, figures, and errors."""

import dataclasses
import functools
import io
import json
import math
import pathlib
import subprocess
import sys
from typing import Any

import compare
import dpo
import instructgpt
import jax
import numpy as np
import pytest
import sweep
from launch import published_settings, run_folder, setting_checks, settings
from recipe import comparison_data, evaluation, jobs, policy_sampling, precompile, rl_methods, tasks
from rich import console
from sweeps import frontier_plot, run_grid

from rlhf_jax import checkpoint, diagnostics, kl, lm, metrics, parallel, types

ROOT = pathlib.Path(__file__).parents[2]
PUBLISHED = json.loads((ROOT / "tests" / "cases" / "published_numbers.json").read_text())


class Silent:
    """A progress display that prints nothing."""

    def __getattr__(self, name):
        return lambda *_, **__: None


GRPO = ("--ppo.method", "grpo", "--ppo.samples", "4")


def small(**ppo):
    preset = settings.preset("smoke")
    parts = {
        "net": dataclasses.replace(preset.net, layers=1, width=32, mlp=64, heads=2),
        "pretrain": dataclasses.replace(preset.pretrain, documents=400),
        "sft": dataclasses.replace(preset.sft, demonstrations=16),
        "ppo": dataclasses.replace(preset.ppo, **({"iterations": 2, "batch": 8} | ppo)),
        "evaluation": dataclasses.replace(preset.evaluation, prompts=8),
    }
    return dataclasses.replace(preset, **parts)


def job_in(folder, asked):
    return jobs.make_job(
        asked,
        tasks.make_task(asked),
        model=None,
        checkpoints=lambda stage: checkpoint.Checkpoints(folder / "checkpoints" / stage),
        log=metrics.MetricLog(folder),
        progress=Silent(),
    )


def shared_by(job):
    params = jax.jit(lambda key: lm.init(key, cfg=job.cfg))(jax.random.key(0))
    return run_grid.StartModels(params, params, lm.with_head(jax.random.key(1), params, job.cfg))


def rows_of(folder, stage):
    found = [row for row in metrics.read(folder) if row["stage"] == stage]
    return [{name: value for name, value in row.items() if name not in ("stage", "step")} for row in found]


def test_answers_are_sampled_and_scored_at_the_temperature_of_the_policy(tmp_path):
    asked = small(temperature=0.5)
    job = job_in(
        tmp_path, dataclasses.replace(asked, evaluation=dataclasses.replace(asked.evaluation, temperature=0.01))
    )
    shared, prompts, P = shared_by(job), job.task.eval_prompts.take(8), job.task.prompt_width
    other = jax.tree.map(lambda x: 1.1 * x, shared.start)
    answers = job.sampler(shared.start, other, shared.reward, prompts, jax.random.key(3))

    def logprobs(params):
        score = jax.jit(functools.partial(lm.token_logprobs, cfg=job.cfg, prompt_width=P, temperature=0.5))
        values_BT = score(params, answers.tokens_BL, mask_BL=answers.mask_BL)
        return np.sum(np.where(answers.response_mask_BT, values_BT, 0.0), axis=1)

    np.testing.assert_allclose(answers.kl_B, logprobs(shared.start) - logprobs(other), rtol=1e-3, atol=1e-3)
    hot = job.sampler(shared.start, None, None, prompts, jax.random.key(3), temperature=1.0)
    assert not np.array_equal(hot.tokens_BL, answers.tokens_BL)
    # The evaluation of this job is near-greedy, so that the key hardly matters.
    greedy = [run_grid.sample_answers(job, shared, prompts, shared.start, seed=seed).tokens_BL for seed in (0, 1)]
    assert np.mean(greedy[0] == greedy[1]) > 0.9
    assert job.sampler.traces == 2, "all temperatures share the compiled programs"


@pytest.mark.slow  # the fast version is the sweep of test_ppo.py
def test_one_program_reproduces_the_results_of_separate_runs(tmp_path):
    job, together = job_in(tmp_path / "a", small()), job_in(tmp_path / "b", small())
    shared = shared_by(job)
    wanted = [
        run_grid.Cell(f"kl{coef}-seed{seed}", dataclasses.replace(job.settings.ppo, kl_coef=coef), seed)
        for coef, seed in ((0.0, 0), (0.5, 0), (0.5, 1))
    ]
    alone = [run_grid.train(job, shared, cell, step=job.ppo_step) for cell in wanted]
    assert job.ppo_step.traces == 1, "one compiled program serves every seed and coefficient"
    for mine, other, cell in zip(run_grid.train_together(together, shared, wanted), alone, wanted, strict=True):
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), mine, other)
        for a, b in zip(rows_of(tmp_path / "a", cell.name), rows_of(tmp_path / "b", cell.name), strict=True):
            assert a.keys() == b.keys()
            for name in ("kl", "reward", "policy_loss", "value_loss", "kl_coef"):
                assert a[name] == pytest.approx(b[name], rel=1e-3, abs=1e-4), name
    differ = jax.tree.map(lambda a, b: float(np.abs(a - b).max()), alone[1], alone[2])
    assert max(jax.tree.leaves(differ)) > 1e-5, "seeds are different runs"
    # A finished run is restored instead of trained again.
    again = run_grid.train(job, shared, wanted[0], step=None)
    jax.tree.map(np.testing.assert_array_equal, again, alone[0])


@pytest.mark.parametrize(
    "how",
    [
        pytest.param(dict(method="rloo", samples=2), marks=pytest.mark.slow),
        pytest.param(dict(method="grpo", samples=4), marks=pytest.mark.slow),
        pytest.param(dict(method="dr-grpo", samples=4), marks=pytest.mark.slow),
        pytest.param(dict(method="reinforce", micro_batches=2), marks=pytest.mark.slow),
        pytest.param(dict(method="reinforce-pp", epochs=2), marks=pytest.mark.slow),
        pytest.param(dict(critic="policy", iterations=2), marks=pytest.mark.slow),
        dict(critic="zero-head", value_coef=0.1, epochs=2),
        pytest.param(
            dict(reward_clip=1.0, normalise_values=True, entropy_coef=0.01, reference_ema=0.9, whiten_rewards=True),
            marks=pytest.mark.slow,
        ),
        pytest.param(
            dict(adam_tf1=True, schedule="linear", kl_target=6.0, missing_stop="subtract"), marks=pytest.mark.slow
        ),
    ],
    ids=lambda how: how.get("method", "ppo") + "-" + str(len(how)),
)
@pytest.mark.slow
def test_every_rl_method_and_option_trains(tmp_path, how):
    asked = small(**how)
    setting_checks.check(asked)
    job = job_in(tmp_path, asked)
    shared = shared_by(job)
    shared = shared._replace(heldout=shared.reward if asked.ppo.critic == "zero-head" else None)
    policy = run_grid.train(job, shared, run_grid.Cell("run", asked.ppo, 0, ptx_coef=0.5))
    rows = rows_of(tmp_path, "run")
    assert len(rows) == 2 and all(math.isfinite(value) for value in rows[-1].values())
    assert [row.get("heldout_reward") for row in rows] == [row["reward"] if shared.heldout else None for row in rows]
    assert ("value_loss" in rows[0]) == (asked.ppo.method == "ppo")
    assert rows[0]["kl"] == pytest.approx(0.0, abs=1e-6) and rows[0]["first_ratio_error"] < 1e-5
    moved = jax.tree.map(lambda a, b: float(np.abs(a - b).max()), policy, shared.start)
    assert max(jax.tree.leaves(moved)) > 1e-6


@pytest.mark.parametrize(
    ("saved", "expected"),
    [
        ({}, {"supervised", "reward_model", "one", "other"}),
        ({"sft_mix": 4}, {"supervised", "reward_model", "one", "other"}),
        ({"reward_model": 3}, {"reward_model", "one", "other"}),
        ({"a": 1}, {"one", "other"}),
        ({"a": 2, "b": 1}, {"one", "other"}),
        ({"a": 2, "b": 2}, {"other"}),
        ({"a": 2, "b": 2, "c": 2}, set()),
    ],
)
def test_only_the_steps_of_unfinished_stages_are_compiled_ahead(tmp_path, monkeypatch, saved, expected):
    """Stages a and b share a program; c has a separate one."""
    job = job_in(tmp_path, small())
    for stage, step in saved.items():
        with job.checkpoints(stage) as checkpoints:
            checkpoints.save(step, {"x": np.zeros(1)})
    other = run_grid.with_settings(job, dataclasses.replace(job.settings.ppo, samples=2, method="rloo"))
    steps = {job.supervised_step: "supervised", job.reward_step: "reward_model"}
    steps |= {job.ppo_step: "one", other.ppo_step: "other"}
    compiled = []
    monkeypatch.setattr(parallel.JitStep, "compile_ahead", lambda step, *_: compiled.append(steps.get(step)))
    with precompile.in_background(job, {"a": job, "b": job, "c": other}):
        assert set(compiled) - {None} == expected and len(compiled) - compiled.count(None) == len(expected)
    assert compiled.count(None) == 3, "every run samples, measures and scores"


def test_the_critic_starts_from_its_setting(tmp_path):
    job = job_in(tmp_path, small())
    shared = shared_by(job)

    def critic(how) -> Any:
        own = run_grid.with_settings(job, dataclasses.replace(job.settings.ppo, critic=how))
        return own.new_policy(shared.start, shared.reward).params["critic"]

    jax.tree.map(np.testing.assert_array_equal, critic("reward"), shared.reward)
    mine = critic("policy")
    jax.tree.map(np.testing.assert_array_equal, lm.without_head(mine), shared.start)
    assert float(np.abs(mine["head"]["kernel_D"] - shared.reward["head"]["kernel_D"]).max()) > 0.01
    zero = critic("zero-head")
    assert set(zero) == {"head"} and not np.any(zero["head"]["kernel_D"]) and float(zero["head"]["gain"]) == 1


def test_equal_answers_are_found_and_agreement_counts_untied_pairs():
    tokens = np.array([[[1, 2, -1], [3, 3, 3], [1, 2, -1], [1, 2, -1]]])
    where = np.array([[True, True, True, False]])
    np.testing.assert_array_equal(comparison_data._first_equal(tokens, where), [[0, 1, 0, 3]])
    # Both labelers order (0, 1) and (0, 2) equally, but not (1, 2); the fourth answer does not exist.
    mean, low, high = comparison_data._agreement(
        np.array([[1, 2, 3, 0]]), np.array([[1, 3, 2, 0]]), where, np.array([0])
    )
    assert mean == pytest.approx(2 / 3) and low <= mean <= high
    mean, _, _ = comparison_data._agreement(np.array([[1, 2, 2, 0]]), np.array([[1, 3, 2, 0]]), where, np.array([0]))
    assert mean == 1.0, "a tie of either labeler does not count"


def test_the_heldout_reward_model_has_separate_comparisons(tmp_path, monkeypatch):
    n, width = 9, 4
    tokens_BKL = np.broadcast_to(np.arange(n)[:, None, None], (n, 3, width))
    where_BK = np.arange(3) < np.array([2, 3, 2, 3, 2, 3, 2, 3, 2])[:, None]
    every = types.Comparisons(tokens_BKL, tokens_BKL >= 0, np.where(where_BK, np.arange(3) + 1, 0), where_BK)  # type: ignore[arg-type]
    monkeypatch.setattr(comparison_data, "collect", lambda job, policies, stage: (every, every, {"fact": 1}))
    monkeypatch.setattr(tasks.Task, "asked", lambda task, batch: batch.tokens_BKL[:, 0, 0] // 3)
    asked = small()
    (whole,), _, facts = comparison_data.load_or_collect(job_in(tmp_path / "a", asked), [])
    assert whole is every and facts == {"fact": 1, "training_prompts": 9, "training_answers": 22}
    asked = dataclasses.replace(asked, reward_model=dataclasses.replace(asked.reward_model, heldout=True))
    parts, held_out, facts = comparison_data.load_or_collect(job_in(tmp_path / "b", asked), [])
    assert held_out is every, "the validation comparisons are not divided"
    seen = [set(part.tokens_BKL[:, 0, 0].tolist()) for part in parts]
    assert sorted(map(len, seen)) == [3, 6] and not seen[0] & seen[1]
    assert not {i // 3 for i in seen[0]} & {i // 3 for i in seen[1]}, "what a prompt asks is not divided"
    assert facts["training_prompts"] == len(seen[0]) and facts["training_answers"] == parts[0].where_BK.sum()


def test_a_resumed_run_reads_the_comparisons_that_were_collected(tmp_path):
    def job(**changes):
        made = job_in(tmp_path, small())
        return dataclasses.replace(made, note=lambda stage, text: notes.append((stage, text)), **changes)

    def refuse(*_, **__):
        raise AssertionError("sampled")

    notes: list[tuple[str, str]] = []
    policy = shared_by(job()).start
    first = comparison_data.collect(job(), [policy])
    again = comparison_data.collect(job(sampler=refuse), [policy])
    jax.tree.map(np.testing.assert_array_equal, again, first)
    assert again[2] == first[2] and [x.dtype for x in jax.tree.leaves(again[:2])] == [
        x.dtype for x in jax.tree.leaves(first[:2])
    ]
    assert len(first[0].ranks_BK) == job().settings.comparisons.prompts
    with pytest.raises(AssertionError, match="sampled"):
        comparison_data.collect(job(sampler=refuse), [policy], stage="comparisons-shifted")
    # A damaged file costs the time of a collection, but not the run.
    for file in (tmp_path / "checkpoints" / "comparisons" / "step_000000001").rglob("*"):
        if file.is_file():
            file.write_bytes(b"")
    for made in (job(), job(sampler=refuse)):
        jax.tree.map(np.testing.assert_array_equal, comparison_data.collect(made, [policy])[:2], first[:2])
    ((stage, text),) = notes
    assert stage == "comparisons" and text.startswith("the comparisons are collected again, because there is no")


def test_gold_at_a_kl_is_interpolated_and_none_beyond_the_curve():
    kl = np.linspace(0.0, 4.0, 30) ** 2 / 4
    gold = 0.5 + 0.1 * np.sqrt(kl)
    assert compare.gold_at(kl, gold, at=1.0) == pytest.approx(0.6)
    assert compare.gold_at(kl, gold, at=2.25) == pytest.approx(0.65)
    assert compare.gold_at(kl, gold, at=9.0) is None
    noisy = gold + np.random.default_rng(0).normal(size=30) * 0.02
    assert compare.gold_at(kl, noisy, at=1.0) == pytest.approx(0.6, abs=0.02)
    # Curves are concave in √KL; a local line would be 0.01 too low.
    few = np.array([0.0, 0.1, 0.5, 0.9, 1.4, 2.2])
    assert compare.gold_at(few, 0.78 + 0.12 * np.sqrt(few) - 0.04 * few, at=1.0) == pytest.approx(0.86)
    assert compare.gold_at(few[:2], few[:2], at=0.1) == pytest.approx(0.1)


def test_the_gold_utility_of_best_of_n_at_a_kl_is_unbiased():
    """The answers are right with probabilities of 0.5 to 1, and the proxy is noisy."""
    rng = np.random.default_rng(0)
    gold = np.where(rng.random((2000, 64)) < rng.uniform(0.5, 1.0, (2000, 1)), 1.0, 0.5)
    proxy, every = gold + 0.25 * rng.normal(size=gold.shape), range(1, 33)
    sizes = list(compare.SIZES)
    mean = {n: g for n, g in zip(every, diagnostics.best_of_n_mean(proxy, gold, every).mean(axis=0))}
    curve = diagnostics.best_of_n_kl(sizes), np.array([mean[n] for n in sizes])
    chosen = compare.parse(["--methods", "best-of-n", "--at", "0.25", "0.5", "1.0", "1.5"])
    (found,) = compare.summarise(chosen, {"best-of-n": [curve, curve]})["methods"]
    root = np.sqrt(diagnostics.best_of_n_kl(list(every)))
    true = np.interp(np.sqrt(chosen.at), root, list(mean.values()))
    np.testing.assert_allclose([point[0] for point in found["gold"]], true, atol=3e-4)


def test_all_trained_methods_have_equal_answers_and_steps():
    asked = compare.parse([])
    used = {method: compare.costs(asked, method) for method in compare.METHODS}
    trained = [each for method, each in used.items() if method != "best-of-n"]
    assert {each["answers"] for each in trained} == {18 * 256} and {each["steps"] for each in trained} == {72}
    prompts = {method: each["prompts"] for method, each in used.items()}
    assert prompts["ppo"] == prompts["ppo-ptx"] == 4608 and prompts["rloo"] == prompts["expert-iteration"] == 1152
    assert used["best-of-n"]["answers"] == 0 and used["best-of-n"]["samples_per_answer"] == "1–16"
    assert used["ppo-ptx"]["text_rows"] == 4608 and used["ppo"]["text_rows"] == 0


def test_curves_are_held_out_measurements_that_start_at_the_sft_model():
    rows = [{"stage": "a", "kl": 9.0, "gold": 0.1}, {"stage": "b", "kl": 8.0, "eval_kl": 7.0, "eval_gold": 0.7}]
    rows.append({"stage": "a", "kl": 9.0, "gold": 0.2, "eval_kl": 1.0, "eval_gold": 0.8})
    kl, gold = compare._from_start(compare._logged_curve(rows, "a"), 0.75)
    assert kl.tolist() == [0.0, 1.0] and gold.tolist() == [0.75, 0.8]


@pytest.mark.slow
def test_runs_are_evaluated_on_held_out_prompts_during_training(tmp_path):
    asked = small(iterations=3, ema=0.0)
    job = job_in(tmp_path, asked)
    shared = shared_by(job)
    policy = run_grid.train(job, shared, run_grid.Cell("run", asked.ppo, 5), times=2)
    rows = rows_of(tmp_path, "run")
    assert ["eval_kl" in row for row in rows] == [False, True, True]
    answers = run_grid.sample_answers(job, shared, job.task.eval_prompts, policy, seed=5)
    means = run_grid.answer_means(answers)
    assert {name: rows[-1][log] for name, log in run_grid.MEASURED.items()} == pytest.approx(
        {name: means[name] for name in run_grid.MEASURED}, rel=1e-5, abs=1e-6
    )


@pytest.mark.parametrize("temperature", [None, 0.5])
def test_the_diversity_of_a_policy_is_compared_with_that_of_the_initial_model(tmp_path, temperature):
    asked = small()
    settings = dataclasses.replace(asked, evaluation=dataclasses.replace(asked.evaluation, temperature=temperature))
    job = job_in(tmp_path, settings)
    shared, prompts, base = shared_by(job), job.task.eval_prompts, temperature or 1.0
    sharp = shared.start | {"final_norm": jax.tree.map(lambda x: 1.5 * x, shared.start["final_norm"])}
    policies = {"sft_mix": shared.start, "ppo": sharp}
    answers = {
        name: job.sampler(params, shared.start, shared.reward, prompts, jax.random.key(0), temperature=base)
        for name, params in policies.items()
    }
    found = evaluation.diversity_of_policies(
        job,
        policies,
        answers,
        prompts,
        shared.reward,
        initial="sft_mix",
        matched=tuple(policies),
        rng=jax.random.key(0),
    )
    for name, params in policies.items():
        rows: Any = answers[name]
        logits = lm.logits(
            params, lm.forward(params, rows.tokens_BL, cfg=job.cfg, mask_BL=rows.mask_BL).hidden_BLD, cfg=job.cfg
        )
        logprobs = jax.nn.log_softmax(logits.astype(np.float32) / base)
        entropy_BL = -np.sum(np.exp(logprobs) * logprobs, axis=-1)
        P = job.task.prompt_width
        entropy = np.asarray(entropy_BL)[:, P - 1 : -1][rows.response_mask_BT].mean()
        assert found[name]["entropy"][0] == pytest.approx(float(entropy), rel=1e-4)
    assert found["sft_mix"]["entropy_ratio"] == pytest.approx([1, 1, 1])
    narrow, wide = (found[name]["entropy"][0] for name in ("ppo", "sft_mix"))
    assert found["ppo"]["entropy_ratio"][0] == pytest.approx(narrow / wide)
    mean, low, high = found["ppo"]["matched_temperature"]
    assert narrow < wide and low < mean < high
    # The policy's logits are 1.5 times those of the initial model, and the random keys are equal.
    assert mean == pytest.approx(1 / 1.5, abs=0.05)
    assert found["sft_mix"]["matched_temperature"] == pytest.approx([1, 1, 1], abs=1e-3)
    few = {name: jax.tree.map(lambda x: x[:1], each) for name, each in answers.items()}
    single = evaluation.diversity_of_policies(
        job, policies, few, prompts.take(1), shared.reward, initial="sft_mix", matched=("ppo",), rng=jax.random.key(0)
    )
    mean, *bounds = single["ppo"]["matched_temperature"]
    assert 0.1 <= mean <= 2 and bounds == [0, math.inf], "a single cluster has no interval"
    assert "matched_temperature" not in single["sft_mix"]


def test_the_initial_model_is_sampled_until_all_targets_are_between_two_temperatures():
    called = []

    def match(*ratio):
        called.clear()
        return evaluation.match_temperatures({"ppo": ratio}, lambda factor: called.append(factor) or factor)["ppo"]

    cases: list[Any] = [
        ((0.7, 0.65, 0.75), [0.7, 0.65, 0.75], [0.8, 0.6]),
        ((0.95, 0.9, 1.1), [0.95, 0.9, 1.1], [0.8, 1.2]),
        ((1.5, 1.4, 5.0), [1.5, 1.4, math.inf], [1.2, 1.6, 2.0]),
        ((3.0, 2.5, 4.0), [2.0, 2.0, math.inf], [1.2, 1.6, 2.0]),
        ((0.9, 0.0, math.inf), [0.9, 0.0, math.inf], [0.8]),
        ((0.0, 0.0, math.inf), [0.1, 0.0, math.inf], [0.8, 0.6, 0.4, 0.2, 0.1]),
        ((0.5, 0.05, 0.6), [0.5, 0.0, 0.6], [0.8, 0.6, 0.4, 0.2, 0.1]),
    ]
    for ratio, expected, factors in cases:
        assert match(*ratio) == pytest.approx(expected, abs=2e-3) and called == factors
    assert math.isnan(match(math.nan, 0.0, math.inf)[0]) and not called


def test_a_temperature_beyond_the_range_is_noted(tmp_path, monkeypatch):
    job, notes = job_in(tmp_path, small()), []
    monkeypatch.setattr(evaluation, "match_temperatures", lambda *_: {"ppo": [2.0, 2.0, math.inf]})
    shared, prompts = shared_by(job), job.task.eval_prompts
    answers = run_grid.sample_answers(job, shared, prompts, shared.start, seed=0)
    evaluation.diversity_of_policies(
        dataclasses.replace(job, note=lambda stage, text: notes.append(text)),
        {"sft_mix": shared.start, "ppo": shared.start},
        {"sft_mix": answers, "ppo": answers},
        prompts,
        shared.reward,
        initial="sft_mix",
        matched=("ppo",),
        rng=jax.random.key(0),
    )
    assert len(notes) == 1 and "beyond 2" in notes[0]


@pytest.mark.parametrize("temperature", [None, 0.5])
def test_answers_at_another_temperature_are_not_compared(tmp_path, temperature):
    asked = small()
    asked = dataclasses.replace(asked, evaluation=dataclasses.replace(asked.evaluation, temperature=temperature))
    job = job_in(tmp_path, asked)
    shared = shared_by(job)
    answers = run_grid.sample_answers(job, shared, job.task.eval_prompts, shared.start, seed=0)
    measured = {name: evaluation.Measured(answers, {}) for name in ("sft_mix", "best_of_n")}
    pairs = evaluation._add_diversity(job, {"sft_mix": shared.start}, measured, shared.reward, jax.random.key(0))
    assert set(measured["sft_mix"].numbers) == {"diversity", "self_bleu", "entropy", "entropy_ratio"}
    assert set(measured["best_of_n"].numbers) == (set() if temperature else {"diversity", "self_bleu"})
    assert pairs == sum(max(int(n) - 1, 0) for n in answers.lengths_B)


def test_entropies_do_not_depend_on_the_chunk_and_models_share_the_program(tmp_path, monkeypatch):
    evaluation._entropy_step.cache_clear()
    first, second = (job_in(tmp_path / name, small()) for name in "ab")
    shared = shared_by(first)
    answers = run_grid.sample_answers(first, shared, first.task.eval_prompts, shared.start, seed=0)
    whole, again = (evaluation._entropies(job, shared.start, answers, 0.7) for job in (first, second))
    step = evaluation._entropy_step(first.cfg, first.task.prompt_width, None)
    assert step.traces == 1 and evaluation._entropy_step.cache_info().misses == 1
    np.testing.assert_array_equal(whole, again)
    monkeypatch.setattr(policy_sampling, "LONG_CHUNK", 3)
    np.testing.assert_allclose(evaluation._entropies(first, shared.start, answers, 0.7), whole, rtol=1e-4)


def test_policies_are_compared_at_equally_many_pairs_of_tokens(tmp_path):
    job = job_in(tmp_path, small())
    shared = shared_by(job)
    answers = run_grid.sample_answers(job, shared, job.task.eval_prompts, shared.start, seed=0)
    few = jax.tree.map(lambda x: x[:3], answers)
    P = job.task.prompt_width
    found, pairs = evaluation.diversity_of_answers({"few": few, "many": answers}, prompt_width=P)
    sets = [[row[P:][mask].tolist() for row, mask in zip(x.tokens_BL, x.response_mask_BT)] for x in (few, answers)]
    assert [each["diversity"] for each in found.values()] == diagnostics.equal_distinct_n(sets, n=2)
    assert found["many"]["self_bleu"] == diagnostics.self_bleu(sets[1])
    assert pairs == sum(max(len(row) - 1, 0) for row in sets[0])


def test_equal_answers_share_a_score_so_that_the_kl_of_best_of_n_is_lower(tmp_path):
    tokens = np.array([[1, 2, 9], [1, 2, 8], [3, 4, 5], [1, 1, 1], [1, 1, 2], [1, 1, 3]])
    mask = np.array([[True, True, False]] * 2 + [[True] * 3] * 4)
    scores = np.array([0.5, 0.50001, 0.7, 0.1, 0.2, 0.3], np.float32)
    none: Any = None
    answers = policy_sampling.Answers(tokens, mask, none, none, none, scores, none, none)
    pooled = policy_sampling.pooled_scores(answers, 3)
    assert pooled[0, 0] == pooled[0, 1] and pooled.shape == (2, 3)
    (kl,) = policy_sampling.best_of_kl(answers, 3, [2])
    assert kl < diagnostics.best_of_n_kl(2) and scores[1] == np.float32(0.50001)


@pytest.mark.parametrize(
    ("parse", "arguments", "message"),
    [
        (sweep.parse, ["--over", "ppo.kl-coef=0.1,-1"], "ppo.kl-coef is -1"),
        (
            sweep.parse,
            ["--over", "ppo.batch=1,2"],
            "--over ppo.batch=1,2: give NAME=VALUE,VALUE, where NAME is one of ppo.kl-coef",
        ),
        (sweep.parse, ["--over", "ppo.clip=a"], "not a list of numbers"),
        (sweep.parse, ["--over", "ppo.kl-coef=0.1,0.1"], "once"),
        (sweep.parse, ["--seeds", "0"], "seeds"),
        (sweep.parse, ["--ppo.method", "rloo"], "ppo.samples"),
        (sweep.parse, ["--ppo.method", "grpo", "--ppo.samples", "4", "--ppo.lambda_", "0.9"], "no critic"),
        (sweep.parse, ["--ppo.method", "rloo", "--ppo.samples", "4", "--ppo.critic", "zero-head"], "no critic"),
        (sweep.parse, ["--reward-model.heldout", "--reward-model.batch", "1201"], "half of --comparisons.prompts"),
        (sweep.parse, ["--ppo.samples", "3"], "ppo.samples"),
        (sweep.parse, [*GRPO, "--ppo.kl-target", "6"], "no KL in the reward; set --ppo.kl-loss-coef"),
        (instructgpt.parse, [*GRPO, "--ppo.kl-coef", "0.1"], "no KL in the reward; set --ppo.kl-loss-coef"),
        (instructgpt.parse, [*GRPO, "--ppo.discount", "0.9"], "ppo.discount"),
        (instructgpt.parse, ["--ppo.method", "reinforce", "--ppo.discount", "0.9"], "ppo.discount"),
        (instructgpt.parse, ["--ppo.kl-loss-coef", "0.1"], "penalised twice; --ppo.both-kl-terms"),
        (sweep.parse, ["--ppo.kl-loss-coef", "0.1"], "--ppo.kl-loss-coef is 0.1, .* has the coefficient 0.01, so the"),
        (sweep.parse, [*GRPO, "--ppo.kl-loss-coef", "0.1"], "ppo.kl-loss-coef has no effect in sweep.py"),
        (sweep.parse, ["--ppo.kl-loss-coef", "0.1"], "penalised twice"),
        (instructgpt.parse, ["--ppo.kl-gain", "0.2"], "--ppo.kl-gain has no effect without --ppo.kl-target"),
        (sweep.parse, ["--ppo.micro-batches", "7"], "ppo.micro-batches"),
        (sweep.parse, ["--ppo.kl-coef", "0.1"], "ppo.kl-coef has no effect in sweep.py"),
        (instructgpt.parse, ["--ppo.kl-coef", "-0.1"], "ppo.kl-coef"),
        (sweep.parse, ["--resume", "nowhere"], "nowhere"),
        (compare.parse, ["--data.path", "pairs.jsonl"], "gold utility, which only the built-in"),
        (compare.parse, ["--group", "1"], "group"),
        (compare.parse, ["--group", "3"], "divide"),
    ],
)
def test_errors_name_the_invalid_setting(parse, arguments, message):
    with pytest.raises(settings.SettingError, match=message):
        parse(arguments)


@pytest.mark.parametrize("name", ["instructgpt", "stiennon", "ziegler", "n-plus", "hh", "xu", "tutorial"])
def test_published_settings_are_in_range(name):
    asked = sweep.parse(["--published", name])
    assert asked.published == name and asked.ppo != settings.PPO()
    given = settings.preset("default", published=name, pretrained=True)
    setting_checks.check(given)


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_settings_have_the_published_numbers(name):
    """Against a list of the papers' numbers that was typed from the papers."""
    paper, numbers = published_settings.PAPERS[name], PUBLISHED[name]
    known = paper.reported | {
        rate: value for rate, value in paper.learning_rates.items() if rate not in paper.unreported
    }
    assert known == numbers
    assert not paper.reported.keys() & paper.chosen.keys()
    used = settings.preset("default", published=name, pretrained=True).ppo
    assert {field: getattr(used, field) for field in numbers} == numbers
    # No paper clips gradients, and an average or a warmup that a paper does not report is not used.
    assert used.max_grad_norm == numbers.get("max_grad_norm")
    assert used.ema == numbers.get("ema", 0.0)


def test_documented_table_of_published_settings_is_that_of_the_code():
    page = (ROOT / "docs" / "published.md").read_text(encoding="utf-8")
    assert published_settings.table(dataclasses.asdict(settings.PPO())) in page
    assert all(paper.source in page.replace("\n", " ") for paper in published_settings.PAPERS.values())


def test_a_sweep_of_grpo_varies_the_coefficient_of_its_loss():
    asked = sweep.parse([*GRPO, "--over", "ppo.kl-loss-coef=0.01,0.1", "--seeds", "1"])
    hypers = [rl_methods.hyper(cell.settings, 0, ptx_coef=0.0) for cell in sweep.cells_of(asked)]
    assert [float(each.kl_loss_coef) for each in hypers] == pytest.approx([0.01, 0.1])
    assert all(float(each.kl_coef) == 0 for each in hypers), "the logged coefficient is the one that is used"
    assert rl_methods.train_step_options(asked.ppo)["kl_loss"] is kl.k3


def test_grpo_has_its_kl_loss_by_default():
    asked = instructgpt.parse([*GRPO])
    assert float(rl_methods.hyper(asked.ppo, 0, ptx_coef=0.0).kl_loss_coef) == pytest.approx(0.04)
    plain = rl_methods.hyper(instructgpt.parse([]).ppo, 0, ptx_coef=0.0)
    assert float(plain.kl_loss_coef) == 0 and rl_methods.train_step_options(settings.PPO())["kl_loss"] is None


def test_unknown_paper_is_refused():
    with pytest.raises(settings.SettingError, match="--published"):
        settings.preset("default", published="nobody")


def test_figures_show_every_method_and_coefficient(tmp_path):
    run = {"kl": [0.0, 1.0, 2.0], "gold": [0.5, 0.6, 0.65]}
    methods = [
        {"method": name, "at": [1.0, 2.0], "gold": [[0.6, 0.55, 0.65], [None] * 3], "runs": [run]}
        | compare.costs(compare.parse([]), name)
        for name in compare.METHODS
    ]
    frontier_plot.write_methods(tmp_path / "c.html", methods, title="Methods", note="Seeds only.")
    table = io.StringIO()
    for each in (frontier_plot.methods_table(methods, [1.0, 2.0]), frontier_plot.costs_table(methods)):
        console.Console(file=table, width=80).print(each)
    for printed in (table.getvalue(), (tmp_path / "c.html").read_text()):
        assert all(words in printed for words in ("samples per answer", "4608", "1–16", "0.600 ±0.050", "1 nats"))
    text = (tmp_path / "c.html").read_text()
    assert (
        all(name in text for name in compare.METHODS)
        and "<svg" in text
        and "http" not in text.replace("www.w3.org", "")
    )
    points = [
        {"kl_coef": c, "ptx_coef": p, "kl": [1.0, 0.9, 1.1], "gold": [0.6, 0.5, 0.7], "reward": [1.0, None, None]}
        for c in (0.1, 1)
        for p in (0, 4)
    ]
    runs = [{"kl_coef": 0.1, "ptx_coef": 4, "kl": 1.0, "gold": 0.6, "reward": 1.0}]
    frontier_plot.write_sweep(tmp_path / "s.html", points, runs, swept=("kl_coef", "ptx_coef"), title="Sweep")
    page = (tmp_path / "s.html").read_text()
    assert page.count("<svg") == 2 and "ptx coef 4" in page


@pytest.mark.slow
@pytest.mark.parametrize("script", ["sweep.py", "compare.py"])
def test_the_command_runs_and_resumes_a_finished_run(script, tmp_path):
    more = (
        ["--over", "ppo.kl_coef=0.1,0.5", "ppo.ptx_coef=0,2", "--seeds", "2"]
        if script == "sweep.py"
        else ["--seeds", "2", "--rounds", "2"]
    )
    command = [sys.executable, str(ROOT / "experiments" / script), "--preset", "smoke"]
    done = subprocess.run([*command, "--out", tmp_path / "run", *more], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    name = script.replace("py", "json")
    first = json.loads((tmp_path / "run" / name).read_text())
    again = subprocess.run([*command[:2], "--resume", tmp_path / "run"], capture_output=True, text=True)
    assert again.returncode == 0, again.stderr[-3000:]
    second = json.loads((tmp_path / "run" / name).read_text())
    if script == "compare.py":
        assert all(len(run["kl"]) == len(run["gold"]) for each in first["methods"] for run in each["runs"])
        assert all(run["kl"][0] == pytest.approx(0.0, abs=1e-6) for each in first["methods"] for run in each["runs"])
        best = first["best_of_n"]
        assert all(kl <= bound + 0.01 for kl, bound in zip(best["kl"], best["kl_bound"], strict=True))
        assert first["sft_gold"][1] < first["sft_gold"][0] < first["sft_gold"][2]
    drop = {"seconds", "traces"}
    assert {k: v for k, v in first.items() if k not in drop} == {k: v for k, v in second.items() if k not in drop}


def test_a_sweep_uses_the_models_and_settings_of_another_run(tmp_path):
    made = dataclasses.replace(small(), seed=3, out=str(tmp_path / "old"))
    run_folder.create(tmp_path / "old", made)
    (tmp_path / "old" / "checkpoints" / "sft").mkdir(parents=True)
    (tmp_path / "old" / "checkpoints" / "sft" / "1").write_text("saved")
    (tmp_path / "old" / "checkpoints" / "ppo").mkdir()
    flags = ["--from-run", str(tmp_path / "old"), "--seeds", "1", "--ppo.batch", "16"]
    asked = sweep.parse(flags)
    assert asked.seed == 3 and asked.net == made.net and asked.out is None
    assert asked.ppo == dataclasses.replace(made.ppo, batch=16) and len(sweep.cells_of(asked)) == 4
    new = tmp_path / "new"
    (new / "checkpoints" / "sft.copying").mkdir(parents=True)
    for _ in range(2):  # a resumed sweep keeps what it has
        run_grid.copy_stages(tmp_path / "old", new)
        assert (new / "checkpoints" / "sft" / "1").read_text() == "saved"
        assert [path.name for path in (new / "checkpoints").iterdir()] == ["sft"], "later stages are not copied"
        (tmp_path / "old" / "checkpoints" / "sft" / "1").write_text("changed")
    for more, message in (
        (["--seed", "4"], "--seed has no effect with --from-run"),
        (["--net.layers", "2"], "--net.layers has no effect with --from-run"),
        (["--ppo.temperature", "0.5"], "--ppo.temperature has no effect with --from-run"),
    ):
        with pytest.raises(settings.SettingError, match=message):
            sweep.parse([*flags, *more])
    run_folder.create(tmp_path / "other", dataclasses.replace(dpo.parse([]), out=str(tmp_path / "other")))
    with pytest.raises(settings.SettingError, match="is a run of dpo"):
        sweep.parse(["--from-run", str(tmp_path / "other")])
    with pytest.raises(settings.SettingError, match=r"--from-run \S+ is not a run folder"):
        sweep.parse(["--from-run", str(tmp_path)])


@pytest.mark.slow
def test_all_combinations_share_one_compiled_step(tmp_path):
    over = ("ppo.kl_coef=0,0.5", "ppo.entropy_coef=0,0.1", "ppo.ptx_coef=0,2")
    asked = dataclasses.replace(sweep.parse(["--over", *over, "--seeds", "1"]), **vars(small()))
    cells = sweep.cells_of(asked)
    assert [cell.name for cell in cells[:2]] == [
        "kl_coef0-entropy_coef0-ptx_coef0-seed0",
        "kl_coef0-entropy_coef0-ptx_coef2-seed0",
    ]
    job = job_in(tmp_path, asked)
    step = run_grid.with_settings(job, run_grid.widest([cell.settings for cell in cells])).ppo_step
    shared = shared_by(job)
    policies = [run_grid.train(job, shared, cell, step=step) for cell in (cells[0], cells[1], cells[-1])]
    assert step.traces == 1
    alone = run_grid.train(job_in(tmp_path / "alone", asked), shared, cells[0])
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), policies[0], alone)
    logged = [rows_of(tmp_path, cell.name)[-1] for cell in (cells[0], cells[1])]
    assert logged[1]["ptx_loss"] > 0 and "ptx_loss" in logged[0]
