"""DPO and related losses on a bandit with a known optimum, including answers that appear in no pair."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from preferences import bandit_study, three_actions

from rlhf_jax import lm, parallel
from rlhf_jax.simulation import bandit
from rlhf_jax.train import dpo, objectives
from rlhf_jax.train import state as state_lib
from rlhf_jax.train.optim import schedules
from rlhf_jax.types import ApplyFn

S, A, BETA, STEPS = 6, 7, 0.5, 300
APPLY = ApplyFn(bandit.forward, bandit.logits)
ADAM = optax.chain(optax.scale_by_adam(eps=1e-5), optax.scale(-1.0))
rng = np.random.default_rng(0)
REWARDS = jnp.asarray(rng.normal(size=(S, A)), jnp.float32)
REFERENCE = jnp.asarray(rng.normal(size=(S, A)), jnp.float32)
PAIRS: Any = bandit.all_pairs(REWARDS)
logprobs = functools.partial(lm.token_logprobs, cfg=APPLY, prompt_width=1)


@functools.cache
def make_step(objective: Any, reference: bool):
    options: dict[str, Any] = {} if reference else {"reference": None}
    return parallel.jit_step(dpo.make_train_step(logprobs, objectives.soft(objective), **options))


def train(objective: Any, *, pairs: Any = PAIRS, start: Any = REFERENCE, reference: bool = True, **numbers):
    """Returns the logits that an objective converges to, with all pairs in every step."""
    step = make_step(objective, reference)
    state = state_lib.create({"logits_SA": start}, ADAM)
    frozen = {"logits_SA": start} if reference else None
    traces = step.traces
    for i in range(STEPS):
        values = {"beta": BETA} | numbers | {"learning_rate": 0.1 * schedules.linear(i, STEPS)}
        hyper: Any = dpo.Hyper(**{name: np.float32(value) for name, value in values.items()})
        state, _ = step(state, frozen, hyper, pairs, jax.random.key(0))
    assert step.traces - traces <= 1
    return state.params["logits_SA"]


def distance(logits_SA, other_SA):
    return float(bandit.total_variation(jax.nn.softmax(logits_SA), other_SA))


def optimum(kl_coef, rewards=REWARDS, reference=REFERENCE):
    return bandit.optimum(reference, rewards, kl_coef=kl_coef)


def test_all_pairs_lists_every_pair_with_its_bradley_terry_probability():
    assert PAIRS.tokens_BKL.shape == (S * A * (A - 1) // 2, 2, 2)
    seen = {(int(s), int(a), int(b)) for s, a, b in zip(PAIRS.tokens_BKL[:, 0, 0], *PAIRS.tokens_BKL[:, :, 1].T)}
    assert seen == {(s, a, b) for s in range(S) for a in range(A) for b in range(a + 1, A)}
    np.testing.assert_array_equal(PAIRS.tokens_BKL[:, 0, 0], PAIRS.tokens_BKL[:, 1, 0])
    s, a, b = (int(x) for x in (PAIRS.tokens_BKL[40, 0, 0], PAIRS.tokens_BKL[40, 0, 1], PAIRS.tokens_BKL[40, 1, 1]))
    np.testing.assert_allclose(PAIRS.targets_B[40], 1 / (1 + np.exp(REWARDS[s, b] - REWARDS[s, a])), rtol=1e-5)


def test_dpo_reaches_only_the_optimum_of_its_coefficient():
    logits_SA = train(objectives.dpo)
    assert distance(REFERENCE, optimum(BETA)) > 0.3, "training starts far from the optimum"
    assert distance(logits_SA, optimum(BETA)) < 0.002
    for wrong in (0.8 * BETA, 1.25 * BETA):
        assert distance(logits_SA, optimum(wrong)) > 0.05


def test_robust_dpo_reaches_the_optimum_from_flipped_labels_and_dpo_does_not():
    flipped = PAIRS.replace(targets_B=0.8 * PAIRS.targets_B + 0.2 * (1 - PAIRS.targets_B))
    assert distance(train(objectives.robust_dpo, pairs=flipped, label_smoothing=0.2), optimum(BETA)) < 0.002
    assert distance(train(objectives.dpo, pairs=flipped), optimum(BETA)) > 0.05


def test_ipo_reaches_the_optimum_of_win_rates_instead_of_rewards():
    """IPO maximises the mean win probability minus KL (Azar 2023, theorem 1)."""
    gaps = np.asarray(REWARDS, np.float64)[:, :, None] - np.asarray(REWARDS, np.float64)[:, None, :]
    wins = jnp.asarray((1 / (1 + np.exp(-gaps))).mean(axis=2), jnp.float32)
    logits_SA = train(objectives.ipo, beta=0.1)
    assert distance(logits_SA, optimum(0.1, wins)) < 0.002
    assert distance(logits_SA, optimum(0.1)) > 0.05


def test_simpo_without_a_margin_equals_dpo_with_a_uniform_reference():
    logits_SA = train(objectives.simpo, reference=False, margin=0.0)
    assert distance(logits_SA, optimum(BETA, reference=jnp.zeros_like(REFERENCE))) < 0.002
    assert distance(logits_SA, optimum(BETA)) > 0.05


def test_rounds_with_the_latest_policy_as_reference_divide_the_coefficient():
    once = train(objectives.dpo)
    twice = train(objectives.dpo, start=once)
    assert distance(twice, optimum(BETA / 2)) < 0.005


# -------------------------------------------------------------------------------------------------- unseen answers


def test_dpo_loss_allows_mass_on_an_unseen_answer_and_the_optimum_has_none():
    """Checks theorem 4.1 and table 1 of Xu et al. 2024."""
    for beta in (0.1, 1.0):
        for minimiser in ((1.0, 0.0, 0.0), (0.1, 0.0, 0.9), (0.0, 0.0, 1.0)):
            least = three_actions.loss(minimiser, beta=beta)
            assert least == 0.0 if minimiser[0] else least == pytest.approx(np.log(2)), minimiser
        assert three_actions.loss((0.5, 0.5, 0.0), beta=beta) == pytest.approx(np.log(2))
        a, b = 0.7, 0.2  # in general, the loss is log(1 + (b / a)^beta)
        assert three_actions.loss((a, b, 0.1), beta=beta) == pytest.approx(np.log1p((b / a) ** beta), rel=1e-5)
    for unseen_reward in (0.0, 0.5, 1.0):
        best = three_actions.optimum(kl_coef=0.1, unseen_reward=unseen_reward)
        assert best[2] <= 3 * three_actions.UNSEEN and best[0] > 0.99


def test_dpo_moves_mass_to_the_unseen_answer_and_ppo_does_not():
    policy, loss = three_actions.train_dpo()
    assert policy[2] > 0.9 and policy[1] < 1e-6 and loss < 0.05
    policy = three_actions.train_ppo()
    assert policy[2] < 1e-3 and policy[0] > 0.9
    assert three_actions.loss(policy, beta=0.1) > loss, "PPO does not minimise the DPO loss"


def test_rounds_on_the_bandit_share_the_pairs_of_one_pass():
    seen, sample_pairs = [], bandit_study.sample_pairs

    def recorded(*args, n):
        seen.append(n)
        return sample_pairs(*args, n=n)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bandit_study, "sample_pairs", recorded)
        world = bandit_study.make_bandit(0)
        train = bandit_study.train_iterated_dpo
        jax.eval_shape(lambda w: train(w, w.rewards_SA, jnp.float32(0.1), n=20, rounds=3), world)
    assert seen == [6, 6, 6]
