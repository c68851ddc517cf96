"""Measures PPO's ``first_ratio_error`` and ``sampler_gap`` and whether repeated iterations are bit-identical."""

from __future__ import annotations

import tempfile
from typing import Any

import jax
import numpy as np

from benchmarks import train_workloads
from benchmarks.accelerator_rows import row_context, training_rows
from rlhf_jax import checkpoint, metrics
from rlhf_jax.checkpoint import manifest
from rlhf_jax.train import ppo


def numerics(context: row_context.Context) -> None:
    """Records metrics that would be 0 in exact arithmetic, and whether repeated iterations are bit-identical.

    The metrics are recorded in bfloat16, with the default and with plain attention, and in float32.
    """
    settings = {
        "bfloat16, plain attention": {"dtype": "bfloat16", "attention": "einsum"},
        "float32": {"dtype": "float32"},
    }
    run = _Run(context.shapes, dtype="bfloat16")
    _record_metrics(context, "bfloat16", run)
    _record_bits(context, run, flags="")
    for name, overrides in settings.items():
        _record_metrics(context, name, _Run(context.shapes, **overrides))


def bits(context: row_context.Context) -> None:
    """Records whether two iterations repeat bit-identically, without and with a restored checkpoint between them."""
    _record_bits(context, _Run(context.shapes, dtype="bfloat16"), flags=", deterministic operations", at_least=True)


def _record_metrics(context: row_context.Context, name: str, run: _Run) -> None:
    _, logs = run.step(run.inputs.state())
    for metric in ("first_ratio_error", "sampler_gap", "sampler_gap_mean"):
        value = logs[metric]
        context.record(f"{metric}, {name}", float(value.value() if isinstance(value, metrics.Metric) else value))


def _record_bits(context: row_context.Context, run: _Run, *, flags: str, **aim: Any) -> None:
    def iterate(state: Any, times: int) -> Any:
        for _ in range(times):
            state, _ = run.step(state)
        return state

    expected = manifest.digest_tree(iterate(run.inputs.state(), 2))
    repeated = manifest.digest_tree(iterate(run.inputs.state(), 2))
    context.record(f"same seed, same bits{flags}", expected == repeated, **aim)
    state = iterate(run.inputs.state(), 1)
    with tempfile.TemporaryDirectory() as folder, checkpoint.Checkpoints(folder) as checkpoints:
        checkpoints.save(1, state)
        checkpoints.wait()
        _, restored, _ = checkpoints.restore(run.inputs.state())
    again = manifest.digest_tree(iterate(restored, 1))
    context.record(f"same bits after a restored checkpoint{flags}", again == expected, **aim)


class _Run:
    """A jitted step of PPO on a small model."""

    def __init__(self, shapes: row_context.Shapes, **overrides: Any) -> None:
        cfg = training_rows.model(shapes, **dict(shapes.small), **overrides)
        sizes = {"samples": shapes.ppo_samples, "prompt": shapes.ppo_prompt, "answer": shapes.ppo_answer // 2}
        self.inputs = train_workloads.ppo_inputs(cfg, **sizes)
        self._step = jax.jit(
            ppo.make_train_step(self.inputs.models, minibatches=shapes.ppo_minibatches), donate_argnums=0
        )

    def step(self, state: Any) -> Any:
        """Runs an iteration. Its prompts depend only on the step number."""
        batch = self.inputs.batch(np.random.default_rng(int(state.step)))
        return self._step(state, self.inputs.frozen, self.inputs.hyper, batch, jax.random.key(2))
