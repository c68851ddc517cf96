"""Log-probabilities of a data set under the reference, computed once and cached in a file.

The reference does not change while a policy is trained against it, so one forward pass over the data suffices for all
epochs and runs. The file records which reference, data and settings it was computed with, and is used only if all of
them match.
"""

from __future__ import annotations

import json
import os
import pathlib
import warnings
import zipfile
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from rlhf_jax.data import batching
from rlhf_jax.types import Params, Preferences

Score = Callable[[Params, Preferences], jax.Array]
"""``(params, batch) -> [B, K]``, such as a compiled ``partial(dpo.answer_logprobs, logprobs)``."""


def answer_logprobs(score: Score, params: Params, data: Preferences, *, rows: int = 64) -> np.ndarray:
    """Computes ``score`` on all rows of a data set, in batches of one shape.

    Args:
        score: See `Score`.
        params: Parameters of the model.
        data: A data set of N rows.
        rows: Rows per call of ``score``.

    Returns:
        ``[N, K]`` float32 on the host.
    """
    bare = _inputs(data)
    n = len(bare.tokens_BKL)
    parts = []
    for start in range(0, n, rows):
        at = np.minimum(np.arange(start, start + rows), n - 1)  # the last row pads the last batch
        parts.append(score(params, jax.tree.map(lambda x: np.asarray(x)[at], bare)))  # noqa: B023
    return np.concatenate(jax.device_get(parts))[:n].astype(np.float32)


def attach_logprobs(
    score: Score,
    params: Params,
    data: Preferences,
    *,
    path: str | os.PathLike[str] | None = None,
    settings: Any = None,
    rows: int = 64,
    warn: Callable[[str], None] = warnings.warn,
) -> Preferences:
    """Returns ``data`` with ``reference_BK`` set, also in ``data.mismatched`` if it is present.

    Args:
        score: See `Score`.
        params: Parameters of the reference.
        data: The whole data set; the order of its rows is part of its fingerprint.
        path: Cache file in NumPy's .npz format; None for no cache. An existing file is used if it matches the
            reference, data and settings. If it does not match or is damaged, ``warn`` is called and the file is
            replaced.
        settings: Anything else that the log-probabilities depend on (model, temperature, precision), as a JSON value.
        rows: Rows per call of ``score``.
        warn: Called with a message if an existing file cannot be used.

    Returns:
        The data with log-probabilities ``[N, K]`` in float32.
    """
    parts = [data] if data.mismatched is None else [data, data.mismatched]
    identity = {
        "reference": batching.fingerprint(params),
        "data": batching.fingerprint([jax.tree.leaves(_inputs(part)) for part in parts]),
        "settings": json.dumps(settings, sort_keys=True),
    }
    logprobs = None if path is None else _read(pathlib.Path(path), identity, warn)
    if logprobs is None:
        logprobs = [answer_logprobs(score, params, part, rows=rows) for part in parts]
        if path is not None:
            _write(pathlib.Path(path), identity, logprobs)
    result = data.replace(reference_BK=logprobs[0])  # type: ignore[attr-defined]
    if data.mismatched is None:
        return result
    return result.replace(mismatched=data.mismatched.replace(reference_BK=logprobs[1]))


def _inputs(data: Preferences) -> Preferences:
    return Preferences(data.tokens_BKL, data.mask_BKL, data.answer_BKC)


def _read(path: pathlib.Path, identity: dict[str, str], warn: Callable[[str], None]) -> list[np.ndarray] | None:
    if not path.exists():
        return None
    try:
        # NumPy does not close a file that is not an archive, so the file is opened and closed here.
        with path.open("rb") as raw, np.load(raw, allow_pickle=False) as file:
            saved = json.loads(str(file["identity"]))
            logprobs = [file[name] for name in sorted(set(file.files) - {"identity"})]
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        warn(f"cannot read the reference's log-probabilities from {path} ({error}); recomputing them")
        return None
    different = [name for name, value in identity.items() if saved.get(name) != value]
    if different:
        warn(
            f"the reference's log-probabilities in {path} do not match this run's {' and '.join(different)}; "
            "recomputing them"
        )
        return None
    return logprobs


def _write(path: pathlib.Path, identity: dict[str, str], logprobs: list[np.ndarray]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    with temporary.open("wb") as file:
        named = {f"logprobs_{i}": x for i, x in enumerate(logprobs)}
        np.savez(file, identity=np.asarray(json.dumps(identity)), **named)  # pyright: ignore[reportArgumentType]
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
