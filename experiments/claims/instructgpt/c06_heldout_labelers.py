"""C06: held-out labelers prefer the RL models about as often as training labelers do (Ouyang et al. 2022, Figure 3).

The reward model is trained on the rankings of one pool of simulated labelers. A second pool, with other tastes, judges
the same answers of PPO and PPO-ptx against those of the SFT model.
"""

from __future__ import annotations

from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np

from claims import model_stages as ms
from claims import verdicts
from claims.claim import Claim, Measured
from claims.trial import Trial
from rlhf_jax.report import plots
from rlhf_jax.simulation import labelers

OPTIONS: dict[str, dict[str, float]] = {"ppo": {}, "ppo_ptx": {"ptx_coef": 1.0}}


def measure(trial: Trial) -> Measured:
    """Returns the win rates of both policies against SFT, by both pools."""
    recipe = ms.Recipe(trial)
    noise = jnp.float32(recipe.compared.value[1]["labeler_temperature"])
    assert trial.task.world is not None
    world = trial.task.world
    pools = {
        name: pool.replace(temperature=noise)  # type: ignore[attr-defined]
        for name, pool in (("training labelers", world.pool), ("held-out labelers", world.heldout_pool))
    }
    sft = trial.result(ms.answer, recipe.sft, recipe.start, recipe.reward).value
    measured: Measured = {}
    for name, options in OPTIONS.items():
        policy = trial.result(ms.train_policy, recipe.start, recipe.reward, **options)
        answers = trial.result(ms.answer, policy, recipe.start, recipe.reward).value
        measured[name] = {
            judges: float(np.mean(labelers.choice_share(pool, answers["features"], sft["features"])))
            for judges, pool in pools.items()
        }
    return measured


def decide(measured_S: Sequence[Measured]) -> list[verdicts.Part]:
    """Compares the two pools."""
    return [
        verdicts.between(
            f"win rate of {label} by held-out labelers − by training labelers",
            [measured[name]["held-out labelers"] - measured[name]["training labelers"] for measured in measured_S],
            -0.03,
            0.03,
        )
        for name, label in (("ppo", "PPO"), ("ppo_ptx", "PPO-ptx"))
    ]


def plot(measured_S: Sequence[Measured]) -> str:
    """Draws the win rates by one pool against those by the other."""
    with plots.axes(height=2.8) as (svg, (ax,)):
        for name, label in (("ppo", "PPO"), ("ppo_ptx", "PPO-ptx")):
            points = [measured[name] for measured in measured_S]
            x, y = ([point[judges] for point in points] for judges in ("training labelers", "held-out labelers"))
            ax.plot(x, y, "o", color=plots.color(name), label=label)
        ax.axline((0.5, 0.5), slope=1, color=plots.color("other"), linewidth=0.8)
        ax.set_xlabel("win rate against SFT, training labelers")
        ax.set_ylabel("held-out labelers")
        ax.legend()
    return svg[0]


CLAIM = Claim(
    id="C06",
    paper="Ouyang et al. 2022, Figure 3",
    claim="Held-out labelers prefer the RL models about as often as training labelers do.",
    published="no number (figure)",
    differs="Both pools of simulated labelers are drawn from the same distribution of tastes.",
    measure=measure,
    decide=decide,
    plot=plot,
)
