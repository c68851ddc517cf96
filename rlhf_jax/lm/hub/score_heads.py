"""Reading and writing of the scalar heads of a reward model in a Hugging Face directory."""

from __future__ import annotations

import pathlib
from collections.abc import Mapping
from typing import Any

import numpy as np

from rlhf_jax.lm import config
from rlhf_jax.lm import heads as lm_heads
from rlhf_jax.lm import params as lm_params
from rlhf_jax.lm.hub import tensor_files


def stored_heads(score: tensor_files.Stored | None) -> int | None:
    """Returns the number of heads in ``score.weight`` if there are several, else None."""
    return score.shape[0] if score is not None and len(score.shape) == 2 and score.shape[0] > 1 else None


def count(flat: Mapping[str, Any]) -> int:
    """Returns the number of heads of flattened parameters; 0 for a language model."""
    return len(flat["head/kernel_HD"]) if "head/kernel_HD" in flat else int("head/kernel_D" in flat)


def check(flat: Mapping[str, Any], cfg: config.LMConfig) -> None:
    """Raises ValueError if the parameters of the head are incomplete, unknown, of the wrong shape or not finite."""
    head = {name: np.asarray(leaf) for name, leaf in flat.items() if name.startswith("head/")}
    heads = len(head["head/kernel_HD"]) if "head/kernel_HD" in head else None
    given = {name: leaf.shape for name, leaf in head.items()}
    wanted = {name: row.shape for name, row in lm_params.head_table(cfg, heads=heads).items()}
    if given != wanted:
        raise ValueError(f"the head has the shapes {given}; this LMConfig requires {wanted}")
    for name, leaf in head.items():
        if not np.isfinite(leaf).all():
            raise ValueError(f"{name} contains a value that is not finite")


def numbers(kernel_HD: np.ndarray, heads: int | None, bias: Any, source: pathlib.Path) -> dict[str, np.ndarray]:
    """Returns the parameters of the head from ``score.weight`` and ``reward_bias``.

    Args:
        kernel_HD: ``score.weight``.
        heads: Result of `stored_heads`.
        bias: ``reward_bias``, a number or a list.
        source: Path of the file that contains ``reward_bias``, for error messages.

    Returns:
        Dict of the kernel, bias and gain.

    Raises:
        ValueError: ``bias`` is neither one finite number nor, for several heads, one finite number per head.
    """
    try:
        bias = np.asarray(bias, np.float32)
    except (TypeError, ValueError):
        bias = np.full(1, np.nan)
    if bias.shape not in ((), () if heads is None else (heads,)) or not np.isfinite(bias).all():
        several = "" if heads is None else f" or one finite number per head ({heads} in total)"
        raise ValueError(f"{source}: reward_bias must be one finite number{several}")
    if heads is None:
        return {"kernel_D": kernel_HD[0], "bias": bias, "gain": np.ones((), np.float32)}
    return {"kernel_HD": kernel_HD, "bias": np.broadcast_to(bias, (heads,)), "gain": np.ones(heads, np.float32)}


def weight(flat: Mapping[str, Any]) -> np.ndarray:
    """Returns ``score.weight``: the kernel times the gain, ``[H, D]``."""
    gain, several = np.asarray(flat["head/gain"], np.float32), "head/kernel_HD" in flat
    kernel = np.asarray(flat["head/kernel_HD" if several else "head/kernel_D"], np.float32)
    return gain[:, None] * kernel if several else gain * kernel[None, :]


def fields(flat: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the fields of ``config.json`` that describe the head."""
    names = {str(h): f"LABEL_{h}" for h in range(count(flat))}
    return {
        "num_labels": len(names),
        "id2label": names,
        "label2id": {name: int(h) for h, name in names.items()},
        "reward_bias": np.asarray(flat["head/bias"], np.float64).tolist(),
    }


def read_normalisation(hf: Mapping[str, Any], source: pathlib.Path) -> lm_heads.Normalisation | None:
    """Returns the record of how scores were normalised, or None; raises ValueError if it is malformed."""
    kept = hf.get("reward_normalisation")
    if kept is None:
        return None
    try:
        gain, bias = (tuple(map(float, x)) if isinstance(x, list) else float(x) for x in (kept["gain"], kept["bias"]))
        return lm_heads.Normalisation(str(kept["rule"]), gain, bias)
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{source}: reward_normalisation cannot be read ({error})") from error
