"""Answers of a language model to prompts, sampled in batches of similar length and written as JSON Lines.

The answer to prompt i with sample number k depends on the model, the prompt, the seed, i and k, but not on the other
rows of its batch.
"""

from __future__ import annotations

import dataclasses
import fcntl
import functools
import json
import pathlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from launch import device_mesh, initial_model, run_folder
from launch.run_settings import SettingError, Template

from finetune import sampling_settings
from rlhf_jax import atomic, generation, lm, parallel
from rlhf_jax.data import chat, errors, padding, readers, records

PARTIAL = ".partial"
"""Suffix of the file that contains the answers of an unfinished run. Its first line identifies the run."""


@dataclasses.dataclass(frozen=True)
class Prompts:
    """Encoded prompts with their records, and the number of each among the usable prompts of the file."""

    ids: list[list[int]]
    records: list[records.Prompt]
    numbers: list[int]


class Answer(NamedTuple):
    """An answer to a prompt."""

    row: int
    """Index of the prompt in `Prompts`."""
    sample: int
    ids: list[int]
    """Token ids, with the stop token if there is one."""
    stopped: bool
    logprob: float
    """Sum of the log-probabilities of the tokens under the distribution from which they were drawn."""


def read_prompts(settings: sampling_settings.Sampling, path: str, counts: errors.DropCount) -> list[records.Prompt]:
    """Reads the first --limit prompts of a file; raises DataError if none is usable."""
    found = readers.read_prompts(path, counts=counts)[0][: settings.limit]
    if not found:
        raise errors.DataError(f"--prompts {path} has no usable record ({counts.report()})")
    return found


def identity(settings: sampling_settings.Sampling, model: initial_model.InitialModel, prompts: str) -> dict[str, Any]:
    """Returns the settings on which answers depend, by flag, with digests of the model and the prompts."""
    return {
        **model_identity(model, settings.template),
        "the file of --prompts": run_folder.data_digest(prompts),
        **{
            f"--{name.replace('_', '-')}": getattr(settings, name)
            for name in ("n", "temperature", "top_k", "top_p", "max_new_tokens", "prompt_width", "limit", "seed")
        },
    }


def model_identity(model: initial_model.InitialModel, template: Template) -> dict[str, Any]:
    """Returns on what the hidden states of a model's prompts depend, by flag, with a digest of the model."""
    return {
        "the model": initial_model.fingerprint(model.path),
        "the date of the chat template": str(model.fmt.date),
        "--compute.dtype": model.cfg.dtype,
        "--template.options": template.options,
    }


def encode_prompts(
    model: initial_model.InitialModel,
    found: Sequence[records.Prompt],
    *,
    width: int | None,
    max_new_tokens: int,
    counts: errors.DropCount,
    flag: str = "--model",
) -> Prompts:
    """Encodes prompts with the model's chat template.

    Args:
        model: The model.
        found: The prompts.
        width: Maximum number of tokens of a prompt; longer ones lose their oldest turns and are counted. None is the
            largest width that leaves room for the answer.
        max_new_tokens: Maximum number of tokens of an answer.
        counts: Counts shortened prompts and prompts that cannot be encoded.
        flag: The flag of the model, for error messages.

    Raises:
        SettingError: The model is too short for a prompt and its answer.
        DataError: Too many prompts cannot be encoded, or none is left.
    """
    limit = model.cfg.max_length - max_new_tokens
    if limit < 1:
        raise SettingError(
            f"--max-new-tokens is {max_new_tokens}; it must be below {model.cfg.max_length}, the maximum length of "
            f"{flag} {model.path}"
        )
    if width is not None and width > limit:
        raise SettingError(
            f"--prompt-width is {width}; it must be at most {limit}, the maximum length of {flag} {model.path} "
            f"without --max-new-tokens {max_new_tokens}"
        )
    ids, kept = chat.encode_prompts(
        model.fmt,
        [each.prompt for each in found],
        width=limit if width is None else width,
        counts=counts,
        tools=[each.tools for each in found],
    )
    if not ids:
        narrow = width is not None and "prompt too long" in counts.dropped
        advice = f"; --prompt-width is {width}: raise it" if narrow else ""
        raise errors.DataError(f"no prompt is left ({counts.report()}){advice}")
    return Prompts(ids, [found[i] for i in kept], kept.tolist())


