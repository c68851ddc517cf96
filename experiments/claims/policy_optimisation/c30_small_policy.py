"""C30: a small model after RLHF beats a much larger supervised one (Stiennon et al. 2020, Figure 1 and appendix F).

The labelers like long answers: twenty tokens are worth `LENGTH_TASTE` to them, while the gold utility falls if an
answer is longer than its prompt asks for. They rank answers of the large SFT model. A reward model as large as this
model is trained on the rankings, and PPO trains the small SFT model. The same labelers then compare answers of the
small models with those of the large SFT model. All are sampled at `TEMPERATURE`, nearly greedily as in the paper.

The win rate at equal lengths is estimated as in appendix F, by a logistic regression of the choices on the model and
the logarithm of the length ratio.

The large model has eight times the parameters of the small one. The same rates against the largest SFT model, with 32
times the parameters, are drawn and not tested: that model knows more of the facts. In the variants that were tried with
seed 100 (models of two layers, more iterations of RL, a lower KL coefficient, more flaws in the demonstrations), small
PPO models won against it in 31 to 45 % of cases, and in 49 to 60 % at temperature 1. With the seeds 100 to 103, a
length taste of 0.2 gave results similar to those of 0.3.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from recipe import comparison_data, tasks

from claims import model_stages as ms
from claims import verdicts
from claims.claim import Claim, Measured
from claims.trial import Trial
from rlhf_jax import diagnostics, types
from rlhf_jax.report import plots
from rlhf_jax.simulation import labelers

SMALL, LARGE = "1 x 32", "2 x 64"
SFT = (LARGE, ms.LARGEST)
"""Sizes of the SFT models with which the small models are compared."""
LENGTH_TASTE = 0.3
"""Utility of twenty tokens to a labeler; the weight of brevity is 0.1."""
TEMPERATURE = 0.01
ARMS = ("small SFT", "small PPO")


def labelers_of(trial: Trial, length_taste: float) -> labelers.Pool:
    """Returns the training labelers, who also like long answers; their other tastes are those of other claims."""
    settings = trial.settings.world
    return labelers.make_pool(
        jax.random.fold_in(jax.random.key(trial.settings.seed), tasks.POOL),
        settings.labelers,
        spread=settings.spread,
        polite_taste=settings.polite_taste,
        length_taste=length_taste,
        tie_width=settings.tie_width,
        lapse=settings.lapse,
    )


def compare(trial: Trial, start: types.Params, *, length_taste: float) -> tuple[types.Comparisons, dict[str, Any]]:
    """Returns answers of an SFT model, ranked by labelers who like long answers, and facts about the labels."""
    world = trial.task.world
    assert world is not None
    task = dataclasses.replace(trial.task, world=dataclasses.replace(world, pool=labelers_of(trial, length_taste)))
    return comparison_data.sample_and_rank(dataclasses.replace(trial, task=task), [start], "comparisons")


def answer(trial: Trial, policy: types.Params, *, size: str = ms.LARGEST) -> np.ndarray:
    """Returns the labelers' features of one answer to each held-out prompt, ``[prompts, F]``."""
    key, prompts = jax.random.fold_in(trial.key("evaluate"), 30), trial.task.eval_prompts
    sampler = ms.sized(trial, size, policy_only=True).sampler
    answers = sampler(policy.get("policy", policy), None, None, prompts, key, temperature=TEMPERATURE)
    return np.asarray(labelers.features(answers.gold))


