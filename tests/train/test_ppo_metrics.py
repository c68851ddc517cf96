"""Metrics of PPO's rollouts and updates, compared with loops."""

import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax import metrics, types
from rlhf_jax.train import estimators, ppo_metrics


def test_rollout_metrics_match_a_python_loop():
    rng, rows, width = np.random.default_rng(3), 8, 5
    mask = np.arange(width)[None, :] < rng.integers(0, width + 1, size=(rows, 1))
    logprobs, reference, values, sampled, entropy, returns = rng.normal(size=(6, rows, width))
    sampled -= 2.0  # The largest gap is negative.
    (scores, raw), finish = rng.normal(size=(2, rows)), np.arange(rows) % 3 == 0
    s = estimators.Scored(*map(jnp.asarray, (scores, logprobs, reference, values, mask, 0.3, 0.0)))
    lengths = mask.sum(axis=1)
    rollout = types.Rollout(*map(jnp.asarray, (mask, mask, mask, sampled, lengths, finish.astype(int))))
    logs = ppo_metrics.rollout_metrics(rollout, *map(jnp.asarray, (raw, entropy)), s, jnp.asarray(returns))  # type: ignore
    cells = [(i, t) for i in range(rows) for t in range(lengths[i])]

    def real(x):
        return np.array([x[cell] for cell in cells])

    kl_B = [sum(logprobs[i, t] - reference[i, t] for t in range(lengths[i])) for i in range(rows)]
    gaps = np.abs(real(sampled) - real(logprobs))
    ratios = np.exp(real(logprobs) - real(sampled))
    expected = {
        "reward": raw.mean(),
        "reward_std": raw.std(),
        "training_reward": scores.mean(),
        "training_reward_std": scores.std(),
        "kl": np.mean(kl_B),
        "kl_coef": 0.3,
        "return": np.mean(scores - 0.3 * np.array(kl_B)),
        "length": lengths.mean(),
        "stopped": finish.mean(),
        "entropy": real(entropy).mean(),
        "sampler_gap": gaps.max(),
        "sampler_gap_mean": gaps.mean(),
        "sampler_ess": ratios.sum() ** 2 / np.square(ratios).sum() / len(cells),
        "bad_rows": 0,
        "bad_row": -1,
        "explained_variance": 1 - np.square(real(values) - real(returns)).mean() / real(returns).var(),
        "target": real(returns).mean(),
        "target_variance": real(returns).var(),
    }
    assert logs.keys() == expected.keys() and len(cells) < rows * width
    for name, value in metrics.to_floats(logs).items():
        assert value == pytest.approx(expected[name], rel=1e-4, abs=1e-5), name


def test_metrics_of_several_updates_are_merged():
    logs = ppo_metrics.merge_updates(
        {
            "policy_loss": jnp.array([1.0, 2.0, 6.0]),
            "ratio_max": jnp.array([1.0, 5.0, 3.0]),
            "ratio_error": jnp.array([0.25, 4.0, 2.0]),
            "skipped": jnp.array([0.0, 1.0, 1.0]),
        }
    )
    want = {"policy_loss": 3.0, "ratio_max": 5.0, "first_ratio_error": 0.25, "skipped": 2.0, "bad_update": 1.0}
    assert metrics.to_floats(logs) == want
