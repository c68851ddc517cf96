import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from rlhf_jax import aggregation, generation, lm, parallel, types
from rlhf_jax.train import ppo, ptx, sft

P, T, B = 4, 6, 16
EPOCHS, MINIBATCHES = 2, 2
CFG = lm.LMConfig(vocab_size=20, n_layers=1, d_model=16, n_heads=2, d_mlp=32, max_length=P + T)
SPEC = generation.Sampling(max_new_tokens=T, stop_ids=(1, 2, 3), pad_id=0)
ADAM = optax.chain(optax.scale_by_adam(eps=1e-5), optax.scale(-1.0))
SGD = optax.scale(-1.0)


def score(reward, rollout):
    """Returns a constant plus a reward for each token above nine."""
    high_BT = (rollout.tokens_BL[:, P:] > 9) & rollout.response_mask_BT
    return reward["constant"] + reward["high"] * high_BT.sum(axis=1)


def lm_models(axis_name=None):
    def generate(params, rng_B, prompts_BP, mask_BP, temperature):
        sampling = SPEC.replace(temperature=temperature)  # type: ignore[attr-defined]
        return generation.generate(params, rng_B, prompts_BP, mask_BP, cfg=CFG, sampling=sampling, axis_name=axis_name)

    def logprobs(params, tokens_BL, mask_BL, temperature):
        return lm.token_stats(params, tokens_BL, cfg=CFG, prompt_width=P, mask_BL=mask_BL, temperature=temperature)

    def values(params, tokens_BL, mask_BL):
        return lm.values(params, tokens_BL, cfg=CFG, prompt_width=P, mask_BL=mask_BL)

    return ppo.Models(generate, logprobs, values, score, functools.partial(lm.token_logprobs, cfg=CFG))


MODELS = lm_models()
STEP = parallel.jit_step(ppo.make_train_step(MODELS, epochs=EPOCHS, minibatches=MINIBATCHES))
"""The one compiled step of most tests; `test_one_program_serves_all_hyperparameters` counts how often it was traced."""
COLLECT = jax.jit(functools.partial(ppo.collect, MODELS))


@functools.cache
def weights(seed=0):
    """Returns weights with a scalar head; they make some tokens much more likely than others."""
    shapes = jax.eval_shape(lambda key: lm.with_head(key, lm.init(key, CFG), CFG), jax.random.key(0))
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda x: jnp.asarray(0.6 * rng.normal(size=x.shape), x.dtype), shapes)


def zero_critic():
    return {**weights(1), "head": jax.tree.map(jnp.zeros_like, weights(1)["head"])}


def batch(ptx=True):
    rng = np.random.default_rng(7)
    prompts = jnp.asarray(rng.integers(4, 20, size=(B, P)), jnp.int32)
    mask = jnp.asarray(np.arange(P)[None, :] >= np.arange(B)[:, None] % P)
    if not ptx:
        return ppo.Batch(prompts, mask)
    rows = 3 * EPOCHS * MINIBATCHES
    tokens = jnp.asarray(rng.integers(4, 20, size=(rows, P + T)), jnp.int32)
    real = jnp.asarray(np.arange(P + T)[None, :] < rng.integers(5, P + T + 1, size=(rows, 1)))
    return ppo.Batch(prompts, mask, sft.TokenBatch(tokens, real, real.at[:, 0].set(False)))


def hyper(**changes) -> Any:
    numbers = {name: float(value) for name, value in vars(ppo.Hyper()).items()}
    numbers |= {"learning_rate": 0.01, "critic_learning_rate": 0.01}
    return ppo.Hyper(**{name: np.float32(value) for name, value in (numbers | changes).items()})


def frozen(constant=0.0, high=1.0, reference=0):
    reward = {"constant": jnp.asarray(constant, jnp.float32), "high": jnp.asarray(high, jnp.float32)}
    return ppo.Frozen(reference=weights(reference), reward=reward)


def fresh(tx: optax.GradientTransformation = ADAM) -> Any:
    return ppo.create(weights(), zero_critic(), tx)


