"""The state that PPO carries from one iteration to the next."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from rlhf_jax import kl, metrics
from rlhf_jax.train import ppo, ppo_state


def test_running_moments_of_large_numbers():
    """The deviation of 1000 +- 1 must not be lost to the rounding of squares near a million."""
    rng = np.random.default_rng(0)
    moments = ppo.RunningMoments(*jnp.zeros((3,)))
    assert [float(x) for x in moments.scale()] == [0.0, 1.0]
    batches = [rng.normal(1000.0 + i % 3, 1.0, size=256) for i in range(40)]
    for batch in batches:
        x = jnp.asarray(batch, jnp.float32)
        moments = moments.merge(metrics.mean_metric(x), jnp.var(x))
    everything = np.concatenate(batches)
    mean, deviation = moments.scale()
    np.testing.assert_allclose(mean, everything.mean(), rtol=1e-6)
    np.testing.assert_allclose(deviation, everything.std(), rtol=1e-3)


def test_an_iteration_updates_controller_baseline_and_moments():
    state: Any = ppo.create({"w": jnp.ones(())}, None, optax.scale(-1.0), reference={"w": jnp.zeros(())})
    earlier = ppo.RunningMeans(metrics.Metric(jnp.float32(6), jnp.float32(2)), ppo.RunningMoments(*jnp.zeros(3)))
    state = state.replace(kl_scale=kl.init_controller(0.5), past=earlier)
    logs = {
        "kl": metrics.mean_metric(jnp.array([4.0, 5.0])),
        "return": metrics.mean_metric(jnp.array([1.0, 2.0])),
        "training_reward": metrics.mean_metric(jnp.array([8.0, 8.0])),
        "target": metrics.mean_metric(jnp.array([1.0, 5.0])),
        "target_variance": jnp.float32(4.0),
    }
    hyper: Any = ppo.Hyper(kl_target=5.0, kl_gain=0.5, reference_decay=0.75)
    after = ppo_state.finish_iteration(state, hyper, logs, skipped=jnp.array(False))
    np.testing.assert_allclose(after.kl_scale.kl_coef, 0.5 * (1 + 0.5 * -0.1), rtol=1e-6)
    np.testing.assert_allclose(after.past.returns.value(), (6 + 3) / 4)
    np.testing.assert_allclose(after.past.targets.scale(), [3.0, 2.0])
    np.testing.assert_allclose(after.reference["w"], 0.25)  # type: ignore
    skipped = ppo_state.finish_iteration(state, hyper, logs, skipped=jnp.array(True))
    jax.tree.map(np.testing.assert_array_equal, skipped, state)