def batches(lengths: Sequence[int], *, size: int, most: int) -> Iterator[tuple[np.ndarray, int]]:
    """Divides rows into batches of similar length, longest first.

    >>> from finetune import answers
    >>> [(rows.tolist(), width) for rows, width in answers.batches([5, 40, 7], size=2, most=50)]
    [([1, 2], 50), ([0], 32)]

    Args:
        lengths: Number of tokens of each row.
        size: Maximum number of rows in a batch.
        most: Largest width.

    Yields:
        The indices of a batch's rows and its width: a power of two of at least 32, or ``most`` if that is smaller, so
        that few programs are compiled.
    """
    order = np.argsort(-np.asarray(lengths), kind="stable")
    for first in range(0, len(order), size):
        rows = order[first : first + size]
        longest = lengths[rows[0]]
        yield rows, max(longest, min(most, max(32, 1 << (longest - 1).bit_length())))


class Sampler:
    """Samples answers of models with the same architecture; compiles once for each width of prompts."""

    def __init__(
        self, cfg: lm.LMConfig, spec: generation.Sampling, *, batch: int, mesh: jax.sharding.Mesh | None = None
    ) -> None:
        """Builds the program; ``batch`` is the number of answers that are decoded together."""
        self._spec, self._mesh = spec, mesh
        self._batch = device_mesh.round_rows_up(batch, mesh)

        def run(params: Any, key_B: Any, tokens_BP: Any, mask_BP: Any) -> Any:
            return generation.generate(params, key_B, tokens_BP, mask_BP, cfg=cfg, sampling=spec)

        self._run = parallel.JitStep(run, donate_argnums=(), mesh=mesh, batch_args=(1, 2, 3), replicated_args=())

    def __call__(
        self, params: Any, prompts: Prompts, wanted: Sequence[tuple[int, int]], *, seed: int, policy: int = 0
    ) -> Iterator[list[Answer]]:
        """Yields the answers of one batch after another.

        Args:
            params: Parameters of the model.
            prompts: The prompts.
            wanted: Row of the prompt and sample number of each answer.
            seed: Seed of the samples.
            policy: Number of the policy; the samples of different policies are independent.
        """
        longest = max(map(len, prompts.ids))
        for rows, width in batches([len(prompts.ids[i]) for i, _ in wanted], size=self._batch, most=longest):
            chosen = [wanted[row] for row in rows]
            filled = chosen + chosen[-1:] * (self._batch - len(chosen))
            tokens_BP, mask_BP = padding.pad_prompts(
                [prompts.ids[i] for i, _ in filled], width=width, pad_id=self._spec.pad_id
            )
            numbers = np.array([(prompts.numbers[i], sample) for i, sample in filled])
            inputs = _keys(seed, policy, numbers), tokens_BP, mask_BP
            rollout = jax.device_get(
                self._run(params, *(inputs if self._mesh is None else parallel.local_rows(inputs, self._mesh)))
            )
            yield [
                Answer(
                    *chosen[b],
                    rollout.tokens_BL[b, width : width + rollout.lengths_B[b]].tolist(),  # pyright: ignore[reportCallIssue]
                    bool(rollout.finish_B[b]),  # pyright: ignore[reportCallIssue]
                    float(rollout.logprobs_BT[b].sum(dtype=np.float64)),  # pyright: ignore[reportCallIssue]
                )
                for b in range(len(chosen))
            ]


def sampler(settings: sampling_settings.Sampling, model: initial_model.InitialModel, mesh: Any) -> Sampler:
    """Returns a sampler, the same for models of one architecture, which then share its programs.

    A temperature of 0 chooses the most likely token.
    """
    spec: Any = generation.Sampling(
        temperature=settings.temperature or 1.0,
        greedy=settings.temperature == 0,
        top_k=settings.top_k,
        top_p=settings.top_p,
        max_new_tokens=settings.max_new_tokens,
        stop_ids=model.fmt.stop_ids,
        pad_id=model.fmt.pad_id,
    )
    return _sampler(model.cfg, spec, settings.batch, mesh)


@functools.cache
def _sampler(cfg: lm.LMConfig, spec: generation.Sampling, batch: int, mesh: Any) -> Sampler:
    return Sampler(cfg, spec, batch=batch, mesh=mesh)


@jax.jit
def _keys(seed: Any, policy: Any, numbers_B2: Any) -> jax.Array:
    def key(pair: Any) -> jax.Array:
        return jax.random.fold_in(jax.random.fold_in(first, pair[0]), pair[1])

    first = jax.random.fold_in(jax.random.key(seed), policy)

    return jax.vmap(key)(numbers_B2)


def text_of(fmt: chat.ChatFormat, ids: Sequence[int], *, stopped: bool) -> str:
    """Returns the text of an answer without special tokens; ``stopped`` says whether its last token is a stop token."""
    return fmt.tokenizer.decode(list(ids[:-1] if stopped else ids), skip_special_tokens=True)  # pyright: ignore[reportReturnType]


