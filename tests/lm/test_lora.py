import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from lora_cases import ALL, CFG, CONFIGS, SCALE, TOKENS, adapters, base, close, copied, fresh, logits_of, same

from rlhf_jax import generation, lm, parallel, types
from rlhf_jax.lm import lora
from rlhf_jax.lm import params as lm_params
from rlhf_jax.train import ppo, reward_model, sft
from rlhf_jax.train import state as state_lib

ADAM = optax.chain(optax.scale_by_adam(eps=1e-5), optax.scale(-1.0))


# ----------------------------------------------------------------------------------------------- the pure functions


@pytest.mark.parametrize("name", CONFIGS)
def test_new_adapters_do_not_change_the_model(name):
    cfg = CONFIGS[name]
    attached = lora.attach(base(name), fresh(cfg), scale=2.0)
    np.testing.assert_array_equal(logits_of(attached, cfg), logits_of(base(name), cfg))
    for leaf_name, leaf in lm_params.flatten(fresh(cfg)).items():
        if leaf_name.endswith("lora_b"):
            assert not leaf.any()
        else:
            # The distribution is uniform, with PEFT's bounds.
            bound = leaf.shape[1] ** -0.5
            assert 0.8 * bound < abs(leaf).max() <= bound and abs(leaf.mean()) < 0.2 * bound


@pytest.mark.parametrize(("preset", "rank"), [("gpt2", 16), ("pythia-1b", 64), ("llama-3-8b", 64)])
def test_policy_and_reference_share_the_memory_of_the_base(preset, rank):
    cfg = lm.LMConfig.preset(preset)

    def floats(make):
        return sum(leaf.size for leaf in jax.tree.leaves(jax.eval_shape(make, jax.random.key(0))))

    model, own = floats(lambda key: lm.init(key, cfg)), floats(lambda key: lora.init(key, cfg, rank=rank, pattern=ALL))
    assert 1.0 < (model + own) / model < 1.15


def test_an_adapter_depends_only_on_its_name_and_key():
    few, many = (lm_params.flatten(fresh(pattern=p)) for p in ("layers/(q|v)/kernel", ALL))
    assert sorted(few) == [f"layers/{n}/lora_{x}" for n in "qv" for x in "ab"] and len(many) == 14
    same(few, {name: many[name] for name in few})
    assert many["layers/q/lora_a"].shape == (2, 32, 3) and many["layers/q/lora_b"].shape == (2, 3, 64)
    assert many["layers/v/lora_b"].shape == (2, 3, 32)
    assert many["layers/out/lora_a"].shape == (2, 64, 3) and many["layers/out/lora_b"].shape == (2, 3, 32)
    assert not np.array_equal(many["layers/k/lora_a"], many["layers/v/lora_a"])
    axes = {name: row.axes for name, row in lora.table(CFG, rank=3, pattern="layers/(k|out)/kernel").items()}
    assert axes == {
        "layers/k/lora_a": ("layers", "embed", "rank"),
        "layers/k/lora_b": ("layers", "rank", "kv_heads"),
        "layers/out/lora_a": ("layers", "heads", "rank"),
        "layers/out/lora_b": ("layers", "rank", "embed"),
    }


@pytest.mark.parametrize(
    "name", [name if name in ("llama", "gpt2") else pytest.param(name, marks=pytest.mark.slow) for name in CONFIGS]
)
def test_attached_and_merged_adapters_agree_in_logits_and_gradients(name):
    cfg, own = CONFIGS[name], adapters(CONFIGS[name])
    tokens = jnp.asarray(TOKENS, jnp.int32)

    def loss(join):
        def of(params, own):
            logprobs_BL = lm.token_logprobs(join(params, own, scale=SCALE), tokens, cfg=cfg)
            return jnp.sum(logprobs_BL * jnp.cos(jnp.arange(11.0))[None, :])

        return jax.jit(jax.grad(of, argnums=(0, 1)))(base(name), own)

    attached, merged = (join(base(name), own, scale=SCALE) for join in (lora.attach, lora.merge))
    assert merged.keys() == base(name).keys() and merged["layers"].keys() == base(name)["layers"].keys()
    close(logits_of(attached, cfg), logits_of(merged, cfg), 1e-5)
    assert abs(logits_of(attached, cfg) - logits_of(base(name), cfg)).max() > 0.1
    # A key's bias shifts all scores of a query equally, so its gradient is only rounding error.
    (of_base, of_own), (of_base_merged, of_own_merged) = loss(lora.attach), loss(lora.merge)
    close(of_own, of_own_merged, 1e-5)
    close(of_base["layers"]["q"]["kernel"], of_base_merged["layers"]["q"]["kernel"], 1e-5)