def step(state=None, frozen_=None, seed=0, **hypers: Any) -> Any:
    return STEP(state or fresh(), frozen_ or frozen(), hyper(**hypers), batch(), jax.random.key(seed))


def same(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


def close(a, b, **tolerance):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, **tolerance), a, b)


def farthest(a, b):
    return max(float(jnp.abs(x - y).max()) for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b)))


def scripted(scores, *, lengths=(3, 1, 2, 3), stopped=(1, 1, 0, 1), **options):
    """Returns models with fixed responses of up to three tokens, a uniform policy and the given ``scores``."""
    n, width = len(lengths), 3
    mask = jnp.arange(width)[None, :] < jnp.array(lengths)[:, None]

    def generate(params, rng_B, prompts_BP, mask_BP, temperature):
        return types.Rollout(
            tokens_BL=jnp.concatenate([prompts_BP, jnp.ones((n, width), jnp.int32)], axis=1),
            mask_BL=jnp.concatenate([mask_BP, mask], axis=1),
            response_mask_BT=mask,
            logprobs_BT=jnp.zeros((n, width)),
            lengths_B=jnp.array(lengths),
            finish_B=jnp.array(stopped),
        )

    zeros = jnp.zeros((n, width))
    models = ppo.Models(generate, lambda *_: (zeros, zeros), lambda *_: zeros, lambda *_: scores)
    prompts = ppo.Batch(jnp.zeros((n, 1), jnp.int32), jnp.ones((n, 1), bool))
    nothing = {"policy": {}, "critic": {}}
    key = jax.random.key(0)
    return lambda **h: ppo.collect(models, nothing, ppo.Frozen({}, {}), hyper(**h), prompts, key, **options)


# ------------------------------------------------------------------------------------------------------- collect


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_first_update_has_ratio_one_and_zero_kl(temperature):
    _, logs = step(temperature=temperature, kl_coef=0.1)
    assert float(logs["first_ratio_error"]) < 1e-5
    assert abs(float(logs["kl"].value())) < 1e-6
    assert float(logs["sampler_gap"]) < 1e-5
    # The ratio after the first update and the KL to another reference can be large.
    assert float(logs["ratio_max"]) > 1.01 and float(logs["approx_kl"]) > 1e-5
    _, logs = step(frozen_=frozen(reference=2), temperature=temperature)
    assert float(logs["kl"].value()) > 0.1 and float(logs["first_ratio_error"]) < 1e-5
    assert 0 < float(logs["stopped"].value()) < 1 and 1 < float(logs["length"].value()) < T


def test_lower_temperature_lowers_the_entropy():
    entropy = [float(step(temperature=temperature)[1]["entropy"].value()) for temperature in (0.7, 1.0, 2.0)]
    assert entropy[0] + 0.05 < entropy[1] < entropy[2] - 0.05


def test_truncated_sampling_is_corrected_by_importance_weights():
    def generate(params, rng_B, prompts_BP, mask_BP, temperature):
        sampling = dataclasses.replace(SPEC, top_p=0.8, temperature=temperature)
        return generation.generate(params, rng_B, prompts_BP, mask_BP, cfg=CFG, sampling=sampling)

    models = MODELS._replace(generate=generate)
    collect = jax.jit(functools.partial(ppo.collect, models, correct_sampler=True))
    experience, _ = collect(fresh().params, frozen(), hyper(), batch(), jax.random.key(1))
    real = np.asarray(experience.response_mask_BT)
    # Truncation makes a kept token more likely by the factor 1 / (kept mass).
    weights_N = np.asarray(experience.weights_BT)[real]
    assert np.all(weights_N <= 1 + 1e-5) and np.all(weights_N >= 0.8 - 1e-5) and weights_N.min() < 0.95
    # At the first update every ratio is 1, so the loss is the weighted mean of the negative advantages.
    _, logs = jax.jit(functools.partial(ppo.loss, models))(fresh().params, experience, hyper())
    want = -(weights_N * np.asarray(experience.advantages_BT)[real]).mean()
    np.testing.assert_allclose(logs["policy_loss"], want, atol=1e-5)


