"""Diversity of policies' answers, compared with that of the model from which RL starts."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from launch import device_mesh, host_agreement

from recipe import policy_sampling
from recipe.jobs import Job
from recipe.policy_sampling import Answers
from recipe.tasks import PromptSet
from rlhf_jax import diagnostics, lm, parallel, types

TEMPERATURES = (0.1, 0.2, 0.4, 0.6, 0.8, 1.0, 1.2)
"""Multiples of the policies' temperature at which the initial model is sampled, to find the matched temperature."""

Entropies = Callable[[types.Params, Answers, float], np.ndarray]
"""``(params, answers, temperature) -> entropy_B``, summed over the tokens of each answer."""


def of_answers(answers: Mapping[str, Answers], *, prompt_width: int) -> dict[str, dict[str, float]]:
    """Returns distinct-2 (``diversity``) and self-BLEU of several policies' answers to the same prompts.

    Distinct-2 is reduced to equally many pairs of tokens of each policy. The numbers have no interval.
    """
    sets = [
        [row[prompt_width:][mask].tolist() for row, mask in zip(each.tokens_BL, each.response_mask_BT)]
        for each in answers.values()
    ]
    distinct = diagnostics.equal_distinct_n(sets, n=2)
    return {
        name: {"diversity": ratio, "self_bleu": diagnostics.self_bleu(each)}
        for name, ratio, each in zip(answers, distinct, sets)
    }


def make_entropies(job: Job) -> Entropies:
    """Returns a function that computes the entropies of a policy at its own answers; it compiles once."""
    chunk = device_mesh.round_rows_up(policy_sampling.LONG_CHUNK, job.mesh)

    def run(params: Any, tokens_BL: Any, mask_BL: Any, response_mask_BT: Any, temperature: Any) -> jax.Array:
        _, entropy_BT = lm.token_stats(
            params,
            tokens_BL,
            cfg=job.cfg,
            prompt_width=job.task.prompt_width,
            mask_BL=mask_BL,
            temperature=temperature,
        )
        return jnp.where(response_mask_BT, entropy_BT, 0.0).sum(axis=1)

    step = parallel.JitStep(run, donate_argnums=(), mesh=job.mesh, batch_args=(1, 2, 3), replicated_args=(4,))

    def entropies(params: types.Params, answers: Answers, temperature: float) -> np.ndarray:
        n, parts = len(answers.lengths_B), []
        for start in range(0, n, chunk):
            rows = np.minimum(np.arange(start, start + chunk), n - 1)
            inputs = answers.tokens_BL[rows], answers.mask_BL[rows], answers.response_mask_BT[rows]
            inputs = inputs if job.mesh is None else parallel.local_rows(inputs, job.mesh)
            parts.append(host_agreement.to_numpy(step(params, *inputs, np.float32(temperature))))
        return np.concatenate(parts)[:n]

    return entropies


def of_policies(
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

    Intervals are clustered by what the prompts ask. That of the matched temperature is the one of the policy's entropy.

    Args:
        job: The job of the run.
        policies: Parameters of the policies by name.
        answers: The answers of each to ``prompts``.
        prompts: The prompts.
        reward: Parameters of the reward model, which the sampler scores answers with.
        initial: Name of the model from which RL starts.
        matched: Names of the policies whose matched temperature is computed.
        rng: Random key; consumed. All temperatures share it.
    """
    entropies = make_entropies(job)
    base = job.settings.evaluation.temperature or job.settings.ppo.temperature
    asked = prompts.asked_B.tolist()
    columns = {
        name: (entropies(params, answers[name], base), answers[name].lengths_B) for name, params in policies.items()
    }
    found: dict[str, dict[str, list[float]]] = {}
    for name, column in columns.items():
        found[name] = {
            "entropy": list(_mean(column, prompts.asked_B)),
            "entropy_ratio": list(diagnostics.entropy_ratio(*column, *columns[initial], clusters=asked)),
        }
    if not matched:
        return found
    temperatures = [each * base for each in TEMPERATURES]
    curve = []
    for temperature in temperatures:
        cold = job.sampler(policies[initial], policies[initial], reward, prompts, rng, temperature=temperature)
        curve.append(_mean((entropies(policies[initial], cold, temperature), cold.lengths_B), prompts.asked_B)[0])
    match = partial(
        diagnostics.matched_temperature,
        lambda temperature: float(np.interp(temperature, temperatures, curve)),
        low=temperatures[0],
        high=temperatures[-1],
    )
    for name in matched:
        found[name]["matched_temperature"] = [match(each) for each in found[name]["entropy"]]
    return found


def _mean(column: tuple[np.ndarray, np.ndarray], asked_B: np.ndarray) -> diagnostics.Estimate:
    """Returns the mean entropy per token of answers, given the sum and the number of tokens of each."""
    index = np.unique(asked_B, return_inverse=True)[1].ravel()
    return diagnostics.ratio_interval(*(np.bincount(index, weights=each) for each in column), rate=False)
