"""Reads human comparisons and encodes them as rows, with widths that hold nearly all prompts and answers."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from launch import device_mesh, initial_model
from launch.run_settings import SettingError
from recipe import human_comparisons

from finetune import preference_settings, training
from rlhf_jax import types
from rlhf_jax.data import chat, comparison_transforms, encoding, errors, packing, readers, records

_MEASURED = 10_000
"""Maximum number of records that are encoded to choose the widths."""


@dataclasses.dataclass(frozen=True)
class Encoded:
    """Comparisons as rows, each of which has all answers to a prompt."""

    rows: types.Comparisons
    """Comparisons of NumPy arrays, in which at least two answers to each prompt differ in rank."""
    conversation_B: np.ndarray
    """The conversation of each prompt, by which intervals are clustered."""
    turn_B: np.ndarray
    """Number of user turns in each prompt."""

    def __len__(self) -> int:
        """Returns the number of prompts."""
        return len(self.conversation_B)

    def take(self, n: int | None) -> Encoded:
        """Returns the first n prompts; None for all."""
        rows = jax.tree.map(lambda x: x[:n], self.rows)
        return Encoded(rows, self.conversation_B[:n], self.turn_B[:n])

    def strata(self, prompt_N: np.ndarray) -> dict[str, list[str]]:
        """Returns the turn of each pair, given the index of its prompt."""
        return {"turn": [str(self.turn_B[b]) if self.turn_B[b] < 4 else "4 and on" for b in prompt_N]}


@dataclasses.dataclass(frozen=True)
class Data:
    """The comparisons of a file, encoded for a model."""

    train: Encoded
    held_out: Encoded
    prompt_width: int
    response_width: int
    notes: tuple[str, ...]
    """Warnings, which are saved as incidents."""
    held_out_records: Sequence[records.Ranking] = ()
    """The held-out comparisons as records."""

    @property
    def row_width(self) -> int:
        """Number of tokens of a row, which consists of a prompt and an answer."""
        return self.prompt_width + self.response_width

    @property
    def sizes(self) -> dict[str, int]:
        """The sizes to print, by name."""
        sizes = {"training comparisons": len(self.train), "held-out comparisons": len(self.held_out)}
        return sizes | {"tokens per prompt": self.prompt_width, "tokens per answer": self.response_width}

    @property
    def longest(self) -> int:
        """Number of tokens of the longest prompt with an answer, rounded up to a multiple of 32."""
        parts = self.train, self.held_out
        return max(-(-int(np.asarray(part.rows.mask_BKL).sum(axis=2).max()) // 32) * 32 for part in parts)


def load(settings: Any, mesh: Any, counts: errors.DropCount) -> tuple[initial_model.InitialModel, Data]:
    """Loads --model, or creates it with a tokenizer trained on the file, and reads and encodes --data.path.

    Raises:
        SettingError: The model or a width is unusable.
        DataError: The data is unusable.
    """
    data, key, notes = settings.data, jax.random.key(settings.seed), []
    if not initial_model.is_architecture(settings.model):
        initial_model.check(settings.model)
    rankings, _ = readers.read_rankings(data.path, counts=counts)
    if not rankings:
        raise errors.DataError(f"{data.path} has no usable record ({counts.report()})")
    parts = human_comparisons.split(data, rankings, key, warn=notes.append)
    if initial_model.is_architecture(settings.model):
        fmt = human_comparisons.train_chat_format(parts[0], data.vocab_size)
        model = initial_model.create(settings.model, fmt, key, mesh=mesh)
    else:
        initial_model.refuse_vocab_size(data)
        model = initial_model.load(settings.model, mesh=mesh, template=settings.template)
    lengths = measure(model.fmt, rankings)
    widths = choose_widths(lengths, data, max_length=model.cfg.max_length)
    notes += cut_warnings(lengths, widths)
    answers = max(len(each.responses) for each in rankings)
    # Counted over both parts, because a part with a single conversation would be divided by its prompts.
    conversation_N = human_comparisons.conversation_ids([*parts[0], *parts[1]])
    groups = conversation_N[: len(parts[0])], conversation_N[len(parts[0]) :]
    encoded = [
        _encode(model.fmt, part, group_B, widths, answers, counts, path=data.path)
        for part, group_B in zip(parts, groups)
    ]
    return model, Data(encoded[0], encoded[1], *widths, tuple(notes), parts[1])


def load_crowd(
    settings: preference_settings.OwnRewardSettings,
    model: initial_model.InitialModel,
    held_out: Sequence[records.Ranking],
    counts: errors.DropCount,
) -> tuple[Encoded, int, list[str]]:
    """Reads and encodes --pmp.path, without conversations of the held-out comparisons.

    Args:
        settings: The settings of the command.
        model: The model.
        held_out: The held-out human comparisons.
        counts: Counts unusable records.

    Returns:
        ``(crowd, prompt_width, notes)``: the comparisons, the number of columns before their answers, and warnings.
    """
    path = str(settings.pmp.path)
    found, _ = readers.read_rankings(path, counts=counts)
    id_N, n = human_comparisons.conversation_ids([*held_out, *found]), len(held_out)
    kept = np.flatnonzero(~np.isin(id_N[n:], id_N[:n]))
    if len(kept) == 0:
        raise errors.DataError(f"{path} has no usable record that is not held out ({counts.report()})")
    notes, rankings = [], [found[i] for i in kept]
    if dropped := len(found) - len(kept):
        notes = [f"{dropped} of {errors.counted(len(found), 'comparisons')} in {path} open like held-out comparisons"]
        notes = [f"{notes[0]} of {settings.data.path}, and are dropped"]
    lengths = measure(model.fmt, rankings)
    widths = choose_widths(lengths, settings.data, max_length=model.cfg.max_length)
    answers = max(len(each.responses) for each in rankings)
    crowd = _encode(model.fmt, rankings, id_N[n:][kept], widths, answers, counts, path=path)
    return crowd, widths[0], notes + cut_warnings(lengths, widths)


def _encode(
    fmt: chat.ChatFormat,
    rankings: Sequence[records.Ranking],
    conversation_N: np.ndarray,
    widths: tuple[int, int],
    max_answers: int,
    counts: errors.DropCount,
    *,
    path: str,
) -> Encoded:
    # Records that exceed the widths do not count towards --data.max-dropped, which is for defects of the file.
    found = errors.DropCount(max_dropped=1.0)
    P, T = widths
    rows, kept = encoding.encode_rankings(
        fmt, rankings, prompt_width=P, response_width=T, counts=found, max_answers=max_answers
    )
    soft = [soft_label(rankings[i]) for i in kept]
    if any(each is not None for each in soft):
        target_B = np.array([1.0 if each is None else each for each in soft], np.float32)
        labelled: Any = rows
        rows = labelled.replace(loss_inputs={"target": target_B})
    ranks_BK, where_BK = np.asarray(rows.ranks_BK), np.asarray(rows.where_BK)
    differ_B = np.array([len(set(ranks[where])) > 1 for ranks, where in zip(ranks_BK, where_BK)], bool)
    if differ_B.any():
        rows = comparison_transforms.drop_uninformative(rows, found)
    for name in ("dropped", "truncated", "noted", "unused"):
        totals = getattr(counts, name)
        for reason, n in getattr(found, name).items():
            totals[reason] = totals.get(reason, 0) + n
    if not differ_B.any():
        raise errors.DataError(
            f"{path}: none of {errors.counted(len(rankings), 'comparisons')} is usable ({found.report()})"
        )
    kept = kept[differ_B]
    turn_B = np.array([sum(turn.role == "user" for turn in rankings[i].prompt) for i in kept])
    return Encoded(rows, conversation_N[kept], turn_B)


def soft_label(ranking: records.Ranking) -> float | None:
    """Returns the probability that the chosen answer of a pair is better, its field ``preference`` if that is a float.

    Values of other types, such as the name of an answer, are no probabilities.

    Raises:
        DataError: The probability is below 0.5.
    """
    found = ranking.metadata.get("preference")
    if len(ranking.responses) != 2 or not isinstance(found, float) or not 0 <= found <= 1:
        return None
    if found < 0.5:
        raise errors.DataError(
            f"{ranking.location}: 'preference' is {found:g}; the probability that the chosen answer is better must be "
            "at least 0.5: exchange the answers"
        )
    return found


def measure(fmt: chat.ChatFormat, rankings: Sequence[records.Ranking]) -> tuple[np.ndarray, np.ndarray]:
    """Returns the numbers of tokens of prompts and of answers, of evenly spaced records if there are many."""
    some = [rankings[i] for i in np.unique(np.linspace(0, len(rankings) - 1, _MEASURED).astype(int))]
    counts = errors.DropCount(max_dropped=1.0)
    prompts, _ = chat.encode_prompts(
        fmt, [each.prompt for each in some], width=1 << 30, counts=counts, tools=[each.tools for each in some]
    )
    answered = [(each, answer) for each in some for answer in each.responses]
    answers = chat.try_answers(
        fmt,
        [each.prompt for each, _ in answered],
        [answer for _, answer in answered],
        tools=[each.tools for each, _ in answered],
    )
    found = [len(each) for each in answers if not isinstance(each, errors.DataError)]
    if not prompts or not found:
        raise errors.DataError(f"the chat template of --model rejects every record ({counts.report()})")
    return np.array([len(ids) for ids in prompts]), np.array(found)


def choose_widths(
    lengths: tuple[np.ndarray, np.ndarray], data: preference_settings.Comparisons, *, max_length: int
) -> tuple[int, int]:
    """Returns the widths of prompts and answers: those of the settings or those that hold 99 % of the file's.

    If both together exceed the model's maximum length, answers get what prompts leave, but at least half.

    Raises:
        SettingError: The widths of the settings exceed ``max_length``.
    """
    given = data.prompt_width, data.response_width
    flags = "--data.prompt-width", "--data.response-width"
    total = sum(width or 1 for width in given)
    if total > max_length:
        set_flags = " plus ".join(f"{flag} {width}" for flag, width in zip(flags, given) if width)
        raise SettingError(f"{set_flags} exceeds {max_length}, the maximum length of --model; lower it")
    prompt, answer = (width or _holding_99(lengths[i]) for i, width in enumerate(given))
    if prompt + answer > max_length:
        if given[1] is None:
            least = 1 if given[0] else max_length // 2
            answer = min(answer, max(max_length - prompt, least))
        if given[0] is None:
            prompt = min(prompt, max_length - answer)
    return prompt, answer


def _holding_99(lengths_N: np.ndarray) -> int:
    return -(-int(np.quantile(lengths_N, 0.99, method="higher")) // 32) * 32


def cut_warnings(lengths: tuple[np.ndarray, np.ndarray], widths: tuple[int, int]) -> list[str]:
    """Returns warnings that more than a tenth of the prompts or of the answers exceed their width."""
    flags = ("--data.prompt-width", "--data.response-width")
    found = map(cut_warning, ("prompts", "answers"), flags, lengths, widths)
    return [text for text in found if text]


def cut_warning(name: str, flag: str, lengths_N: np.ndarray, width: int) -> str | None:
    """Returns a warning if more than a tenth of some texts exceed a width."""
    long = int((lengths_N > width).sum())
    if long <= 0.1 * len(lengths_N):
        return None
    return (
        f"{long} of {errors.counted(len(lengths_N), name)} ({long / len(lengths_N):.0%}) exceed the width of {width} "
        f"tokens and are shortened or dropped; {flag} {_holding_99(lengths_N)} would hold 99 % of them"
    )


def packed_batches(
    settings: Any,
    mesh: Any,
    rows: Any,
    planned: training.Schedule,
    *,
    pack: Callable[..., Any],
    masks: Sequence[np.ndarray],
    pad_id: int,
    cost: float = 1.0,
) -> tuple[Callable[[int], Any] | None, dict[str, float] | None]:
    """Returns the function that packs the batch of a step, and what it saves; None without packing.

    Args:
        settings: The settings of the command.
        mesh: The mesh of the run.
        rows: A pytree of NumPy arrays whose first axis is the rows of the schedule.
        planned: The schedule.
        pack: `packing.pack_comparisons` or `packing.pack_preferences`.
        masks: bool, True at the tokens that are packed; several arrays ``[B, K, L]`` are packed separately.
        pad_id: Token id used for padding.
        cost: Computation of a packed token relative to that of a token of rows that are not packed.
    """
    if settings.packing is False or (settings.packing is None and mesh is not None):
        return None, None
    lengths = [mask_BKL.sum(axis=2) for mask_BKL in masks]
    _, K, L = masks[0].shape
    groups, multiple = settings.micro_batches, device_mesh.round_rows_up(1, mesh)
    width = min(-(-max(int(length_BK.max()) for length_BK in lengths) // 32) * 32, L)
    n = packed_rows(lengths, planned, width=width, groups=groups, multiple=multiple)
    share = width * n / (planned.batch * K * L)
    if settings.packing is None and share * cost > 0.9:
        return None, None

    def batch_at(i: int) -> Any:
        batch = jax.tree.map(lambda x: x[planned.order[i]], rows)
        return pack(batch, width=width, pad_id=pad_id, rows=n, groups=groups)

    return batch_at, {"width": width, "rows": n, "share_of_unpacked_tokens": share}


def packed_rows(
    lengths: Sequence[np.ndarray], planned: training.Schedule, *, width: int, groups: int, multiple: int
) -> int:
    """Returns the number of rows into which the answers of every batch fit.

    Args:
        lengths: Lengths of the answers with their prompts; several arrays ``[B, K]`` are packed separately.
        planned: The schedule.
        width: Width of a packed row.
        groups: Number of micro-batches, which are packed separately.
        multiple: The number of rows of a micro-batch is a multiple of this number.
    """
    most = 0
    for i in range(planned.steps):
        at = np.asarray(planned.order[i])
        for length_BK in lengths:
            for group in range(groups):
                positions = packing.best_fit(length_BK[at[group::groups]].ravel().tolist(), width=width)
                most = max(most, 1 + max(row for row, _ in positions))
    return -(-most // multiple) * multiple * groups
