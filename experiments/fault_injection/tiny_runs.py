"""Four tiny runs that use the library's train steps and loop, and report their events to the parent process.

Importing this module runs no JAX computation, so that the fork server can preload it.
"""

from __future__ import annotations

import json
import os
import pathlib
import threading
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from fault_injection.torture_settings import STAGES
from rlhf_jax import checkpoint, metrics, parallel, types
from rlhf_jax.checkpoint import manifest
from rlhf_jax.train import dpo, loop, objectives, ppo, reward_model, sft
from rlhf_jax.train import state as state_lib
from rlhf_jax.train.optim import schedules

P, T, V, B, ROWS = 4, 6, 24, 8, 64
FINAL = "final.json"


class Stage(NamedTuple):
    """The arguments of `loop.fit` for a stage."""

    step: Callable[..., Any]
    state: Any
    frozen: Any
    batch_at: Callable[[int], Any]
    hyper_at: Callable[[int], Any]
    fingerprint: Any


def build(stage: str, steps: int, *, seed: int = 0) -> Stage:
    """Returns a stage of ``steps`` iterations on random data, with every optional field of the state in use.

    The model is a bigram table, so the train step compiles in a second or two. This function compiles nothing.
    """
    rng = np.random.default_rng([seed, STAGES.index(stage)])
    adam = optax.chain(optax.scale_by_adam(eps=1e-5), optax.scale(-1.0))
    table = {"table": rng.normal(size=(V, V)).astype(np.float32)}
    scorer = {**table, "words": rng.normal(size=V).astype(np.float32)}

    def rows(*shape: int) -> np.ndarray:
        return rng.integers(4, V, size=(ROWS, *shape)).astype(np.int32)

    def create(params: Any) -> Any:
        return state_lib.create(params, adam)

    frozen: Any = None
    if stage == "ppo":
        text = sft.TokenBatch(rows(P + T), *2 * [np.ones((ROWS, P + T), bool)])
        data = ppo.Batch(rows(P), np.ones((ROWS, P), bool), text)  # type: ignore[arg-type]
        models = ppo.Models(_generate, _logprobs_and_entropy, _values, _score_rollout, _token_logprobs)
        step = ppo.make_train_step(models, epochs=2, minibatches=2, normalise_values=True)
        frozen = ppo.Frozen(table, scorer)
        state = _random_state(lambda: ppo.create(table, scorer, adam, reference=table))
    elif stage == "sft":
        real_BL = np.arange(P + T) < rng.integers(3, P + T + 1, size=(ROWS, 1))
        data = sft.TokenBatch(rows(P + T), real_BL, real_BL & (np.arange(P + T) > 0))
        step, state = sft.make_train_step(_token_logprobs), _random_state(lambda: create(table))
    elif stage == "reward_model":
        ranks_BK = rng.integers(1, 4, size=(ROWS, 3)).astype(np.int32)
        mask = np.ones((ROWS, 3, P + T), bool)
        data = types.Comparisons(rows(3, P + T), mask, ranks_BK, mask[:, :, 0])  # type: ignore[arg-type]
        step, state = reward_model.make_train_step(_score), _random_state(lambda: create(scorer))
    else:
        answers = np.ones((ROWS, 2, T), bool)
        data = types.Preferences(rows(2, P + T), None, answers)  # type: ignore[arg-type]
        step = dpo.make_train_step(lambda *a: _token_logprobs(*a)[:, P:], objectives.dpo)
        state, frozen = _random_state(lambda: create(table)), table

    def hyper_at(i: int) -> Any:
        values = {"learning_rate": np.float32(0.01) * schedules.cosine(i, steps), "max_grad_norm": np.float32(1.0)}
        if stage == "ppo":
            values |= {"critic_learning_rate": values["learning_rate"], "ptx_coef": 0.5, "ema_decay": 0.9}
            values |= {"kl_coef": 0.1, "kl_target": 0.01, "kl_gain": 0.1, "reference_decay": 0.9}
            return jax.tree.map(np.float32, ppo.Hyper(**values))
        return jax.tree.map(np.float32, dpo.Hyper(**values)) if stage == "dpo" else values

    def batch_at(i: int) -> Any:
        epoch, first = divmod(i * B, ROWS)
        rows_B = np.random.default_rng([seed, 1, epoch]).permutation(ROWS)[first : first + B]
        return jax.tree.map(lambda x: x[rows_B], data)

    frozen = jax.tree.map(jnp.asarray, frozen)
    return Stage(parallel.jit_step(step), state, frozen, batch_at, hyper_at, manifest.digest_tree(data))