def measure(trial: Trial) -> Measured:
    """Returns the results of the small models against the large SFT model and against the largest one."""
    recipe, own = ms.Recipe(trial), ms.sized(trial, LARGE)
    small, large = recipe.start_of(SMALL), recipe.start_of(LARGE)
    compared = own.result(compare, large, length_taste=LENGTH_TASTE)
    reward = own.result(ms.train_reward_model, large, compared)
    policy = own.result(ms.train_policy, small, reward, size=SMALL)
    answers = [own.result(answer, model, size=SMALL).value for model in (small, policy)]
    references = [own.result(answer, large).value, trial.result(answer, recipe.start).value]
    noise = jnp.float32(compared.value[1]["labeler_temperature"])
    judges = labelers_of(trial, LENGTH_TASTE).replace(temperature=noise)  # type: ignore[attr-defined]
    found = {size: win_rates(judges, answers, reference) for size, reference in zip(SFT, references, strict=True)}
    return {arm: {size: rates[arm] for size, rates in found.items()} for arm in ARMS}


def win_rates(judges: labelers.Pool, answers: Sequence[np.ndarray], reference: np.ndarray) -> dict[str, Any]:
    """Returns the win rate against a model, that at equal lengths, and the ratio of mean lengths, for each of `ARMS`.

    Args:
        judges: The labelers.
        answers: Features of the answers of each arm, ``[prompts, F]``.
        reference: Features of the model's answers.
    """
    place = labelers.FEATURES.index("length")
    found = diagnostics.length_controlled_win_rates(
        np.concatenate([np.asarray(labelers.choice_share(judges, each, reference)) for each in answers]),  # pyright: ignore[reportArgumentType]
        np.concatenate([each[:, place] for each in answers]),
        np.tile(reference[:, place], len(answers)),
        np.repeat(ARMS, len(reference)).tolist(),
    )
    ratios = [float(np.mean(each[:, place]) / np.mean(reference[:, place])) for each in answers]
    return {
        arm: {"win_rate": plain.mean, "at equal lengths": controlled.mean, "length ratio": ratio}
        for arm, plain, controlled, ratio in zip(found.policies, found.plain, found.rates, ratios, strict=True)
    }


def decide(measured_S: Sequence[Measured]) -> list[verdicts.Part]:
    """Compares the small PPO model with the large SFT model."""
    against_S = [measured["small PPO"][LARGE] for measured in measured_S]
    return [
        verdicts.above("win rate of small PPO against large SFT", [each["win_rate"] for each in against_S], 0.5),
        verdicts.above("the same at equal lengths", [each["at equal lengths"] for each in against_S], 0.5),
    ]


def plot(measured_S: Sequence[Measured]) -> str:
    """Draws the win rates of both small models against both SFT models."""
    labels = [f"{arm}\nagainst {size}" for size in SFT for arm in ARMS]
    with plots.axes(height=2.8) as (svg, (ax,)):
        for name, color, shift in (("win_rate", "ppo", -0.1), ("at equal lengths", "other", 0.1)):
            rate_SA = np.array(
                [[m[arm][size][name] for size in (LARGE, ms.LARGEST) for arm in ARMS] for m in measured_S]
            )
            x_A = np.arange(len(labels)) + shift
            ax.plot(x_A, rate_SA.T, ".", color=plots.color(color), alpha=0.3)
            ax.plot(x_A, rate_SA.mean(axis=0), "o", color=plots.color(color), label=name.replace("_", " "))
        ax.axhline(0.5, color=plots.color("other"), linewidth=0.8)
        ax.set_xticks(range(len(labels)), labels)
        ax.set_ylabel("win rate against SFT")
        ax.legend()
    return svg[0]


CLAIM = Claim(
    id="C30",
    paper="Stiennon et al. 2020, Figure 1 and appendix F",
    claim="A small model after RLHF is preferred to a much larger supervised one, also at equal lengths.",
    published="summaries of the RL model of 1.3B parameters are preferred to the references at 61 %, those of the "
    "supervised model of 13B at 43 %; at equal lengths, rates are lower by about 5 points",
    differs="The sizes differ by a factor of 8 instead of 10. The answers of both models are compared with each other "
    "instead of with references. The taste of the simulated labelers for long answers is a setting.",
    measure=measure,
    decide=decide,
    plot=plot,
)
