"""The runs that `torture` kills: four tiny ones, by the library's own steps and loop, that say where they are.

Nothing here computes when it is imported, so that a process may be forked from one that has imported it.
"""

from __future__ import annotations

import json
import os
import pathlib
import threading
import time
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from rlhf_jax import checkpoint, metrics, parallel, types
from rlhf_jax.checkpoint import manifest
from rlhf_jax.train import dpo, loop, objectives, ppo, reward_model, sft
from rlhf_jax.train import state as state_lib
from rlhf_jax.train.optim import schedules

STAGES = ("sft", "reward_model", "dpo", "ppo")
P, T, V, B, ROWS = 4, 6, 24, 8, 64
FINAL = "final.json"


class Run(NamedTuple):
    """What `loop.fit` is given of a stage."""

    step: Callable[..., Any]
    state: Any
    frozen: Any
    batch_at: Callable[[int], Any]
    hyper_at: Callable[[int], Any]
    fingerprint: Any


def build(stage: str, steps: int, *, seed: int = 0) -> Run:
    """A stage of ``steps`` iterations on random data, with everything that a state can carry.

    The model is a table of bigrams, which compiles in a second or two; nothing else is compiled here.
    """
    rng = np.random.default_rng([seed, STAGES.index(stage)])
    adam = optax.chain(optax.scale_by_adam(eps=1e-5), optax.scale(-1.0))
    table = {"table": rng.normal(size=(V, V)).astype(np.float32)}
    scoring = {**table, "words": rng.normal(size=V).astype(np.float32)}

    def rows(*shape: int) -> np.ndarray:
        return rng.integers(4, V, size=(ROWS, *shape)).astype(np.int32)

    def create(params: Any) -> Any:
        return state_lib.create(params, adam)

    frozen: Any = None
    if stage == "ppo":
        text = sft.TokenBatch(rows(P + T), *2 * [np.ones((ROWS, P + T), bool)])  # type: ignore[arg-type]
        data = ppo.Batch(rows(P), np.ones((ROWS, P), bool), text)  # type: ignore[arg-type]
        models = ppo.Models(_generate, _logprobs_and_entropy, _values, _score_rollout, _token_logprobs)
        step = ppo.make_train_step(models, epochs=2, minibatches=2, normalise_values=True)
        frozen = ppo.Frozen(table, scoring)
        state = _filled(lambda: ppo.create(table, scoring, adam, reference=table))
    elif stage == "sft":
        real_BL = np.arange(P + T) < rng.integers(3, P + T + 1, size=(ROWS, 1))
        data = sft.TokenBatch(rows(P + T), real_BL, real_BL & (np.arange(P + T) > 0))  # type: ignore[arg-type]
        step, state = sft.make_train_step(_token_logprobs), _filled(lambda: create(table))
    elif stage == "reward_model":
        ranks_BK = rng.integers(1, 4, size=(ROWS, 3)).astype(np.int32)
        whole = np.ones((ROWS, 3, P + T), bool)
        data = types.Comparisons(rows(3, P + T), whole, ranks_BK, whole[:, :, 0])  # type: ignore[arg-type]
        step, state = reward_model.make_train_step(_score), _filled(lambda: create(scoring))
    else:
        answers = np.ones((ROWS, 2, T), bool)
        data = types.Preferences(rows(2, P + T), None, answers)  # type: ignore[arg-type]
        step = dpo.make_train_step(lambda *a: _token_logprobs(*a)[:, P:], objectives.dpo)
        state, frozen = _filled(lambda: create(table)), table

    def hyper_at(i: int) -> Any:
        how = {"learning_rate": np.float32(0.01) * schedules.cosine(i, steps), "max_grad_norm": np.float32(1.0)}
        if stage == "ppo":
            how |= {"critic_learning_rate": how["learning_rate"], "ptx_coef": 0.5, "ema_decay": 0.9}
            how |= {"kl_coef": 0.1, "kl_target": 0.01, "kl_gain": 0.1, "reference_decay": 0.9}
            return jax.tree.map(np.float32, ppo.Hyper(**how))
        return jax.tree.map(np.float32, dpo.Hyper(**how)) if stage == "dpo" else how

    def order_at(epoch: int) -> np.ndarray:
        return np.random.default_rng([seed, 1, epoch]).permutation(ROWS)

    def batch_at(i: int) -> Any:
        epoch, place = divmod(i * B, ROWS)
        rows_B = order_at(epoch)[place : place + B]
        return jax.tree.map(lambda x: x[rows_B], data)

    frozen = jax.tree.map(jnp.asarray, frozen)
    return Run(parallel.jit_step(step), state, frozen, batch_at, hyper_at, manifest.digest_tree(data))


