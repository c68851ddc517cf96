"""Reading and writing the scalar heads of a reward model in a Hugging Face directory."""

from __future__ import annotations

import pathlib
from collections.abc import Mapping
from typing import Any

import numpy as np

from rlhf_jax.lm import heads as lm_heads
from rlhf_jax.lm.hub import tensor_files


def stored_heads(score: tensor_files.Stored | None) -> int | None:
    """How many heads ``score.weight`` has; None for one, which has a layout of its own, and for none."""
    return score.shape[0] if score is not None and len(score.shape) == 2 and score.shape[0] > 1 else None


def count(flat: Mapping[str, Any]) -> int:
    """How many heads flat parameters have; 0 for a language model."""
    return len(flat["head/kernel_HD"]) if "head/kernel_HD" in flat else int("head/kernel_D" in flat)


def numbers(kernel_HD: np.ndarray, heads: int | None, bias: Any, source: pathlib.Path) -> dict[str, np.ndarray]:
    """The head's parameters from ``score.weight`` and ``reward_bias``; raises ValueError where they do not fit."""
    try:
        bias = np.asarray(bias, np.float32)
    except (TypeError, ValueError):
        bias = np.full(1, np.nan)
    if bias.shape not in ((), () if heads is None else (heads,)) or not np.isfinite(bias).all():
        raise ValueError(f"{source}: reward_bias must be one finite number a head, and there are {heads or 1}")
    if heads is None:
        return {"kernel_D": kernel_HD[0], "bias": bias, "gain": np.ones((), np.float32)}
    return {"kernel_HD": kernel_HD, "bias": np.broadcast_to(bias, (heads,)), "gain": np.ones(heads, np.float32)}


def weight(flat: Mapping[str, Any]) -> np.ndarray:
    """``score.weight``: the kernel times the gain, ``[H, D]``."""
    gain, several = np.asarray(flat["head/gain"], np.float32), "head/kernel_HD" in flat
    kernel = np.asarray(flat["head/kernel_HD" if several else "head/kernel_D"], np.float32)
    return gain[:, None] * kernel if several else gain * kernel[None, :]


def fields(flat: Mapping[str, Any]) -> dict[str, Any]:
    """What ``config.json`` says of the head."""
    names = {str(h): f"LABEL_{h}" for h in range(count(flat))}
    return {
        "num_labels": len(names),
        "id2label": names,
        "label2id": {name: int(h) for h, name in names.items()},
        "reward_bias": np.asarray(flat["head/bias"], np.float64).tolist(),
    }


def read_normalisation(hf: Mapping[str, Any], source: pathlib.Path) -> lm_heads.Normalisation | None:
    """The record of what scores were normalised on, if there is one."""
    kept = hf.get("reward_normalisation")
    if kept is None:
        return None
    try:
        gain, bias = (tuple(map(float, x)) if isinstance(x, list) else float(x) for x in (kept["gain"], kept["bias"]))
        return lm_heads.Normalisation(str(kept["rule"]), gain, bias)
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{source}: reward_normalisation cannot be read ({error})") from error
