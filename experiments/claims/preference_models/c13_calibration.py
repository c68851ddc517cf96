"""C13: preference models of helpfulness are calibrated, those of the mix under-confident (Bai et al. 2022, Figure 9).

Answers to benign prompts are compared by helpfulness and answers to harmful requests by harmlessness, which conflicts
with helpfulness there. The labels follow the Bradley-Terry model. One preference model is trained on pairs for benign
prompts, another on the same pairs and as many for harmful requests. Each is tested on pairs for held-out prompts in the
same proportions, with labels drawn in the same way. The slope of the logistic regression of the label on the difference
in score is 1 for a calibrated model and above 1 for an under-confident one.
"""

from __future__ import annotations

from collections.abc import Sequence

import jax
import numpy as np
from recipe import tasks
from scipy import special

from claims import model_stages as ms
from claims import verdicts
from claims.claim import Claim, Measured
from claims.preference_models import pair_stages
from claims.trial import Trial
from rlhf_jax import diagnostics, types
from rlhf_jax.report import plots
from rlhf_jax.simulation import labelers

PAIRS = 4000
"""Training pairs of each kind."""
TESTED = 3000
"""Pairs of each kind for held-out prompts."""
HARMFUL = "harmful"
JUDGED = {"benign": "helpful", HARMFUL: "harmless"}
"""The component of gold utility by which answers are compared, by kind of prompt."""
AGREEMENT = 0.75
"""Rate at which two labelers agree on a pair of different utility, which sets the noise of the labels."""
RATE = 1.0
"""Factor on the learning rate of reward models."""
TOLERANCE = 0.1

Pairs = dict[str, dict[str, types.Comparisons]]
"""Labelled pairs by kind of prompt, for training and for testing."""


def measure(trial: Trial) -> Measured:
    """Returns the slope and the accuracy of both models, each on pairs like those that it was trained on."""
    recipe = ms.Recipe(trial)
    train, test = (64, 64) if trial.quick else (PAIRS, TESTED)
    pairs = trial.result(sample, recipe.start, train=train, test=test)
    return {
        name: trial.result(train_and_test, recipe.start, pairs, kinds=list(kinds)).value
        for name, kinds in (("helpful", ("benign",)), ("mix", tuple(JUDGED)))
    }


def sample(trial: Trial, start: types.Params, *, train: int, test: int) -> Pairs:
    """Returns equally many labelled pairs of each kind of prompt, for training and for testing.

    The few harmful requests get several pairs of answers.
    """
    sources = {
        "train": (tasks.more_prompts(trial.settings, trial.task, 2 * train), train),
        "test": (trial.task.eval_prompts, test),
    }
    found: Pairs = {}
    for number, (kind, judged) in enumerate(JUDGED.items()):
        streams = {part: 1300 + 200 * number + 100 * place for place, part in enumerate(sources)}
        parts = {}
        for part, (prompts, pairs) in sources.items():
            asked = prompts.at(np.flatnonzero((np.array(prompts.categories) == HARMFUL) == (kind == HARMFUL)))
            parts[part] = pair_stages.sample_pairs(trial, start, asked, pairs=pairs, stream=streams[part])
        noise = temperature(parts["train"][judged])
        found[kind] = {part: label(trial, each, judged, noise, stream=streams[part]) for part, each in parts.items()}
    return found


def temperature(gold_N2: np.ndarray) -> float:
    """Returns the noise with which two labelers of equal tastes agree on pairs of different utility at `AGREEMENT`."""
    unequal_M2 = gold_N2[gold_N2[:, 0] != gold_N2[:, 1]]
    alike = [np.stack([unequal_M2[:, k]] * 2, axis=1) for k in range(2)]
    return labelers.calibrated_temperature(*alike, target=AGREEMENT)


def label(trial: Trial, rows: dict[str, np.ndarray], judged: str, noise: float, *, stream: int) -> types.Comparisons:
    """Returns pairs as comparisons, whose labels follow the Bradley-Terry model.

    Args:
        trial: The trial.
        rows: Tokens, mask and components of gold utility of the answers.
        judged: The component by which the answers are compared.
        noise: Temperature of the labels.
        stream: Number of the random stream.
    """
    rng = np.random.default_rng([trial.settings.seed, stream])
    gold_N2 = rows[judged]
    first_N = rng.random(len(gold_N2)) < special.expit((gold_N2[:, 0] - gold_N2[:, 1]) / noise)
    return pair_stages.comparisons(rows["tokens"], rows["mask"], np.where(first_N, 0, 1))


def train_and_test(trial: Trial, start: types.Params, pairs: Pairs, *, kinds: list[str]) -> dict[str, float]:
    """Trains on the pairs of some kinds for one epoch; returns slope and accuracy on held-out pairs of these kinds."""
    rows = jax.tree.map(lambda *x: np.concatenate(x), *(pairs[kind]["train"] for kind in kinds))
    rate = RATE * trial.settings.reward_model.learning_rate
    model = pair_stages.train(trial, start, rows, rate=rate, stream=13)
    parts = []
    for kind in kinds:
        test = pairs[kind]["test"]
        scores_N2 = pair_stages.scores(trial, model, np.asarray(test.tokens_BKL), np.asarray(test.mask_BKL))
        chosen_N = np.asarray(test.ranks_BK).argmin(axis=1)
        parts.append(np.where(chosen_N == 0, 1, -1) * (scores_N2[:, 0] - scores_N2[:, 1]))
    margins = np.concatenate(parts)
    zeros = np.zeros_like(margins)
    return {
        "slope": float(diagnostics.calibration_slope(margins, zeros).mean),
        "accuracy": float(diagnostics.win_outcomes(margins, zeros).mean()),
    }


def decide(measured_S: Sequence[Measured]) -> list[verdicts.Part]:
    """Compares the slopes with 1."""
    slope_S = {name: [each[name]["slope"] for each in measured_S] for name in ("helpful", "mix")}
    return [
        verdicts.between("slope of the helpful-only model", slope_S["helpful"], 1 - TOLERANCE, 1 + TOLERANCE),
        verdicts.above("slope of the model of the mix", slope_S["mix"], 1.0),
    ]


def plot(measured_S: Sequence[Measured]) -> str:
    """Draws the slopes of both models."""
    with plots.axes(height=2.4) as (svg, (ax,)):
        for place, name in enumerate(measured_S[0]):
            slope_S = [measured[name]["slope"] for measured in measured_S]
            ax.plot([place] * len(slope_S), slope_S, "o", color=plots.color("reward_model"), alpha=0.5)
            ax.plot(place, np.mean(slope_S), "_", color=plots.color("other"), markersize=16)
        ax.axhline(1.0, color=plots.color("other"), linewidth=0.8)
        ax.set_xticks(range(len(measured_S[0])), list(measured_S[0]))
        ax.set_ylabel("slope of label against score")
    return svg[0]


CLAIM = Claim(
    id="C13",
    paper="Bai et al. 2022, Figure 9",
    claim="A preference model of helpfulness is calibrated; one of helpfulness and harmlessness is slightly "
    "under-confident.",
    published="no number (figure)",
    differs="Simulated labels follow the Bradley-Terry model. An interval cannot prove equality, so the slope of the "
    "helpful-only model must be within 0.1 of 1.",
    measure=measure,
    decide=decide,
    plot=plot,
)
