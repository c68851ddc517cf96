"""Compares every training stage on eight simulated devices with the same stage on one device.

This is a script, because the number of devices is fixed when JAX starts. It prints a line of JSON for each case, with
the largest differences in parameters and metrics.
"""

import dataclasses
import functools
import json
import pathlib
import sys
import tempfile
import time
from typing import Any

import jax

if __name__ == "__main__":
    jax.config.update("jax_num_cpu_devices", 8)

import jax.numpy as jnp
import numpy as np
import optax

from rlhf_jax import generation, lm, parallel, types
from rlhf_jax.train import dpo, objectives, ppo, reward_model, sft
from rlhf_jax.train import state as state_lib

numpy_types: Any = types
"""The library's pytrees, filled with NumPy arrays."""
P, T = 4, 8
LONG = sys.argv[1:] == ["long"]
CFG = lm.LMConfig(
    vocab_size=32, n_layers=2 if LONG else 1, d_model=16, n_heads=4, n_kv_heads=2, d_mlp=32, max_length=P + T
)
AXES = lm.logical_axes(CFG, head=True)
SPEC = generation.Sampling(max_new_tokens=T, stop_ids=(1, 2), pad_id=0)
ADAM = optax.chain(optax.scale_by_adam(b2=0.95, eps=1e-5), optax.scale(-1.0))
"""Of all stages: with an epsilon of 1e-8, rounding errors in zero gradients would become full steps."""
STEPS = 10
SHARDS = 8

MESHES: dict[str, dict[str, Any]] = {
    "8": {"data": 8},
    "2x4": {"data": 2, "fsdp": 4},
    "2x2x2": {"data": 2, "fsdp": 2, "tensor": 2},
    "sequence": {"data": 2, "tensor": 2, "sequence": 2},
}


@functools.cache
def weights():
    """Returns weights that are large enough to make some tokens likely."""
    shapes = jax.eval_shape(lambda key: lm.with_head(key, lm.init(key, CFG), CFG), jax.random.key(0))
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda x: np.asarray(0.4 * rng.normal(size=x.shape), x.dtype), shapes)


def policy():
    return {name: node for name, node in weights().items() if name != "head"}


def real(rng, rows, width, least=3):
    """Returns a mask with rows of very different lengths, so that devices have different numbers of tokens."""
    lengths = np.linspace(least, width, rows).astype(int) if rng is None else rng.integers(least, width + 1, rows)
    return np.arange(width)[None] < np.sort(lengths)[:, None]


def text(seed, rows=16):
    rng = np.random.default_rng(seed)
    mask = real(rng, rows, P + T)
    loss_mask = mask & (rng.random(mask.shape) < 0.7)
    return sft.TokenBatch(rng.integers(3, 32, mask.shape).astype(np.int32), mask, loss_mask)


class SFT:
    frozen: Any = None
    hyper: Any = {"learning_rate": np.float32(1e-4), "max_grad_norm": np.float32(1.0)}  # noqa: RUF012

    @staticmethod
    def make():
        return state_lib.create(policy(), ADAM)

    @staticmethod
    def step(**options):
        return sft.make_train_step(functools.partial(lm.token_logprobs, cfg=CFG), **options)

    @staticmethod
    def batch(i):
        return text(i)


class Reward(SFT):
    @staticmethod
    def make():
        return state_lib.create(weights(), ADAM)

    @staticmethod
    def step(**options):
        return reward_model.make_train_step(functools.partial(lm.score, cfg=CFG), **options)

    @staticmethod
    def batch(i):
        rng = np.random.default_rng(i)
        B, K = 16, 3
        mask = real(rng, B * K, P + T).reshape(B, K, P + T)
        ranks = np.stack([rng.permutation(K) + 1 for _ in range(B)]).astype(np.int32)
        where = np.arange(K)[None] < rng.integers(1, K + 1, size=(B, 1))
        return numpy_types.Comparisons(rng.integers(3, 32, mask.shape).astype(np.int32), mask, ranks, where)


