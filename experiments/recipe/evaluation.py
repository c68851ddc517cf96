"""Evaluates policies on held-out prompts for results.json."""

from __future__ import annotations

import collections
import dataclasses
import functools
import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from launch import device_mesh, host_agreement

from recipe import policy_sampling, reward_diagnosis
from recipe.jobs import Job
from recipe.policy_sampling import Answers
from recipe.tasks import PromptSet
from rlhf_jax import diagnostics, lm, parallel, types
from rlhf_jax.simulation import corpus, labelers

TIE = 1e-5
"""Maximum difference in gold utility that counts as a tie."""
POLICIES = ("base", "sft", "sft_mix", "ppo", "ppo_ptx")
FACTORS = (0.1, 0.2, 0.4, 0.6, 0.8, 1.0, 1.2, 1.6, 2.0)
"""Multiples of the policies' temperature at which the initial model can be sampled, to find the matched temperature."""


@dataclasses.dataclass(frozen=True)
class Measured:
    """A policy's answers to held-out prompts and the metrics computed from them."""

    answers: Answers
    numbers: dict[str, Any]


def evaluate(
    job: Job, policies: dict[str, types.Params], reward: types.Params, *, labeler_temperature: float | None = None
) -> dict[str, Any]:
    """Evaluates all policies on the same held-out prompts and returns the entries for results.json.

    Every mean over prompts is ``[mean, low, high]`` with its 95 % interval, clustered by what the prompts ask.
    Distinct-2, self-BLEU and the KL of best-of-n have no interval.
    """
    settings, prompts = job.settings.evaluation, job.task.eval_prompts
    total = len(policies) + 3
    job.progress.start("evaluate", total)
    probe = make_probe(job)
    reference = policies["sft_mix"]
    key = job.key("evaluate")
    measured: dict[str, Measured] = {}
    sampler = partial(job.sampler, temperature=settings.temperature)
    few = min(settings.best_of_prompts, len(prompts))
    for number, (name, policy) in enumerate(policies.items()):
        answers = sampler(policy, reference, reward, prompts, jax.random.fold_in(key, number))
        measured[name] = Measured(answers, numbers(prompts, answers) | probe(policy))
        job.progress.update("evaluate", number + 1, total)
    again = sampler(policies["sft"], reference, reward, prompts, jax.random.fold_in(key, 100))
    best, curve = _best_of_n(job, policies["sft_mix"], reward, jax.random.fold_in(key, 101))
    measured["best_of_n"] = best
    job.progress.update("evaluate", len(policies) + 1, total)
    pairs = _add_diversity(job, policies, measured, reward, jax.random.fold_in(key, list(policies).index("sft_mix")))
    job.progress.update("evaluate", len(policies) + 2, total)

    results: dict[str, Any] = {"policies": {}, "transcripts": _transcripts(job, measured)}
    world, asked_B = job.task.world, prompts.asked_B
    sft, sft_mix = (measured[name].answers for name in ("sft", "sft_mix"))
    if world is not None:
        results["null_check"] = win_rate(again, sft, asked_B)
        results["best_possible_gold"] = 1.0
        results["goodhart"] = {}
    for name, each in measured.items():
        n = len(each.answers.lengths_B)  # best-of-n is evaluated on fewer prompts
        results["policies"][name] = dict(each.numbers)
        if world is not None:
            pools = (world.pool, world.heldout_pool)
            results["policies"][name] |= against_sft(
                each.answers, _first(sft, n), asked_B[:n], pools, labeler_temperature=labeler_temperature
            )
            if name not in ("base", "sft", "sft_mix"):
                results["goodhart"][name] = reward_diagnosis.goodhart(_first(sft_mix, n), each.answers, asked_B[:n])
    results["best_of_n_curve"] = curve
    results["diversity_pairs"] = pairs
    categories = np.asarray(prompts.categories)
    few_asked = [len(np.unique(asked_B[categories == c])) for c in np.unique(categories)]
    results["clusters"] = {"best-of-n results": len(np.unique(asked_B[:few]))}
    if world is not None:
        results["clusters"]["gold utility by category"] = min(few_asked)
    results["best_of"] = settings.best_of
    if settings.temperature is not None:
        results["temperature"] = {"policies": settings.temperature, "best_of_n": job.settings.ppo.temperature}
    results["held_out"] = {"prompts": len(prompts), "asked": len(np.unique(asked_B))}
    job.progress.update("evaluate", total, total)
    job.progress.finish("evaluate")
    return results