def line_of(fmt: chat.ChatFormat, prompts: Prompts, answer: Answer) -> dict[str, Any]:
    """Returns the line of an answer in a file of samples, a record that all readers of prompts accept."""
    record = prompts.records[answer.row]
    return {
        "index": prompts.numbers[answer.row],
        "sample": answer.sample,
        "prompt": chat.messages(record.prompt),
        **({"tools": list(record.tools)} if record.tools else {}),
        "response": text_of(fmt, answer.ids, stopped=answer.stopped),
        "tokens": len(answer.ids),
        "stopped": answer.stopped,
        "logprob": answer.logprob,
        **({"metadata": dict(record.metadata)} if record.metadata else {}),
    }


Line = dict[str, Any]


class SampleFile:
    """A file of samples that is written as the answers arrive, and can be continued after an interruption.

    The answers of an unfinished run are in a file of the same name with the suffix `PARTIAL`. `finish` sorts them,
    writes the file and removes the other, so a file without the suffix is always complete.
    """

    def __init__(self, path: str | pathlib.Path, identity: Mapping[str, Any]) -> None:
        """Reads the answers of an interrupted run with the same ``identity``: the settings on which answers depend.

        Raises:
            SettingError: The file exists, belongs to a run with another identity, or cannot be written.
        """
        self.path, self._partial = pathlib.Path(path), pathlib.Path(f"{path}{PARTIAL}")
        if self.path.exists():
            raise SettingError(f"--out {self.path} exists already; delete it or choose another name")
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._stream = self._partial.open("a+b")
            fcntl.flock(self._stream, fcntl.LOCK_EX | fcntl.LOCK_NB)  # until the process or `finish` closes the file
            self._stream.seek(0)
            content = self._stream.read()
            self._stream.truncate(content.rfind(b"\n") + 1)  # a killed process may have left an incomplete line
            written = [json.loads(line) for line in content.split(b"\n")[:-1]]
        except BlockingIOError as error:
            raise SettingError(f"another process writes to --out {self.path}; choose another name") from error
        except OSError as error:
            raise SettingError(f"cannot write to --out {self.path}: {error.strerror}") from error
        except ValueError as error:
            raise SettingError(f"{self._partial} is damaged; delete it to start again") from error
        if not written:
            self._write([dict(identity)])
        first, self.lines = (written[0], written[1:]) if written else (json.loads(json.dumps(identity)), [])
        if changed := [name for name in identity if first.get(name) != json.loads(json.dumps(identity[name]))]:
            self._stream.close()
            raise SettingError(
                f"{self._partial} has the answers of an interrupted run in which {changed[0]} was different; delete it "
                "or choose another --out"
            )

    @property
    def done(self) -> set[tuple[int, int]]:
        """Number of the prompt and sample number of each answer that the file has."""
        return {(line["index"], line["sample"]) for line in self.lines}

    def append(self, lines: Sequence[Line]) -> None:
        """Adds answers."""
        self._write(lines)
        self.lines += lines

    def _write(self, lines: Sequence[Line]) -> None:
        self._stream.write(as_lines(lines))
        self._stream.flush()

    def finish(self) -> list[Line]:
        """Writes the finished file and returns its lines, in the order of the prompts."""
        self.lines.sort(key=lambda line: (line["index"], line["sample"]))
        atomic.replace_file(self.path, as_lines(self.lines))
        self._partial.unlink()
        self._stream.close()
        return self.lines


def as_lines(values: Sequence[Mapping[str, Any]]) -> bytes:
    """Returns the content of a JSONL file."""
    text = "".join(json.dumps(value, ensure_ascii=False) + "\n" for value in values)
    return text.encode("utf-8", "backslashreplace")


def sample_file(
    sampler: Sampler,
    model: initial_model.InitialModel,
    prompts: Prompts,
    file: SampleFile,
    *,
    n: int,
    seed: int,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> list[Line]:
    """Samples the answers that a file does not have yet and returns all lines of the finished file.

    Args:
        sampler: The sampler for the architecture of the model.
        model: The model.
        prompts: The prompts.
        file: The file.
        n: Number of answers to each prompt.
        seed: Seed of the samples.
        on_progress: Called with the number of answers so far and their total.
    """
    done = file.done
    every = [(row, sample) for row in range(len(prompts.ids)) for sample in range(n)]
    wanted = [each for each in every if (prompts.numbers[each[0]], each[1]) not in done]
    on_progress(len(every) - len(wanted), len(every))
    for batch in sampler(model.params, prompts, wanted, seed=seed):
        file.append([line_of(model.fmt, prompts, answer) for answer in batch])
        on_progress(len(file.lines), len(every))
    return file.finish()
