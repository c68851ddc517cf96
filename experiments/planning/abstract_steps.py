"""Train steps on abstract arrays: the arguments of each stage's step are shapes with shardings on a mesh.

This module creates no arrays. It lowers the library's train steps through `parallel.jit_step`, as a run does.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec

from planning.plan_settings import Plan
from rlhf_jax import generation, lm, parallel, types
from rlhf_jax.lm import costs
from rlhf_jax.train import dpo, objectives, ppo, ppo_models, reward_model, sft
from rlhf_jax.train import state as state_lib

STOP_ID = 2
"""An arbitrary token id; it does not affect the cost of the program."""


@dataclasses.dataclass(frozen=True)
class Program:
    """A program to compile, and the properties that are known without compilation."""

    name: str
    lower: Callable[[], jax.stages.Lowered]
    traced: Callable[[], Any]
    """Returns the jaxpr of the program before it is partitioned among the chips."""
    kept: dict[str, int]
    """Exact number of bytes per chip, by kind, of the arrays kept between calls, and of the KV cache."""
    tokens: int
    """Number of training tokens per call (for ppo-collect, per iteration), over all rows, epochs and trained models."""
    model_flops: float
    """FLOPs of the models on all chips: per parameter and token, 2 forward and 6 with gradients, plus attention."""
    loops: int
    """Assumed number of iterations of loops that can stop early; in a rollout, the number of answer tokens minus 1."""


def build(plan: Plan, cfg: lm.LMConfig, mesh: Mesh | AbstractMesh) -> Program:
    """Returns the program of the plan's stage."""
    return {
        "sft": _sft,
        "reward_model": _reward_model,
        "dpo": _dpo,
        "ppo": partial(_ppo, part="ppo"),
        "ppo-collect": partial(_ppo, part="collect"),
        "ppo-update": partial(_ppo, part="update"),
    }[plan.stage](plan, cfg, mesh)


def chip_bytes(tree: Any) -> int:
    """Returns the number of bytes per chip of abstract arrays, which may have shardings."""

    def shard_bytes(x: Any) -> int:
        shape = x.shape if getattr(x, "sharding", None) is None else x.sharding.shard_shape(x.shape)
        return int(np.prod(shape, dtype=np.int64)) * x.dtype.itemsize

    return sum(shard_bytes(x) for x in jax.tree.leaves(tree))


def cache_bytes(plan: Plan, cfg: lm.LMConfig, mesh: Mesh | AbstractMesh) -> int:
    """Returns the number of bytes per chip of a rollout's KV cache."""
    cache = jax.eval_shape(partial(lm.create_cache, cfg, batch=plan.batch, slots=plan.prompt + plan.response - 1))
    axes = ("batch", "kv_heads", None, None)
    sharding = NamedSharding(mesh, parallel.spec(axes, mesh, shape=cache.keys[0].shape))
    return chip_bytes(
        _with_shardings((cache.keys, cache.values), jax.tree.map(lambda _: sharding, (cache.keys, cache.values)))
    )


def _sft(plan: Plan, cfg: lm.LMConfig, mesh: Mesh | AbstractMesh) -> Program:
    state = _state(plan, cfg, mesh)
    shape = (plan.batch, plan.length)
    batch = sft.TokenBatch(_ints(shape), _bools(shape), _bools(shape))
    step = sft.make_train_step(partial(lm.token_logprobs, cfg=cfg), micro_batches=plan.micro_batches)
    flops = 3 * costs.forward_flops(cfg, rows=plan.batch, length=plan.length)
    return _program(
        "sft", plan, step, (state, None, _rates(), batch), mesh, tokens=plan.batch * plan.length, flops=flops
    )


def _reward_model(plan: Plan, cfg: lm.LMConfig, mesh: Mesh | AbstractMesh) -> Program:
    state = _state(plan, cfg, mesh, head=True)
    B, K, L = plan.batch, plan.completions, plan.length
    batch = types.Comparisons(_ints((B, K, L)), _bools((B, K, L)), _floats((B, K)), _bools((B, K)))
    step = reward_model.make_train_step(partial(lm.score, cfg=cfg), micro_batches=plan.micro_batches)
    flops = 3 * costs.forward_flops(cfg, rows=B * K, length=L, logits=0)
    return _program("reward_model", plan, step, (state, None, _rates(), batch), mesh, tokens=B * K * L, flops=flops)


