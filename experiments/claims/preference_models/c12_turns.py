"""C12: preference models are most accurate on the first turn and then equally accurate (Bai et al. 2022, Figure 8).

Dialogues of up to four turns are made from single prompts: the turns before the last are other questions with answers
of the SFT model. Labelers rank answers to the last turn, for which the earlier turns make no difference. A preference
model is trained on dialogues of one to four turns, equally many of each. Its accuracy is the share of pairs of answers
to held-out prompts that it orders as gold utility does.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from claims import model_stages as ms
from claims import sample_pool, verdicts
from claims.claim import Claim, Measured
from claims.overoptimisation import c11_scaling
from claims.preference_models import pair_stages
from claims.trial import Trial
from rlhf_jax import types
from rlhf_jax.report import plots

TURNS = (1, 2, 3, 4)
BATCH = 4
"""Prompts per step, each with up to nine answers."""
SAMPLES = 8
"""Answers to each held-out prompt."""
TOLERANCE = 0.01
"""The largest change of accuracy per turn, from the second on, that counts as flat."""


def measure(trial: Trial) -> Measured:
    """Returns the accuracy at each turn."""
    recipe = ms.Recipe(trial)
    pool = sample_pool.pool(trial, recipe)
    return {"accuracy": trial.result(train_and_test, recipe.start, recipe.compared, pool).value}


def train_and_test(
    trial: Trial, start: types.Params, compared: tuple[types.Comparisons, dict[str, Any]], pool: dict[str, np.ndarray]
) -> np.ndarray:
    """Trains on dialogues of all lengths; returns the accuracy for each number of turns on the same answers.

    Args:
        trial: The trial.
        start: Initial parameters.
        compared: The comparisons, as `model_stages.compare` returns them.
        pool: Answers to held-out prompts, as `sample_pool.sample` returns them.
    """
    rows = jax.tree.map(np.asarray, ms.train_rows(trial, compared[0]))
    rng = np.random.default_rng([trial.settings.seed, 1200])
    earlier = [tokens[0][mask[0]] for tokens, mask in zip(rows.tokens_BKL, rows.mask_BKL)]
    width = (len(TURNS) - 1) * max(map(len, earlier)) + rows.tokens_BKL.shape[-1]
    turns_B = rng.permutation(np.resize(TURNS, len(earlier)))
    tokens_BKL, mask_BKL = prepend(rows.tokens_BKL, rows.mask_BKL, earlier, turns_B - 1, rng, width=width)
    longer: Any = rows.replace(tokens_BKL=tokens_BKL, mask_BKL=mask_BKL)
    rate = trial.settings.reward_model.learning_rate
    model = pair_stages.train(trial, start, longer, rate=rate, batch=BATCH, stream=12)
    tokens, mask, gold_PN = (pool[name][:, :SAMPLES] for name in ("tokens", "mask", "gold"))
    accuracies = []
    for turn in TURNS:
        asked = prepend(tokens, mask, earlier, np.full(len(tokens), turn - 1), rng, width=width)
        accuracies.append(c11_scaling.accuracy(pair_stages.scores(trial, model, *asked), gold_PN))
    return np.array(accuracies)


def prepend(
    tokens_BKL: np.ndarray,
    mask_BKL: np.ndarray,
    earlier: Sequence[np.ndarray],
    turns_B: np.ndarray,
    rng: np.random.Generator,
    *,
    width: int,
) -> tuple[np.ndarray, np.ndarray]:
    """Returns rows that begin with random earlier turns, the same for all answers to a prompt, and their mask.

    Args:
        tokens_BKL: Prompts with their answers.
        mask_BKL: True at their real tokens.
        earlier: Questions with their answers, as token ids, from which the earlier turns are drawn.
        turns_B: Number of earlier turns of each prompt.
        rng: Random generator, whose state advances.
        width: Number of columns of the rows.
    """
    B, K, L = tokens_BKL.shape
    tokens, mask = np.zeros((B, K, width), tokens_BKL.dtype), np.zeros((B, K, width), bool)
    tokens[:, :, width - L :], mask[:, :, width - L :] = tokens_BKL, mask_BKL
    for b, n in enumerate(turns_B.tolist()):
        before = [earlier[i] for i in rng.integers(len(earlier), size=n)]
        ids = np.concatenate([np.zeros(0, tokens.dtype), *before])
        if len(ids):
            end = width - L
            tokens[b, :, end - len(ids) : end], mask[b, :, end - len(ids) : end] = ids, True
    return tokens, mask


def decide(measured_S: Sequence[Measured]) -> list[verdicts.Part]:
    """Compares the first turn with the later ones, and computes the slope over these."""
    accuracy_SN = np.array([each["accuracy"] for each in measured_S])
    slope_S = np.polyfit(TURNS[1:], accuracy_SN[:, 1:].T, 1)[0]
    return [
        verdicts.above(
            "accuracy on the first turn − on later turns", accuracy_SN[:, 0] - accuracy_SN[:, 1:].mean(axis=1)
        ),
        verdicts.between("slope of the accuracy per turn, from the second on", slope_S, -TOLERANCE, TOLERANCE),
    ]


def plot(measured_S: Sequence[Measured]) -> str:
    """Draws the accuracy by turn."""
    with plots.axes(height=2.4) as (svg, (ax,)):
        accuracy_SN = np.array([each["accuracy"] for each in measured_S])
        ax.plot(TURNS, accuracy_SN.T, ".", color=plots.color("reward_model"), alpha=0.4)
        ax.plot(TURNS, accuracy_SN.mean(axis=0), "o-", color=plots.color("reward_model"))
        ax.set_xticks(TURNS)
        ax.set_xlabel("turn")
        ax.set_ylabel("accuracy")
    return svg[0]


CLAIM = Claim(
    id="C12",
    paper="Bai et al. 2022, Figure 8",
    claim="The accuracy of a preference model is highest on the first turn and nearly constant after it.",
    published="no number (figure)",
    differs="Earlier turns are unrelated to the last one, and gold utility replaces human labels. An interval cannot "
    "prove that the accuracy is constant, so its slope must be less than one point per turn.",
    measure=measure,
    decide=decide,
    plot=plot,
)
