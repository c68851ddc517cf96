"""The answers of several policies to the same prompts, sampled or read from files."""

from __future__ import annotations

import dataclasses
import functools
import json
import pathlib
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from finetune import answers, sampling_settings
from launch import config_file, initial_model
from launch.run_settings import SettingError

from judging import reward_scores
from rlhf_jax import lm, parallel
from rlhf_jax.data import errors, records

Progress = Callable[[int, int], None]


@dataclasses.dataclass(frozen=True)
class Given:
    """The answers of a policy to N prompts, S to each."""

    name: str
    path: str
    records: list[records.Prompt]
    """The prompts."""
    lines: list[list[dict[str, Any]]]
    """Line of each answer, as in a file of samples, for each prompt."""
    ids: list[tuple[list[int], list[list[int]]]] | None = None
    """Ids of each prompt and of its answers; None if the answers were read from a file."""
    vocabulary: dict[str, int] | None = None
    """Vocabulary of the policy's tokenizer, by which `reference_logprobs` recognises models that can be compared."""
    logprobs_NS: np.ndarray | None = None
    """Log-probabilities of the answers under the policy; None if they are not needed or unknown."""

    def at(self, rows: Sequence[int], n: int) -> Given:
        """Returns the first ``n`` answers to each of these prompts."""
        return dataclasses.replace(
            self,
            records=[self.records[i] for i in rows],
            lines=[self.lines[i][:n] for i in rows],
            ids=None if self.ids is None else [(self.ids[i][0], self.ids[i][1][:n]) for i in rows],
            logprobs_NS=None if self.logprobs_NS is None else self.logprobs_NS[list(rows), :n],
        )


def names(paths: Sequence[str]) -> list[str]:
    """Returns a short, unique name for each path.

    >>> from judging import compared_policies
    >>> compared_policies.names(["runs/a/model", "runs/b", "c.jsonl", "runs/b"])
    ['a', 'b', 'c', 'b (2)']
    """

    def short(path: str) -> str:
        parts = pathlib.PurePath(path).parts
        generic = len(parts) > 1 and parts[-1] in ("model", "policy", "reward_model")
        last = parts[-2] if generic else parts[-1] if parts else path  # pyright: ignore[reportGeneralTypeIssues]
        return last.removesuffix(".jsonl")

    shortest = [short(path) for path in paths]
    several = {name for name in shortest if len({p for p, each in zip(paths, shortest) if each == name}) > 1}
    full = [path if name in several else name for path, name in zip(paths, shortest)]
    return [f"{name} ({earlier + 1})" if earlier else name for name, earlier in _numbered(full)]


def sample(
    settings: sampling_settings.Sampling,
    found: Sequence[records.Prompt],
    *,
    name: str,
    path: str,
    number: int,
    mesh: Any,
    measure: bool,
    counts: errors.DropCount,
    on_progress: Progress,
) -> Given:
    """Samples answers of a policy.

    Args:
        settings: How to sample.
        found: The prompts.
        name: Name of the policy.
        path: Its folder.
        number: Number of the policy. Policies with different numbers sample with different random keys.
        mesh: The mesh; None for one device.
        measure: Whether to compute the log-probabilities of the answers, for the KL.
        counts: Counts shortened prompts and prompts that cannot be encoded.
        on_progress: Called with the numbers of finished and of all answers.
    """
    model = load(settings, path, flag="--policies", mesh=mesh)
    prompts = answers.encode_prompts(
        model,
        found,
        width=settings.prompt_width,
        max_new_tokens=settings.max_new_tokens,
        counts=counts,
        flag="--policies",
    )
    sampler = answers.sampler(settings, model, mesh)
    wanted = [(row, k) for row in range(len(prompts.ids)) for k in range(settings.n)]
    made: dict[tuple[int, int], answers.Answer] = {}
    for batch in sampler(model.params, prompts, wanted, seed=settings.seed, policy=number):
        made |= {(answer.row, answer.sample): answer for answer in batch}
        on_progress(len(made), len(wanted))
    rows = [[made[row, k] for k in range(settings.n)] for row in range(len(prompts.ids))]
    given = Given(
        name,
        path,
        prompts.records,
        [[answers.line_of(model.fmt, prompts, answer) for answer in each] for each in rows],
        [(prompts.ids[row], [answer.ids for answer in each]) for row, each in enumerate(rows)],
        model.fmt.tokenizer.get_vocab(),
    )
    if measure:
        given = dataclasses.replace(given, logprobs_NS=_logprobs(settings, model, given, mesh, lambda *_: None))
    return given