class DPO(SFT):
    hyper = jax.tree.map(np.float32, dpo.Hyper(learning_rate=1e-4, max_grad_norm=1.0))
    frozen = policy()

    @staticmethod
    def step(**options):
        logprobs = functools.partial(lm.token_logprobs, cfg=CFG, prompt_width=P)
        return dpo.make_train_step(logprobs, objectives.dpo, **options)

    @staticmethod
    def batch(i):
        rng = np.random.default_rng(i)
        answers = real(rng, 32, T, least=1)[rng.permutation(32)].reshape(16, 2, T)
        prompts = np.ones((16, 2, P), bool)
        mask = np.concatenate([prompts, answers], axis=2)
        return numpy_types.Preferences(rng.integers(3, 32, mask.shape).astype(np.int32), mask, answers)


def rollouts():
    def generate(params, rng_B, prompts_BP, mask_BP, temperature):
        sampling = SPEC.replace(temperature=temperature)  # type: ignore[attr-defined]
        return generation.generate(params, rng_B, prompts_BP, mask_BP, cfg=CFG, sampling=sampling, n=2)

    def logprobs(params, tokens_BL, mask_BL, temperature):
        return lm.token_stats(params, tokens_BL, cfg=CFG, prompt_width=P, mask_BL=mask_BL, temperature=temperature)

    def values(params, tokens_BL, mask_BL):
        return lm.values(params, tokens_BL, cfg=CFG, prompt_width=P, mask_BL=mask_BL)

    def score(params, rollout):
        return lm.score(params, rollout.tokens_BL, cfg=CFG, mask_BL=rollout.mask_BL)

    def checksum(rollout):
        """Returns a checksum of each answer; sums of small integers are exact in float32."""
        position = 1 + jnp.arange(P + T)[None, :]
        return {"checksum": jnp.sum(jnp.where(rollout.mask_BL, rollout.tokens_BL * position, 0), axis=1) % 4096}

    return ppo.Models(generate, logprobs, values, score, functools.partial(lm.token_logprobs, cfg=CFG), checksum)


class PPO(SFT):
    hyper = jax.tree.map(
        np.float32,
        ppo.Hyper(
            learning_rate=1e-4,
            critic_learning_rate=1e-4,
            kl_coef=0.1,
            kl_gain=0.1,
            ptx_coef=0.5,
            max_grad_norm=1.0,
            ema_decay=0.9,
            missing_stop_score=-1.0,
        ),
    )
    frozen = ppo.Frozen(policy(), weights(), heldout=weights())

    @staticmethod
    def make():
        return ppo.create(policy(), weights(), ADAM)

    @staticmethod
    def step(**options):
        return ppo.make_train_step(rollouts(), epochs=1, minibatches=2, samples=2, shards=SHARDS, **options)

    @staticmethod
    def batch(i):
        rng = np.random.default_rng(i)
        mask: Any = real(rng, 16, P, least=1)[:, ::-1]
        prompts: Any = rng.integers(3, 32, mask.shape).astype(np.int32)
        return ppo.Batch(prompts, mask, text(100 + i, rows=32))


STAGES = {"sft": SFT, "reward": Reward, "dpo": DPO, "ppo": PPO}


