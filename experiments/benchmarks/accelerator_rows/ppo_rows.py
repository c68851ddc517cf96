"""Measures the parts of a PPO iteration, and several seeds of PPO on a small model in turn and as one program."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import train_workloads
from benchmarks.accelerator_rows import row_context, training_rows
from rlhf_jax import generation, lm
from rlhf_jax.train import ppo, ppo_models


def iteration(context: row_context.Context) -> None:
    """Measures the rollout, the scoring and the update of an iteration with one epoch.

    Rollout, collection (rollout and scoring) and update are compiled separately. The time of scoring is that of
    collection minus that of the rollout.
    """
    shapes, cfg = context.shapes, training_rows.model(context.shapes)
    inputs = train_workloads.ppo_inputs(
        cfg, samples=shapes.ppo_samples, prompt=shapes.ppo_prompt, answer=shapes.ppo_answer
    )
    rng, key = np.random.default_rng(0), jax.random.key(2)
    state = inputs.state()
    rollout = jax.jit(inputs.models.generate)
    collect = jax.jit(partial(ppo.collect, inputs.models))
    update = jax.jit(partial(ppo.update, inputs.models, epochs=1, minibatches=shapes.ppo_minibatches), donate_argnums=0)
    keys_B = jax.random.split(key, shapes.ppo_samples)
    experience: Any = None

    def run_rollout() -> None:
        batch = inputs.batch(rng)
        jax.block_until_ready(rollout(state.params["policy"], keys_B, batch.prompts_BP, batch.mask_BP, 1.0))

    def run_collect() -> None:
        nonlocal experience
        experience, _ = jax.block_until_ready(
            collect(state.params, inputs.frozen, inputs.hyper, inputs.batch(rng), key)
        )

    def run_update() -> None:
        nonlocal state
        state, _ = jax.block_until_ready(update(state, experience, inputs.hyper, None, key))

    repeats = min(shapes.repeats, 3)
    rollout_s, rollout_times = row_context.seconds(run_rollout, repeats=repeats)
    collect_s, collect_times = row_context.seconds(run_collect, repeats=repeats)
    update_s, update_times = row_context.seconds(run_update, repeats=repeats)
    total = collect_s + update_s
    B, P, T = shapes.ppo_samples, shapes.ppo_prompt, shapes.ppo_answer
    note = f"{1e3 * total:.3g} ms; tokens of prompts and answers"
    context.record("PPO iteration", B * (P + T) / total, "tokens/s", note=note, total_s=total, **collect_times)
    flops = lm.costs.forward_flops(cfg, rows=B, length=P + T, logits=T)
    flops = 3 * (flops + lm.costs.forward_flops(cfg, rows=B, length=P + T, logits=0))
    parts: dict[str, tuple[float, dict[str, Any]]] = {
        "rollout": (rollout_s, {"at_most": 0.5, **rollout_times}),
        "scoring": (collect_s - rollout_s, {}),
        "update": (update_s, {"note": f"{flops / update_s / 1e12:.3g} TFLOP/s", "flops": flops, **update_times}),
    }
    for name, (seconds, fields) in parts.items():
        context.record(f"PPO {name}", seconds, "s", share=seconds / total, share_of="PPO iteration", **fields)


def seeds(context: row_context.Context) -> None:
    """Measures several seeds of PPO, as one program and one after another, on a model of instructgpt.py's size."""
    shapes, axis = context.shapes, "member"
    cfg = lm.LMConfig(
        vocab_size=256,
        n_layers=shapes.seed_layers,
        d_model=96,
        n_heads=4,
        d_mlp=256,
        max_length=64,
        tie_embeddings=True,
    )
    inputs = train_workloads.ppo_inputs(cfg, samples=shapes.seed_samples, prompt=16, answer=24)
    batch = inputs.batch(np.random.default_rng(0))
    keys_M = jax.random.split(jax.random.key(2), shapes.seeds)
    models = ppo_models.from_config(cfg, generation.Sampling(max_new_tokens=24), prompt_width=16, axis_name=axis)
    single = jax.jit(ppo.make_train_step(inputs.models, minibatches=4), donate_argnums=0)
    together = jax.jit(
        jax.vmap(ppo.make_train_step(models, minibatches=4), in_axes=(0, None, None, None, 0), axis_name=axis),
        donate_argnums=0,
    )
    states = [inputs.state() for _ in range(shapes.seeds)]
    stacked = jax.tree.map(lambda *x: jnp.stack(x), *states)

    def in_turn() -> None:
        for i, key in enumerate(keys_M):
            states[i], _ = single(states[i], inputs.frozen, inputs.hyper, batch, key)
        jax.block_until_ready(states)

    def as_one() -> None:
        nonlocal stacked
        stacked, _ = jax.block_until_ready(together(stacked, inputs.frozen, inputs.hyper, batch, keys_M))

    in_turn_s, in_turn_times = row_context.seconds(in_turn, repeats=shapes.repeats)
    as_one_s, as_one_times = row_context.seconds(as_one, repeats=shapes.repeats)
    context.record(f"{shapes.seeds} seeds in turn", in_turn_s, "s", **in_turn_times)
    context.record(f"{shapes.seeds} seeds as one program", as_one_s, "s", **as_one_times)
    context.record("seeds in turn / as one program", in_turn_s / as_one_s, "x")
