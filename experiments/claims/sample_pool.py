"""Many samples of an SFT model, which several reward models score, for instance to select the best of n."""

from __future__ import annotations

import jax
import numpy as np

from claims import model_stages as ms
from claims.result_store import Result
from claims.trial import Trial
from rlhf_jax import types
from rlhf_jax.simulation import labelers

PROMPTS, SAMPLES = 256, 128


def pool(trial: Trial, recipe: ms.Recipe, *, size: str = ms.LARGEST) -> Result:
    """Returns the stored samples of the SFT model of a size for the first held-out prompts."""
    sizes = {} if size == ms.LARGEST else {"size": size}
    prompts = 16 if trial.quick else PROMPTS
    return trial.result(sample, recipe.start_of(size), prompts=prompts, samples=SAMPLES, **sizes)


def sample(
    trial: Trial, start: types.Params, *, prompts: int, samples: int, size: str = ms.LARGEST
) -> dict[str, np.ndarray]:
    """Returns rows, gold utility and the labelers' features of ``samples`` answers to each of the first prompts.

    Arrays have the shape ``[prompts, samples, ...]``.
    """
    asked = trial.task.eval_prompts.at(np.repeat(np.arange(prompts), samples))
    answers = ms.sized(trial, size).sampler(start, None, None, asked, jax.random.fold_in(trial.key("evaluate"), 1000))
    rows = {
        "tokens": answers.tokens_BL,
        "mask": answers.mask_BL,
        "gold": np.asarray(answers.gold.total),
        "features": np.asarray(labelers.features(answers.gold)),
    }
    return {name: x.reshape(prompts, samples, *x.shape[1:]) for name, x in rows.items()}


def score(
    trial: Trial,
    reward: types.Params,
    sampled: dict[str, np.ndarray],
    *,
    samples: int = SAMPLES,
    size: str = ms.LARGEST,
) -> np.ndarray:
    """Returns the scores of the first samples of each prompt, ``[prompts, samples]``, by a reward model of a size.

    Scores are rounded, since those of equal answers may differ in the last digits.
    """
    tokens, mask = (sampled[name][:, :samples] for name in ("tokens", "mask"))
    rows = (x.reshape(-1, x.shape[-1]) for x in (tokens, mask))
    return np.round(ms.sized(trial, size).sampler.score(reward, *rows).reshape(tokens.shape[:2]), 4)