def train(stage, form, *, micro_batches=1):
    """Returns the parameters after ten steps and the metrics of each; ``form`` selects how the step is compiled."""
    spec = STAGES[stage]
    axis_name = {"shard_map": parallel.BATCH_AXES, "pmap": "devices"}.get(form.partition(" ")[0])
    train_step = spec.step(micro_batches=micro_batches, axis_name=axis_name)
    state, frozen = jax.jit(spec.make)(), spec.frozen
    step: Any
    if form == "one":
        step = parallel.jit_step(train_step)
    elif form == "pmap":
        step = parallel.pmap_step(train_step)
        state, frozen = step.replicate(state), step.replicate(frozen)
    else:
        name = form.split()[1]
        mesh = parallel.make_mesh(**MESHES[name])
        if form.startswith("shard_map"):
            checked = form.endswith("checked")
            step = own_shard_map(train_step, mesh) if checked else parallel.shard_map_step(train_step, mesh)
            state, frozen = parallel.replicate(state, mesh), parallel.replicate(frozen, mesh)
        else:
            step = parallel.jit_step(train_step, mesh=mesh)
            state = jax.jit(spec.make, out_shardings=parallel.shardings(state, mesh, AXES))()
            frozen = parallel.shard(frozen, parallel.shardings(frozen, mesh, AXES))
            params = state.params if stage != "ppo" else state.ema
            assert name == "8" or not params["layers"]["q"]["kernel"].is_fully_replicated
    logs = []
    for i in range(STEPS):
        before = state
        state, metrics = step(state, frozen, spec.hyper, spec.batch(i), jax.random.key(1))
        assert all(x.is_deleted() for x in jax.tree.leaves(before.params)), "the state was not donated"
        logs.append(jax.device_get(metrics))
    assert step.traces == 1, step.traces
    if form == "pmap":
        state = step.unreplicate(state)
    result = {"params": state.params} | ({"ema": state.ema, "kl_scale": state.kl_scale} if stage == "ppo" else {})
    return jax.device_get(result), logs


def own_shard_map(train_step, mesh):
    """Compiles a step as a user might: `jax.shard_map` with its default check of how values vary over devices."""

    def mapped(state, frozen, hyper, batch, rng):
        whole, rows = jax.sharding.PartitionSpec(), jax.sharding.PartitionSpec(parallel.BATCH_AXES)
        specs = (whole, whole, whole, jax.tree.map(lambda _: rows, batch), whole)
        step = jax.shard_map(train_step, mesh=mesh, in_specs=specs, out_specs=(whole, whole))
        return step(state, frozen, hyper, batch, rng)

    return parallel.JitStep(mapped, mesh=mesh)


def number(metric):
    return float(metric.value()) if hasattr(metric, "value") else float(metric)


def max_difference(a, b):
    return max(float(np.abs(x - y).max()) for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True))


def cases(long):
    """Yields ``(stage, form, micro_batches)``: all combinations, or a few that cover every part."""
    if not long:
        yield from (("sft", "jit sequence", 2), ("sft", "pmap", 1), ("reward", "jit 2x4", 1))
        yield from (("dpo", "shard_map 2x4", 1), ("ppo", "shard_map 8", 2), ("ppo", "shard_map 8 checked", 1))
        return
    for stage in STAGES:
        for form in ("jit 8", "jit 2x4", "jit 2x2x2", "shard_map 8", "shard_map 2x4", "pmap"):
            yield stage, form, 1
        for form in ("jit 2x4", "shard_map 8", "shard_map 8 checked", "pmap"):
            yield stage, form, 2
    yield "sft", "jit sequence", 1


def main():
    single = {}
    for stage, form, micro_batches in cases(LONG):
        started = time.process_time()
        if stage not in single:
            single[stage] = train(stage, "one")
            start = jax.device_get(jax.jit(STAGES[stage].make)().params)
            print(json.dumps({"stage": stage, "moved": max_difference(start, single[stage][0]["params"])}), flush=True)
        params, logs = train(stage, form, micro_batches=micro_batches)
        differences = [
            {name: abs(number(log[name]) - number(expected[name])) for name in expected}
            for log, expected in zip(logs, single[stage][1], strict=True)
        ]
        result = {
            "stage": stage,
            "form": form,
            "micro_batches": micro_batches,
            "params": max_difference(params, single[stage][0]),
            "metrics": {name: max(each[name] for each in differences) for name in differences[0]},
            "same_answers": all(each.get("checksum", 0.0) == 0 for each in differences),
            "seconds": round(time.process_time() - started, 1),
        }
        print(json.dumps(result), flush=True)


class Silent:
    """A progress display that prints nothing."""

    def __getattr__(self, name):
        return lambda *_, **__: None