@pytest.mark.slow
def test_correction_of_an_exact_sampler_changes_nothing():
    plain = COLLECT(fresh().params, frozen(), hyper(), batch(), jax.random.key(1))[0]
    corrected = jax.jit(functools.partial(ppo.collect, MODELS, correct_sampler=True))(
        fresh().params, frozen(), hyper(), batch(), jax.random.key(1)
    )[0]
    real = np.asarray(plain.response_mask_BT)
    np.testing.assert_allclose(np.asarray(corrected.weights_BT)[real], 1.0, atol=1e-5)
    assert plain.weights_BT is None


def test_fractional_scores_are_kept_and_replaced_without_a_stop():
    numbers = hyper(lambda_=1.0, kl_coef=0.0, missing_stop_score=-1.5)
    params = {"policy": weights(), "critic": zero_critic()}
    experience, logs = COLLECT(params, frozen(0.7, 0.0), numbers, batch(), jax.random.key(0))
    mask: Any = np.asarray(experience.response_mask_BT)
    stopped = np.isin(np.where(mask, experience.tokens_BL[:, P:], 0), SPEC.stop_ids).any(axis=1)
    assert stopped.any() and not stopped.all()
    expected = np.where(mask, np.where(stopped, 0.7, -1.5)[:, None], 0.0)
    np.testing.assert_allclose(experience.returns_BT, expected, atol=1e-6)
    assert experience.returns_BT.dtype == jnp.float32
    # The logged reward is the score before the missing-stop rule.
    np.testing.assert_allclose(logs["reward"].value(), 0.7, rtol=1e-6)
    np.testing.assert_allclose(logs["stopped"].value(), stopped.mean())


@pytest.mark.parametrize(
    "scores", [jnp.array([0.7, 1.5, -2.25, 0.125]), jnp.array([3, -2, 7, 0]), jnp.array([1, 0, 1, 1], jnp.bfloat16)]
)
def test_scores_of_any_type_become_returns(scores):
    experience, _ = scripted(scores)(lambda_=1.0, kl_coef=0.0, missing_stop_score=-9.0)
    final_scores = np.where([True, True, False, True], scores.astype(jnp.float32), -9.0)
    np.testing.assert_allclose(
        experience.returns_BT, np.where(experience.response_mask_BT, final_scores[:, None], 0), atol=1e-6
    )
    valid = np.asarray(experience.advantages_BT)[np.asarray(experience.response_mask_BT)]
    np.testing.assert_allclose([valid.mean(), valid.std()], [0, 1], atol=1e-3)


STEPS = np.array([[0.5, -1.0, 3.0], [2.0, np.nan, np.inf], [-4.0, 1.0, np.nan], [0.25, 0.5, 1.0]])


@pytest.mark.parametrize("rule", [ppo.replace_score, ppo.subtract_penalty])
def test_scores_of_tokens_are_clipped_and_the_missing_stop_rule_applies_to_their_sum(rule):
    numbers = dict(lambda_=1.0, kl_coef=0.0, reward_clip=2.5, missing_stop_score=-9.0)
    experience, logs = scripted(jnp.asarray(STEPS, jnp.float32), unfinished=rule)(**numbers)
    # The second response has one token; the third has two and no stop token.
    clipped = np.array([[0.5, -1.0, 2.5], [2.0, 0, 0], [-2.5, 1.0, 0], [0.25, 0.5, 1.0]])
    sums = clipped.sum(axis=1)
    total = -9.0 if rule is ppo.replace_score else -9.0 + sums[2]
    clipped[2, 1] += total - sums[2]
    to_go = np.cumsum(clipped[:, ::-1], axis=1)[:, ::-1]
    np.testing.assert_allclose(experience.returns_BT, np.where(experience.response_mask_BT, to_go, 0.0), atol=1e-5)
    np.testing.assert_allclose(logs["reward"].value(), np.mean([2.5, 2.0, -3.0, 1.75]), rtol=1e-6)
    np.testing.assert_allclose(logs["training_reward"].value(), clipped.sum(axis=1).mean(), rtol=1e-5)
    np.testing.assert_allclose(logs["training_reward_std"], clipped.sum(axis=1).std(), rtol=1e-4)
    assert logs["bad_rows"] == 0


