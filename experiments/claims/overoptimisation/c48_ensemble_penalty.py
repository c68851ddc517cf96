"""C48: a penalty for the disagreement of an ensemble reduces over-optimisation (Coste et al. 2023).

Four reward models, each trained on another quarter of the comparisons, form an ensemble. Policies are trained without a
KL penalty on the mean of its scores minus a coefficient times their standard deviation, with coefficients of 0 and two
others, and measured in the course of training. Compared are the gold utility at the end of training, and its fall from
the highest value in the course of training. The KL at that peak is drawn and not tested.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from recipe import rl_methods, stages

from claims import model_stages as ms
from claims import trajectories, verdicts
from claims.claim import Claim, Measured
from claims.trial import Programs, Trial
from rlhf_jax import lm, parallel, rewards, types
from rlhf_jax.report import plots
from rlhf_jax.train import ppo

COEFS = {"no penalty": 0.0, "small penalty": 0.5, "large penalty": 2.0}
AT = (0, 2, 4, 6, 8, 12, 16, 24)
RATE = 2.0
"""Factor on the default learning rate of the policy, as in C09."""
MEMBERS = 4


def measure(trial: Trial) -> Measured:
    """Returns KL and gold utility in the course of training with each coefficient."""
    recipe, at = ms.Recipe(trial), trajectories.iterations(trial, AT)
    members = [
        trial.result(ms.train_reward_model, recipe.start, recipe.compared, part=f"quarter {i + 1}")
        for i in range(MEMBERS)
    ]
    runs = {name: trial.result(follow, recipe.start, *members, at=at, coef=coef) for name, coef in COEFS.items()}
    return {name: run.value for name, run in runs.items()}


def follow(
    trial: Trial, start: types.Params, *members: types.Params, at: tuple[int, ...], coef: float
) -> dict[str, np.ndarray]:
    """Trains a policy on an ensemble; returns the means of its KL, gold utility and disagreement, ``[C]``.

    Args:
        trial: The trial.
        start: SFT model from which RL starts.
        *members: The reward models; the first is also the initial critic.
        at: Iterations after which the policy is measured; the last is the number of iterations.
        coef: Weight of the standard deviation of the scores.
    """
    rate = RATE * trial.settings.ppo.learning_rate
    own = trial.with_ppo(iterations=at[-1], kl_coef=0.0, learning_rate=rate)
    rows = [_means(own, start, start, members)]
    batch_at, hyper_at = stages.ppo_inputs(own, "ppo", ptx_coef=0.0)

    def record(done: int, state: Any, metrics: Any) -> None:
        del metrics
        if done in at:
            rows.append(_means(own, state.ema, start, members))

    own.fit(
        "ppo",
        _step(own.shared, own.cfg, own.settings.ppo),  # type: ignore[arg-type]  # frozen, thus hashable
        own.new_policy(start, members[0]),
        at[-1],
        batch_at=batch_at,
        hyper_at=hyper_at,
        frozen=ppo.Frozen(start, {"members": list(members), "coef": np.float32(coef)}),
        callbacks=[record],
    )
    return {name: np.array([row[name] for row in rows]) for name in rows[0]}


@functools.cache
def _step(programs: Programs, cfg: lm.LMConfig, settings: Any) -> parallel.JitStep:
    """Returns the compiled iteration of RL, which all coefficients share."""

    def score(params: dict[str, Any], rollout: types.Rollout) -> Any:
        scores_BK = jnp.stack(
            [lm.score(each, rollout.tokens_BL, cfg=cfg, mask_BL=rollout.mask_BL) for each in params["members"]], axis=1
        )
        return rewards.penalise_disagreement(scores_BK, coef=params["coef"])

    models = programs.rl_functions(samples=settings.samples, critic=rl_methods.has_critic(settings), score=score)
    return parallel.jit_step(ppo.make_train_step(models, **rl_methods.train_step_options(settings)))


def _means(trial: Trial, policy: Any, start: Any, members: Sequence[Any]) -> dict[str, float]:
    key = jax.random.fold_in(trial.key("evaluate"), 2000)
    answers = trial.sampler(policy, start, members[0], trial.task.eval_prompts, key)
    others = [trial.sampler.score(each, answers.tokens_BL, answers.mask_BL) for each in members[1:]]
    scores_BK = np.stack([answers.scores_B, *others], axis=1)
    found = {"kl": answers.kl_B, "gold": np.asarray(answers.gold.total), "disagreement": scores_BK.std(axis=1)}
    return {name: float(np.mean(each, dtype=np.float64)) for name, each in found.items()}


def decide(measured_S: Sequence[Measured]) -> list[verdicts.Part]:
    """Compares the policies that were trained with a penalty with the one without."""
    parts = []
    for name in [name for name in COEFS if name != "no penalty"]:
        pairs = [(each[name], each["no penalty"]) for each in measured_S]
        parts += [
            verdicts.above(
                f"gold utility at the end, {name} − none", [a["gold"][-1] - b["gold"][-1] for a, b in pairs]
            ),
            verdicts.below(f"fall of gold utility from its peak, {name} − none", [fall(a) - fall(b) for a, b in pairs]),
        ]
    return parts


def fall(run: dict[str, np.ndarray]) -> float:
    """Returns the highest gold utility in the course of training minus that at the end."""
    return float(np.max(run["gold"]) - run["gold"][-1])


def peak_root(run: dict[str, np.ndarray]) -> float:
    """Returns the square root of the KL at which gold utility is highest."""
    return float(trajectories.root(run["kl"])[np.argmax(run["gold"])])


def plot(measured_S: Sequence[Measured]) -> str:
    """Draws gold utility against the square root of the KL, and the mean place of the peak."""
    colors = ("ppo", "sft", "best_of_n")
    with plots.axes(height=2.8) as (svg, (ax,)):
        for name, color in zip(COEFS, colors, strict=True):
            peak = np.mean([peak_root(each[name]) for each in measured_S])
            for number, measured in enumerate(measured_S):
                run, shown = measured[name], None if number else f"{name}, peak at {peak:.2f}"
                ax.plot(
                    trajectories.root(run["kl"]), run["gold"], ".-", color=plots.color(color), alpha=0.6, label=shown
                )
        ax.set_xlabel("square root of the KL")
        ax.set_ylabel("gold utility")
        ax.legend()
    return svg[0]


CLAIM = Claim(
    id="C48",
    paper="Coste et al. 2023 (reward model ensembles)",
    claim="A penalty for the disagreement of an ensemble of reward models reduces over-optimisation.",
    published="over-optimisation always decreases, and gold scores are higher than with a single reward model",
    differs="The four reward models have seen different comparisons, instead of different seeds, and the penalty is "
    "the standard deviation instead of the variance.",
    measure=measure,
    decide=decide,
    plot=plot,
)
