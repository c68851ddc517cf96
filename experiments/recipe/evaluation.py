"""Evaluates policies on held-out prompts for results.json."""

from __future__ import annotations

import dataclasses
import math
from functools import partial
from typing import Any

import jax
import numpy as np
from launch import device_mesh, host_agreement

from recipe import policy_sampling, reward_diagnosis
from recipe.jobs import Job
from recipe.policy_sampling import Answers
from rlhf_jax import diagnostics, lm, parallel, types
from rlhf_jax.simulation import corpus, labelers

TIE = 1e-5
"""Maximum difference in gold utility that counts as a tie."""
POLICIES = ("base", "sft", "sft_mix", "ppo", "ppo_ptx")


@dataclasses.dataclass(frozen=True)
class Measured:
    """A policy's answers to held-out prompts and the metrics computed from them."""

    answers: Answers
    numbers: dict[str, Any]


def evaluate(
    job: Job, policies: dict[str, types.Params], reward: types.Params, *, labeler_temperature: float | None = None
) -> dict[str, Any]:
    """Evaluates all policies on the same held-out prompts and returns the entries for results.json."""
    settings, prompts = job.settings.evaluation, job.task.eval_prompts
    job.progress.start("evaluate", len(policies) + 2)
    probe = _make_probe(job)
    reference = policies["sft_mix"]
    key = job.key("evaluate")
    measured: dict[str, Measured] = {}
    sampler = partial(job.sampler, temperature=settings.temperature)
    for number, (name, policy) in enumerate(policies.items()):
        answers = sampler(policy, reference, reward, prompts, jax.random.fold_in(key, number))
        measured[name] = Measured(answers, _numbers(job, answers) | probe(policy))
        job.progress.update("evaluate", number + 1, len(policies) + 2)
    again = sampler(policies["sft"], reference, reward, prompts, jax.random.fold_in(key, 100))
    best, curve = _best_of_n(job, policies["sft_mix"], reward, jax.random.fold_in(key, 101))
    measured["best_of_n"] = best
    job.progress.update("evaluate", len(policies) + 1, len(policies) + 2)

    results: dict[str, Any] = {"policies": {}, "transcripts": _transcripts(job, measured)}
    for name, each in measured.items():
        n = len(each.answers.lengths_B)  # best-of-n is evaluated on fewer prompts
        baseline = _first(measured["sft"].answers, n)
        results["policies"][name] = _win_rates(job, each.answers, baseline, labeler_temperature) | each.numbers
    if job.task.world is not None:
        results["null_check"] = list(
            diagnostics.win_rate(again.gold.total, measured["sft"].answers.gold.total, tie_tolerance=TIE)
        )
        results["best_possible_gold"] = 1.0
        for name in measured:
            numbers = results["policies"][name]
            floor = float(np.mean(_first(measured["sft"].answers, len(measured[name].answers.lengths_B)).gold.total))
            numbers["gap_closed"] = (numbers["gold"] - floor) / (1.0 - floor)
        results["goodhart"] = {
            name: reward_diagnosis.goodhart(
                _first(measured["sft_mix"].answers, len(each.answers.lengths_B)), each.answers
            )
            for name, each in measured.items()
            if name not in ("base", "sft", "sft_mix")
        }
    results["best_of_n_curve"] = curve
    results["best_of"] = settings.best_of
    job.progress.finish("evaluate")
    return results


def _first(answers: Answers, n: int) -> Answers:
    return jax.tree.map(lambda x: x[:n], answers)


