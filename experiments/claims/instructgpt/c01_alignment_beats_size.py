"""C01: alignment counts for more than size (Ouyang et al. 2022, Figure 1 and section 4.1).

A small and a large model are compared as base models, as base models with a prompt, and after SFT, PPO and PPO-ptx. A
prompt writes the question in the form of the questions and answers in the pretraining corpus; without it, the base
model sees role tokens that the corpus does not contain. Each answer is compared with that of the large SFT model by
gold utility. The win rate of the large model must rise from base to prompted to SFT to PPO, and the small PPO model
must beat the large base model with a prompt. The order of the small models is drawn and not tested.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import jax
import numpy as np
from recipe import tasks

from claims import model_stages as ms
from claims import verdicts
from claims.claim import Claim, Measured
from claims.trial import Trial
from rlhf_jax import diagnostics, types
from rlhf_jax.data import padding, plain_text
from rlhf_jax.report import plots

SIZES = {"small": "1 x 32", "large": ms.LARGEST}
ARMS = ("base", "prompted", "sft", "ppo", "ppo_ptx")
TOLERANCE = 0.05
"""Largest difference in the win rates of PPO and PPO-ptx that counts as none."""


def measure(trial: Trial) -> Measured:
    """Returns the gold utility of one answer of each model to each held-out prompt."""
    recipe, measured = ms.Recipe(trial), {}
    for name, size in SIZES.items():
        sized = {} if size == ms.LARGEST else {"size": size}
        base, start = recipe.base_of(size), recipe.start_of(size)
        answers = {
            "base": trial.result(ms.answer, base, start, recipe.reward, **sized),
            "prompted": trial.result(answer_prompted, base, **sized),
            "sft": trial.result(ms.answer, start, start, recipe.reward, **sized),
        }
        for arm, options in (("ppo", {}), ("ppo_ptx", {"ptx_coef": 1.0})):
            policy = trial.result(ms.train_policy, start, recipe.reward, **options, **sized)
            answers[arm] = trial.result(ms.answer, policy, start, recipe.reward, **sized)
        measured |= {f"{name} {arm}": {"gold": each.value["gold"]} for arm, each in answers.items()}
    return measured


def answer_prompted(trial: Trial, base: types.Params, *, size: str = ms.LARGEST) -> dict[str, np.ndarray]:
    """Returns the gold utility of a base model's answers to the held-out prompts, written as in the corpus."""
    sampler, key = ms.sized(trial, size).sampler, jax.random.fold_in(trial.key("evaluate"), 1)
    answers = sampler(base, None, None, as_in_corpus(trial.task), key)
    return {"gold": np.asarray(answers.gold.total)}


def as_in_corpus(task: tasks.Task) -> tasks.PromptSet:
    """Returns the held-out prompts in the form of the questions of the pretraining corpus."""
    prompts = task.eval_prompts
    asked = [
        [line.removeprefix("user: ") for line in text.split("\n") if line.startswith("user: ")]
        for text in prompts.texts
    ]
    ids = plain_text.encode_texts(task.tokenizer, [f"question : {' '.join(each)} answer :" for each in asked])
    tokens_BP, mask_BP = padding.pad_prompts(ids, width=task.prompt_width, pad_id=task.fmt.pad_id)
    return dataclasses.replace(prompts, tokens_BP=tokens_BP, mask_BP=mask_BP)


def wins(first: dict[str, np.ndarray], second: dict[str, np.ndarray]) -> float:
    """Returns the share of prompts at which the first answer has the higher gold utility; ties count half."""
    return float(np.mean(diagnostics.win_outcomes(first["gold"], second["gold"], tie_tolerance=1e-5)))


def decide(measured_S: Sequence[Measured]) -> list[verdicts.Part]:
    """Compares the win rates of the large models against SFT, and the small PPO model with the large prompted one."""
    rate_S = {arm: np.array([wins(each[f"large {arm}"], each["large sft"]) for each in measured_S]) for arm in ARMS}
    small_S = [wins(each["small ppo"], each["large prompted"]) for each in measured_S]
    return [
        verdicts.above("win rate of the large model against SFT, prompted − base", rate_S["prompted"] - rate_S["base"]),
        verdicts.above("the same, SFT − prompted", rate_S["sft"] - rate_S["prompted"]),
        verdicts.above("the same, PPO − SFT", rate_S["ppo"] - rate_S["sft"]),
        verdicts.between("the same, PPO-ptx − PPO", rate_S["ppo_ptx"] - rate_S["ppo"], -TOLERANCE, TOLERANCE),
        verdicts.above("win rate of small PPO against large prompted", small_S, 0.5),
    ]


def plot(measured_S: Sequence[Measured]) -> str:
    """Draws the win rates of all models."""
    labels = ("base", "prompted", "SFT", "PPO", "PPO-ptx")
    with plots.axes(height=2.8) as (svg, (ax,)):
        for size, color in zip(SIZES, ("sft", "ppo"), strict=True):
            rate_SA = np.array(
                [[wins(each[f"{size} {arm}"], each["large sft"]) for arm in ARMS] for each in measured_S]
            )
            ax.plot(labels, rate_SA.T, ".", color=plots.color(color), alpha=0.35)
            ax.plot(labels, rate_SA.mean(axis=0), "o-", color=plots.color(color), label=f"{size} model")
        ax.axhline(0.5, color=plots.color("other"), linewidth=0.8)
        ax.set_ylabel("win rate against large SFT")
        ax.legend()
    return svg[0]


CLAIM = Claim(
    id="C01",
    paper="Ouyang et al. 2022, Figure 1 and section 4.1",
    claim="GPT, GPT with a prompt, SFT and PPO are preferred in this order, PPO-ptx about as often as PPO, and a small "
    "aligned model to a much larger base model.",
    published="PPO-ptx of 1.3B parameters is preferred to GPT-3 of 175B; PPO-ptx of 175B to GPT-3 at 85 ± 3 %, to "
    "few-shot GPT-3 at 71 ± 4 %",
    differs="The sizes differ by a factor of 30 instead of 130. A prompt writes the question as in the corpus, instead "
    "of showing examples. Gold utility replaces human preferences.",
    measure=measure,
    decide=decide,
    plot=plot,
)