def small_job(folder, mesh):
    """Returns a very small InstructGPT job."""
    from launch import settings
    from recipe import jobs, policy_sampling, tasks

    from rlhf_jax import checkpoint, metrics

    policy_sampling.CHUNK = 16
    options = settings.preset("smoke")
    parts = {
        "net": dataclasses.replace(options.net, layers=1, width=32, mlp=64, heads=4),
        "pretrain": dataclasses.replace(options.pretrain, documents=400, steps=3, batch=16),
        "sft": dataclasses.replace(options.sft, demonstrations=32, epochs=1, mix_epochs=1),
        "ppo": dataclasses.replace(options.ppo, iterations=1, batch=16, shards=4),
        "evaluation": dataclasses.replace(options.evaluation, prompts=8),
    }
    options = dataclasses.replace(options, **parts)
    return jobs.make_job(
        options,
        tasks.make_task(options),
        model=None,
        checkpoints=lambda stage: checkpoint.Checkpoints(folder / stage),
        log=metrics.MetricLog(folder),
        progress=Silent(),
        mesh=mesh,
    )


def recipe(job):
    """Returns the weights of the base and SFT models and, in the long version, the reward and PPO-ptx models."""
    from recipe import stages

    rows, rng = job.task.demonstrations, np.random.default_rng(0)
    pick = rng.integers(0, len(rows.tokens_BL), size=(16, 3))
    ranks = np.stack([rng.permutation(3) + 1 for _ in range(16)]).astype(np.int32)
    ranked = numpy_types.Comparisons(rows.tokens_BL[pick], rows.mask_BL[pick], ranks, np.ones((16, 3), bool))
    base = stages.pretrain(job)
    start = stages.supervised(job, "sft_mix", base, epochs=1, mix=0.25)
    if not LONG:
        return {"base": base, "sft_mix": start}
    rewards = stages.train_reward_models(job, start, [ranked])
    ppo_ptx = stages.train_ppo(job, "ppo", start, rewards, ptx_coef=1.0)
    return {"base": base, "sft_mix": start, "reward": rewards[0], "ppo": ppo_ptx}


def whole_job():
    """Runs the recipe on a mesh, restores it on another mesh and on one device, and compares it with one device."""
    with tempfile.TemporaryDirectory() as folder:
        started = time.process_time()
        mesh = parallel.make_mesh(**MESHES["2x2x2"])
        job = small_job(pathlib.Path(folder), mesh)
        weights = recipe(job)
        kernels = [node["layers"]["q"]["kernel"] for node in weights.values()]
        result = {
            "job": "2x2x2",
            "sharded": [not x.is_fully_replicated for x in kernels],
            "programs": job.programs(),
            "seconds": round(time.process_time() - started, 1),
        }
        weights = jax.device_get(weights)
        for other in (parallel.make_mesh(**MESHES["2x4"]), None):
            again = small_job(pathlib.Path(folder), other)
            restored = jax.device_get(recipe(again))
            name = "one" if other is None else "2x4"
            result[f"restored on {name}"] = max_difference(restored, weights)
            result[f"retrained on {name}"] = again.supervised_step.traces
        if not LONG:
            print(json.dumps(result), flush=True)
            return
        single = jax.device_get(recipe(small_job(pathlib.Path(folder) / "single", None)))
        result["difference"] = {name: max_difference(weights[name], single[name]) for name in weights}
    print(json.dumps(result), flush=True)


def print_errors():
    """Prints the errors for indivisible batches and impossible meshes."""
    mesh = parallel.make_mesh(**MESHES["2x2x2"])
    step = parallel.jit_step(SFT.step(), mesh=mesh)
    state = jax.jit(SFT.make)()
    indivisible = jax.tree.map(lambda x: x[:6], SFT.batch(0))
    for fn in (
        lambda: step(state, None, SFT.hyper, indivisible, jax.random.key(0)),
        lambda: parallel.pmap_step(SFT.step())(state, None, SFT.hyper, indivisible, jax.random.key(0)),
        lambda: parallel.shard_map_step(SFT.step(), mesh),
        lambda: parallel.make_mesh(data=3),
    ):
        try:
            fn()
        except ValueError as error:
            print(json.dumps({"error": str(error)}), flush=True)


if __name__ == "__main__":
    print_errors()
    main()
    whole_job()