def _numbers(job: Job, answers: Answers) -> dict[str, Any]:
    """Returns the metrics of a policy that require no baseline."""
    P = job.task.prompt_width
    responses = [row[P:][mask].tolist() for row, mask in zip(answers.tokens_BL, answers.response_mask_BT)]
    numbers: dict[str, Any] = {
        "reward": float(np.mean(answers.scores_B)),
        "kl": float(np.mean(answers.kl_B)),
        "length": float(np.mean(answers.lengths_B)),
        "stopped": float(np.mean(answers.stopped_B)),
        # The share of distinct bigrams falls with the number of answers, so it uses as many as best-of-n has.
        "diversity": float(diagnostics.distinct_n(responses[: job.settings.evaluation.best_of_prompts], n=2)),
    }
    if answers.unknown_B is not None:
        numbers["unknown_words"] = float(np.mean(answers.unknown_B))
    utility = answers.gold
    if utility is not None:
        stated, harmful = utility.stated > 0, utility.harmful_request
        categories = np.asarray(job.task.eval_prompts.categories[: len(responses)])
        by_category = {
            str(name): list(diagnostics.mean_interval(utility.total[categories == name]))
            for name in dict.fromkeys(categories)
            if (categories == name).sum() > 1
        }
        numbers |= {
            "gold": float(np.mean(utility.total)),
            "gold_helpful": float(np.mean(utility.helpful)),
            "gold_harmless": float(np.mean(utility.harmless)),
            "gold_by_category": by_category,
            "truthful_rate": _share((utility.false == 0) & stated, stated),
            "harm_rate": _share(utility.harm, harmful),
            "refusal_rate": _share(utility.refused & ~harmful, ~harmful),
            "polite_words": float(np.mean(utility.polite_words)),
        }
    return numbers


def _share(part: Any, whole: Any) -> float | None:
    return float(part.sum() / whole.sum()) if whole.sum() else None


def _win_rates(job: Job, answers: Answers, baseline: Answers, labeler_temperature: float | None) -> dict[str, Any]:
    """Returns win rates against ``baseline`` by gold utility, training labelers and held-out labelers.

    ``answers`` and ``baseline`` answer the same prompts. A tie counts as one half. The labelers choose with the noise
    of ``labeler_temperature``, with which they also ranked the comparisons.
    """
    world = job.task.world
    if world is None:
        return {}
    outcomes = diagnostics.win_outcomes(answers.gold.total, baseline.gold.total, tie_tolerance=TIE)
    features, baseline_features = (labelers.features(each.gold) for each in (answers, baseline))

    def by(pool: labelers.Pool) -> list[float]:
        if labeler_temperature is not None:
            pool = pool.replace(temperature=np.float32(labeler_temperature))  # type: ignore[attr-defined]
        share = np.asarray(labelers.choice_share(pool, features, baseline_features), np.float64)
        return list(diagnostics.mean_interval(share))

    return {
        "gold_win_rate_vs_sft": list(diagnostics.outcome_rate(outcomes)),
        "gold_strict_wins_vs_sft": float(np.mean(outcomes == 1)),
        "length_controlled_win_rate_vs_sft": _length_controlled(outcomes, answers.lengths_B, baseline.lengths_B),
        "labeler_win_rate_vs_sft": by(world.pool),
        "heldout_win_rate_vs_sft": by(world.heldout_pool),
    }


def _length_controlled(outcomes: np.ndarray, lengths_B: np.ndarray, baseline_B: np.ndarray) -> list[float] | None:
    """Returns the length-controlled win rate; None if all lengths differ from the baseline's by the same factor."""
    try:
        return list(
            diagnostics.length_controlled_win_rate(outcomes, np.maximum(lengths_B, 1), np.maximum(baseline_B, 1))
        )
    except ValueError:
        return None


