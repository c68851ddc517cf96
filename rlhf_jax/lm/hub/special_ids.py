"""Reading and writing of the ids of special tokens in a Hugging Face directory."""

from __future__ import annotations

import pathlib
from collections.abc import Iterable, Sequence
from typing import Any

from rlhf_jax.lm.hub import tensor_files

GENERATION = "generation_config.json"


def read_stop_ids(folder: pathlib.Path, *, vocab_size: int) -> tuple[int, ...]:
    """Returns the ids listed as ``eos_token_id`` in a directory's files, in ascending order; see `lm.load_stop_ids`."""
    found: set[int] = set()
    for file in (folder / "config.json", folder / GENERATION):
        if file.exists():
            ids = tensor_files.read_json(file).get("eos_token_id")
            listed = [] if ids is None else ids if isinstance(ids, list) else [ids]
            wrong = [i for i in listed if not _is_id(i, vocab_size)]
            if wrong:
                raise ValueError(
                    f"{file}: eos_token_id contains {wrong[0]!r}; it must be null, an id in [0, {vocab_size - 1}] or a "
                    "list of ids"
                )
            found.update(listed)
    return tuple(sorted(found))


def fields(
    tokenizer: Any, stop_ids: Iterable[int] | None, *, pad_id: int | None, reward: bool, vocab_size: int
) -> dict[str, Any]:
    """Returns the ids of special tokens for ``config.json``.

    Args:
        tokenizer: The tokenizer that is saved in the same directory, or None.
        stop_ids: Ids that end an answer; by default, the tokenizer's EOS.
        pad_id: ``pad_token_id`` if there is no tokenizer.
        reward: Whether the model is a reward model.
        vocab_size: Size of the model's vocabulary.

    Returns:
        ``bos_token_id``, ``eos_token_id`` (an id, a list of several ids or None) and ``pad_token_id``.

    Raises:
        ValueError: ``stop_ids`` or ``pad_id`` contains an id outside the vocabulary.
    """
    bos, eos, pad = (getattr(tokenizer, f"{name}_token_id", None) for name in ("bos", "eos", "pad"))
    given = None if stop_ids is None else list(dict.fromkeys(map(int, stop_ids)))
    for name, ids in (("stop_ids", given or []), ("pad_id", [] if pad_id is None else [pad_id])):
        wrong = [i for i in ids if not _is_id(i, vocab_size)]
        if wrong:
            raise ValueError(f"{name} contains {wrong[0]!r}; ids must be in [0, {vocab_size - 1}]")
    ends = given if given is not None else [] if eos is None else [eos]
    if reward:
        candidates = [pad_id] if tokenizer is None else [pad, *_special_ids(tokenizer)]
        pad = next((i for i in candidates if _is_id(i, vocab_size) and i not in ends), None)
    elif tokenizer is None:
        pad = pad_id
    return {"bos_token_id": bos, "eos_token_id": ends[0] if len(ends) == 1 else ends or None, "pad_token_id": pad}


def write_generation(folder: pathlib.Path, special: dict[str, Any]) -> None:
    """Writes the result of `fields` to ``generation_config.json``, unless no id ends an answer."""
    ends = special["eos_token_id"]
    if ends is not None:
        listed = special | {"eos_token_id": ends if isinstance(ends, list) else [ends]}
        tensor_files.write_json(folder / GENERATION, {name: ids for name, ids in listed.items() if ids is not None})


def _is_id(i: Any, vocab_size: int) -> bool:
    return type(i) is int and 0 <= i < vocab_size


def _special_ids(tokenizer: Any) -> Sequence[int]:
    """Returns the ids of control tokens: first those named after padding, and last the unknown token."""
    added = getattr(tokenizer, "added_tokens_decoder", {})
    names = {i: str(token) for i, token in sorted(added.items()) if token.special}
    unknown = getattr(tokenizer, "unk_token_id", None)
    return sorted(names, key=lambda i: (i == unknown, "pad" not in names[i].lower(), i))