def test_a_score_at_the_last_token_gives_the_experience_of_the_score():
    numbers = dict(lambda_=0.7, kl_coef=0.3, reward_clip=1.0, missing_stop_score=-2.0)
    whole, logs = scripted(jnp.array([0.5, 1.5, 0.7, -3.0]))(**numbers)
    last = np.zeros((4, 3))
    last[[0, 1, 2, 3], [2, 0, 1, 2]] = [0.5, 1.5, 0.7, -3.0]
    steps, more = scripted(jnp.asarray(last, jnp.float32))(**numbers)
    close(whole, steps, rtol=1e-6)
    close(logs, more, rtol=1e-6)


def test_numbers_beside_the_scores_are_logged():
    scores = jnp.array([0.5, 1.5, 0.7, -3.0])
    same_, logs = scripted((scores, {"helpful": 2 * scores}))()
    plain, _ = scripted(scores)()
    same(same_, plain)
    np.testing.assert_allclose(logs["helpful"].value(), 2 * logs["reward"].value(), rtol=1e-6)


def test_returns_contain_the_kl_penalty():
    numbers = hyper(lambda_=1.0, kl_coef=0.5, missing_stop_score=-1.0)
    params = {"policy": weights(), "critic": zero_critic()}
    experience, logs = COLLECT(params, frozen(0.7, 0.0, reference=2), numbers, batch(), jax.random.key(0))
    mask: Any = np.asarray(experience.response_mask_BT)
    scored = jax.jit(functools.partial(lm.token_logprobs, cfg=CFG))
    old, reference = (
        np.asarray(scored(w, experience.tokens_BL, mask_BL=experience.mask_BL))[:, P:] for w in (weights(), weights(2))
    )
    np.testing.assert_allclose(experience.logprobs_BT, old, atol=1e-5)
    stopped: Any = np.isin(np.where(mask, experience.tokens_BL[:, P:], 0), SPEC.stop_ids).any(axis=1)
    for b in range(B):
        later = -0.5 * (old - reference)[b] * mask[b]
        expected = [(later[t:].sum() + (0.7 if stopped[b] else -1.0)) * mask[b, t] for t in range(T)]
        np.testing.assert_allclose(experience.returns_BT[b], expected, atol=1e-4)
    np.testing.assert_allclose(logs["kl"].value(), ((old - reference) * mask).sum(1).mean(), atol=1e-4)


def test_heldout_reward_model_is_logged_and_changes_nothing():
    params = {"policy": weights(), "critic": zero_critic()}
    plain, logs = COLLECT(params, frozen(0.7), hyper(), batch(), jax.random.key(0))
    assert "heldout_reward" not in logs
    second = frozen(0.7)._replace(heldout=frozen(2.5, 0.0).reward)
    watched, logs = COLLECT(params, second, hyper(), batch(), jax.random.key(0))
    np.testing.assert_allclose(logs["heldout_reward"].value(), 2.5)
    assert float(logs["reward"].value()) != 2.5
    close(plain, watched, atol=1e-6)


# -------------------------------------------------------------------------------------------------------- update


def test_one_program_serves_all_hyperparameters():
    state, _ = step(ptx_coef=0.0)
    state, plain = STEP(state, frozen(), hyper(ptx_coef=0.0, clip=0.1), batch(), jax.random.key(1))
    _, ptx = STEP(state, frozen(0.3), hyper(ptx_coef=27.8, kl_coef=0.5), batch(), jax.random.key(2))
    assert STEP.traces == 1
    assert np.isnan(plain["ptx_loss"]), "plain PPO does not compute the loss of the pretraining rows"
    assert float(ptx["ptx_loss"]) > 1
    assert float(plain["ptx_coef_per_token"]) == float(plain["ptx_coef_per_sequence"]) == 0
    np.testing.assert_allclose(ptx["ptx_coef_per_token"], 27.8, rtol=1e-6)


