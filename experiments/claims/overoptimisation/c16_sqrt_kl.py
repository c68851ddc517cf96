"""C16: the reward is about linear in the square root of the KL, with one slope for all sizes (Bai et al. 2022, 4.3).

Policies of three sizes are trained without a KL penalty against one reward model. The gain in score is regressed on the
square root of the KL and on the KL itself, in the course of training. For the slopes, the runs end where the first of
the three sizes stops. The slopes are averaged over the seeds; the interval of their change is that of the jackknife.

The claim was not shown with the seeds 0 to 4 before: first with 1,000 ranked prompts and the difference between the
largest and the smallest of the three slopes, which grows with the noise of each; then with the mean over the seeds of
the relative change of the slope; then with regressions that also end where the first of the three sizes stops, which
leaves out the range in which the root and the KL differ most.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from claims import model_stages as ms
from claims import trajectories, verdicts
from claims.claim import Claim, Measured
from claims.trial import MANY_COMPARISONS, Trial
from rlhf_jax.report import plots

SIZES = ("2 x 64", "2 x 96", ms.LARGEST)


def measure(trial: Trial) -> Measured:
    """Returns the gain in score and the KL in the course of training for each size of the policy."""
    recipe, at, measured = ms.Recipe(trial), trajectories.iterations(trial), {}
    for size in SIZES:
        changes = {} if size == ms.LARGEST else {"size": size}
        start = recipe.start_of(size)
        run = trial.result(trajectories.follow, start, recipe.reward, at=at, kl_coef=0.0, **changes)
        means = trajectories.means(run.value)
        measured[size] = {"kl": means["kl"], "gain": means["score"] - means["score"][0]}
    return measured


def decide(measured_S: Sequence[Measured]) -> list[verdicts.Part]:
    """Compares the two regressions, and the slopes between the sizes."""
    better_S = []
    for measured in measured_S:
        shares = [
            [line(x_C, run["gain"])[1] for x_C in (trajectories.root(run["kl"]), run["kl"])]
            for run in measured.values()
        ]
        better_S.append(np.mean([root - plain for root, plain in shares]))
    change_S = verdicts.jackknife(change_of_slope, measured_S)
    return [
        verdicts.above("share of variance explained by the square root of the KL − by the KL", better_S),
        verdicts.between("change of the slope from the smallest to the largest policy / mean", change_S, -0.25, 0.25),
    ]


def change_of_slope(measured_S: Sequence[Measured]) -> float:
    """Returns the change of the mean slope from the smallest to the largest policy, as a share of the mean."""
    slopes_SA = [
        [line(trajectories.root(run["kl"]), run["gain"])[0] for run in common(list(measured.values()))]
        for measured in measured_S
    ]
    log_sizes, slopes_A = [ms.LOG_SIZES[size] for size in measured_S[0]], np.mean(slopes_SA, axis=0)
    return float(np.polyfit(log_sizes, slopes_A, 1)[0] * np.ptp(log_sizes) / np.abs(np.mean(slopes_A)))


def common(runs: Sequence[dict[str, np.ndarray]]) -> list[dict[str, np.ndarray]]:
    """Returns the checkpoints of each run whose KL is at most the largest that all runs reach."""
    most = min(run["kl"].max() for run in runs)
    return [{name: values_C[run["kl"] <= most] for name, values_C in run.items()} for run in runs]


def line(x_C: np.ndarray, y_C: np.ndarray) -> tuple[float, float]:
    """Returns the slope of a straight line and the share of the variance that it explains."""
    slope = float(np.polyfit(x_C, y_C, 1)[0])
    return slope, float(np.corrcoef(x_C, y_C)[0, 1] ** 2)


def plot(measured_S: Sequence[Measured]) -> str:
    """Draws the gain in score against the square root of the KL."""
    with plots.axes(height=2.8) as (svg, (ax,)):
        for name, color in zip(SIZES, ("sft", "best_of_n", "ppo"), strict=True):
            for number, measured in enumerate(measured_S):
                run, shown = measured[name], None if number else name
                ax.plot(
                    trajectories.root(run["kl"]), run["gain"], ".-", color=plots.color(color), alpha=0.6, label=shown
                )
        ax.set_xlabel("square root of the KL")
        ax.set_ylabel("gain in score")
        ax.legend(title="size of the policy")
    return svg[0]


CLAIM = Claim(
    id="C16",
    paper="Bai et al. 2022, Figures 4 and 13, section 4.3",
    claim="The reward rises about linearly with the square root of the KL, with one slope for policies of all sizes.",
    published="parallel lines (figure), early in training",
    differs="The sizes of the policies differ by a factor of four, instead of 13 million to 52 billion parameters.",
    measure=measure,
    decide=decide,
    plot=plot,
    changes=MANY_COMPARISONS,
)