def _first(answers: Answers, n: int) -> Answers:
    return jax.tree.map(lambda x: x[:n], answers)


def mean(values: Any, asked_B: np.ndarray, *, rate: bool = False) -> list[float]:
    """Returns ``[mean, low, high]`` of values over prompts, clustered by ``asked_B``, what the prompts ask."""
    return list(diagnostics.clustered_mean(np.asarray(values, np.float64), asked_B.tolist(), rate=rate))


def _add_diversity(
    job: Job, policies: dict[str, types.Params], measured: dict[str, Measured], reward: types.Params, rng: jax.Array
) -> int:
    """Adds the diversity and the entropy of the answers to the first prompts, which best-of-n also answers.

    ``rng`` is the key of the answers of ``sft_mix``. Best-of-n has no diversity if it samples at another temperature
    than the policies. Returns the number of pairs of tokens of each policy.
    """
    few, settings = len(measured["best_of_n"].answers.lengths_B), job.settings
    own = None if settings.evaluation.temperature in (None, settings.ppo.temperature) else "best_of_n"
    answers = {name: _first(each.answers, few) for name, each in measured.items() if name != own}
    prompts = job.task.eval_prompts.take(few)
    narrowed = diversity_of_policies(
        job,
        policies,
        answers,
        prompts,
        reward,
        initial="sft_mix",
        matched=tuple(name for name in policies if name not in ("base", "sft", "sft_mix")),
        rng=rng,
    )
    found, pairs = diversity_of_answers(answers, prompt_width=prompts.tokens_BP.shape[1])
    for name, numbers_of_set in found.items():
        measured[name].numbers.update(numbers_of_set | narrowed.get(name, {}))
    return pairs


def diversity_of_answers(
    answers: Mapping[str, Answers], *, prompt_width: int
) -> tuple[dict[str, dict[str, float]], int]:
    """Returns distinct-2 (``diversity``) and self-BLEU of several policies' answers to the same prompts.

    Distinct-2 is reduced to equally many pairs of tokens of each policy, whose number is also returned. The numbers
    have no interval.
    """
    sets = [
        [row[prompt_width:][mask].tolist() for row, mask in zip(each.tokens_BL, each.response_mask_BT)]
        for each in answers.values()
    ]
    distinct = diagnostics.equal_distinct_n(sets, n=2)
    found = {
        name: {"diversity": ratio, "self_bleu": diagnostics.self_bleu(each)}
        for name, ratio, each in zip(answers, distinct, sets)
    }
    return found, diagnostics.fewest_ngrams(sets, n=2)


def _entropies(job: Job, params: types.Params, answers: Answers, temperature: float) -> np.ndarray:
    """Returns the entropy of a policy at its own answers, summed over the tokens of each answer, ``[B]``."""
    n, parts = len(answers.lengths_B), []
    step = _entropy_step(job.cfg, job.task.prompt_width, job.mesh)  # type: ignore[arg-type]  # frozen, thus hashable
    chunk = device_mesh.round_rows_up(min(policy_sampling.LONG_CHUNK, n), job.mesh)
    for start in range(0, n, chunk):
        rows = np.minimum(np.arange(start, start + chunk), n - 1)
        inputs = answers.tokens_BL[rows], answers.mask_BL[rows], answers.response_mask_BT[rows]
        inputs = inputs if job.mesh is None else parallel.local_rows(inputs, job.mesh)
        parts.append(host_agreement.to_numpy(step(params, *inputs, np.float32(temperature))))
    return np.concatenate(parts)[:n]