def test_pretraining_rows_with_zero_weight_have_no_effect():
    plain = parallel.jit_step(ppo.make_train_step(MODELS, epochs=EPOCHS, minibatches=MINIBATCHES))
    alone, logs = plain(fresh(), frozen(), hyper(), batch(ptx=False), jax.random.key(0))
    unweighted, _ = step()
    mixed, _ = step(ptx_coef=1.0)
    assert "ptx_loss" not in logs
    close(alone.params, unweighted.params, atol=1e-6)
    assert farthest(mixed.params["policy"], unweighted.params["policy"]) > 1e-3
    with pytest.raises(ValueError, match="token_logprobs"):
        ppo.ptx_loss(MODELS._replace(token_logprobs=None), weights(), sft.TokenBatch(*[jnp.zeros((1, 2))] * 3))


def test_ptx_adds_its_gradient_times_the_coefficient():
    params = {"policy": weights(), "critic": zero_critic()}
    experience, _ = COLLECT(params, frozen(), hyper(), batch(), jax.random.key(0))
    rows = batch().ptx
    assert rows is not None
    update = jax.jit(functools.partial(ppo.update, MODELS, epochs=1, minibatches=1))

    def updated(coef):
        state, _ = update(fresh(SGD), experience, hyper(ptx_coef=coef, learning_rate=0.1), rows, jax.random.key(0))
        return state.params

    def pretraining_loss(policy):
        logprobs_BL = lm.token_logprobs(policy, rows.tokens_BL, cfg=CFG, mask_BL=rows.mask_BL)
        return -jnp.sum(logprobs_BL * rows.loss_mask_BL) / rows.loss_mask_BL.sum()

    gradient = jax.jit(jax.grad(pretraining_loss))(weights())
    plain = updated(0.0)
    assert farthest(plain["policy"], weights()) > 1e-3
    for coef in (0.5, 27.8):
        mixed = updated(coef)
        moved = jax.tree.map(lambda a, b: a - b, mixed["policy"], plain["policy"])
        expected = optax.tree.scale(-0.1 * coef, gradient)
        close(moved, expected, atol=1e-6 * max(1, coef), rtol=1e-3)
        close(mixed["critic"], plain["critic"], atol=1e-7)


@pytest.mark.parametrize(
    ("reduction", "per_token", "per_sequence"),
    [
        (aggregation.token_mean, 27.8, 27.8 * 3 / 15),
        (aggregation.sequence_sum, 27.8 / 3, 27.8 / 15),
        (aggregation.sequence_mean, 27.8, 27.8 * 3 / 15),
        (aggregation.constant_mean, 27.8 * 8 / 6, 27.8 * 8 / 6 * 3 / 15),
    ],
)
def test_ptx_coefficients_match_hand_computed_values(reduction, per_token, per_sequence):
    answers_BT = jnp.array([[1, 1, 1, 1], [1, 1, 0, 0], [0, 0, 0, 0]], bool)  # 3 tokens per response
    learnt_BL = jnp.arange(24)[None, :] < jnp.array([[10], [20]])  # 15 tokens per row
    rows = sft.TokenBatch(jnp.zeros((2, 24), jnp.int32), jnp.ones((2, 24), bool), learnt_BL)
    weights_B, total = reduction(answers_BT)
    coefficients = ptx.coefficients(27.8, rows, answers_BT, weights_B=weights_B, total=total)
    np.testing.assert_allclose(coefficients["ptx_coef_per_token"], per_token, rtol=1e-5)
    np.testing.assert_allclose(coefficients["ptx_coef_per_sequence"], per_sequence, rtol=1e-5)


# -------------------------------------------------------------------------------------------------- a shared trunk

SHARED = MODELS._replace(join=ppo.shared_trunk)


def shared_state(head) -> Any:
    trunk = {name: node for name, node in weights().items() if name != "head"}
    return ppo.create(trunk, {"head": head}, SGD)


