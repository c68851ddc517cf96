"""C18: larger reward models are more robust (Bai et al. 2022, section 4.2 and Figure 33).

The samples of one policy are ranked by reward models of four sizes, which are trained on the same comparisons. Best of
n samples raises the score of each reward model. At an equal gain in score, the gain in gold utility should rise with
the size of the reward model.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from claims import model_stages as ms
from claims import reward_sizes, verdicts
from claims.claim import Claim, Measured
from claims.trial import Trial
from rlhf_jax.report import plots

GAIN = 0.8
"""Gain in score, in standard deviations within a prompt, at which gold utilities are compared; all sizes reach it."""


def measure(trial: Trial) -> Measured:
    """Returns the gains of best of n by the reward model of each size."""
    return reward_sizes.measure_sizes(trial)[1]


def gold_at(curve: dict[str, np.ndarray], gain: float) -> float:
    """Returns the gain in gold utility at a gain in score, interpolated."""
    return float(np.interp(gain, curve["proxy"], curve["gold"]))


def decide(measured_S: Sequence[Measured]) -> list[verdicts.Part]:
    """Computes the slope of the gold utility against the logarithm of the size."""
    gold_SA = np.array([[gold_at(curve, GAIN) for curve in measured.values()] for measured in measured_S])
    slopes_S = np.polyfit([ms.LOG_SIZES[size] for size in measured_S[0]], gold_SA.T, 1)[0]
    return [
        verdicts.above("gain in gold utility at equal gain in score, per doubling of the reward model", slopes_S),
        verdicts.above("the same, largest − smallest reward model", gold_SA[:, -1] - gold_SA[:, 0]),
    ]


def plot(measured_S: Sequence[Measured]) -> str:
    """Draws the gold utility against the score, one line per size."""
    with plots.axes(height=2.8) as (svg, (ax,)):
        for number, size in enumerate(measured_S[0]):
            proxy, gold = (np.mean([each[size][name] for each in measured_S], axis=0) for name in ("proxy", "gold"))
            shade = 0.3 + 0.7 * number / max(len(measured_S[0]) - 1, 1)
            ax.plot(proxy, gold, "o-", color=plots.color("reward_model"), alpha=shade, label=size)
        ax.axvline(GAIN, color=plots.color("other"), linewidth=0.8)
        ax.set_xlabel("gain in score (standard deviations)")
        ax.set_ylabel("gain in gold utility")
        ax.legend()
    return svg[0]


CLAIM = Claim(
    id="C18",
    paper="Bai et al. 2022, section 4.2 and Figure 33",
    claim="Larger reward models are more robust: at equal gain in score, the gold utility gains more.",
    published="no number (figure); 13M to 52B parameters after 200,000 samples",
    differs="Best of n instead of RL raises the score, and the gold utility replaces the score of a second reward "
    "model. The sizes differ by a factor of about 120 in all.",
    measure=measure,
    decide=decide,
    plot=plot,
)
