"""The reference's log-probabilities of a whole data set, computed once and kept in a file.

The reference does not change while a policy is trained against it, so one forward pass over the data serves every epoch
and every run. The file says of which reference, data and settings it is; it is used for no other.
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
"""``(params, batch) -> [B, K]``: a compiled ``partial(dpo.answer_logprobs, logprobs)``."""


def over_rows(score: Score, params: Params, data: Preferences, *, rows: int = 64) -> np.ndarray:
    """``[N, K]`` float32: ``score`` of all of ``data``, ``rows`` at a time and in one shape, on the host."""
    bare = _bare(data)
    n = len(bare.tokens_BKL)
    parts = []
    for start in range(0, n, rows):
        at = np.minimum(np.arange(start, start + rows), n - 1)  # the last row fills the last part
        parts.append(score(params, jax.tree.map(lambda x: np.asarray(x)[at], bare)))  # noqa: B023
    return np.concatenate(jax.device_get(parts))[:n].astype(np.float32)


def attached(
    score: Score,
    params: Params,
    data: Preferences,
    *,
    path: str | os.PathLike[str] | None = None,
    settings: Any = None,
    rows: int = 64,
    tell: Callable[[str], None] = warnings.warn,
) -> Preferences:
    """``data`` with ``reference_BK`` of the reference ``params``, that of its mismatched answers included.

    Args:
        score: See `Score`; called with ``rows`` rows at a time.
        params: The reference's.
        data: All of the data, in the order in which batches index it.
        path: File that the numbers are kept in, NumPy's .npz; None for none. One of this reference, data and settings
            is read. Any other, and one that is damaged, is told of, computed anew and replaced.
        settings: Whatever else the numbers depend on (model, temperature, precision), as JSON.
        rows: Rows of data in one call of ``score``.
        tell: Gets one sentence where a file there could not be used.
    """
    parts = [data] if data.mismatched is None else [data, data.mismatched]
    identity = {
        "reference": batching.fingerprint(params),
        "data": batching.fingerprint([jax.tree.leaves(_bare(part)) for part in parts]),
        "settings": json.dumps(settings, sort_keys=True),
    }
    found = None if path is None else _read(pathlib.Path(path), identity, tell)
    if found is None:
        found = [over_rows(score, params, part, rows=rows) for part in parts]
        if path is not None:
            _write(pathlib.Path(path), identity, found)
    made = data.replace(reference_BK=found[0])  # type: ignore[attr-defined]
    if data.mismatched is None:
        return made
    return made.replace(mismatched=data.mismatched.replace(reference_BK=found[1]))


def _bare(data: Preferences) -> Preferences:
    return Preferences(data.tokens_BKL, data.mask_BKL, data.answer_BKC)


def _read(path: pathlib.Path, identity: dict[str, str], tell: Callable[[str], None]) -> list[np.ndarray] | None:
    if not path.exists():
        return None
    try:
        # Opened here: NumPy leaves a file open that turns out to be no archive.
        with path.open("rb") as raw, np.load(raw, allow_pickle=False) as file:
            saved = json.loads(str(file["identity"]))
            found = [file[name] for name in sorted(set(file.files) - {"identity"})]
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        tell(f"the reference's log-probabilities in {path} cannot be read ({error}); they are computed anew")
        return None
    other = [name for name, mine in identity.items() if saved.get(name) != mine]
    if other:
        tell(
            f"the reference's log-probabilities in {path} are of another {' and other '.join(other)}; "
            "they are computed anew"
        )
        return None
    return found


def _write(path: pathlib.Path, identity: dict[str, str], found: list[np.ndarray]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    with temporary.open("wb") as file:
        named = {f"logprobs_{i}": x for i, x in enumerate(found)}
        np.savez(file, identity=np.asarray(json.dumps(identity)), **named)  # pyright: ignore[reportArgumentType]
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