def _random_state(make: Callable[[], Any]) -> Any:
    """Returns a state with the shapes of ``make()``: random parameters, a ``kl_coef`` of 1, and zeros elsewhere."""

    def leaf(path: Any, shape: Any) -> jax.Array:
        name = jax.tree_util.keystr(path)
        if name.endswith("kl_coef"):
            return jnp.array(np.ones(shape.shape, shape.dtype))
        if ".opt_state" not in name and len(shape.shape) > 0:
            return jnp.array(np.random.default_rng(shape.shape).normal(size=shape.shape).astype(shape.dtype))
        return jnp.array(np.zeros(shape.shape, shape.dtype))

    return jax.tree_util.tree_map_with_path(leaf, jax.eval_shape(make))


def _next_logprobs(params: Any, tokens_BL: Any, temperature: Any = 1.0) -> jax.Array:
    return jax.nn.log_softmax(params["table"][tokens_BL[:, :-1]] / temperature)


def _token_logprobs(params: Any, tokens_BL: Any, mask_BL: Any = None) -> jax.Array:
    logprobs_BL = jnp.take_along_axis(_next_logprobs(params, tokens_BL), tokens_BL[:, 1:, None], axis=-1)[..., 0]
    return jnp.pad(logprobs_BL, ((0, 0), (1, 0)))


def _logprobs_and_entropy(params: Any, tokens_BL: Any, mask_BL: Any, temperature: Any) -> tuple[jax.Array, jax.Array]:
    logprobs_BTV = _next_logprobs(params, tokens_BL, temperature)[:, P - 1 :]
    logprobs_BT = jnp.take_along_axis(logprobs_BTV, tokens_BL[:, P:, None], axis=-1)[..., 0]
    return logprobs_BT, -jnp.sum(jnp.exp(logprobs_BTV) * logprobs_BTV, axis=-1)


def _values(params: Any, tokens_BL: Any, mask_BL: Any) -> jax.Array:
    return params["words"][tokens_BL[:, P - 1 : -1]]


def _score(params: Any, tokens_BL: Any, mask_BL: Any) -> jax.Array:
    return jnp.sum(jnp.where(mask_BL, params["words"][tokens_BL], 0.0), axis=-1)


def _score_rollout(params: Any, rollout: types.Rollout) -> jax.Array:
    return _score(params, rollout.tokens_BL, rollout.mask_BL)


def _generate(params: Any, rng_B: Any, prompts_BP: Any, mask_BP: Any, temperature: Any) -> types.Rollout:
    """Samples up to T tokens; token 1 ends a response."""

    def step(carry: tuple[Any, Any], t: Any) -> tuple[Any, Any]:
        last_B, live_B = carry
        logits_BV = params["table"][last_B] / temperature
        keys_B = jax.vmap(jax.random.fold_in, in_axes=(0, None))(rng_B, t)
        token_B = jnp.where(live_B, jax.vmap(jax.random.categorical)(keys_B, logits_BV), 0)
        logprob_B = jnp.take_along_axis(jax.nn.log_softmax(logits_BV), token_B[:, None], axis=-1)[:, 0]
        return (token_B, live_B & (token_B != 1)), (token_B, live_B, jnp.where(live_B, logprob_B, 0.0))

    first = (prompts_BP[:, -1], jnp.ones(prompts_BP.shape[0], bool))
    (_, live_B), outputs = jax.lax.scan(step, first, jnp.arange(T))
    response_BT, real_BT, logprobs_BT = (jnp.swapaxes(x, 0, 1) for x in outputs)
    tokens_BL = jnp.concatenate([prompts_BP, response_BT], axis=1)
    mask_BL = jnp.concatenate([mask_BP, real_BT], axis=1)
    return types.Rollout(tokens_BL, mask_BL, real_BT, logprobs_BT, real_BT.sum(axis=1), 1 - live_B.astype(jnp.int32))


def state_digest(state: Any) -> str:
    """Returns a digest of all leaves."""
    return manifest.digest_tree(state)[:16]


def leaf_digests(state: Any) -> dict[str, str]:
    """Returns the digest of each leaf by its path, so that differences can be named."""
    paths, leaves, _ = manifest.flatten(state)
    return {path: manifest.digest(jnp.asarray(leaf)) for path, leaf in zip(paths, leaves)}


