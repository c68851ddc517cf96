"""C02: all pairs of a prompt belong in one batch element (Ouyang et al. 2022, 3.5, note 5, and C.2).

If pairs are shuffled, each answer is in several updates of a single epoch, and the reward model overfits. More epochs
overfit too, and a learning rate that is 50 % lower or higher makes no difference. Reward models are trained on the same
few prompts, in small batches so that there are enough updates, and the log-loss is measured on prompts that ask
something else. A batch of shuffled pairs has about as many answers as a batch of whole prompts, so shuffled pairs take
more updates. The log-losses of the arms that differ in the learning rate are averages over two runs, because those of
single runs vary by about 0.01.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from claims import model_stages as ms
from claims import reward_fits, verdicts
from claims.claim import Claim, Measured
from claims.trial import Trial
from rlhf_jax import types
from rlhf_jax.report import plots

RATE = 2.0
"""Factor on the learning rate of the recipe, which trains on more prompts in larger batches."""
RUNS = 2
ARMS: dict[str, dict[str, Any]] = {
    "grouped": {"runs": RUNS},
    "shuffled": {"shuffled": True},
    "3 epochs": {"epochs": 3},
    "rate x 0.5": {"rate": 0.5 * RATE, "runs": RUNS},
    "rate x 1.5": {"rate": 1.5 * RATE, "runs": RUNS},
}
PROMPTS, BATCH = 480, 2
HELD_OUT = 400


def measure(trial: Trial) -> Measured:
    """Trains a reward model in each way; returns its log-loss and accuracy on held-out prompts."""
    recipe, prompts = ms.Recipe(trial), 16 if trial.quick else PROMPTS
    return {
        name: trial.result(train_and_test, recipe.start, recipe.compared, prompts=prompts, **options).value
        for name, options in ARMS.items()
    }


def train_and_test(
    trial: Trial,
    start: types.Params,
    compared: tuple[types.Comparisons, dict[str, Any]],
    *,
    prompts: int,
    epochs: int = 1,
    rate: float = RATE,
    shuffled: bool = False,
    runs: int = 1,
) -> dict[str, float]:
    """Trains reward models on the first prompts; returns their mean log-loss and accuracy on others.

    Args:
        trial: The trial.
        start: Initial parameters.
        compared: The comparisons, as `model_stages.compare` returns them.
        prompts: Number of training prompts.
        epochs: Number of passes over them.
        rate: Factor on the learning rate.
        shuffled: Whether to train on shuffled pairs.
        runs: Number of reward models.
    """
    few = types.Comparisons(
        **{name: getattr(compared[0], name)[:prompts] for name in ("tokens_BKL", "mask_BKL", "ranks_BK", "where_BK")}
    )
    rows = reward_fits.held_out(trial, compared[0], trained=prompts, limit=HELD_OUT)
    numbers = []
    for run in range(runs):
        reward = reward_fits.fit(trial, start, few, batch=BATCH, epochs=epochs, rate=rate, shuffled=shuffled, run=run)
        numbers.append(reward_fits.pair_numbers(reward_fits.score(trial, reward, rows), rows))
    return {name: float(np.mean([each[name] for each in numbers])) for name in numbers[0]}


def decide(measured_S: Sequence[Measured]) -> list[verdicts.Part]:
    """Compares the log-losses with that of the first arm."""
    more_S = {
        name: np.array([each[name]["loss"] - each["grouped"]["loss"] for each in measured_S]) for name in measured_S[0]
    }
    return [
        verdicts.above("held-out log-loss with shuffled pairs − with whole prompts", more_S["shuffled"]),
        verdicts.above("held-out log-loss after three epochs − after one", more_S["3 epochs"]),
        verdicts.between(
            "held-out log-loss at half the learning rate − at the full", more_S["rate x 0.5"], -0.01, 0.01
        ),
        verdicts.between("held-out log-loss at 1.5 times the rate − at the full", more_S["rate x 1.5"], -0.01, 0.01),
    ]


def plot(measured_S: Sequence[Measured]) -> str:
    """Draws the held-out log-loss of each arm."""
    with plots.axes(height=2.4) as (svg, (ax,)):
        for place, name in enumerate(ARMS):
            losses_S = [measured[name]["loss"] for measured in measured_S]
            ax.plot([place] * len(losses_S), losses_S, "o", color=plots.color("reward_model"), alpha=0.5)
            ax.plot(place, np.mean(losses_S), "_", color=plots.color("other"), markersize=16)
        ax.set_xticks(range(len(ARMS)), list(ARMS))
        ax.set_ylabel("held-out log-loss (nats)")
    return svg[0]


CLAIM = Claim(
    id="C02",
    paper="Ouyang et al. 2022, section 3.5, note 5, and C.2",
    claim="Batches of whole prompts avoid the overfitting of shuffled pairs; more epochs overfit; the learning rate "
    "matters little.",
    published="no numbers; validation accuracy and log-loss are much better; rates 50 % lower or higher do as well",
    differs="480 prompts, two in a batch, instead of 33,000 and 64, ranked by simulated labelers. Batches have equal "
    "numbers of answers, not of pairs, and the learning rate is the same for shuffled pairs, which take about five "
    "times as many updates.",
    measure=measure,
    decide=decide,
    plot=plot,
)