def test_base_arrays_are_shared_and_unchanged():
    params, own = base(), adapters(pattern="layers/(q|down)/kernel")
    before = copied(params)
    attached, merged = lora.attach(params, own, scale=SCALE), lora.merge(params, own, scale=SCALE)
    same(params, before)
    flat, flat_attached, flat_merged = map(lm_params.flatten, (params, attached, merged))
    assert all(flat_attached[name] is leaf for name, leaf in flat.items())
    changed = {name for name, leaf in flat.items() if flat_merged[name] is not leaf}
    assert changed == {"layers/q/kernel", "layers/down/kernel"}
    low = lm_params.flatten(own)
    for node in ("layers/q", "layers/down"):
        a, b = (np.asarray(low[f"{node}/lora_{x}"], np.float64) for x in "ab")
        expected = flat[f"{node}/kernel"] + SCALE * np.matmul(a, b).reshape(flat[f"{node}/kernel"].shape)
        np.testing.assert_allclose(flat_merged[f"{node}/kernel"], expected, atol=1e-6)
    half = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params)
    assert lora.merge(half, own, scale=SCALE)["layers"]["q"]["kernel"].dtype == jnp.bfloat16


def test_greedy_answers_with_attached_and_merged_adapters_agree():
    how = generation.Sampling(max_new_tokens=8, stop_ids=(), pad_id=0, greedy=True)
    prompts, mask = jnp.asarray(TOKENS[:, :5], jnp.int32), jnp.ones((3, 5), bool)

    @functools.partial(jax.jit, static_argnames="join")
    def answer(join):
        params = join(base(), adapters(), scale=SCALE)
        return generation.generate(params, jax.random.split(jax.random.key(0), 3), prompts, mask, cfg=CFG, sampling=how)

    attached, merged = answer(lora.attach), answer(lora.merge)
    np.testing.assert_array_equal(attached.tokens_BL, merged.tokens_BL)
    np.testing.assert_allclose(attached.logprobs_BT, merged.logprobs_BT, atol=1e-4)


def test_errors_name_wrong_patterns_and_adapters():
    for pattern in ("layers/query/kernel", ["layers/q/kernel", "q"], "embed/tokens", "layers/attn_norm/scale"):
        wrong = pattern if isinstance(pattern, str) else pattern[-1]
        with pytest.raises(ValueError, match=rf"'{wrong}' matches none .*layers/out/kernel"):
            fresh(pattern=pattern)
    with pytest.raises(ValueError, match=r"'layers/\(q' is not a valid regular expression"):
        fresh(pattern="layers/(q")
    with pytest.raises(ValueError, match="no pattern"):
        fresh(pattern=[])
    with pytest.raises(ValueError, match="rank is 0"):
        fresh(rank=0)
    attached = lora.attach(base(), adapters(), scale=1.0)
    for join in (lora.attach, lora.merge):
        with pytest.raises(ValueError, match="already have an adapter at layers/q"):
            join(attached, {"layers": {"q": adapters()["layers"]["q"]}}, scale=1.0)
        with pytest.raises(ValueError, match="layers/gate requires layers/gate/kernel, which is missing"):
            join(base("gpt2"), {"layers": {"gate": adapters()["layers"]["gate"]}}, scale=1.0)
        with pytest.raises(ValueError, match=r"layers/k has shapes .*\(2, 3, 64\).*\(2, 32, 2, 16\)"):
            join(base(), {"layers": {"k": adapters()["layers"]["q"]}}, scale=1.0)
        with pytest.raises(ValueError, match="requires layers/q/lora_b"):
            join(base(), {"layers": {"q": {"lora_a": adapters()["layers"]["q"]["lora_a"]}}}, scale=1.0)
        with pytest.raises(ValueError, match="only lora_a and lora_b, but have layers/q/scale"):
            join(base(), {"layers": {"q": adapters()["layers"]["q"] | {"scale": jnp.ones(())}}}, scale=1.0)


