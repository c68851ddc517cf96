"""C26: RL narrows the distribution of answers, as a lower temperature would (Bai et al. 2022, 4.5 and B.10).

A policy after PPO and the SFT model that it starts from answer the held-out prompts. Compared are the mean entropy per
token at their own answers, the share of distinct pairs of tokens among equally many pairs, and the temperature at which
the SFT model has the entropy of the policy, relative to that of the policy. Temperatures are at most 2, where a higher
one counts as 2. The paper finds that bias scores of a policy match those of its initial model at a temperature of about
0.6.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from recipe import evaluation

from claims import model_stages as ms
from claims import verdicts
from claims.claim import Claim, Measured
from claims.trial import Trial
from rlhf_jax import types
from rlhf_jax.report import plots


def measure(trial: Trial) -> Measured:
    """Returns the diversity of the answers of the SFT model and of the policy that PPO trains from it."""
    recipe = ms.Recipe(trial)
    policy = trial.result(ms.train_policy, recipe.start, recipe.reward)
    return trial.result(diversity, recipe.start, policy, recipe.reward).value


def diversity(trial: Trial, start: types.Params, policy: dict[str, Any], reward: types.Params) -> Measured:
    """Returns entropy per token, distinct-2, self-BLEU and the matched temperature."""
    prompts, key = trial.task.eval_prompts, jax.random.fold_in(trial.key("evaluate"), 3000)
    policies = {"start": start, "ppo": policy["policy"]}
    answers = {
        name: trial.sampler(params, start, reward, prompts, jax.random.fold_in(key, number))
        for number, (name, params) in enumerate(policies.items())
    }
    narrowed = evaluation.diversity_of_policies(
        trial,
        policies,
        answers,
        prompts,
        reward,
        initial="start",
        matched=("ppo",),
        rng=jax.random.fold_in(key, 0),
    )
    found, _ = evaluation.diversity_of_answers(answers, prompt_width=trial.task.prompt_width)
    return {
        name: {"matched_temperature": 1.0, "gold": _gold(answers[name])}
        | found[name]
        | {key: value[0] for key, value in narrowed[name].items()}
        for name in policies
    }


def _gold(answers: Any) -> float:
    return float(np.mean(answers.gold.total))


def decide(measured_S: Sequence[Measured]) -> list[verdicts.Part]:
    """Compares the policy with the SFT model."""
    ratios_S = [np.log(each["ppo"]["entropy"] / each["start"]["entropy"]) for each in measured_S]
    distinct_S = [each["ppo"]["diversity"] - each["start"]["diversity"] for each in measured_S]
    temperatures_S = [each["ppo"]["matched_temperature"] for each in measured_S]
    return [
        verdicts.below("log of the entropy of PPO / of SFT", ratios_S),
        verdicts.below("share of distinct pairs of tokens, PPO − SFT", distinct_S),
        verdicts.below("temperature of SFT with the entropy of PPO", temperatures_S, 1.0),
    ]


def plot(measured_S: Sequence[Measured]) -> str:
    """Draws entropy and distinct pairs of both models, a line for each seed, and names the mean temperature."""
    temperatures_S = [each["ppo"]["matched_temperature"] for each in measured_S]
    beyond = sum(each in (evaluation.FACTORS[0], evaluation.FACTORS[-1]) for each in temperatures_S)
    note = f" ({beyond} of {len(temperatures_S)} seeds beyond the measured range)" if beyond else ""
    with plots.axes(height=2.8) as (svg, (ax,)):
        for measured in measured_S:
            x, y = ([measured[name][axis] for name in ("start", "ppo")] for axis in ("entropy", "diversity"))
            ax.plot(x, y, color=plots.color("other"), alpha=0.4)
        for name, color, label in (("start", "sft_mix", "SFT"), ("ppo", "ppo", "PPO")):
            x, y = ([measured[name][axis] for measured in measured_S] for axis in ("entropy", "diversity"))
            ax.plot(x, y, "o", color=plots.color(color), label=label)
        ax.set_title(f"SFT has the entropy of PPO at a temperature of {np.mean(temperatures_S):.2f}{note}", fontsize=8)
        ax.set_xlabel("entropy, nats per token")
        ax.set_ylabel("share of distinct pairs of tokens")
        ax.legend()
    return svg[0]


CLAIM = Claim(
    id="C26",
    paper="Bai et al. 2022 (helpful and harmless), section 4.5 and appendix B.10",
    claim="RL narrows the distribution of answers, as a lower temperature would.",
    published="bias scores of the policy match those of the initial model at a temperature of about 0.6",
    differs="The entropy per token is matched instead of bias scores.",
    measure=measure,
    decide=decide,
    plot=plot,
)
