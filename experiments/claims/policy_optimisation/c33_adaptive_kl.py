"""C33: with an adaptive coefficient of the KL penalty, runs end at one KL (Ziegler et al. 2019).

Policies are trained against three reward models of each world, one from all comparisons and one from each half, with a
fixed coefficient and with one that a controller adapts to a target KL. A run's deviation is that of the logarithm of
its final KL from the mean of the other worlds with the same coefficient. The deviation must be smaller with the
controller, and the KL must be near the target.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from claims import model_stages as ms
from claims import verdicts
from claims.claim import Claim, Measured
from claims.trial import Trial
from rlhf_jax.report import plots

TARGET = 3.0
"""Target KL in nats, near the KL that the fixed coefficient reaches."""
GAIN = 1.0
"""Change of the coefficient per iteration for an error of 100 %. Errors are clipped to 20 %."""
ARMS = {"fixed": {}, "adaptive": {"kl_target": TARGET, "kl_gain": GAIN}}
PARTS = ("all", "first half", "second half")


def measure(trial: Trial) -> Measured:
    """Trains a policy against each reward model with either coefficient; returns the KLs and the coefficients."""
    recipe = ms.Recipe(trial)
    measured: Measured = {name: {"kl": [], "kl_coef": [], "course": []} for name in ARMS}
    for part in PARTS[: 1 if trial.quick else None]:
        changes = {} if part == "all" else {"part": part}
        reward = trial.result(ms.train_reward_model, recipe.start, recipe.compared, **changes)
        for name, options in ARMS.items():
            policy = trial.result(ms.train_policy, recipe.start, reward, **options)
            answers = trial.result(ms.answer, policy, recipe.start, reward).value
            measured[name]["kl"].append(float(np.mean(answers["kl"], dtype=np.float64)))
            measured[name]["kl_coef"].append(float(policy.value["logged"]["kl_coef"][-1]))
            measured[name]["course"].append(policy.value["logged"]["kl"])
    return measured


def decide(measured_S: Sequence[Measured]) -> list[verdicts.Part]:
    """Compares the deviations, and the mean KL of the adaptive runs with the target."""
    log_kl = {name: np.log(np.maximum([each[name]["kl"] for each in measured_S], 1e-3)) for name in ARMS}
    deviation_S = {name: deviation(log_kl_SM) for name, log_kl_SM in log_kl.items()}
    mean_S = np.exp(log_kl["adaptive"]).mean(axis=1)
    return [
        verdicts.above(
            "deviation of log KL with a fixed coefficient − with an adaptive one",
            deviation_S["fixed"] - deviation_S["adaptive"],
        ),
        verdicts.between("final KL with an adaptive coefficient / target", mean_S / TARGET, 0.9, 1.1),
    ]


def deviation(log_kl_SM: np.ndarray) -> np.ndarray:
    """Returns the mean distance of a world's values from the mean of the other worlds, ``[S]``."""
    S = len(log_kl_SM)
    mean_S = np.array([np.delete(log_kl_SM, s, axis=0).mean() if S > 1 else log_kl_SM.mean() for s in range(S)])
    return np.abs(log_kl_SM - mean_S[:, None]).mean(axis=1)


def plot(measured_S: Sequence[Measured]) -> str:
    """Draws the KL of the rollouts in the course of training."""
    with plots.axes(height=2.6) as (svg, (ax,)):
        for name, color in (("fixed", "sft"), ("adaptive", "ppo")):
            courses = [course for measured in measured_S for course in measured[name]["course"]]
            for number, kl_I in enumerate(courses):
                shown = {} if number else {"label": f"{name} coefficient"}
                ax.plot(kl_I, color=plots.color(color), alpha=0.5, linewidth=0.8, **shown)
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
    "ten times that of the paper, because training has 24 iterations instead of thousands.",
    measure=measure,
    decide=decide,
    plot=plot,
    minutes=5.0,
)