def _dpo(plan: Plan, cfg: lm.LMConfig, mesh: Mesh | AbstractMesh) -> Program:
    state, reference = _state(plan, cfg, mesh), _frozen(plan, cfg, mesh)
    B, L = plan.batch, plan.prompt + plan.response
    batch = types.Preferences(_ints((B, 2, L)), _bools((B, 2, L)), _bools((B, 2, plan.response)))
    logprobs = partial(lm.token_logprobs, cfg=cfg, prompt_width=plan.prompt)
    step = dpo.make_train_step(logprobs, objectives.dpo, micro_batches=plan.micro_batches)
    flops = 4 * costs.forward_flops(cfg, rows=2 * B, length=L, logits=plan.response)
    args = (state, reference, _scalars(dpo.Hyper()), batch)
    return _program("dpo", plan, step, args, mesh, tokens=2 * B * L, flops=flops, frozen=reference)


def _ppo(plan: Plan, cfg: lm.LMConfig, mesh: Mesh | AbstractMesh, *, part: str) -> Program:
    spec = generation.Sampling(max_new_tokens=plan.response, stop_ids=(STOP_ID,))
    models = ppo_models.from_config(cfg, spec, prompt_width=plan.prompt)
    policy, critic = lm.abstract(cfg), lm.abstract(cfg, head=True)
    state = jax.eval_shape(
        partial(ppo.create, tx=_optimiser(plan)), _cast(policy, plan.params), _cast(critic, plan.params)
    )
    state = _with_shardings(state, parallel.shardings(state, mesh, lm.logical_axes(cfg, head=True)))
    frozen = ppo.Frozen(_frozen(plan, cfg, mesh), _frozen(plan, cfg, mesh, head=True))
    B, P, T = plan.batch, plan.prompt, plan.response
    batch, hyper = ppo.Batch(_ints((B, P)), _bools((B, P))), _scalars(ppo.Hyper())
    options: dict[str, Any] = {
        "epochs": plan.epochs,
        "minibatches": plan.minibatches,
        "micro_batches": plan.micro_batches,
    }

    # pair_flops covers a forward pass of a language model and one of a scalar model. Collecting decodes answers and
    # runs four models on them: both frozen models, the policy and the critic. An update trains the policy and the
    # critic.
    answer_flops = costs.forward_flops(cfg, rows=B, length=P + T, logits=T)
    pair_flops = answer_flops + costs.forward_flops(cfg, rows=B, length=P + T, logits=0)
    collect_flops = answer_flops + 2 * pair_flops
    update_flops = 3 * plan.epochs * pair_flops
    names = ("logprobs_BT", "values_BT", "advantages_BT", "returns_BT", "reference_BT")
    per_token: dict[str, Any] = {name: _floats((B, T)) for name in names}
    experience = types.Experience(
        tokens_BL=_ints((B, P + T)),
        mask_BL=_bools((B, P + T)),
        response_mask_BT=_bools((B, T)),
        **per_token,
    )

    def collect(params: Any, frozen: Any, hyper: Any, batch: ppo.Batch, rng: Any) -> Any:
        return ppo.collect(models, params, frozen, hyper, batch, rng)

    def update(state: Any, frozen: Any, hyper: Any, batch: types.Experience, rng: Any) -> Any:
        return ppo.update(models, state, batch, hyper, None, rng, frozen=frozen, **options)

    known: dict[str, Any] = {"tokens": B * (P + T) * 2 * plan.epochs, "frozen": frozen, "state": state}
    if part == "collect":
        args = (state.params, frozen, hyper, batch)
        return _program("ppo collect", plan, collect, args, mesh, flops=collect_flops, **known, cfg=cfg, donate=False)
    if part == "update":
        args = (state, None, hyper, experience)
        return _program("ppo update", plan, update, args, mesh, flops=update_flops, **known)
    args, flops = (state, frozen, hyper, batch), collect_flops + update_flops
    return _program("ppo", plan, ppo.make_train_step(models, **options), args, mesh, flops=flops, **known, cfg=cfg)