def _filled(make: Callable[[], Any]) -> Any:
    """What ``make`` gives, with nothing compiled: zeros wherever it is not an array that it was made from."""
    given: dict[str, Any] = {}

    def leaf(path: Any, shape: Any) -> jax.Array:
        name = jax.tree_util.keystr(path)
        if name.endswith("kl_coef"):
            return jnp.array(np.ones(shape.shape, shape.dtype))
        if ".opt_state" not in name and len(shape.shape) > 0:
            if name.rpartition("[")[2] not in given:
                draw = np.random.default_rng(shape.shape)
                given[name.rpartition("[")[2]] = draw.normal(size=shape.shape).astype(shape.dtype)
            return jnp.array(given[name.rpartition("[")[2]])
        return jnp.array(np.zeros(shape.shape, shape.dtype))

    return jax.tree_util.tree_map_with_path(leaf, jax.eval_shape(make))


def _next_logprobs(params: Any, tokens_BL: Any, temperature: Any = 1.0) -> jax.Array:
    return jax.nn.log_softmax(params["table"][tokens_BL[:, :-1]] / temperature)


def _token_logprobs(params: Any, tokens_BL: Any, mask_BL: Any = None) -> jax.Array:
    of_BL = jnp.take_along_axis(_next_logprobs(params, tokens_BL), tokens_BL[:, 1:, None], axis=-1)[..., 0]
    return jnp.pad(of_BL, ((0, 0), (1, 0)))


def _logprobs_and_entropy(params: Any, tokens_BL: Any, mask_BL: Any, temperature: Any) -> tuple[jax.Array, jax.Array]:
    logprobs_BTV = _next_logprobs(params, tokens_BL, temperature)[:, P - 1 :]
    of_BT = jnp.take_along_axis(logprobs_BTV, tokens_BL[:, P:, None], axis=-1)[..., 0]
    return of_BT, -jnp.sum(jnp.exp(logprobs_BTV) * logprobs_BTV, axis=-1)


def _values(params: Any, tokens_BL: Any, mask_BL: Any) -> jax.Array:
    return params["words"][tokens_BL[:, P - 1 : -1]]


def _score(params: Any, tokens_BL: Any, mask_BL: Any) -> jax.Array:
    return jnp.sum(jnp.where(mask_BL, params["words"][tokens_BL], 0.0), axis=-1)


def _score_rollout(params: Any, rollout: types.Rollout) -> jax.Array:
    return _score(params, rollout.tokens_BL, rollout.mask_BL)


def _generate(params: Any, rng_B: Any, prompts_BP: Any, mask_BP: Any, temperature: Any) -> types.Rollout:
    """Word after word until word 1."""

    def say(carry: tuple[Any, Any], t: Any) -> tuple[Any, Any]:
        last_B, live_B = carry
        logits_BV = params["table"][last_B] / temperature
        keys_B = jax.vmap(jax.random.fold_in, in_axes=(0, None))(rng_B, t)
        word_B = jnp.where(live_B, jax.vmap(jax.random.categorical)(keys_B, logits_BV), 0)
        logprob_B = jnp.take_along_axis(jax.nn.log_softmax(logits_BV), word_B[:, None], axis=-1)[:, 0]
        return (word_B, live_B & (word_B != 1)), (word_B, live_B, jnp.where(live_B, logprob_B, 0.0))

    first = (prompts_BP[:, -1], jnp.ones(prompts_BP.shape[0], bool))
    (_, live_B), said = jax.lax.scan(say, first, jnp.arange(T))
    words_BT, real_BT, logprobs_BT = (jnp.swapaxes(x, 0, 1) for x in said)
    tokens_BL = jnp.concatenate([prompts_BP, words_BT], axis=1)
    mask_BL = jnp.concatenate([mask_BP, real_BT], axis=1)
    return types.Rollout(tokens_BL, mask_BL, real_BT, logprobs_BT, real_BT.sum(axis=1), 1 - live_B.astype(jnp.int32))


def state_digest(state: Any) -> str:
    """Of every leaf."""
    return manifest.digest_tree(state)[:16]


