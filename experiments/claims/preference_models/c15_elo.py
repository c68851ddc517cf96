"""C15: win rates, Elo scores and scores of preference models are interchangeable (Bai et al. 2022, 2.4 and B.5).

A difference of one unit of score is 174 Elo points. A preference model scores the answers of base, SFT and PPO models
of two sizes. The mean score of a policy is its known score. Matches between all policies are drawn with the
Bradley-Terry probabilities of the known scores, and the Elo scores that maximise their likelihood are compared with
the known ones. About 95 % must be within two standard errors. The probability that an answer is preferred to another
must be the same for the preference model's loss and for the Elo scores of both answers.

Two other Elo scores are drawn and not tested: those of matches between the answers to each prompt, in which the choice
is that of the preference model, and those of the labelers' choices. A mean score is not a win rate, so these Elo scores
are not the mean score times 174.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from scipy import special

from claims import model_stages as ms
from claims import verdicts
from claims.claim import Claim, Measured
from claims.trial import Trial
from rlhf_jax import diagnostics, losses
from rlhf_jax.report import plots
from rlhf_jax.simulation import labelers

SIZES = {"small": "1 x 32", "large": ms.LARGEST}
REFERENCE = "large SFT"
MATCHES, TOURNAMENTS = 300, 1000
"""Matches between two policies in a tournament, and tournaments."""
TWO_ERRORS = float(special.erf(np.sqrt(2.0)))
"""Confidence, 0.954, of an interval of two standard errors on both sides."""


def measure(trial: Trial) -> Measured:
    """Returns the known Elo score of each policy relative to `REFERENCE`, and what is found in matches."""
    recipe, answers = ms.Recipe(trial), {}
    for name, size in SIZES.items():
        sized = {} if size == ms.LARGEST else {"size": size}
        base, start = recipe.base_of(size), recipe.start_of(size)
        policy = trial.result(ms.train_policy, start, recipe.reward, **sized)
        for stage, model in (("base", base), ("SFT", start), ("PPO", policy)):
            answers[f"{name} {stage}"] = trial.result(ms.answer, model, start, recipe.reward, **sized).value
    gain, noise = recipe.reward.value["head"]["gain"], recipe.compared.value[1]["labeler_temperature"]
    score_MN = np.stack([each["score"] for each in answers.values()]) / np.float32(gain)
    assert trial.task.world is not None
    judges = trial.task.world.pool.replace(temperature=jnp.float32(noise))  # type: ignore[attr-defined]
    features = [each["features"] for each in answers.values()]
    reference = list(answers).index(REFERENCE)
    known_M = score_MN.astype(np.float64).mean(axis=1)
    chosen = {
        "preference model": wins(lambda i, j: special.expit(score_MN[i] - score_MN[j]), len(score_MN)),
        "labelers": wins(lambda i, j: labelers.choice_share(judges, features[i], features[j]), len(score_MN)),
    }
    elo = {
        judge: [each.mean for each in diagnostics.bradley_terry(wins_MM).elo(reference=reference)]
        for judge, wins_MM in chosen.items()
    }
    inside_M = recovered(known_M, reference, tournaments=20 if trial.quick else TOURNAMENTS, seed=trial.settings.seed)
    return {
        name: {
            "score": float(diagnostics.ELO_PER_NAT * (known_M[i] - known_M[reference])),
            "inside": inside_M[i],
            "formula": formula_error(score_MN[i], score_MN[reference]),
        }
        | {judge: values[i] for judge, values in elo.items()}
        for i, name in enumerate(answers)
        if name != REFERENCE
    }


def wins(share: Callable[[int, int], Any], models: int) -> np.ndarray:
    """Returns the expected number of wins, ``[M, M]``, given the probabilities of wins of one model over another."""
    return np.array([[np.sum(np.asarray(share(i, j))) for j in range(models)] for i in range(models)], np.float64)


def recovered(known_M: np.ndarray, reference: int, *, tournaments: int, seed: int) -> np.ndarray:
    """Returns how often the Elo score of each model is within two standard errors of the known one, ``[M]``.

    Args:
        known_M: Known scores, in nats.
        reference: Number of the model whose Elo score is 0.
        tournaments: Number of tournaments, each of `MATCHES` matches between any two models.
        seed: Seed of the matches.
    """
    rng, M = np.random.default_rng([seed, 15]), len(known_M)
    elo_M = diagnostics.ELO_PER_NAT * (known_M - known_M[reference])
    share_MM = 1 / (1 + 10 ** ((elo_M[None, :] - elo_M[:, None]) / 400))
    inside_M = np.zeros(M)
    for _ in range(tournaments):
        upper_MM = np.triu(rng.binomial(MATCHES, share_MM), k=1)
        wins_MM = upper_MM + np.tril(MATCHES - upper_MM.T, k=-1)
        found = diagnostics.bradley_terry(wins_MM).elo(reference=reference, confidence=TWO_ERRORS)
        inside_M += [each.lo <= elo <= each.hi for each, elo in zip(found, elo_M, strict=True)]
    return inside_M / tournaments


def formula_error(first_N: np.ndarray, second_N: np.ndarray) -> float:
    """Returns the largest difference between the probabilities of preference by the loss and by Elo scores."""
    by_loss_N = np.exp(-np.asarray(losses.pairwise(jnp.asarray(first_N), jnp.asarray(second_N)), np.float64))
    elo_N = [diagnostics.ELO_PER_NAT * each.astype(np.float64) for each in (first_N, second_N)]
    return float(np.max(np.abs(by_loss_N - 1 / (1 + 10 ** ((elo_N[1] - elo_N[0]) / 400)))))


def decide(measured_S: Sequence[Measured]) -> list[verdicts.Part]:
    """Computes the share of Elo scores within two standard errors, and the largest error of the formula."""
    inside_S = [np.mean([each["inside"] for each in measured.values()]) for measured in measured_S]
    error_S = [max(each["formula"] for each in measured.values()) for measured in measured_S]
    return [
        verdicts.between("share of Elo scores within two standard errors of the known ones", inside_S, 0.94, 0.97),
        verdicts.below("largest difference of probabilities by the loss and by Elo scores", error_S, 1e-6),
    ]


def plot(measured_S: Sequence[Measured]) -> str:
    """Draws Elo scores against the mean score times 174."""
    points = [each for measured in measured_S for each in measured.values()]
    x = np.array([each["score"] for each in points])
    with plots.axes(height=2.8) as (svg, (ax,)):
        for judge, color in (("preference model", "reward_model"), ("labelers", "ppo")):
            y = [each[judge] for each in points]
            ax.plot(x, y, "o", color=plots.color(color), alpha=0.7, label=f"choices of the {judge}")
        ax.axline((0, 0), slope=1, color=plots.color("other"), linewidth=0.8)
        ax.set_xlabel("mean score × 174, relative to the large SFT model")
        ax.set_ylabel("Elo score")
        ax.legend()
    return svg[0]


CLAIM = Claim(
    id="C15",
    paper="Bai et al. 2022, section 2.4 and appendix B.5",
    claim="Win rates, Elo scores and scores of preference models are interchangeable.",
    published="174 Elo points for each unit of score",
    differs="Matches are drawn with known scores, the mean scores of six policies, instead of judged by crowdworkers. "
    "An interval of two standard errors should contain 95.4 % of known scores; a share of 94 to 97 % counts as this.",
    measure=measure,
    decide=decide,
    plot=plot,
)
