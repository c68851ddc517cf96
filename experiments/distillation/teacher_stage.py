"""Lets a teacher read its prompt before each row, and keeps its most likely tokens in a file (Bai et al. 2022, A.1)."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import pathlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from finetune import outcome
from launch.run_settings import SettingError
from recipe import engine

from distillation import distill_rows
from rlhf_jax import lm, losses, parallel, types
from rlhf_jax.data import chat
from rlhf_jax.data.stores import record_file, teacher_rows

NAME = "teacher.array_record"
"""Name of the file in the run folder."""
_PARTS, _LARGEST_PART = 50, 512
"""Approximate number of parts of a file, and the most rows of a part, which an interruption can lose."""


def tokenizer_digest(fmt: chat.ChatFormat) -> str:
    """Returns a SHA-256 of the tokens and their ids."""
    text = json.dumps(sorted(fmt.tokenizer.get_vocab().items(), key=lambda item: item[1]))
    return hashlib.sha256(text.encode()).hexdigest()


def after_prompt(batch: Any, prompt: Sequence[int], *, keep_first: bool) -> tuple[jax.Array, jax.Array]:
    """Returns ``(tokens, mask)`` of rows that start with the prompt or, with ``keep_first``, with their first token.

    Args:
        batch: A `TokenBatch` whose rows have a real token in their first column.
        prompt: Token ids of the prompt.
        keep_first: Whether the prompt follows the first token of a row, which is the BOS token.
    """
    B, C = batch.tokens_BL.shape[0], len(prompt)
    prompt_BC = jnp.broadcast_to(jnp.asarray(prompt, jnp.int32), (B, C))
    first = 1 if keep_first else 0
    parts = (batch.tokens_BL[:, :first], prompt_BC, batch.tokens_BL[:, first:])
    mask = jnp.concatenate([jnp.ones((B, C), bool), batch.mask_BL], axis=1)
    return jnp.concatenate(parts, axis=1), mask


def make_top_k(
    cfg: lm.LMConfig, prompt: Sequence[int], *, k: int, keep_first: bool
) -> Callable[[types.Params, types.TokenBatch], lm.TopK]:
    """Returns ``(params, batch) -> TopK``, the teacher's k most likely tokens at each position of a `TokenBatch`.

    Args:
        cfg: Architecture of the teacher.
        prompt: Token ids of the prompt, which may be empty.
        k: Number of tokens to keep.
        keep_first: As for `after_prompt`. The entries of a row's first token then mean nothing.
    """

    def top_k(params: types.Params, batch: types.TokenBatch) -> lm.TopK:
        if not prompt:
            return lm.token_top_k(params, batch.tokens_BL, cfg=cfg, k=k, mask_BL=batch.mask_BL)
        tokens, mask = after_prompt(batch, prompt, keep_first=keep_first)
        return lm.token_top_k(params, tokens, cfg=cfg, k=k, mask_BL=mask, prompt_width=len(prompt))

    return top_k


class Reader(NamedTuple):
    """A teacher with its prompt."""

    cfg: lm.LMConfig
    params: types.Params
    prompt: Sequence[int]
    keep_first: bool


def write(
    job: engine.Engine,
    path: pathlib.Path,
    header: Mapping[str, Any],
    rows: distill_rows.Rows,
    load: Callable[[], Reader],
    *,
    k: int,
    width: int,
    pad_id: int,
    per_pass: int = 8,
) -> None:
    """Writes the file of a teacher's distributions, or what an interrupted run has left out; does nothing if it exists.

    Args:
        job: The engine of the run.
        path: The file.
        header: What the file is made from.
        rows: The rows to read.
        load: Loads the teacher; not called if the file exists.
        k: Number of tokens to keep at each position.
        width: Maximum number of tokens in a row, without the prompt.
        pad_id: Token id used for padding.
        per_pass: Number of rows in a forward pass.
    """
    with _locked(path):
        if path.exists():
            check_header(path, record_file.RecordFile(path).header, header)
            use_finished(job, path)
            return
        _write(job, path, header, rows, load(), k=k, width=width, pad_id=pad_id, per_pass=per_pass)


def use_finished(job: engine.Engine, path: pathlib.Path) -> None:
    """Skips the stage because the file exists, and removes the parts from which it was made if they are left."""
    record_file.remove_parts(path)
    job.progress.skip("teacher")


def _write(
    job: engine.Engine,
    path: pathlib.Path,
    header: Mapping[str, Any],
    rows: distill_rows.Rows,
    reader: Reader,
    *,
    k: int,
    width: int,
    pad_id: int,
    per_pass: int,
) -> None:
    n = len(rows.ids)
    top_k = make_top_k(reader.cfg, reader.prompt, k=k, keep_first=reader.keep_first)
    step = parallel.JitStep(top_k, donate_argnums=(), mesh=job.mesh, batch_args=(1,), replicated_args=())
    job.progress.start("teacher", n)

    def records(start: int, stop: int) -> list[bytes]:
        batch = distill_rows.padded(rows.ids[start:stop], width=width, pad_id=pad_id)
        top = outcome.in_chunks(partial(step, reader.params), batch, size=per_pass, mesh=job.mesh)
        made = {"ids_BLK": top.ids, "logprobs_BLK": top.logprobs}
        return teacher_rows.encode(types.DistillationBatch(batch.tokens_BL, batch.mask_BL, batch.loss_mask_BL, **made))

    per_part = min(-(-n // (_PARTS * per_pass)) * per_pass, _LARGEST_PART)
    report = lambda done: job.progress.update("teacher", done, n)  # noqa: E731
    record_file.write(path, header, records, n=n, per_part=per_part, progress=report)
    job.progress.finish("teacher")


@contextlib.contextmanager
def _locked(path: pathlib.Path) -> Iterator[None]:
    """Raises SettingError if another process is writing the file.

    The empty file ``PATH.lock`` is kept: if it were deleted, two processes could lock two files of this name.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.with_name(path.name + ".lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # released when the process ends, however it ends
        except BlockingIOError:
            raise SettingError(f"another process is writing --teacher-file {path}; wait until it ends") from None
        yield


def check_header(path: pathlib.Path, found: Mapping[str, Any], expected: Mapping[str, Any]) -> None:
    """Raises SettingError, naming what differs, if a file was made from something else than ``expected``."""
    for name, value in expected.items():
        if found.get(name) != value:
            what = _NAMES.get(name, "other rows")
            raise SettingError(
                f"--teacher-file {path} was made with {what}{_values(found.get(name), value)}; give what it was made "
                "from, or another file"
            )


_NAMES = {
    "teacher": "another --teacher",
    "prompt": "another --prompt",
    "data": "another --data.path",
    "pretraining": "another --data.pretraining",
    "tokenizer": "another tokenizer than that of --model",
    "dtype": "another --compute.dtype",
    "k": "--k",
    "mix": "--mix",
    "held_out": "--data.held-out",
    "width": "--data.width",
    "seed": "--seed",
}


def _values(found: Any, expected: Any) -> str:
    shown = all(isinstance(each, int | float) for each in (found, expected))
    return f" {found:g} instead of {expected:g}" if shown else ""


class Lessons:
    """The rows of a finished file as batches for the student."""

    def __init__(self, path: pathlib.Path, *, pad_id: int) -> None:
        """Opens the file."""
        self._file = record_file.RecordFile(path)
        self._pad_id = pad_id
        self.header = self._file.header
        self.n_train: int = self.header["rows"][0]
        self.n_held_out: int = self.header["rows"][1]

    def at(self, indices: Sequence[int] | np.ndarray) -> types.DistillationBatch:
        """Returns the rows at ``indices``; held-out rows follow the training rows."""
        return teacher_rows.decode(self._file.read(list(indices)), width=self.header["width"], pad_id=self._pad_id)


def make_listed_kl(cfg: lm.LMConfig) -> Callable[[types.Params, types.DistillationBatch], tuple[jax.Array, jax.Array]]:
    """Returns ``(params, batch) -> (kl_B, tokens_B)``, the KL over K + 1 classes, summed over the tokens of a row."""

    def sums(params: types.Params, batch: types.DistillationBatch) -> tuple[jax.Array, jax.Array]:
        logprobs_BLK = lm.token_listed_logprobs(params, batch.tokens_BL, batch.ids_BLK, cfg=cfg, mask_BL=batch.mask_BL)
        kl_BL = losses.distill(logprobs_BLK, batch.logprobs_BLK)
        return jnp.where(batch.loss_mask_BL, kl_BL, 0.0).sum(axis=1), batch.loss_mask_BL.sum(axis=1)

    return sums