def leaf_digests(state: Any) -> dict[str, str]:
    """Leaf by leaf, so that a difference can be named."""
    paths, leaves, _ = manifest.flatten(state)
    return {path: manifest.digest(jnp.asarray(leaf)) for path, leaf in zip(paths, leaves)}


# ------------------------------------------------------------------------------------------------------------ a life


class _Marks:
    """Where the run is, told to whoever waits for the moment to kill it: ``mark step seconds detail``."""

    def __init__(self, connection: Any) -> None:
        self._file = connection.fileno()

    def __call__(self, mark: str, step: int = 0, detail: str = "-") -> None:
        os.write(self._file, f"{mark} {step} {time.monotonic()} {detail}\n".encode())


class _Checkpoints(checkpoint.Checkpoints):
    """Marks when a save begins, and when it is on disk."""

    marks: _Marks
    under_way: int | None = None

    def save(self, step: int, state: Any, metadata: dict[str, Any] | None = None) -> None:
        self.marks("save", step)
        self.under_way = step
        threading.Thread(target=self._watch, args=(step,), daemon=True).start()
        super().save(step, state, metadata)

    def _watch(self, step: int) -> None:
        while not self._path(step).exists():
            time.sleep(0.001)
        self.marks("saved", step)
        if self.under_way == step:
            self.under_way = None

    def settle(self) -> None:
        """Wait for the save under way, as slow data would."""
        while self.under_way is not None:
            time.sleep(0.001)


def live(stage: str, folder: str, steps: int, save_every: int, seed: int, connection: Any) -> None:
    """Begin a run or go on with it, in a process of its own; exits 75 where it was asked to stop."""
    path, marks = pathlib.Path(folder), _Marks(connection)
    path.mkdir(parents=True, exist_ok=True)
    out = os.open(path / "output.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(out, 1)
    os.dup2(out, 2)
    run = build(stage, steps, seed=seed)
    called = [0]

    def step(*arguments: Any) -> Any:
        called[0] += 1
        if called[0] % save_every >= save_every // 2:  # else none would be without a save beside it
            saves.settle()
        if called[0] > 1:
            marks("step", called[0])
            return run.step(*arguments)
        marks("compile")
        done = jax.block_until_ready(run.step(*arguments))
        marks("compiled")
        return done

    def digest(done: int, state: Any, logs: Any) -> None:
        marks("state", done, state_digest(state))

    saves = _Checkpoints(path / "checkpoints", warn=partial(_trouble, marks))
    saves.marks = marks
    marks("restore")
    try:
        with saves, metrics.MetricLog(path) as log:
            state = loop.fit(
                step,
                run.state,
                steps=steps,
                batch_at=run.batch_at,
                hyper_at=run.hyper_at,
                rng=jax.random.key(seed),
                frozen=run.frozen,
                stage=stage,
                log=log,
                checkpoints=saves,
                save_every=save_every,
                callbacks=[digest],
                fingerprint=run.fingerprint,
            )
    except loop.Preempted as stopped:
        marks("stopped", stopped.step, str(stopped.saved))
        os._exit(75)
    (path / FINAL).write_text(json.dumps(leaf_digests(state)))
    marks("finished", steps)
    os._exit(0)


def _trouble(marks: _Marks, text: str) -> None:
    """A kill must leave nothing damaged behind."""
    marks("trouble", 0, text.replace("\n", " "))


# ------------------------------------------------------------------------------------------------------------ damage


def endure(folder: str, stage: str, steps: int, seed: int, trials: list[tuple[str, str, int]], connection: Any) -> None:
    """Damage a file, restore, and put the file back, for each ``(kind, file, place)``; sends what came of it.

    It is ``(step, digest of the state, what was told)``, or ``(-1, "", error)``.
    """
    out = os.open(os.devnull, os.O_WRONLY)
    os.dup2(out, 2)
    like = build(stage, steps, seed=seed).state
    for kind, name, place in trials:
        path = pathlib.Path(name)
        whole = path.read_bytes()
        if kind == "delete":
            path.unlink()
        elif kind == "truncate":
            path.write_bytes(whole[:place])
        else:
            changed = bytearray(whole)
            changed[place // 8] ^= 1 << place % 8
            path.write_bytes(changed)
        told: list[str] = []
        try:
            with checkpoint.Checkpoints(folder, warn=told.append) as saves:
                step, state, _ = saves.restore(like)
            connection.send((step, state_digest(state), "; ".join(told)))
        except BaseException as error:
            connection.send((-1, "", f"{type(error).__name__}: {error}"))
        path.write_bytes(whole)
    connection.close()
