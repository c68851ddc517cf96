"""Reading and writing of the ids of special tokens in a Hugging Face directory."""

from __future__ import annotations

import pathlib
from typing import Any

from rlhf_jax.lm.hub import tensor_files

GENERATION = "generation_config.json"


def read_stop_ids(folder: pathlib.Path, *, vocab_size: int) -> tuple[int, ...]:
    """Returns the ids listed as ``eos_token_id`` in a directory's files, in ascending order; see `lm.load_stop_ids`."""
    found: set[int] = set()
    for file in (folder / "config.json", folder / GENERATION):
        if file.exists():
            ids = tensor_files.read_json(file).get("eos_token_id")
            found.update(_checked(ids, file, vocab_size=vocab_size))
    return tuple(sorted(found))


def _checked(ids: Any, file: pathlib.Path, *, vocab_size: int) -> list[int]:
    listed = [] if ids is None else ids if isinstance(ids, list) else [ids]
    for i in listed:
        if type(i) is not int or not 0 <= i < vocab_size:
            raise ValueError(
                f"{file}: eos_token_id contains {i!r}; it must be null, an id in [0, {vocab_size - 1}] or a list of ids"
            )
    return listed
