"""Defines `Engine`, which runs training stages: keys, sharding, checkpoints, logs and the training loop."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from launch.run_settings import RunSettings

from rlhf_jax import checkpoint, lm, parallel, types
from rlhf_jax.checkpoint import manifest
from rlhf_jax.distributed import hosts
from rlhf_jax.train import loop

STAGES = ("pretrain", "sft", "sft_mix", "comparisons", "reward_model", "ppo", "ppo_ptx", "evaluate")
STAGES += ("heldout_reward_model",)  # the position of a stage determines its random key, so append new ones
STAGES += ("dpo",)


def stage_key(seed: int, stage: str) -> jax.Array:
    """Returns the random key of a stage, ignoring a suffix after a hyphen: ``ppo-more`` has the key of ``ppo``."""
    return jax.random.fold_in(jax.random.key(seed), 100 + STAGES.index(stage.partition("-")[0]))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Engine:
    """The objects with which all stages of a run are trained."""

    settings: RunSettings
    cfg: lm.LMConfig
    """Architecture of the trained models."""
    checkpoints: Callable[[str], checkpoint.Checkpoints]
    log: Any
    progress: Any
    mesh: jax.sharding.Mesh | None = None
    """The mesh of the run; None on one device."""
    note: Callable[[str, str], None] = lambda stage, text: print(f"{stage}: {text}", file=sys.stderr)
    """``note(stage, text)`` prints and saves an incident; the default only prints it."""

    def key(self, stage: str) -> jax.Array:
        """Returns `stage_key` with the seed of the run."""
        return stage_key(self.settings.seed, stage)

    @property
    def axes(self) -> types.Params:
        """The logical axes of the model's parameters, including a scalar head."""
        return lm.logical_axes(self.cfg, head=True)

    def create_on_mesh(self, make: Callable[..., Any], *args: Any) -> Any:
        """Returns ``make(*args)``, a train state or parameters, which are sharded by `parallel.RULES` on a mesh."""
        if self.mesh is None:
            return make(*args)
        args = tuple(self.put_params(each) for each in args)
        sharding = parallel.shardings(jax.eval_shape(make, *args), self.mesh, self.axes)
        with jax.set_mesh(self.mesh):
            return jax.jit(make, out_shardings=sharding)(*args)

    def put_params(self, params: types.Params) -> types.Params:
        """Shards parameters over the mesh, if there is one."""
        if self.mesh is None:
            return params
        return parallel.shard(params, parallel.shardings(params, self.mesh, self.axes))

    def replicate(self, x: np.ndarray) -> jax.Array:
        """Replicates a host array on all devices."""
        return jnp.asarray(x) if self.mesh is None else parallel.replicate(x, self.mesh)

    def fit(
        self, stage: str, train_step: parallel.JitStep, state: Any, steps: int, *, batch_at: Any, **options: Any
    ) -> Any:
        """Trains one stage, showing its progress and saving checkpoints.

        Args:
            stage: Name of the stage in logs, checkpoints and the progress bar.
            train_step: The compiled step.
            state: The initial train state. If there is a checkpoint, the newest one is restored instead.
            steps: Number of steps.
            batch_at: Returns the batch of a step as NumPy arrays, with the rows of all hosts. Each host uses its share.
            **options: Other arguments of `loop.fit`. ``log`` defaults to the run's log, ``rng`` to the stage's key.

        Returns:
            The train state after the last step.
        """
        mesh = self.mesh
        options = {"log": self.log} | ({} if "rng" in options else {"rng": self.key(stage)}) | options
        options |= self.loop_checks(stage, steps, batch_at)
        self.progress.start(stage, steps)
        with self.checkpoints(stage) as checkpoints:
            state = loop.fit(
                train_step,
                state,
                steps=steps,
                stage=stage,
                checkpoints=checkpoints,
                save_every=max(1, -(-steps // self.settings.saves)),
                progress=self.progress.update,
                batch_at=batch_at if mesh is None else lambda i: parallel.local_rows(batch_at(i), mesh),
                should_stop=hosts.current().stop_agreement(),
                **options,
            )
        self.progress.finish(stage)
        return state

    def loop_checks(self, stage: str, steps: int, batch_at: Callable[[int], Any]) -> dict[str, Any]:
        """Returns the arguments of `loop.fit` that handle skipped steps and identify the stage's data.

        The fingerprint consists of the number of steps and, on a single host, of digests of the first and last batch. A
        run is not resumed if its fingerprint has changed, for example because the batch size is different.
        """
        fingerprint: Any = [steps]
        if jax.process_count() == 1 and steps > 0:
            fingerprint += [manifest.digest_tree(batch_at(i)) for i in (0, steps - 1)]
        return {
            "max_skipped": self.settings.max_skipped,
            "warn": partial(self.note, stage),
            "fingerprint": fingerprint,
        }
