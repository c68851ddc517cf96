"""DPO on rankings, with all pairs of a prompt in one batch element, as in the training of a reward model.

DPO is the pairwise loss of a reward model whose score is the implicit reward ``beta log(policy / reference)``. Trained
in this way, DPO and a reward model use the same answers, labels, batches and weights of the pairs. A batch of shuffled
pairs would compute each of the K answers to a prompt K - 1 times.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import numpy as np
from launch import device_mesh
from recipe import jobs, stages

from rlhf_jax import lm, losses, masking, parallel, types
from rlhf_jax.data import batching
from rlhf_jax.train import reward_model
from rlhf_jax.train import state as state_lib
from rlhf_jax.train.optim import schedules


def make_step(job: jobs.Job) -> parallel.JitStep:
    """Builds the train step, whose batches are `types.Comparisons` from `with_reference`, without compiling it."""
    step = reward_model.make_train_step(_make_score(job), loss=_loss)

    def train_step(*args: Any) -> tuple[Any, dict[str, Any]]:
        state, logs = step(*args)
        # These two would describe log-probabilities, without the reference.
        return state, {name: value for name, value in logs.items() if name not in ("accuracy", "score")}

    return parallel.jit_step(train_step, mesh=job.mesh)


def _make_score(job: jobs.Job) -> Any:
    P = job.task.prompt_width
    temperature = job.settings.ppo.temperature
    logprobs = partial(lm.token_logprobs, cfg=job.cfg, prompt_width=P, temperature=temperature)

    def score(params: types.Params, tokens_BL: jax.Array, mask_BL: jax.Array) -> jax.Array:
        return masking.masked_sum(logprobs(params, tokens_BL, mask_BL=mask_BL), where=mask_BL[:, P:], axis=-1)

    return score


def _loss(
    logprobs_K: jax.Array, ranks_K: jax.Array, *, where_K: jax.Array, reference_K: jax.Array, beta: jax.Array
) -> jax.Array:
    return losses.ranking(beta * (logprobs_K - reference_K), ranks_K, where_K=where_K)


def with_reference(job: jobs.Job, reference: types.Params, ranked: types.Comparisons) -> types.Comparisons:
    """Returns the comparisons with the log-probabilities of their answers under the reference."""
    B, K, L = np.shape(ranked.tokens_BKL)
    rows = device_mesh.round_rows_up(128, job.mesh)
    score = parallel.JitStep(_make_score(job), donate_argnums=(), mesh=job.mesh, batch_args=(1, 2), replicated_args=())
    tokens_RL, mask_RL = (np.asarray(x).reshape(B * K, L) for x in (ranked.tokens_BKL, ranked.mask_BKL))
    parts = []
    for start in range(0, B * K, rows):
        at = np.minimum(np.arange(start, start + rows), B * K - 1)  # the last row pads the last batch
        parts.append(score(reference, tokens_RL[at], mask_RL[at]))
    reference_BK = np.concatenate(jax.device_get(parts))[: B * K].reshape(B, K)
    # Slots without an answer have no tokens, so their log-probabilities are 0.
    return ranked.replace(loss_inputs={"reference_K": reference_BK})  # type: ignore[attr-defined]


def train(
    job: jobs.Job,
    step: parallel.JitStep,
    start: types.Params,
    ranked: types.Comparisons,
    *,
    name: str,
    seed: int,
    beta: float,
    learning_rate: float,
    epochs: int = 1,
) -> types.Params:
    """Trains a policy with DPO on all pairs of the comparisons and returns its parameters.

    Args:
        job: The job of the run.
        step: The step from `make_step`.
        start: The initial parameters, which are also the reference of ``ranked``.
        ranked: Comparisons from `with_reference`.
        name: Name of the run in its checkpoints and its log. A finished run is restored, not trained.
        seed: Seed of the batch order.
        beta: Coefficient of the KL penalty.
        learning_rate: Peak learning rate, with warmup over the first tenth of the steps and cosine decay to a tenth.
        epochs: Number of passes over the comparisons.

    Returns:
        The parameters of the policy.
    """
    n = len(ranked.ranks_BK)
    batch = min(job.settings.reward_model.batch, n)
    steps = epochs * (n // batch)
    key = jax.random.fold_in(job.key("ppo"), 10_000 + seed)
    order = batching.epoch_batches(0, n=n, batch_size=batch, key=key, steps=steps)

    def batch_at(i: int) -> types.Comparisons:
        rows = jax.tree.map(lambda x: np.asarray(x)[order[i]], ranked)
        return rows.replace(loss_inputs=rows.loss_inputs | {"beta": np.full(batch, beta, np.float32)})

    def rate(i: int) -> Any:
        warmup = schedules.constant_with_warmup(i, steps, warmup=max(1, steps // 10))
        return learning_rate * warmup * schedules.cosine(i, steps)

    state = job.fit(
        name,
        step,
        job.create_on_mesh(partial(state_lib.create, tx=job.ppo_tx), start),
        steps,
        batch_at=batch_at,
        hyper_at=lambda i: stages.hyper(rate(i)),
        rng=key,
    )
    return state.params