@functools.cache
def _entropy_step(cfg: Any, prompt_width: int, mesh: jax.sharding.Mesh | None) -> parallel.JitStep:
    """Returns the compiled computation of entropies, which all models of an architecture share."""

    def run(params: Any, tokens_BL: Any, mask_BL: Any, response_mask_BT: Any, temperature: Any) -> jax.Array:
        _, entropy_BT = lm.token_stats(
            params, tokens_BL, cfg=cfg, prompt_width=prompt_width, mask_BL=mask_BL, temperature=temperature
        )
        return jnp.where(response_mask_BT, entropy_BT, 0.0).sum(axis=1)

    return parallel.JitStep(run, donate_argnums=(), mesh=mesh, batch_args=(1, 2, 3), replicated_args=(4,))


def diversity_of_policies(
    job: Job,
    policies: Mapping[str, types.Params],
    answers: Mapping[str, Answers],
    prompts: PromptSet,
    reward: types.Params,
    *,
    initial: str,
    matched: tuple[str, ...],
    rng: jax.Array,
) -> dict[str, dict[str, list[float]]]:
    """Returns the mean entropy per token of policies, its ratio to the initial model's, and the matched temperature.

    The matched temperature is relative to that of the answers. Intervals are clustered by what the prompts ask; that of
    the matched temperature is the one of the ratio.

    Args:
        job: The job of the run.
        policies: Parameters of the policies by name.
        answers: The answers of each to ``prompts``.
        prompts: The prompts.
        reward: Parameters of the reward model, which the sampler scores answers with.
        initial: Name of the model from which RL starts.
        matched: Names of the policies whose matched temperature is computed.
        rng: Random key of the initial model's answers, which its answers at other temperatures share.
    """
    base = job.settings.evaluation.temperature or job.settings.ppo.temperature
    asked = prompts.asked_B.tolist()
    columns = {
        name: (_entropies(job, params, answers[name], base), answers[name].lengths_B)
        for name, params in policies.items()
    }
    found: dict[str, dict[str, list[float]]] = {}
    for name, column in columns.items():
        found[name] = {
            "entropy": list(_mean_per_token(column, prompts.asked_B)),
            "entropy_ratio": list(diagnostics.entropy_ratio(*column, *columns[initial], clusters=asked)),
        }

    def relative_entropy(factor: float) -> float:
        model = policies[initial]
        cold = job.sampler(model, model, reward, prompts, rng, temperature=factor * base)
        column = _entropies(job, model, cold, factor * base), cold.lengths_B
        return _mean_per_token(column, prompts.asked_B).mean / found[initial]["entropy"][0]

    temperatures = match_temperatures({name: found[name]["entropy_ratio"] for name in matched}, relative_entropy)
    for name, temperature in temperatures.items():
        found[name]["matched_temperature"] = temperature
        if temperature[0] in (FACTORS[0], FACTORS[-1]):
            job.note(
                "evaluation",
                f"the entropy of {name} is that of {initial} at a relative temperature beyond {temperature[0]:g}, the "
                "end of the measured range",
            )
    return found