def load(
    settings: sampling_settings.Sampling, path: str, *, flag: str, mesh: Any, kind: str = initial_model.LANGUAGE_MODEL
) -> initial_model.InitialModel:
    """Loads a model in the number format of the settings."""
    template = settings.template if kind == initial_model.LANGUAGE_MODEL else initial_model.Template()
    model = initial_model.load(path, flag=flag, mesh=mesh, kind=kind, template=template)
    dtype = settings.compute.dtype or model.cfg.dtype
    return dataclasses.replace(model, cfg=dataclasses.replace(model.cfg, dtype=dtype))


def reference_logprobs(
    settings: sampling_settings.Sampling,
    path: str,
    policies: Sequence[Given],
    *,
    flag: str,
    mesh: Any,
    note: Callable[[str], None],
    on_progress: Progress,
) -> list[np.ndarray | None]:
    """Returns the log-probabilities of the policies' answers under a reference model, ``[N, S]`` for each policy.

    The entry of a policy is None, and ``note`` is called, if the reference has another tokenizer or chat template.
    """
    model = load(settings, path, flag=flag, mesh=mesh)
    found: list[np.ndarray | None] = []
    for given in policies:
        why = _not_comparable(model, given)
        if why:
            note(f"the KL of {given.name} is left out: {why}")
            found.append(None)
        else:
            found.append(_logprobs(settings, model, given, mesh, on_progress))
    return found


def _not_comparable(model: initial_model.InitialModel, given: Given) -> str | None:
    """Returns why a model cannot score the tokens of a policy's answers, or None if it can."""
    if model.fmt.tokenizer.get_vocab() != given.vocabulary:
        return f"{model.path} has another tokenizer"
    limit = model.cfg.max_length
    if any(len(prompt) + len(ids) > limit for prompt, each in given.ids or () for ids in each):
        return f"a prompt with its answer exceeds {limit} tokens, the maximum length of {model.path}"
    width = max(len(prompt) for prompt, _ in given.ids or ())
    counts = errors.DropCount(max_dropped=1.0)
    own = answers.encode_prompts(model, given.records, width=None, max_new_tokens=1, counts=counts, flag="--reference")
    expected = [prompt for prompt, _ in given.ids or ()]
    same = all(ids == expected[i] for ids, i in zip(own.ids, own.numbers) if len(ids) <= width)
    return None if same else f"the chat template of {model.path} writes the prompts differently"


def _logprobs(
    settings: sampling_settings.Sampling,
    model: initial_model.InitialModel,
    given: Given,
    mesh: Any,
    on_progress: Progress,
) -> np.ndarray:
    """Returns the log-probabilities of a policy's answers under a model at the sampling temperature, ``[N, S]``."""
    assert given.ids is not None
    step = _logprob_step(model.cfg, mesh)
    temperature = np.float32(settings.temperature)
    rows = [prompt + ids for prompt, each in given.ids for ids in each]
    marks = [[False] * len(prompt) + [True] * len(ids) for prompt, each in given.ids for ids in each]
    sums = reward_scores.score_rows(
        rows,
        lambda *arrays: jax.device_get(step(model.params, *arrays, temperature)),
        batch=settings.batch,
        max_length=model.cfg.max_length,
        pad_id=model.fmt.pad_id,
        marks=marks,
        on_progress=lambda done: on_progress(done, len(rows)),
    )
    return sums.reshape(len(given.ids), -1)


@functools.cache
def _logprob_step(cfg: lm.LMConfig, mesh: Any) -> parallel.JitStep:
    run = functools.partial(_sums, cfg=cfg)
    return parallel.JitStep(run, donate_argnums=(), mesh=mesh, batch_args=(1, 2, 3), replicated_args=(4,))


def _sums(params: Any, tokens_BL: Any, mask_BL: Any, marks_BL: Any, temperature: Any, *, cfg: lm.LMConfig) -> jax.Array:
    logprobs_BL = lm.token_logprobs(params, tokens_BL, cfg=cfg, mask_BL=mask_BL, temperature=temperature)
    return jnp.where(marks_BL, logprobs_BL, 0.0).sum(axis=1)


