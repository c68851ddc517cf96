"""C04: labelers agree on about 73 % of pairs, and the majority of three agrees more often (Ouyang et al. 2022, 3.4).

Stiennon et al. (2020, C.2) report that the majority of three labelers agrees with another one more often than a single
labeler does. The noise of the simulated labelers is set by the closed form of their agreement, ``E[p_i p_j +
(1 - p_i)(1 - p_j)]``. Choices are then simulated, with ties and lapses, on pairs of answers of the SFT model.
"""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from claims import model_stages as ms
from claims import sample_pool, verdicts
from claims.claim import Claim, Measured
from claims.trial import Trial
from rlhf_jax.feedback.labelers import labeler_agreement
from rlhf_jax.report import plots
from rlhf_jax.simulation import labelers

TARGET = 0.73
DRAWS = 8
"""Number of times that each pair is judged."""
SAMPLES = 16
"""Answers to each prompt, of which each two are a pair."""
LABELERS = 4
"""One labeler, and three whose majority is compared with the first one's choice."""


def measure(trial: Trial) -> Measured:
    """Simulates the choices of four labelers on each pair."""
    recipe = ms.Recipe(trial)
    features_PNF = sample_pool.pool(trial, recipe).value["features"][:, :SAMPLES]
    a_NF, b_NF = features_PNF.reshape(-1, 2, features_PNF.shape[-1]).swapaxes(0, 1)
    assert trial.task.world is not None
    pool = trial.task.world.pool
    utility_a_NR, utility_b_NR = (np.asarray(labelers.utilities(pool, each_NF)) for each_NF in (a_NF, b_NF))
    noise = labelers.calibrated_temperature(utility_a_NR, utility_b_NR, target=TARGET)
    a_NF, b_NF = (np.repeat(each_NF, DRAWS, axis=0) for each_NF in (a_NF, b_NF))
    noisy: labelers.Pool = pool.replace(temperature=jnp.float32(noise))  # type: ignore[attr-defined]
    votes_NL = _votes(trial.key("comparisons"), noisy, a_NF, b_NF)
    majority_N = labeler_agreement.mode(votes_NL[:, 1:])
    return {
        "closed form": labelers.agreement(utility_a_NR, utility_b_NR, temperature=noise),
        "one labeler": labeler_agreement.pairwise_agreement(votes_NL[:, :2]).share.mean,
        "majority of three": labeler_agreement.agreement_with(votes_NL[:, :1], majority_N)[0].share.mean,
    }


def _votes(key: jax.Array, pool: labelers.Pool, a_NF: np.ndarray, b_NF: np.ndarray) -> np.ndarray:
    """Returns 1 where a labeler prefers answer a, 0 where answer b, NaN where it ties them: ``[N, LABELERS]``."""
    n, R = len(a_NF), len(pool.weights_RF)
    drawn_NR = jax.random.uniform(jax.random.fold_in(key, 1), (n, R))
    labeler_LN = jnp.argsort(drawn_NR, axis=1)[:, :LABELERS].T  # different labelers for each pair
    pair_NKF, where_K = np.stack([a_NF, b_NF], axis=1), np.ones(2, bool)
    rank = jax.jit(jax.vmap(labelers.rank, in_axes=(0, None, 0, 0, None)))
    ranks = [
        rank(jax.random.split(jax.random.fold_in(key, 2 + i), n), pool, labeler_N, pair_NKF, where_K)
        for i, labeler_N in enumerate(labeler_LN)
    ]
    difference_NL = np.stack([np.asarray(rank_NK[:, 1] - rank_NK[:, 0]) for rank_NK in ranks], axis=1)
    return np.where(difference_NL == 0, np.nan, difference_NL > 0)


def decide(measured_S: Sequence[Measured]) -> list[verdicts.Part]:
    """Compares the simulation with the closed form, and the majority with a single labeler."""
    closed_S, one_S, three_S = (
        np.array([measured[name] for measured in measured_S])
        for name in ("closed form", "one labeler", "majority of three")
    )
    return [
        verdicts.between("simulated agreement − closed form", one_S - closed_S, -0.015, 0.015),
        verdicts.above("agreement with the majority of three − with one labeler", three_S - one_S),
    ]


def plot(measured_S: Sequence[Measured]) -> str:
    """Draws the three rates of agreement."""
    names = list(measured_S[0])
    with plots.axes(height=2.2) as (svg, (ax,)):
        for place, name in enumerate(names):
            values_S = [measured[name] for measured in measured_S]
            ax.plot([place] * len(values_S), values_S, "o", color=plots.color("ppo"), alpha=0.4)
        ax.axhline(TARGET, color=plots.color("other"), linewidth=0.8)
        ax.set_xticks(range(len(names)), names)
        ax.set_ylabel("rate of agreement")
    return svg[0]


CLAIM = Claim(
    id="C04",
    paper="Ouyang et al. 2022, section 3.4; Stiennon et al. 2020, C.2",
    claim="Labelers agree on about 73 % of pairs, and the majority of three agrees with a labeler more often.",
    published="training labelers 72.6 ± 1.5 %, held-out labelers 77.3 ± 1.3 %; the majority of three raises 72 to 77 %",
    differs="The labelers are simulated. Their noise is set so that the closed form gives 73 %, so the first statistic "
    "tests the simulation, with its ties and lapses, and not people.",
    measure=measure,
    decide=decide,
    plot=plot,
)