# ------------------------------------------------------------------------------------------- processes of torture.py


class _EventWriter:
    """Writes events to the parent process as lines of the form ``event step time detail``."""

    def __init__(self, connection: Any) -> None:
        self._file = connection.fileno()

    def __call__(self, event: str, step: int = 0, detail: str = "-") -> None:
        os.write(self._file, f"{event} {step} {time.monotonic()} {detail}\n".encode())


class _Checkpoints(checkpoint.Checkpoints):
    """Checkpoints that report when a save starts and when it is on disk."""

    report: _EventWriter
    in_progress: int | None = None

    def save(self, step: int, state: Any, metadata: dict[str, Any] | None = None) -> None:
        self.report("save", step)
        self.in_progress = step
        threading.Thread(target=self._watch, args=(step,), daemon=True).start()
        super().save(step, state, metadata)

    def _watch(self, step: int) -> None:
        while not self._path(step).exists():
            time.sleep(0.001)
        self.report("saved", step)
        if self.in_progress == step:
            self.in_progress = None

    def wait_for_save(self) -> None:
        """Waits until the current save is on disk."""
        while self.in_progress is not None:
            time.sleep(0.001)


def run(stage: str, folder: str, steps: int, save_every: int, seed: int, connection: Any) -> None:
    """Starts or resumes a run; exits with status 0 when the run finishes, or with 75 if SIGTERM stops it."""
    path, report = pathlib.Path(folder), _EventWriter(connection)
    path.mkdir(parents=True, exist_ok=True)
    out = os.open(path / "output.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(out, 1)
    os.dup2(out, 2)
    built = build(stage, steps, seed=seed)
    calls = 0

    def step(*arguments: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls % save_every >= save_every // 2:  # otherwise a save would be in progress during every step
            checkpoints.wait_for_save()
        if calls > 1:
            report("step", calls)
            return built.step(*arguments)
        report("compile")
        outputs = jax.block_until_ready(built.step(*arguments))
        report("compiled")
        return outputs

    def report_state(done: int, state: Any, logs: Any) -> None:
        report("state", done, state_digest(state))

    def report_problem(text: str) -> None:
        report("problem", 0, text.replace("\n", " "))

    # Every message of the checkpoints is a problem, because an interruption must not leave a damaged checkpoint.
    checkpoints = _Checkpoints(path / "checkpoints", warn=report_problem)
    checkpoints.report = report
    report("restore")
    try:
        with checkpoints, metrics.MetricLog(path) as log:
            state = loop.fit(
                step,
                built.state,
                steps=steps,
                batch_at=built.batch_at,
                hyper_at=built.hyper_at,
                rng=jax.random.key(seed),
                frozen=built.frozen,
                stage=stage,
                log=log,
                checkpoints=checkpoints,
                save_every=save_every,
                callbacks=[report_state],
                fingerprint=built.fingerprint,
            )
    except loop.Preempted as stopped:
        report("stopped", stopped.step, str(stopped.saved))
        os._exit(75)
    (path / FINAL).write_text(json.dumps(leaf_digests(state)))
    report("finished", steps)
    os._exit(0)


def restore_corrupted(
    folder: str, stage: str, steps: int, seed: int, trials: list[tuple[str, str, int]], connection: Any
) -> None:
    """For each ``(kind, file, position)``, corrupts the file, restores a checkpoint and repairs the file.

    Sends ``(step, digest of the state, messages)`` for each trial, or ``(-1, "", error)`` if the restore fails.
    """
    out = os.open(os.devnull, os.O_WRONLY)
    os.dup2(out, 2)
    like = build(stage, steps, seed=seed).state
    for kind, name, position in trials:
        path = pathlib.Path(name)
        content = path.read_bytes()
        if kind == "delete":
            path.unlink()
        elif kind == "truncate":
            path.write_bytes(content[:position])
        else:
            flipped = bytearray(content)
            flipped[position // 8] ^= 1 << position % 8
            path.write_bytes(flipped)
        messages: list[str] = []
        try:
            with checkpoint.Checkpoints(folder, warn=messages.append) as checkpoints:
                step, state, _ = checkpoints.restore(like)
            connection.send((step, state_digest(state), "; ".join(messages)))
        except BaseException as error:
            connection.send((-1, "", f"{type(error).__name__}: {error}"))
        path.write_bytes(content)
    connection.close()