def read(path: str, *, name: str) -> Given:
    """Reads a file of samples, with one answer per line.

    Lines with the same prompt and the same index, if they have one, are answers to the same prompt.

    Raises:
        SettingError: The file cannot be read.
        DataError: A line has no prompt or no response.
    """
    by_prompt: dict[Any, tuple[records.Prompt, list[dict[str, Any]]]] = {}
    try:
        text = pathlib.Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise SettingError(f"--samples {path} cannot be read: {error}") from error
    for number, written in enumerate(text.split("\n"), start=1):  # texts may contain other line separators
        if not written.strip():
            continue
        where = errors.location(path, number)
        try:
            line = json.loads(written)
            record = records.parse_prompt({key: line[key] for key in ("prompt", "tools", "metadata") if key in line})
            if not isinstance(line["response"], str):
                raise TypeError
        except (ValueError, KeyError, TypeError, errors.UnusableRecord) as error:
            raise errors.DataError(
                f"{where} is not a sample: it must be a JSON object with prompt and response, as sample.py writes it"
            ) from error
        by_prompt.setdefault((key_of(record), line.get("index")), (record, []))[1].append(line)
    if not by_prompt:
        raise errors.DataError(f"--samples {path} has no lines")
    return Given(name, path, [record for record, _ in by_prompt.values()], [each for _, each in by_prompt.values()])


def key_of(record: records.Prompt) -> str:
    """Returns what two records must have in common to be the same prompt."""
    turns = [[turn.role, turn.text, dict(turn.extra)] for turn in record.prompt]
    return json.dumps([turns, list(record.tools)], sort_keys=True, default=repr)


def join(policies: Sequence[Given], *, note: Callable[[str], None]) -> list[Given]:
    """Returns the answers to the prompts that all policies have, in the order of the first, with equal numbers of each.

    If a file of prompts has the same prompt several times, the first of each policy belong together, and so on.

    Raises:
        DataError: There is no such prompt.
    """
    places = [{key: row for row, key in enumerate(_numbered(map(key_of, given.records)))} for given in policies]
    keys = [key for key in places[0] if all(key in each for each in places)]
    if not keys:
        raise errors.DataError(f"{policies[0].path} and the others have no prompt in common")
    rows = [[each[key] for key in keys] for each in places]
    n = min(len(given.lines[row]) for given, chosen in zip(policies, rows) for row in chosen)
    for given, place, chosen in zip(policies, places, rows):
        if len(place) > len(keys):
            left = errors.counted(len(place) - len(keys), "prompts")
            note(f"leaving out {left} of {given.name} that another policy lacks")
        if any(len(given.lines[row]) > n for row in chosen):
            first = f"the first {errors.counted(n, 'answers')}" if n > 1 else "the first answer"
            note(f"using only {first} of {given.name} to each prompt, as many as every policy has")
    return [given.at(chosen, n) for given, chosen in zip(policies, rows)]


def _numbered(keys: Iterable[str]) -> list[tuple[str, int]]:
    """Returns each key with the number of equal keys before it."""
    seen: Counter[str] = Counter()
    numbered = []
    for key in keys:
        numbered.append((key, seen[key]))
        seen[key] += 1
    return numbered


def trained_on(policy: str, reward_model: str) -> bool:
    """Returns whether the run that saved a policy records this folder, or the folder's run, as its reward model."""
    folder = next((p for p in (pathlib.Path(policy), pathlib.Path(policy).parent) if config_file.is_run(p)), None)
    if folder is None:
        return False
    recorded = json.loads((folder / config_file.NAME).read_text(encoding="utf-8")).get("reward_model")
    recorded = [recorded] if isinstance(recorded, str) else recorded if isinstance(recorded, list) else []
    judge = pathlib.Path(reward_model).resolve()
    used = [pathlib.Path(each).resolve() for each in recorded if isinstance(each, str)]
    used.append((folder / "reward_model").resolve())
    return any(judge == each or judge.parent == each or (judge == each.parent and each.name in _SAVED) for each in used)


_SAVED = ("model", "reward_model")
