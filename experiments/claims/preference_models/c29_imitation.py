"""C29: preference modelling beats imitation on ranked answers, but not on right and wrong ones (Askell et al. 2021).

Imitation fine-tunes a language model on the better answers only and scores an answer by its mean log-probability per
token. A preference model is trained on the same comparisons. In the ranked task, labelers rank samples of the SFT model
that differ in many ways. In the binary task, one answer is right, and the other differs from it only in a wrong value,
verdict, thing or material, with the same polite words. The accuracy is that on answers to held-out prompts, in the
ranked task with respect to gold utility.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from recipe import stages, tasks

from claims import model_stages as ms
from claims import sample_pool, verdicts
from claims.claim import Claim, Measured
from claims.overoptimisation import c11_scaling
from claims.preference_models import pair_stages
from claims.trial import Trial
from rlhf_jax import lm, types
from rlhf_jax.data import batching, errors, padding
from rlhf_jax.report import plots
from rlhf_jax.simulation import demonstrators, prompts
from rlhf_jax.simulation import world as world_lib
from rlhf_jax.train import state as state_lib
from rlhf_jax.train.optim import schedules

PROMPTS = 1000
"""Training prompts of the ranked task."""
PAIRS = 8000
"""Training prompts of the binary task, each with one pair."""
TESTED = 1000
"""Held-out prompts of the binary task."""
EPOCHS = 2
"""Passes of imitation over the better answers."""
BATCH = 32
RANKED_BATCH, BINARY_BATCH = 4, 16
"""Prompts per step of the preference model in the ranked task, each with up to nine answers, and in the binary task."""
TOLERANCE = 0.05
_CHUNK = 512


def measure(trial: Trial) -> Measured:
    """Returns the accuracy of both methods in both tasks."""
    recipe = ms.Recipe(trial)
    ranked, binary = (32, 32) if trial.quick else (PROMPTS, PAIRS)
    pool = sample_pool.pool(trial, recipe)
    return {
        "ranked": trial.result(ranked_task, recipe.start, recipe.compared, pool, prompts=ranked).value,
        "binary": trial.result(binary_task, recipe.start, prompts=binary).value,
    }


def ranked_task(
    trial: Trial,
    start: types.Params,
    compared: tuple[types.Comparisons, dict[str, Any]],
    pool: dict[str, np.ndarray],
    *,
    prompts: int,
) -> dict[str, float]:
    """Returns the accuracy of both methods on samples to held-out prompts, after training on ranked answers."""
    rows = jax.tree.map(lambda x: np.asarray(x)[:prompts], ms.train_rows(trial, compared[0]))
    ranks_BK = np.where(rows.where_BK, rows.ranks_BK, np.iinfo(np.int32).max)
    best = np.arange(len(ranks_BK)), ranks_BK.argmin(axis=1)
    imitator = imitate(trial, start, rows.tokens_BKL[best], rows.mask_BKL[best])
    rate = trial.settings.reward_model.learning_rate
    model = pair_stages.train(trial, start, rows, rate=rate, batch=RANKED_BATCH, stream=29)
    K = c11_scaling.SAMPLES
    tokens, mask, gold_PN = (pool[name][:, :K] for name in ("tokens", "mask", "gold"))
    return {
        "imitation": c11_scaling.accuracy(mean_logprobs(trial, imitator, tokens, mask), gold_PN),
        "preference model": c11_scaling.accuracy(pair_stages.scores(trial, model, tokens, mask), gold_PN),
    }


def binary_task(trial: Trial, start: types.Params, *, prompts: int) -> dict[str, float]:
    """Returns the accuracy of both methods on right and wrong answers to held-out prompts, after training on such."""
    train, test = (right_and_wrong(trial, n, held_out=held_out) for held_out, n in ((False, prompts), (True, TESTED)))
    imitator = imitate(trial, start, train[0][:, 0], train[1][:, 0])
    rows = pair_stages.comparisons(*train, np.zeros(len(train[0]), int))
    rate = trial.settings.reward_model.learning_rate
    model = pair_stages.train(trial, start, rows, rate=rate, batch=BINARY_BATCH, stream=30)
    scores = {
        "imitation": mean_logprobs(trial, imitator, *test),
        "preference model": pair_stages.scores(trial, model, *test),
    }
    return {name: float(np.mean((x[:, 0] > x[:, 1]) + 0.5 * (x[:, 0] == x[:, 1]))) for name, x in scores.items()}


def right_and_wrong(trial: Trial, n: int, *, held_out: bool) -> tuple[np.ndarray, np.ndarray]:
    """Returns tokens and mask of a right and a wrong answer to n training or held-out prompts, ``[n, 2, L]``.

    Prompts to which the right answer is a refusal, which cannot be wrong in this way, are replaced.
    """
    seed, fmt = trial.settings.seed, trial.task.fmt
    world, rng = world_lib.make_world(seed), np.random.default_rng([seed, 2900 + held_out])
    sets = prompts.split_prompts(world, seed)
    drawn = prompts.draw_prompts(sets.test if held_out else sets.train, 2 * n, rng)
    texts = [both_answers(world, each, [seed, 2900 + held_out, i]) for i, each in enumerate(drawn)]
    kept = [i for i, (right, wrong) in enumerate(texts) if right != wrong][:n]
    assert len(kept) == n
    P, T = trial.task.prompt_width, trial.task.response_width
    asked = [prompts.prompt_tokens(drawn[i].turns) for i in kept]
    tokens_NP, mask_NP = padding.pad_prompts(asked, width=P, pad_id=fmt.pad_id)
    sides = []
    for side in range(2):
        ids = [prompts.answer_tokens(texts[i][side]) for i in kept]
        counts = errors.DropCount(max_dropped=1.0)
        answers = padding.pad_answers(ids, width=T, pad_id=fmt.pad_id, counts=counts)
        sides.append([np.concatenate(parts, axis=1) for parts in zip((tokens_NP, mask_NP), answers, strict=True)])
    tokens, mask = (np.stack(parts, axis=1) for parts in zip(*sides, strict=True))
    return tokens, mask


def both_answers(world: world_lib.World, prompt: prompts.Prompt, seed: list[int]) -> tuple[str, str]:
    """Returns a right answer, and the same with wrong content; they are equal if the right answer is a refusal."""
    none = demonstrators.Slips.none()

    def answer(**flaws: float) -> str:
        slips = dataclasses.replace(none, **flaws)
        return demonstrators.demonstrate(world, prompt, np.random.default_rng(seed), slips=slips)

    # Drawing wrong content changes later draws, and thus the polite words. Answers without them end with the content.
    content, wrong_content = (answer(impolite=1.0, wrong=wrong).removesuffix(" .") for wrong in (0.0, 1.0))
    right = answer()
    assert right.count(content) == 1
    return right, right.replace(content, wrong_content)


def imitate(trial: Trial, start: types.Params, tokens_BL: np.ndarray, mask_BL: np.ndarray) -> types.Params:
    """Returns the language model that is fine-tuned on answers."""
    P, key, n = trial.task.prompt_width, jax.random.fold_in(trial.key("sft"), 2900), len(tokens_BL)
    batch = min(BATCH, n)
    steps = max(1, EPOCHS * n // batch)
    rows: Any = types.TokenBatch(tokens_BL, mask_BL, mask_BL & (np.arange(tokens_BL.shape[1]) >= P))  # type: ignore[arg-type]
    order = batching.epoch_batches(0, n=n, batch_size=batch, key=key, steps=steps)
    state = trial.fit(
        "sft",
        trial.supervised_step,
        trial.create_on_mesh(partial(state_lib.create, tx=trial.supervised_tx), start),
        steps,
        batch_at=lambda i: tasks.token_batch(rows, order[i]),
        hyper_at=lambda i: stages.hyper(trial.settings.sft.learning_rate * schedules.cosine(i, steps)),
        rng=key,
    )
    return state.params


@functools.cache
def _logprobs(cfg: lm.LMConfig, prompt_width: int) -> Any:
    """Returns the compiled mean log-probability per token of answers."""

    def mean(params: types.Params, tokens_BL: jax.Array, mask_BL: jax.Array) -> jax.Array:
        logprobs_BL = lm.token_logprobs(params, tokens_BL, mask_BL=mask_BL, cfg=cfg)
        answer_BL = mask_BL & (jnp.arange(tokens_BL.shape[1]) >= prompt_width)
        return jnp.where(answer_BL, logprobs_BL, 0.0).sum(axis=1) / jnp.maximum(answer_BL.sum(axis=1), 1)

    return jax.jit(mean)


def mean_logprobs(trial: Trial, params: types.Params, tokens_NKL: np.ndarray, mask_NKL: np.ndarray) -> np.ndarray:
    """Returns the mean log-probability per token of answers, ``[N, K]``, including the end token."""
    mean = _logprobs(trial.cfg, trial.task.prompt_width)  # type: ignore[arg-type]  # frozen, thus hashable
    tokens, mask = (x.reshape(-1, x.shape[-1]) for x in (tokens_NKL, mask_NKL))
    n, parts = len(tokens), []
    for first in range(0, n, _CHUNK):
        rows = np.minimum(np.arange(first, first + _CHUNK), n - 1)  # the last row fills up the last chunk
        parts.append(np.asarray(mean(params, tokens[rows], mask[rows])))
    return np.round(np.concatenate(parts)[:n], 5).reshape(tokens_NKL.shape[:2])


def decide(measured_S: Sequence[Measured]) -> list[verdicts.Part]:
    """Compares the accuracies of both methods in both tasks."""
    lead_S = {
        task: [each[task]["preference model"] - each[task]["imitation"] for each in measured_S]
        for task in ("ranked", "binary")
    }
    name = "accuracy of the preference model − of imitation"
    return [
        verdicts.above(f"{name}, ranked task", lead_S["ranked"]),
        verdicts.between(f"{name}, binary task", lead_S["binary"], -TOLERANCE, TOLERANCE),
    ]


def plot(measured_S: Sequence[Measured]) -> str:
    """Draws the accuracy of both methods in both tasks."""
    with plots.axes(height=2.4) as (svg, (ax,)):
        for offset, method, color in ((-0.1, "imitation", "sft"), (0.1, "preference model", "reward_model")):
            for place, task in enumerate(measured_S[0]):
                accuracy_S = [measured[task][method] for measured in measured_S]
                label = method if place == 0 else None
                ax.plot([place + offset] * len(accuracy_S), accuracy_S, "o", color=plots.color(color), label=label)
        ax.set_xticks(range(len(measured_S[0])), list(measured_S[0]))
        ax.set_ylabel("accuracy")
        ax.legend()
    return svg[0]


CLAIM = Claim(
    id="C29",
    paper="Askell et al. 2021, section 3",
    claim="Preference models are more accurate than imitation on ranked answers, and as accurate on right and wrong "
    "ones.",
    published="up to +25 points on ranked tasks at 52B, no difference on binary tasks",
    differs="One task of each kind in a simulated world. An interval cannot prove equality, so the difference in the "
    "binary task must be less than five points.",
    measure=measure,
    decide=decide,
    plot=plot,
)