def match_temperatures(
    ratios: Mapping[str, Sequence[float]], relative_entropy: Callable[[float], float]
) -> dict[str, list[float]]:
    """Returns the relative temperature at which the initial model has the entropy of each policy, with its interval.

    A temperature outside `FACTORS` is replaced by the first or the last of these, a bound by 0 or infinity. Ratios that
    are NaN, because the initial model has no entropy, lead to NaN.

    Args:
        ratios: ``[ratio, low, high]`` of the entropies of each policy and the initial model.
        relative_entropy: Returns the entropy of the initial model at one of `FACTORS`, divided by that at 1. It is
            called for those closest to 1 until all ratios and finite bounds are between two numbers.
    """
    known = {name: ratio for name, ratio in ratios.items() if not math.isnan(ratio[0])}
    wanted = [x for mean, *bounds in known.values() for x in (mean, *(b for b in bounds if 0 < b < math.inf))]
    curve = {1.0: 1.0}
    for factor in (each for each in reversed(FACTORS) if each < 1 and wanted):
        if min(curve.values()) < min(wanted):
            break
        curve[factor] = relative_entropy(factor)
    for factor in (each for each in FACTORS if each > 1 and wanted):
        if max(curve.values()) > max(wanted):
            break
        curve[factor] = relative_entropy(factor)
    factors = sorted(curve)
    entropies = np.maximum.accumulate([curve[factor] for factor in factors])  # sampled, so it may fall slightly
    match = partial(
        diagnostics.matched_temperature,
        lambda factor: float(np.interp(factor, factors, entropies)),
        low=factors[0],
        high=factors[-1],
    )

    def interval(ratio: float, low: float, high: float) -> list[float]:
        return [
            match(ratio),
            match(low) if low > entropies[0] else 0.0,
            match(high) if high < entropies[-1] else math.inf,
        ]

    return {name: interval(*ratio) if name in known else [math.nan, 0.0, math.inf] for name, ratio in ratios.items()}


def _mean_per_token(column: tuple[np.ndarray, np.ndarray], asked_B: np.ndarray) -> diagnostics.Estimate:
    """Returns the mean entropy per token of answers, given the sum and the number of tokens of each."""
    index = np.unique(asked_B, return_inverse=True)[1].ravel()
    return diagnostics.ratio_interval(*(np.bincount(index, weights=each) for each in column), rate=False)


def numbers(prompts: PromptSet, answers: Answers) -> dict[str, Any]:
    """Returns the metrics of a policy that require no baseline; ``answers`` may answer only the first prompts."""
    n = len(answers.lengths_B)
    asked_B, categories = prompts.asked_B[:n], np.asarray(prompts.categories[:n])
    numbers: dict[str, Any] = {
        "reward": mean(answers.scores_B, asked_B),
        "kl": mean(answers.kl_B, asked_B),
        "length": mean(answers.lengths_B, asked_B),
        "stopped": mean(answers.stopped_B, asked_B, rate=True),
    }
    if answers.unknown_B is not None:
        numbers["unknown_words"] = mean(answers.unknown_B, asked_B, rate=True)
    utility = answers.gold
    if utility is not None:
        stated, harmful = np.asarray(utility.stated) > 0, np.asarray(utility.harmful_request)

        def share(part: Any, whole: np.ndarray) -> list[float] | None:
            return mean(np.asarray(part)[whole], asked_B[whole], rate=True) if whole.any() else None

        numbers |= {
            "gold": mean(utility.total, asked_B, rate=True),
            "gold_helpful": mean(utility.helpful, asked_B, rate=True),
            "gold_harmless": mean(utility.harmless, asked_B, rate=True),
            "gold_by_category": {str(c): share(utility.total, categories == c) for c in dict.fromkeys(categories)},
            "truthful_rate": share(utility.false == 0, stated),
            "harm_rate": share(utility.harm, harmful),
            "refusal_rate": share(utility.refused, ~harmful),
            "polite_words": mean(utility.polite_words, asked_B),
        }
    return numbers


def _outcomes(answers: Answers, baseline: Answers) -> np.ndarray:
    return diagnostics.win_outcomes(answers.gold.total, baseline.gold.total, tie_tolerance=TIE)


def win_rate(answers: Answers, baseline: Answers, asked_B: np.ndarray) -> list[float]:
    """Returns how often ``answers`` have the higher gold utility; a tie counts as one half."""
    return mean(_outcomes(answers, baseline), asked_B, rate=True)


