"""C05: reward models generalise to unseen groups of labelers (Ouyang et al. 2022, section 4.1 and E.2).

Labelers of five groups, whose tastes differ, rank the answers. For each group, a reward model is trained on the labels
of the other four. On held-out prompts, its accuracy is the probability that a labeler agrees with it about a pair. It
is computed for the labelers of the four groups and for those of the held-out group. In-group accuracy should be higher
by less than five points.

With 320 prompts, the claim was not shown with the seeds 0 to 4: the reward models were right about 62 % of pairs, and
the interval of the gap, 0.005 (-0.003 to 0.012), contained 0.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from recipe import world_words

from claims import model_stages as ms
from claims import reward_fits, verdicts
from claims.claim import Claim, Measured
from claims.trial import MANY_COMPARISONS, Trial
from rlhf_jax import types
from rlhf_jax.report import plots
from rlhf_jax.simulation import labelers

GROUPS = 5
GROUP_SPREAD = 0.6
"""Relative standard deviation of the groups' tastes; that within groups is --world.spread."""
AGREEMENT = 0.73
PROMPTS, BATCH = 960, 4
HELD_OUT = 400

Compared = tuple[types.Comparisons, dict[str, Any]]


def measure(trial: Trial) -> Measured:
    """Trains a reward model for each fold; returns its accuracy for both kinds of labelers."""
    recipe, prompts = ms.Recipe(trial), 16 if trial.quick else PROMPTS
    judged = trial.result(judge, recipe.compared)
    folds = [
        trial.result(train_and_test, recipe.start, recipe.compared, judged, fold=fold, prompts=prompts).value
        for fold in range(GROUPS)
    ]
    return {name: {"accuracy": np.array([fold[name] for fold in folds])} for name in ("in-group", "held-out")}


def judge(trial: Trial, compared: Compared) -> dict[str, Any]:
    """Returns the pool of labelers, whose noise is calibrated, and the features of the compared answers."""
    world, settings = trial.task.world, trial.settings.world
    rows: Any = compared[0]
    assert world is not None and world.compare_prompts.words_BP is not None
    b, k = np.nonzero(rows.where_BK)
    P = trial.task.prompt_width
    utility = world_words.gold_utility(
        world.tables, world.compare_prompts.words_BP[b], rows.tokens_BKL[b, k, P:], rows.mask_BKL[b, k, P:]
    )
    features_BKF = np.zeros((*rows.where_BK.shape, len(labelers.FEATURES)), np.float32)
    features_BKF[b, k] = labelers.features(utility)
    pool = labelers.make_pool(
        jax.random.fold_in(trial.key("comparisons"), 2001),
        settings.labelers,
        n_groups=GROUPS,
        spread=settings.spread,
        group_spread=GROUP_SPREAD,
        polite_taste=settings.polite_taste,
        tie_width=settings.tie_width,
        lapse=settings.lapse,
    )
    utility_BKR = np.asarray(labelers.utilities(pool, jnp.asarray(features_BKF)))
    noise = labelers.calibrated_temperature(utility_BKR[:, 0], utility_BKR[:, 1], target=AGREEMENT)
    noisy = pool.replace(temperature=jnp.float32(noise))  # type: ignore[attr-defined]
    return {"pool": noisy, "features": features_BKF}


def train_and_test(
    trial: Trial, start: types.Params, compared: Compared, judged: dict[str, Any], *, fold: int, prompts: int
) -> dict[str, float]:
    """Trains on labels of all groups but one; returns the accuracy for the labelers of these groups and of that one.

    Args:
        trial: The trial.
        start: Initial parameters.
        compared: The comparisons, whose ranks are not used.
        judged: The result of `judge`.
        fold: The group that is held out.
        prompts: Number of training prompts.
    """
    pool, rows = judged["pool"], compared[0]
    seen_R = np.flatnonzero(np.asarray(pool.group_R) != fold)
    keys_B = jax.random.split(jax.random.fold_in(trial.key("comparisons"), 2100 + fold), prompts)
    rank_all = jax.jit(jax.vmap(labelers.rank, in_axes=(0, None, 0, 0, 0)))
    labeler_B = seen_R[np.arange(prompts) % len(seen_R)]
    ranks_BK: Any = rank_all(keys_B, pool, labeler_B, judged["features"][:prompts], rows.where_BK[:prompts])
    few = types.Comparisons(
        rows.tokens_BKL[:prompts],
        rows.mask_BKL[:prompts],
        np.asarray(ranks_BK),  # type: ignore[arg-type]
        rows.where_BK[:prompts],
    )
    reward = reward_fits.fit(trial, start, few, batch=BATCH)
    all_rows = rows.replace(loss_inputs={"features": judged["features"]})  # type: ignore[attr-defined]
    tested = reward_fits.held_out(trial, all_rows, trained=prompts, limit=HELD_OUT)
    scores_BK = reward_fits.score(trial, reward, tested)
    features_BKF = tested.loss_inputs["features"]
    own_R = {"in-group": seen_R, "held-out": np.flatnonzero(np.asarray(pool.group_R) == fold)}
    return {
        name: accuracy(scores_BK, features_BKF, np.asarray(tested.where_BK), part(pool, each_R))
        for name, each_R in own_R.items()
    }


