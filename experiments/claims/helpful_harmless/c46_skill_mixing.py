"""C46: a preference model that also learns another kind of comparisons loses on neither (Bai et al. 2022, Figure 20).

The other kind, in place of summaries, are answers to skill problems: the right answer is compared with that to another
problem of the same skill. One preference model is trained on pairs about helpfulness and harmlessness, one on skills,
and one on both. No problem of the held-out pairs is in training. Each specialist is compared with the model that is
trained on both.

After a first verdict with the seeds 0 to 4, the number of skill pairs was raised from 4,000 to 10,000, chosen with the
seeds 100 and 101. With 4,000, the model that is trained on all pairs is more accurate on skills than the specialist, by
0.019 (-0.001 to 0.038). After a second verdict, sums were left out, chosen with the seeds 100 to 103: models begin to
learn them late, each at another time. With sums, the difference was -0.003 (-0.036 to 0.030).
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from typing import Any

import numpy as np
from online import comparison_sets, preference_models
from recipe import reward_diagnosis

from claims import model_stages as ms
from claims import verdicts
from claims.claim import Claim, Measured
from claims.helpful_harmless import c19_tension, hh_stages
from claims.trial import Trial
from rlhf_jax import types
from rlhf_jax.report import plots
from rlhf_jax.simulation import corpus, lexicon

ARMS = {"helpfulness and harmlessness": (True, False), "skills": (False, True), "all": (True, True)}
PAIRS, SKILL_PAIRS, HELD_OUT = 4000, 10000, 4000
TAUGHT = ("copy", "sort", "look")
"""Kinds of skill problems."""
FLIPPED = 0.1
"""Share of wrong labels of the skill pairs in training."""


def problems(trial: Trial, n: int, *, held_out: bool) -> list[corpus.SkillProblem]:
    """Returns n skill problems; a fourth of all problems is held out, chosen by a digest of their text."""
    rng, found = np.random.default_rng([trial.settings.seed, 46, 1 + held_out]), []
    while len(found) < n:
        problem = corpus.skill_problem(TAUGHT[len(found) % len(TAUGHT)], rng)
        if (zlib.crc32(f"{trial.settings.seed} {problem.text}".encode()) % 4 == 0) == held_out:
            found.append(problem)
    return found


def skill_pairs(trial: Trial, n: int, *, held_out: bool, flipped: float) -> types.Comparisons:
    """Returns pairs of a right and a wrong answer to n skill problems, in random order."""
    rng = np.random.default_rng([trial.settings.seed, 46, 3 + held_out])
    P, L = trial.task.prompt_width, trial.task.row_width
    tokens_B2L = np.full((n, 2, L), lexicon.PAD_ID, np.int32)
    mask_B2L, ranks_B2 = np.zeros((n, 2, L), bool), np.zeros((n, 2), np.int32)
    for b, problem in enumerate(problems(trial, n, held_out=held_out)):
        other = corpus.skill_problem(problem.skill, rng)
        while other.answer == problem.answer:
            other = corpus.skill_problem(problem.skill, rng)
        order = int(rng.integers(2))
        asked = [lexicon.END_ID, *(lexicon.IDS[word] for word in problem.text.split())][-P:]
        for k, answer in ((order, problem.answer), (1 - order, other.answer)):
            ids = [*(lexicon.IDS[word] for word in answer.split()), lexicon.END_ID]
            tokens_B2L[b, k, P - len(asked) : P + len(ids)] = asked + ids
            mask_B2L[b, k, P - len(asked) : P + len(ids)] = True
        right = order if rng.random() >= flipped else 1 - order
        ranks_B2[b, right], ranks_B2[b, 1 - right] = 1, 2
    arrays: Any = (tokens_B2L, mask_B2L, ranks_B2, np.ones((n, 2), bool))
    return types.Comparisons(*arrays, domain_B=np.zeros(n, np.int32))


def train_and_test(
    trial: Trial, start: types.Params, sets: comparison_sets.Sets, *, dialogues: bool, skills: bool
) -> dict[str, float]:
    """Returns the accuracy of a preference model on both kinds of held-out pairs."""
    n, skilled, held_out = (32, 32, 64) if trial.quick else (PAIRS, SKILL_PAIRS, HELD_OUT)
    parts = []
    if dialogues:
        parts.append(comparison_sets.first(sets.train, {"helpful": n, "harmless": n}))
    if skills:
        parts.append(skill_pairs(trial, skilled, held_out=False, flipped=FLIPPED))
    rows = comparison_sets.merge(parts)
    model = preference_models.train(
        trial, hh_stages.step_of(trial), start, rows, name="reward_model", number=0, batch=hh_stages.BATCH
    )
    tested = skill_pairs(trial, held_out, held_out=True, flipped=0.0)
    scores_B2 = reward_diagnosis.score_answers(trial, model, tested)
    first_B = np.asarray(tested.ranks_BK)[:, 0] == 1
    right = float(np.mean((scores_B2[:, 0] > scores_B2[:, 1]) == first_B))
    return {"dialogues": float(np.mean(list(hh_stages.accuracy(trial, model, sets).values()))), "skills": right}


def measure(trial: Trial) -> Measured:
    """Returns the accuracies of the three preference models."""
    recipe = ms.Recipe(trial)
    sets = trial.result(hh_stages.collect, recipe.start, **c19_tension.DRAWN)
    return {
        name: trial.result(train_and_test, recipe.start, sets, dialogues=dialogues, skills=skills).value
        for name, (dialogues, skills) in ARMS.items()
    }


def decide(measured_S: Sequence[Measured]) -> list[verdicts.Part]:
    """Compares the model that is trained on all pairs with each specialist."""
    return [
        verdicts.between(
            f"accuracy on {kind}, trained on all − {specialist} only",
            [each["all"][kind] - each[specialist][kind] for each in measured_S],
            -0.015,
            0.015,
        )
        for kind, specialist in (("dialogues", "helpfulness and harmlessness"), ("skills", "skills"))
    ]


def plot(measured_S: Sequence[Measured]) -> str:
    """Draws the accuracies."""
    with plots.axes(height=2.4) as (svg, (ax,)):
        for kind, color in (("dialogues", "sft"), ("skills", "ppo")):
            accuracy_SA = np.array([[each[name][kind] for name in ARMS] for each in measured_S])
            ax.plot(accuracy_SA.T, ".", color=plots.color(color), alpha=0.4)
            ax.plot(accuracy_SA.mean(axis=0), "_", color=plots.color(color), markersize=16, label=f"on {kind}")
        ax.set_xticks(range(len(ARMS)), [f"trained on\n{name}" for name in ARMS])
        ax.set_ylabel("accuracy")
        ax.legend()
    return svg[0]


CLAIM = Claim(
    id="C46",
    paper="Bai et al. 2022, Figure 20",
    claim="A preference model that is trained on helpfulness, harmlessness and another skill loses on neither.",
    published="figure only; the other skill is summarisation",
    differs="10,000 skill problems with one right answer replace summaries. RLHF on the mixture is not measured.",
    measure=measure,
    decide=decide,
    plot=plot,
)