def against_sft(
    answers: Answers,
    baseline: Answers,
    asked_B: np.ndarray,
    pools: tuple[labelers.Pool, labelers.Pool],
    *,
    labeler_temperature: float | None,
) -> dict[str, Any]:
    """Returns the metrics that compare a policy with SFT, whose answers to the same prompts are ``baseline``.

    Args:
        answers: The policy's answers.
        baseline: SFT's answers.
        asked_B: What each prompt asks.
        pools: The training and the held-out labelers.
        labeler_temperature: Noise of the labelers' choices, with which they also ranked the comparisons; None keeps the
            noise of the pools.

    Returns:
        Win rates by gold utility and by both pools of labelers, in which a tie counts as one half, and the share of the
        gap between SFT and the best possible gold utility that the policy closes (None if SFT leaves no gap).
    """
    outcomes, gold, floor = (
        _outcomes(answers, baseline),
        np.asarray(answers.gold.total),
        np.asarray(baseline.gold.total),
    )
    features, baseline_features = (labelers.features(each.gold) for each in (answers, baseline))

    def by(pool: labelers.Pool) -> list[float]:
        if labeler_temperature is not None:
            pool = pool.replace(temperature=np.float32(labeler_temperature))  # type: ignore[attr-defined]
        return mean(labelers.choice_share(pool, features, baseline_features), asked_B, rate=True)

    cluster_B = np.unique(asked_B, return_inverse=True)[1]
    gained, gap = (np.bincount(cluster_B, weights=np.float64(x)) for x in (gold - floor, np.maximum(1 - floor, 0)))
    return {
        "gold_win_rate_vs_sft": mean(outcomes, asked_B, rate=True),
        "gold_strict_wins_vs_sft": mean(outcomes == 1, asked_B, rate=True),
        "length_controlled_win_rate_vs_sft": _length_controlled(outcomes, answers, baseline, asked_B),
        "labeler_win_rate_vs_sft": by(pools[0]),
        "heldout_win_rate_vs_sft": by(pools[1]),
        "gap_closed": list(diagnostics.ratio_interval(gained, gap, rate=False)) if gap.any() else None,
    }


def _length_controlled(
    outcomes: np.ndarray, answers: Answers, baseline: Answers, asked_B: np.ndarray
) -> list[float] | None:
    """Returns the length-controlled win rate; None if all lengths differ from the baseline's by the same factor."""
    lengths = (np.maximum(each.lengths_B, 1) for each in (answers, baseline))
    try:
        return list(diagnostics.length_controlled_win_rate(outcomes, *lengths, clusters=asked_B.tolist()))
    except ValueError:
        return None


def make_probe(job: Job) -> Any:
    """Returns a function that measures what a policy retains from pretraining: loss on text and skill accuracy."""
    task, cfg = job.task, job.cfg

    def nll(params: Any, tokens_BL: Any, mask_BL: Any) -> jax.Array:
        return -lm.token_logprobs(params, tokens_BL, cfg=cfg, mask_BL=mask_BL)[:, 1:].mean(axis=1)

    def solved(params: Any, tokens_BL: Any, mask_BL: Any, loss_mask_BL: Any) -> jax.Array:
        right_BL = lm.greedy_matches(params, tokens_BL, cfg=cfg, mask_BL=mask_BL)
        return (right_BL | ~loss_mask_BL).all(axis=1)

    held_BL = task.pretraining_held_out_BL
    text = device_mesh.put_rows(job.mesh, held_BL, np.ones(held_BL.shape, bool))
    skill_rows = () if task.world is None else device_mesh.put_rows(job.mesh, *_arrays(task.world.skill_rows))
    loss, right = (
        parallel.JitStep(each, donate_argnums=(), mesh=job.mesh, batch_args=(), replicated_args=())
        for each in (nll, solved)
    )

    def probe(params: types.Params) -> dict[str, Any]:
        loss_B = host_agreement.to_numpy(loss(params, *text))
        numbers: dict[str, Any] = {"pretraining_loss": list(diagnostics.mean_interval(loss_B))}
        if task.world is not None:
            right_B = host_agreement.to_numpy(right(params, *skill_rows))
            numbers |= skill_accuracy(right_B, task.world.skill_rows.tokens_BL)
        return numbers

    return probe