# ------------------------------------------------------------------------------------------------------- trainers


@functools.cache
def model(head=False):
    """Returns the base model of the trainers, with hidden states large enough for peaked token distributions."""
    return {**base(head=head), "final_norm": {"scale": jnp.full((32,), 2.0)}}


def leaves_like(tree, own):
    """Returns whether every array of an optimiser's state is a scalar or has the shape of an adapter."""
    shapes = {leaf.shape for leaf in jax.tree.leaves(own)} | {()}
    return all(leaf.shape in shapes for leaf in jax.tree.leaves(tree))


def test_supervised_training_updates_adapters_only():
    join = functools.partial(lora.attach, scale=2.0)
    score = functools.partial(lm.token_logprobs, cfg=CFG)
    step = parallel.jit_step(sft.make_train_step(score, join=join))
    split = parallel.jit_step(sft.make_train_step(score, join=join, micro_batches=3))
    rows = jnp.asarray(TOKENS, jnp.int32)
    batch = sft.TokenBatch(rows, rows > 0, (rows > 0).at[:, 0].set(False))
    hyper = {"learning_rate": np.float32(0.03), "max_grad_norm": np.float32(1.0)}
    frozen, before = model(), copied(model())
    state = state_lib.create(fresh(), ADAM)
    assert leaves_like(state.opt_state, fresh())
    numbers = sum(leaf.size for leaf in jax.tree.leaves(state.opt_state))
    assert numbers == 1 + 2 * sum(leaf.size for leaf in jax.tree.leaves(fresh()))
    parts, _ = split(state_lib.create(fresh(), ADAM), frozen, hyper, batch, jax.random.key(0))
    found = []
    for i in range(20):
        state, logs = step(state, frozen, hyper, batch, jax.random.key(0))
        found.append(float(logs["loss"].value()))
        if i == 0:
            jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=2e-3), state.params, parts.params)
    logprobs_BL = jax.jit(score)(frozen, rows)
    np.testing.assert_allclose(found[0], -logprobs_BL[:, 1:].mean(), rtol=1e-5)
    assert found[-1] < 0.5 * found[0]
    assert step.traces == 1
    same(frozen, before)


def test_reward_model_trains_adapters_and_head(tmp_path):
    join = functools.partial(lora.attach, scale=2.0)
    step = parallel.jit_step(reward_model.make_train_step(functools.partial(lm.score, cfg=CFG), join=join))
    tokens_BKL = jnp.asarray(TOKENS[:, :10].reshape(3, 2, 5), jnp.int32)
    ranks_BK = jnp.array([[1, 2], [2, 1], [1, 2]])
    batch = types.Comparisons(tokens_BKL, tokens_BKL > 0, ranks_BK, ranks_BK > 0)
    hyper = {"learning_rate": np.float32(0.01), "max_grad_norm": np.float32(1.0)}
    whole, before = model(head=True), copied(model(head=True))
    frozen = {name: node for name, node in whole.items() if name != "head"}
    state = state_lib.create({**fresh(), "head": whole["head"]}, ADAM)
    found = []
    for _ in range(20):
        state, logs = step(state, frozen, hyper, batch, jax.random.key(0))
        found.append(float(logs["loss"].value()))
    assert found[-1] < 0.5 * found[0] and float(logs["accuracy"].value()) == 1
    assert abs(state.params["head"]["kernel_D"] - whole["head"]["kernel_D"]).max() > 1e-3
    same(whole, before)
    # The trained adapters and head, saved and attached to the same base model, give the same scores.
    lm.peft.save(tmp_path / "rm", CFG, state.params, scale=2.0)
    loaded, scale = lm.peft.load(tmp_path / "rm", CFG)
    tokens = tokens_BKL.reshape(6, 5)
    scores = [
        lm.score(params, tokens, mask_BL=tokens > 0, cfg=CFG)
        for params in (join(frozen, state.params), lora.attach(frozen, loaded, scale=scale))
    ]
    np.testing.assert_allclose(scores[0], scores[1], rtol=1e-5)


P, T, B = 4, 6, 16