def _make_probe(job: Job) -> Any:
    """Returns a function that measures what a policy retains from pretraining: loss on text and skill accuracy."""
    task, cfg = job.task, job.cfg

    def nll(params: Any, tokens_BL: Any, mask_BL: Any) -> jax.Array:
        return -lm.token_logprobs(params, tokens_BL, cfg=cfg, mask_BL=mask_BL)[:, 1:].mean()

    def solved(params: Any, tokens_BL: Any, mask_BL: Any, loss_mask_BL: Any) -> jax.Array:
        right_BL = lm.greedy_matches(params, tokens_BL, cfg=cfg, mask_BL=mask_BL)
        return (right_BL | ~loss_mask_BL).all(axis=1)

    held_BL = task.pretraining_held_out_BL
    text = device_mesh.put_rows(job.mesh, held_BL, np.ones(held_BL.shape, bool))
    skill_rows = () if task.world is None else device_mesh.put_rows(job.mesh, *task.world.skill_rows)
    loss, right = (
        parallel.JitStep(each, donate_argnums=(), mesh=job.mesh, batch_args=(), replicated_args=())
        for each in (nll, solved)
    )

    def probe(params: types.Params) -> dict[str, Any]:
        numbers: dict[str, Any] = {"pretraining_loss": float(loss(params, *text))}
        if task.world is not None:
            right_B = host_agreement.to_numpy(right(params, *skill_rows))
            numbers["skill_accuracy"] = float(right_B.mean())
            numbers["skills"] = {s: float(right_B[i :: len(corpus.SKILLS)].mean()) for i, s in enumerate(corpus.SKILLS)}
        return numbers

    return probe


def _best_of_n(job: Job, policy: types.Params, reward: types.Params, rng: jax.Array) -> tuple[Measured, list[dict]]:
    """Returns the results of best-of-n by the reward model, and the mean score and gold utility for each n."""
    settings = job.settings.evaluation
    n, N = settings.best_of, min(settings.best_of_prompts, len(job.task.eval_prompts))
    prompts = job.task.eval_prompts.take(N)
    pool = job.sampler(policy, policy, reward, prompts.at(np.repeat(np.arange(N), n)), rng)
    pick = np.arange(N) * n + pool.scores_B.reshape(N, n).argmax(axis=1)
    best = jax.tree.map(lambda x: x[pick], pool)
    sizes = [2**i for i in range(int(math.log2(n)) + 1)]
    kl = dict(zip([*sizes, n], policy_sampling.best_of_kl(pool, n, [*sizes, n])))
    numbers = _numbers(job, best) | {"kl": kl[n], "kl_bound": float(diagnostics.best_of_n_kl(n)), "n": n, "prompts": N}

    def mean(values: Any) -> np.ndarray:
        pairs = zip(pool.scores_B.reshape(N, n), values.reshape(N, n))
        return np.mean([diagnostics.best_of_n_mean(proxy, value, sizes) for proxy, value in pairs], axis=0)

    columns = {"reward": mean(pool.scores_B)}
    if pool.gold is not None:
        columns["gold"] = mean(pool.gold.total)
    curve = [
        {"n": size, "kl": kl[size], "kl_bound": float(diagnostics.best_of_n_kl(size))}
        | {k: float(v[i]) for k, v in columns.items()}
        for i, size in enumerate(sizes)
    ]
    return Measured(best, numbers), curve


def _transcripts(job: Job, measured: dict[str, Measured]) -> list[dict[str, Any]]:
    """Returns the policies' answers to a few prompts, which are chosen from the categories in rotation."""
    prompts = job.task.eval_prompts
    seen: dict[str, int] = {}
    turn = [seen.setdefault(c, 0) or 0 for c in prompts.categories]
    for i, category in enumerate(prompts.categories):
        turn[i], seen[category] = seen[category], seen[category] + 1
    order = sorted(range(len(prompts)), key=lambda i: (turn[i], i))[: job.settings.evaluation.transcripts]
    shown = [name for name in measured if name not in ("sft_mix", "best_of_n")]
    rows = []
    for i in order:
        row: dict[str, Any] = {"prompt": prompts.texts[i], "answers": {}}
        if prompts.categories[i]:
            row["category"] = prompts.categories[i]
        for name in shown:
            answers = measured[name].answers
            ids = answers.tokens_BL[i, job.task.prompt_width :][answers.response_mask_BT[i]]
            row["answers"][name] = job.task.tokenizer.decode(ids, skip_special_tokens=True)
        if measured["sft"].answers.gold is not None:
            row["gold"] = {name: float(measured[name].answers.gold.total[i]) for name in shown}
        rows.append(row)
    return rows