def _optimiser(plan: Plan) -> optax.GradientTransformation:
    """Returns Adam with learning rate 1; its first moment has the dtype ``plan.moment``."""
    adam = optax.scale_by_adam(b1=0.9, b2=0.95, mu_dtype=jnp.dtype(plan.moment))
    return optax.chain(adam, optax.scale(-1.0))


def _program(
    name: str,
    plan: Plan,
    step: Callable[..., Any],
    args: tuple[Any, ...],
    mesh: Mesh | AbstractMesh,
    *,
    tokens: int,
    flops: float,
    frozen: Any = None,
    state: Any = None,
    cfg: lm.LMConfig | None = None,
    donate: bool = True,
) -> Program:
    state = args[0] if state is None else state
    kept = {"parameters": chip_bytes(state.params), "optimiser": chip_bytes(state.opt_state)}
    averaged = getattr(state, "ema", None)
    if averaged is not None:
        kept["averaged policy"] = chip_bytes(averaged)
    if frozen is not None:
        kept["frozen models"] = chip_bytes(frozen)
    if cfg is not None:
        kept["KV cache"] = cache_bytes(plan, cfg, mesh)
    replicated = NamedSharding(mesh, PartitionSpec())
    trained, frozen_models, hyper, batch = args
    batch = _with_shardings(batch, parallel.batch_shardings(batch, mesh))
    key = jax.eval_shape(lambda: jax.random.key(0))
    rng = jax.ShapeDtypeStruct(key.shape, key.dtype, sharding=replicated)
    hyper = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=replicated), hyper)
    step_args = (trained, frozen_models, hyper, batch, rng)

    def lower() -> jax.stages.Lowered:
        assert isinstance(mesh, Mesh), "an abstract mesh has no devices to compile for"
        if donate:
            return parallel.jit_step(step, mesh=mesh).lower(*step_args)
        with jax.set_mesh(mesh):
            return jax.jit(step).lower(*step_args)

    return Program(
        name=name,
        lower=lower,
        traced=lambda: jax.make_jaxpr(step)(*step_args),
        kept=kept,
        tokens=tokens,
        model_flops=flops,
        loops=plan.response - 1 if cfg is not None else 1,
    )


def _state(plan: Plan, cfg: lm.LMConfig, mesh: Mesh | AbstractMesh, *, head: bool = False) -> Any:
    params = _cast(lm.abstract(cfg, head=head), plan.params)
    state = jax.eval_shape(partial(state_lib.create, tx=_optimiser(plan)), params)
    return _with_shardings(state, parallel.shardings(state, mesh, lm.logical_axes(cfg, head=head)))


def _frozen(plan: Plan, cfg: lm.LMConfig, mesh: Mesh | AbstractMesh, *, head: bool = False) -> Any:
    params = _cast(lm.abstract(cfg, head=head), plan.frozen)
    return _with_shardings(params, parallel.shardings(params, mesh, lm.logical_axes(cfg, head=head)))


def _cast(tree: Any, dtype: str) -> Any:
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, jnp.dtype(dtype)), tree)


def _with_shardings(tree: Any, shardings: Any) -> Any:
    return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), tree, shardings)


def _rates() -> dict[str, jax.ShapeDtypeStruct]:
    return _scalars({"learning_rate": 0.0, "max_grad_norm": 0.0})


def _scalars(tree: Any) -> Any:
    return jax.tree.map(lambda _: jax.ShapeDtypeStruct((), jnp.float32), tree)


def _ints(shape: tuple[int, ...]) -> Any:
    return jax.ShapeDtypeStruct(shape, jnp.int32)


def _bools(shape: tuple[int, ...]) -> Any:
    return jax.ShapeDtypeStruct(shape, jnp.bool_)


def _floats(shape: tuple[int, ...]) -> Any:
    return jax.ShapeDtypeStruct(shape, jnp.float32)