@functools.cache
def ppo_step():
    sampling = generation.Sampling(max_new_tokens=T, stop_ids=(1, 2, 3), pad_id=0)

    def generate(params, rng_B, prompts_BP, mask_BP, temperature):
        how = sampling.replace(temperature=temperature)  # type: ignore[attr-defined]
        return generation.generate(params, rng_B, prompts_BP, mask_BP, cfg=CFG, sampling=how)

    def logprobs(params, tokens_BL, mask_BL, temperature):
        return lm.token_stats(params, tokens_BL, cfg=CFG, prompt_width=P, mask_BL=mask_BL, temperature=temperature)

    def values(params, tokens_BL, mask_BL):
        return lm.values(params, tokens_BL, cfg=CFG, prompt_width=P, mask_BL=mask_BL)

    def score(reward, rollout):
        # The policy is rewarded for stopping; an answer without a stop token has reward -1.
        return jnp.ones(rollout.lengths_B.shape)

    def join(frozen, params):
        # Policy and critic share the base; the critic has separate adapters and a head.
        critic = lora.attach(frozen.reference, params["critic"]["lora"], scale=2.0)
        return {
            "policy": lora.attach(frozen.reference, params["policy"], scale=2.0),
            "critic": {**critic, "head": params["critic"]["head"]},
        }

    models = ppo.Models(generate, logprobs, values, score, functools.partial(lm.token_logprobs, cfg=CFG), join=join)
    return parallel.jit_step(ppo.make_train_step(models, epochs=2, minibatches=2))


def ppo_batch():
    rng = np.random.default_rng(7)
    prompts = jnp.asarray(rng.integers(4, 61, size=(B, P)), jnp.int32)
    mask = jnp.asarray(np.arange(P)[None, :] >= np.arange(B)[:, None] % P)
    rows = jnp.asarray(rng.integers(4, 61, size=(8, P + T)), jnp.int32)
    return ppo.Batch(prompts, mask, sft.TokenBatch(rows, rows > 0, (rows > 0).at[:, 0].set(False)))


def ppo_hyper(**changes) -> Any:
    numbers = {name: float(value) for name, value in vars(ppo.Hyper()).items()}
    numbers |= {"learning_rate": 0.03, "critic_learning_rate": 0.03}
    return ppo.Hyper(**{name: np.float32(value) for name, value in (numbers | changes).items()})


@pytest.mark.slow
def test_base_is_the_reference_of_a_policy_with_adapters():
    frozen, before = ppo.Frozen(reference=model(), reward={}), copied(model())
    critic = {"lora": fresh(), "head": model(head=True)["head"]}
    state = ppo.create(fresh(), critic, ADAM)
    own = {"policy": fresh(), "critic": critic}
    assert jax.tree.structure(state.params) == jax.tree.structure(own)
    assert leaves_like((state.opt_state, state.ema), own)
    found = []
    for i in range(12):
        state, logs = ppo_step()(state, frozen, ppo_hyper(ema_decay=0.5), ppo_batch(), jax.random.key(i))
        assert float(logs["first_ratio_error"]) < 1e-5
        if i == 0:
            assert float(logs["kl"].value()) == 0.0
            assert float(logs["ratio_max"]) > 1.01
        else:
            assert float(logs["kl"].value()) != 0.0
        found.append(float(logs["stopped"].value()))
    assert np.mean(found[-3:]) > np.mean(found[:3]) + 0.2
    same(frozen.reference, before)
    # The average is over adapters and can be merged into a model.
    assert jax.tree.structure(state.ema) == jax.tree.structure(fresh())
    assert np.isfinite(logits_of(lora.merge(model(), state.ema, scale=2.0))).all()
    assert ppo_step().traces == 1


def test_ptx_gradient_reaches_adapters():
    critic = {"lora": fresh(), "head": model(head=True)["head"]}
    frozen, changed = ppo.Frozen(reference=model(), reward={}), []
    for coef in (0.0, 5.0):
        state = ppo.create(fresh(), critic, ADAM)
        state, logs = ppo_step()(state, frozen, ppo_hyper(ptx_coef=coef), ppo_batch(), jax.random.key(0))
        changed.append(copied(state.params))
    assert float(logs["ptx_loss"]) > 1
    plain, mixed = changed
    assert abs(plain["policy"]["layers"]["q"]["lora_b"] - mixed["policy"]["layers"]["q"]["lora_b"]).max() > 1e-3
    same(plain["critic"], mixed["critic"])