@pytest.mark.slow  # test_sweep.py trains a zero head
def test_zero_head_on_a_shared_trunk():
    zero = lm.with_head(jax.random.key(0), weights(), CFG, zero=True)["head"]
    experience, _ = jax.jit(functools.partial(ppo.collect, SHARED))(
        shared_state(zero).params, frozen(), hyper(), batch(), jax.random.key(0)
    )
    np.testing.assert_array_equal(experience.values_BT, 0.0)
    real = experience.response_mask_BT
    update = jax.jit(functools.partial(ppo.update, SHARED, epochs=1, minibatches=1))

    def updated(head, coef):
        numbers = hyper(value_coef=coef, learning_rate=0.1, critic_learning_rate=0.1, value_clip=100.0)
        state, logs = update(shared_state(head), experience, numbers, None, jax.random.key(0))
        assert float(logs["first_ratio_error"]) < 1e-5
        return state.params

    # No gradient passes through a head of zeros, so the value loss first trains only the head.
    alone, both = updated(zero, 0.0), updated(zero, 0.1)
    assert farthest(alone["policy"], shared_state(zero).params["policy"]) > 1e-3
    close(both["policy"], alone["policy"], atol=1e-7)
    assert farthest(both["critic"], {"head": zero}) > 1e-3 and farthest(alone["critic"], {"head": zero}) == 0

    # With any other head, the value loss times its coefficient trains the trunk.
    def value_loss(trunk):
        values_BT = MODELS.values({**trunk, "head": weights()["head"]}, experience.tokens_BL, experience.mask_BL)  # type: ignore[misc]
        return jnp.sum(jnp.where(real, 0.5 * (values_BT - experience.returns_BT) ** 2, 0.0)) / real.sum()

    gradient = jax.jit(jax.grad(value_loss))(shared_state(zero).params["policy"])
    alone, both = updated(weights()["head"], 0.0), updated(weights()["head"], 0.5)
    moved = jax.tree.map(lambda a, b: a - b, both["policy"], alone["policy"])
    assert farthest(moved, optax.tree.zeros_like(moved)) > 1e-3
    close(moved, optax.tree.scale(-0.1 * 0.5, gradient), atol=1e-6, rtol=1e-3)


def table_experience(returns_B):
    """Returns one-token responses; the table has a separate value for each prompt."""
    zeros = jnp.zeros((len(returns_B), 1))
    tokens = jnp.pad(jnp.arange(len(returns_B))[:, None], ((0, 0), (0, 1)))
    return types.Experience(tokens, tokens >= 0, zeros == 0, zeros, zeros, zeros, returns_B[:, None])


TABLE = ppo.Models(
    generate=lambda *_: None,  # type: ignore[arg-type]
    logprobs=lambda params, tokens, mask, temperature: (params["w"] * jnp.zeros((len(tokens), 1)), 0.0),
    values=lambda params, tokens, mask: params["value_B"][tokens[:, :1]] + params["shared"],
    score=lambda *_: jnp.zeros(()),
)


@functools.cache
def table_update(minibatches, epochs=1):
    def update(state, returns_B, numbers, rng):
        experience = table_experience(returns_B)
        return ppo.update(TABLE, state, experience, numbers, None, rng, epochs=epochs, minibatches=minibatches)

    return jax.jit(update)


def table_state(learnt):
    """Returns a state that trains either the table or the parameter that all prompts share."""
    critic = {"value_B": jnp.zeros(16), "shared": jnp.zeros(())}
    held = optax.masked(optax.set_to_zero(), {"policy": True, "critic": {name: name != learnt for name in critic}})
    return ppo.create({"w": jnp.ones(())}, critic, optax.chain(SGD, held))


def test_every_response_is_used_once_per_epoch():
    state, numbers = table_state("value_B"), hyper(critic_learning_rate=0.4, value_clip=100.0)
    for seed in range(3):
        # A minibatch has four responses, so each error shrinks by a quarter of the learning rate.
        new, _ = table_update(4)(state, jnp.ones(16), numbers, jax.random.key(seed))
        np.testing.assert_allclose(new.params["critic"]["value_B"], np.full(16, 0.4 / 4), rtol=1e-6)
        again, _ = table_update(4, epochs=2)(state, jnp.ones(16), numbers, jax.random.key(seed))
        np.testing.assert_allclose(again.params["critic"]["value_B"], np.full(16, 0.1 + 0.9 * 0.1), rtol=1e-5)
        assert int(new.step) == 4 and int(again.step) == 8