def _arrays(rows: types.TokenBatch) -> tuple[Any, ...]:
    return rows.tokens_BL, rows.mask_BL, rows.loss_mask_BL


def skill_accuracy(right_B: np.ndarray, problems_BL: np.ndarray) -> dict[str, Any]:
    """Returns the accuracy on all skill problems and by skill, with the skills in rotation; a skill may be missing.

    The intervals are clustered by ``problems_BL``, because the greedy answers to equal problems are equal.
    """
    problem_B = np.unique(problems_BL, axis=0, return_inverse=True)[1].reshape(-1)
    n = len(corpus.SKILLS)
    by_skill = {
        skill: mean(right_B[i::n], problem_B[i::n], rate=True) for i, skill in enumerate(corpus.SKILLS[: len(right_B)])
    }
    return {"skill_accuracy": mean(right_B, problem_B, rate=True), "skills": by_skill}


def _best_of_n(job: Job, policy: types.Params, reward: types.Params, rng: jax.Array) -> tuple[Measured, list[dict]]:
    """Returns the results of best-of-n by the reward model, and the mean score and gold utility for each n."""
    settings = job.settings.evaluation
    n, N = settings.best_of, min(settings.best_of_prompts, len(job.task.eval_prompts))
    prompts = job.task.eval_prompts.take(N)
    pool = job.sampler(policy, policy, reward, prompts.at(np.repeat(np.arange(N), n)), rng)
    pick = np.arange(N) * n + pool.scores_B.reshape(N, n).argmax(axis=1)
    best = jax.tree.map(lambda x: x[pick], pool)
    found = numbers(prompts, best) | {"n": n, "prompts": N}
    found |= {"kl": policy_sampling.best_of_kl(pool, n, [n])[0], "kl_bound": float(diagnostics.best_of_n_kl(n))}
    return Measured(best, found), best_of_n_curve(pool, prompts.asked_B)


def best_of_n_curve(pool: Answers, asked_B: np.ndarray) -> list[dict[str, Any]]:
    """Returns KL, mean score and mean gold utility of best-of-n for powers of two, from as many answers to each prompt.

    The KL has no interval, because the bias of its estimate can exceed its sampling error.
    """
    N, samples = len(asked_B), len(pool.scores_B) // len(asked_B)
    sizes = [2**i for i in range(int(math.log2(samples)) + 1)]
    scores = {"reward": pool.scores_B} | ({} if pool.gold is None else {"gold": pool.gold.total})
    curves = {
        name: diagnostics.best_of_n_curve(
            pool.scores_B.reshape(N, -1), np.asarray(each).reshape(N, -1), ns=sizes, clusters=asked_B.tolist()
        )
        for name, each in scores.items()
    }
    return [
        {"n": n, "kl": kl, "kl_bound": float(diagnostics.best_of_n_kl(n))}
        | {name: [float(x[i]) for x in (curve.mean, curve.lo, curve.hi)] for name, curve in curves.items()}
        for i, (n, kl) in enumerate(zip(sizes, policy_sampling.best_of_kl(pool, samples, sizes)))
    ]


def _transcripts(job: Job, measured: dict[str, Measured]) -> list[dict[str, Any]]:
    """Returns the policies' answers to a few prompts, which are chosen from the categories in rotation."""
    prompts = job.task.eval_prompts
    seen, turn = collections.Counter[str](), []
    for category in prompts.categories:
        turn.append(seen[category])
        seen[category] += 1
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