def part(pool: labelers.Pool, rows_R: np.ndarray) -> labelers.Pool:
    """Returns the pool of some of the labelers."""
    return pool.replace(weights_RF=pool.weights_RF[rows_R], group_R=pool.group_R[rows_R])  # type: ignore[attr-defined]


def accuracy(scores_BK: np.ndarray, features_BKF: np.ndarray, where_BK: np.ndarray, pool: labelers.Pool) -> float:
    """Returns the probability that a labeler prefers the answer with the higher score, averaged over different answers.

    Args:
        scores_BK: Scores of the answers.
        features_BKF: Features of the answers.
        where_BK: False for missing answers.
        pool: The labelers.
    """
    b, i, j = np.nonzero(where_BK[:, :, None] & where_BK[:, None] & np.tri(where_BK.shape[1], k=-1, dtype=bool))
    differ = (features_BKF[b, i] != features_BKF[b, j]).any(axis=-1)
    b, i, j = b[differ], i[differ], j[differ]
    first_NF, second_NF = jnp.asarray(features_BKF[b, i]), jnp.asarray(features_BKF[b, j])
    prefers_i_N = np.asarray(labelers.choice_share(pool, first_NF, second_NF))
    sign_N = np.sign(scores_BK[b, i] - scores_BK[b, j])
    return float(np.mean(0.5 + sign_N * (prefers_i_N - 0.5)))


def decide(measured_S: Sequence[Measured]) -> list[verdicts.Part]:
    """Computes the gap, averaged over the folds, and compares both accuracies with chance."""
    inside_S, outside_S = (
        np.array([np.mean(measured[name]["accuracy"]) for measured in measured_S]) for name in ("in-group", "held-out")
    )
    return [
        verdicts.between("accuracy for in-group labelers − for held-out ones", inside_S - outside_S, 0.0, 0.05),
        verdicts.above("accuracy for held-out labelers", outside_S, 0.5),
        verdicts.above("accuracy for in-group labelers", inside_S, 0.5),
    ]


def plot(measured_S: Sequence[Measured]) -> str:
    """Draws the accuracy for held-out labelers against that for in-group labelers, one point per fold."""
    x, y = (np.array([measured[name]["accuracy"] for measured in measured_S]) for name in ("in-group", "held-out"))
    with plots.axes(height=2.8) as (svg, (ax,)):
        ax.plot(x.ravel(), y.ravel(), "o", color=plots.color("reward_model"), alpha=0.5)
        ax.axline((x.mean(), x.mean()), slope=1, color=plots.color("other"), linewidth=0.8)
        ax.set_xlabel("accuracy for in-group labelers")
        ax.set_ylabel("for held-out labelers")
    return svg[0]


CLAIM = Claim(
    id="C05",
    paper="Ouyang et al. 2022, section 4.1 and E.2",
    claim="Reward models generalise to unseen groups of labelers, with slightly lower accuracy.",
    published="69.6 ± 0.9 % for held-out groups, 72.4 ± 0.4 % for the groups of the training labels",
    differs="The labelers are simulated, and how much their groups differ is an assumption. Accuracy is the expected "
    "agreement with a labeler instead of that with single labels; ties count one half.",
    measure=measure,
    decide=decide,
    plot=plot,
    changes=MANY_COMPARISONS,
)