def test_minibatches_depend_on_the_key_and_change_every_epoch():
    state, numbers = table_state("shared"), hyper(critic_learning_rate=0.5, value_clip=100.0)

    def learnt(seed, epochs):
        new, _ = table_update(4, epochs)(state, jnp.arange(16.0), numbers, jax.random.key(seed))
        return float(new.params["critic"]["shared"])

    # Each minibatch moves the value half-way to the minibatch mean, so later minibatches weigh more and order matters.
    ends = [learnt(seed, epochs) for epochs in (1, 2) for seed in (0, 1, 2)]
    assert len(set(ends)) == 6 and ends == [learnt(seed, epochs) for epochs in (1, 2) for seed in (0, 1, 2)]
    # If both epochs had the same order, the second epoch would add a sixteenth of the first.
    one_key = np.array([learnt(seed, 1) for seed in (0, 1, 2)])
    assert (np.abs(np.array(ends[3:]) - one_key * (1 + 1 / 16)) > 1e-3).all()


def test_minibatches_must_divide_the_batch():
    with pytest.raises(ValueError, match=r"16 responses.*3 minibatches"):
        table_update(3)(table_state("shared"), jnp.ones(16), hyper(), jax.random.key(0))


def test_policy_and_critic_have_separate_learning_rates():
    start = fresh()
    state, _ = step(learning_rate=0.0)
    same(state.params["policy"], start.params["policy"])
    assert farthest(state.params["critic"], start.params["critic"]) > 1e-3
    state, _ = step(critic_learning_rate=0.0)
    same(state.params["critic"], start.params["critic"])
    assert farthest(state.params["policy"], start.params["policy"]) > 1e-3


def test_clip_fraction_counts_tokens_whose_clipped_branch_is_larger():
    """A ratio outside the range is not clipped if the update would bring it back."""
    ratios = np.array([[1.25, 1.25, 0.75, 0.75, 1.15, 0.85]])
    advantages = jnp.array([[1.0, -1.0, -1.0, 1.0, 1.0, -1.0]])
    ones = jnp.ones((1, 6), bool)
    zeros_BT = jnp.zeros((1, 6))
    models = ppo.Models(lambda *_: None, lambda *_: (jnp.log(ratios), zeros_BT), None, lambda *_: None)  # type: ignore[arg-type, return-value]
    experience = types.Experience(
        tokens_BL=jnp.zeros((1, 7), jnp.int32),
        mask_BL=jnp.ones((1, 7), bool),
        response_mask_BT=ones,
        logprobs_BT=zeros_BT,
        values_BT=None,
        advantages_BT=advantages,
        returns_BT=None,
    )
    _, logs = ppo.loss(models, {"policy": {}}, experience, ppo.Hyper(clip=0.2))
    np.testing.assert_allclose(logs["clip_fraction"], 2 / 6)


@pytest.mark.parametrize("shared", [False, True])
def test_policy_and_critic_are_clipped_separately_unless_they_share_a_trunk(shared):
    """A large value loss must not shrink the update of a separate policy."""
    models = MODELS._replace(join=ppo.shared_trunk) if shared else MODELS
    compiled = parallel.jit_step(ppo.make_train_step(models, minibatches=1))
    critic = {"head": zero_critic()["head"]} if shared else zero_critic()

    def moved(value_coef):
        state = ppo.create(weights(), critic, SGD)
        numbers = hyper(learning_rate=1.0, critic_learning_rate=0.0, max_grad_norm=0.01, value_coef=value_coef)
        after, logs = compiled(state, frozen(), numbers, batch(ptx=False), jax.random.key(0))
        change = jax.tree.map(lambda a, b: a - b, after.params["policy"], weights())
        return float(optax.tree.norm(change)), logs

    (small, _), (large, logs) = moved(1.0), moved(1e6)
    assert float(logs["grad_norm_critic"]) > 100 * 0.01
    if shared:
        assert large < small
    else:
        assert small == large == pytest.approx(0.01, rel=1e-3)


def test_averaged_weights_follow_the_policy():
    state, _ = step(ema_decay=0.0)
    close(state.ema, state.params["policy"], atol=1e-7)
    state, _ = step(ema_decay=1.0)
    same(state.ema, weights())
    assert farthest(state.params["policy"], weights()) > 1e-3


def test_controller_scales_the_coefficient_of_the_next_batch():
    numbers: Any = {"kl_coef": 0.2, "kl_gain": 0.1, "kl_target": 1e-3}
    state, first = step(frozen_=frozen(reference=2), **numbers)
    _, second = step(state, frozen(reference=2), **numbers)
    np.testing.assert_allclose(first["kl_coef"], 0.2, rtol=1e-6)
    np.testing.assert_allclose(second["kl_coef"], 0.2 * 1.02, rtol=1e-5)  # the error is clipped at 0.2


@pytest.mark.parametrize("broken", ["score", "reference"])
def test_non_finite_step_changes_only_the_counter(broken):
    state, _ = step(ema_decay=0.5)
    kept = jax.tree.map(np.asarray, (state.params, state.opt_state, state.ema, state.kl_scale))
    bad = frozen(constant=np.nan) if broken == "score" else frozen()
    if broken == "reference":
        bad = bad._replace(reference=jax.tree.map(lambda x: x * np.nan, bad.reference))
    new, logs = step(state, bad, ema_decay=0.5, kl_gain=0.1)
    assert float(logs["skipped"]) == EPOCHS * MINIBATCHES
    same((new.params, new.opt_state, new.ema, new.kl_scale), kept)
    assert int(new.step) == 2 * EPOCHS * MINIBATCHES
    good, logs = step(new, ema_decay=0.5)
    assert float(logs["skipped"]) == 0 and farthest(good.params, kept[0]) > 1e-3


def test_step_depends_on_key_and_counter_only():
    one, two, other = step()[0], step()[0], step(seed=1)[0]
    same(one.params, two.params)
    assert farthest(one.params["policy"], other.params["policy"]) > 1e-4
    later = [step(fresh().replace(step=jnp.int32(i)))[1] for i in (0, 4, 8)]
    assert len({float(logs["reward"].sum) for logs in later}) > 1, "later steps with the same key draw other responses"


@pytest.mark.slow
def test_vmap_over_seeds_and_coefficients_matches_a_loop():
    single = ppo.make_train_step(lm_models("member"), epochs=EPOCHS, minibatches=MINIBATCHES)
    swept = jax.jit(jax.vmap(single, in_axes=(0, None, 0, None, 0), axis_name="member"))
    members = [dict(kl_coef=0.0, ptx_coef=0.0), dict(kl_coef=1.0, ptx_coef=2.0)]

    def stack(trees):
        return jax.tree.map(lambda *x: jnp.stack(x), *trees)

    keys = jax.random.split(jax.random.key(3), 2)
    together, logs = swept(
        stack([fresh(), fresh()]), frozen(reference=2), stack([hyper(**m) for m in members]), batch(), keys
    )
    for i, member in enumerate(members):
        alone, alone_logs = STEP(fresh(), frozen(reference=2), hyper(**member), batch(), keys[i])
        mine = jax.tree.map(lambda x: x[i], (together.params, together.ema, together.step))  # noqa: B023
        close(mine, (alone.params, alone.ema, alone.step), atol=1e-5, rtol=1e-5)
        np.testing.assert_allclose(logs["kl"].value()[i], alone_logs["kl"].value(), atol=1e-5)
    assert farthest(*(jax.tree.map(lambda x: x[i], together.params) for i in (0, 1))) > 1e-3  # noqa: B023


def test_ppo_increases_the_reward():
    state = fresh()
    numbers, rewards = hyper(kl_coef=0.01, learning_rate=0.01, critic_learning_rate=0.01), []
    for i in range(80):
        state, logs = STEP(state, frozen(), numbers, batch(), jax.random.key(i))
        rewards.append(float(logs["reward"].value()))
    assert np.mean(rewards[-10:]) > np.mean(rewards[:10]) + 1.0
