r"""Records and their parsers: demonstrations, rankings, judged answers and prompts. `readers` reads whole sources.

The table lists the forms of each kind of record. A *message list* is ``[{"role": "user", "content": "..."}, ...]``.

==============  ======================================================================================================
record          fields
==============  ======================================================================================================
demonstrations  ``prompt`` and ``response`` (or ``completion``)
                ``messages``, a message list whose last turn is the assistant's answer
rankings        ``prompt``, ``responses`` and ``ranks`` (1 is best, equal ranks are ties) or ``scores`` (higher is
                better)
                ``prompt``, ``chosen`` and ``rejected`` (a pair); optionally ``margin``, ``score_chosen``,
                ``score_rejected``
                ``chosen`` and ``rejected`` as whole dialogues, which are message lists or have the hh-rlhf form (see
                `dialogues`); optionally ``prompt``, which must agree with them, and the other fields of a pair
judged          the fields of a demonstration, and ``label`` (true means good, false means bad)
prompts         ``prompt``
==============  ======================================================================================================

A prompt is a message list or a string. A string is one user turn, unless it begins with ``"\n\nHuman:"``, which marks
the hh-rlhf form. The last turn of a prompt must have text, and must be neither an assistant turn nor a system turn. An
answer is a string or a message list that consists of one assistant turn. Texts are kept as written, except in the
hh-rlhf form, in which white space around a turn is removed and ``"\r\n"`` becomes ``"\n"``.

A ``prompt`` *agrees* with a dialogue if it equals the dialogue's prompt or consists only of the first or the last user
turn in it; white space around texts is ignored. A ``prompt`` that is given in addition to ``messages`` must agree with
them, and an answer that is given in addition must equal theirs.

Other fields that hold a string, a finite number or a boolean, such as an annotator or a subset, are stored in
``metadata``. The fields of an object named ``metadata`` are stored there too. Lists and other objects are ignored.

The parsers raise `errors.DataError` if a record has the wrong form: a field is missing or has the wrong type, or the
record mixes two forms. They raise `errors.UnusableRecord` if a record has the right form but cannot be used, for
example because all its answers are tied. The readers drop such a record and count it by reason. A null field counts as
missing, except that the readers also drop and count a record in which a required field is null.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

from rlhf_jax.data import conversations, dialogues, errors, sources

Scalar = str | int | float | bool
Turns = conversations.Turns

_ANSWER_FIELDS = {"prompt", "messages", "response", "completion"}
_RANKING_FIELDS = {"prompt", "responses", "ranks", "scores", "margin"}
_PAIR_FIELDS = {"prompt", "chosen", "rejected", "score_chosen", "score_rejected", "margin"}
_MARGIN_TOLERANCE = 0.01
"""Accepted deviation of a margin from the difference of the two scores, relative to the largest absolute value among
the margin and the scores."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Prompt:
    """A prompt to answer."""

    prompt: Turns
    tools: tuple[Mapping[str, Any], ...] = ()
    """The functions that the assistant may call, for the chat template."""
    metadata: Mapping[str, Scalar] = dataclasses.field(default_factory=dict)
    location: str = dataclasses.field(default="", compare=False)
    """Place in the source, such as file and line; ignored when records are compared."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Demonstration(Prompt):
    """A prompt with an answer to imitate."""

    response: dialogues.Answer


@dataclasses.dataclass(frozen=True, kw_only=True)
class Judged(Demonstration):
    """A prompt with an answer that is labelled good or bad."""

    good: bool


@dataclasses.dataclass(frozen=True, kw_only=True)
class Ranking(Prompt):
    """K >= 2 answers to one prompt, not all of the same rank.

    `parse_ranking` sorts them best first; ties keep their order.
    """

    responses: tuple[dialogues.Answer, ...]
    ranks: tuple[int, ...]
    """Rank of each response, at least 1. A lower rank is better; equal ranks are ties."""
    scores: tuple[float, ...] | None = None
    """Score of each response; higher is better. None if a score is missing."""
    margin: float | None = None
    """How much better the first answer of a pair is; at least 0. This is the record's margin if it has one, otherwise
    the difference of the scores; None if the record has neither, or K > 2."""


def parse_demonstration(fields: Mapping[str, Any], *, location: str = "") -> Demonstration:
    """Parses a demonstration; the module docstring lists its fields and the errors."""
    fields = _without_nulls(fields)
    prompt, response = _prompt_and_answer(fields)
    metadata, tools = _metadata(fields, _ANSWER_FIELDS), conversations.tools(fields)
    return Demonstration(prompt=prompt, response=response, tools=tools, metadata=metadata, location=location)


def parse_judged(fields: Mapping[str, Any], *, location: str = "") -> Judged:
    """Parses a judged answer; the module docstring lists its fields and the errors."""
    fields = _without_nulls(fields)
    label = fields.get("label")
    if label is None:
        raise errors.MissingFieldError("label")
    if label not in (False, True):
        raise errors.DataError(f"'label' is {label!r}; it must be true or false")
    prompt, response = _prompt_and_answer(fields)
    return Judged(
        prompt=prompt,
        response=response,
        good=bool(label),
        tools=conversations.tools(fields),
        metadata=_metadata(fields, _ANSWER_FIELDS | {"label"}),
        location=location,
    )


def parse_prompt(fields: Mapping[str, Any], *, location: str = "") -> Prompt:
    """Parses a prompt; the module docstring lists its fields and the errors."""
    fields = _without_nulls(fields)
    prompt, tools = conversations.prompt(fields), conversations.tools(fields)
    return Prompt(prompt=prompt, tools=tools, metadata=_metadata(fields, {"prompt"}), location=location)


def parse_ranking(fields: Mapping[str, Any], *, location: str = "") -> Ranking:
    """Parses a ranking or a pair; the module docstring lists its fields and the errors.

    >>> from rlhf_jax.data import records
    >>> ranking = records.parse_ranking({"prompt": "2 + 2?", "responses": ["5", "4"], "scores": [0.0, 1.0]})
    >>> ranking.responses, ranking.ranks, ranking.margin
    (('4', '5'), (1, 2), 1.0)
    """
    fields = _without_nulls(fields)
    margin = _number(fields, "margin")
    form = _RANKING_FIELDS if "responses" in fields else _PAIR_FIELDS
    if form is _RANKING_FIELDS:
        _refuse_mixed_forms(fields, "responses", "chosen", "rejected")
        prompt, responses, ranks, scores = _ranked_answers(fields)
    elif "chosen" in fields and "rejected" in fields:
        prompt, responses = _pair(fields)
        ranks, scores = (1, 2), _pair_scores(fields)
    else:
        raise errors.MissingFieldError("rejected" if "chosen" in fields else "chosen", "responses")
    _check_answers(responses, ranks)
    if len(set(ranks)) == 1:
        raise errors.UnusableRecord("all answers tied")
    if scores is not None and _disagree(ranks, scores):
        raise errors.UnusableRecord("ranks and scores disagree")
    order = sorted(range(len(ranks)), key=ranks.__getitem__)
    scores = None if scores is None else tuple(scores[i] for i in order)
    return Ranking(
        prompt=prompt,
        responses=tuple(responses[i] for i in order),
        ranks=tuple(ranks[i] for i in order),
        scores=scores,
        margin=_margin(margin, len(ranks), scores),
        tools=conversations.tools(fields),
        metadata=_metadata(fields, form),
        location=location,
    )


def _without_nulls(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Drops null fields. A row of a Parquet file has a null field for each column that it does not use."""
    return {key: value for key, value in fields.items() if value is not None}


def _metadata(fields: Mapping[str, Any], form: set[str]) -> dict[str, Scalar]:
    others = {key: value for key, value in fields.items() if key not in form | {"tools"}}
    if isinstance(nested := others.get("metadata"), Mapping):
        others = {key: value for key, value in others.items() if key != "metadata"} | dict(nested)
    metadata = {}
    for key, value in others.items():
        if isinstance(value, str):
            sources.require_text(value, key)
        # Infinity and NaN are ignored: JSON has neither, and tables use NaN for missing numbers.
        if isinstance(value, str | int) or (isinstance(value, float) and math.isfinite(value)):
            metadata[sources.require_text(key, "the name of a field")] = value
    return metadata


def _refuse_mixed_forms(fields: Mapping[str, Any], key: str, *others: str) -> None:
    for other in others:
        if other in fields:
            raise errors.DataError(f"the record mixes two forms: it has both {key!r} and {other!r}")


# -------------------------------------------------------------------------------------------------- prompts and answers


def _prompt_and_answer(fields: Mapping[str, Any]) -> tuple[Turns, dialogues.Answer]:
    key = next((key for key in ("response", "completion") if key in fields), None)
    if key == "response":
        _refuse_mixed_forms(fields, "response", "completion")
    if "messages" in fields:
        prompt, answer = conversations.split_answer(conversations.turns(fields["messages"], "messages"))
        prompt = conversations.usable_prompt(prompt)
        if "prompt" in fields and not conversations.repeats(conversations.prompt(fields), prompt):
            raise errors.UnusableRecord("prompts differ")
        if key is not None and _text_key(conversations.answer(fields[key], key)) != _text_key(answer):
            raise errors.UnusableRecord("answers differ")
    elif key is not None:
        prompt, answer = conversations.prompt(fields), conversations.answer(fields[key], key)
    else:
        raise errors.MissingFieldError("response" if "prompt" in fields else "prompt", "messages")
    if dialogues.is_blank(dialogues.answer_turn(answer)):
        raise errors.UnusableRecord("empty answer")
    return prompt, answer


# ------------------------------------------------------------------------------------------------ pairs and rankings


def _pair(fields: Mapping[str, Any]) -> tuple[Turns, tuple[dialogues.Answer, ...]]:
    chosen, rejected = fields["chosen"], fields["rejected"]
    both_texts = isinstance(chosen, str) and isinstance(rejected, str)
    if both_texts and dialogues.is_dialogue(chosen) and dialogues.is_dialogue(rejected):
        return _dialogue_pair(fields)
    if both_texts or not (isinstance(chosen, list | Mapping) and isinstance(rejected, list | Mapping)):
        return conversations.prompt(fields), (
            conversations.answer(chosen, "chosen"),
            conversations.answer(rejected, "rejected"),
        )
    (prompt, better), (other_prompt, worse) = (
        conversations.split_answer(conversations.turns(fields[key], key)) for key in ("chosen", "rejected")
    )
    if not conversations.same(prompt, other_prompt) or (
        prompt and "prompt" in fields and not conversations.repeats(conversations.prompt(fields), prompt)
    ):
        raise errors.UnusableRecord("prompts differ")
    return conversations.usable_prompt(prompt) if prompt else conversations.prompt(fields), (better, worse)


def _dialogue_pair(fields: Mapping[str, Any]) -> tuple[Turns, tuple[dialogues.Answer, ...]]:
    """Parses a pair of whole dialogues in the hh-rlhf form."""
    chosen, rejected = (_dialogue(fields[key], key) for key in ("chosen", "rejected"))
    reason = dialogues.drop_reason(chosen, rejected)
    prompt, answer = chosen[:-1], chosen[-1].text
    if reason is None and "prompt" in fields and not conversations.repeats(conversations.prompt(fields), prompt):
        reason = "prompts differ"
    if reason is not None:
        raise errors.UnusableRecord(reason)
    return prompt, (answer, rejected[-1].text)


def _dialogue(value: str, key: str) -> Turns:
    sources.require_text(value, key)
    try:
        return dialogues.parse_dialogue(value)
    except errors.DataError as error:
        raise errors.DataError(f"in {key!r}, {error}") from None


def _ranked_answers(
    fields: Mapping[str, Any],
) -> tuple[Turns, tuple[dialogues.Answer, ...], tuple[int, ...], tuple[float, ...] | None]:
    prompt = conversations.prompt(fields)
    responses = tuple(conversations.answer(value, "responses") for value in _list(fields, "responses"))
    if len(responses) < 2:
        raise errors.UnusableRecord("fewer than two answers")
    ranks, scores = (_list(fields, key) if key in fields else None for key in ("ranks", "scores"))
    if ranks is None and scores is None:
        raise errors.MissingFieldError("ranks", "scores")
    if scores is not None:
        if len(scores) != len(responses):
            raise errors.UnusableRecord("scores and answers differ in number")
        scores = tuple(_score(score) for score in scores)
    if ranks is None:
        assert scores is not None
        rank_of = {score: rank for rank, score in enumerate(sorted(set(scores), reverse=True), start=1)}
        return prompt, responses, tuple(rank_of[score] for score in scores), scores
    if len(ranks) != len(responses):
        raise errors.UnusableRecord("ranks and answers differ in number")
    return prompt, responses, tuple(_rank(rank) for rank in ranks), scores


def _list(fields: Mapping[str, Any], key: str) -> list[Any]:
    if not isinstance(fields[key], list):
        raise errors.DataError(f"{key!r} has type {type(fields[key]).__name__}; it must be a list")
    return fields[key]


def _text_key(answer: dialogues.Answer) -> str:
    return dialogues.answer_turn(answer).text.strip()


def _check_answers(responses: Sequence[dialogues.Answer], ranks: Sequence[int]) -> None:
    if any(dialogues.is_blank(dialogues.answer_turn(answer)) for answer in responses):
        raise errors.UnusableRecord("empty answer")
    rank_of: dict[tuple[str, str], int] = {}
    if any(rank_of.setdefault(dialogues.answer_key(answer), rank) != rank for answer, rank in zip(responses, ranks)):
        raise errors.UnusableRecord("same answer twice")


def _rank(value: Any) -> int:
    if not _is_finite_number(value) or value != int(value) or value > 2**31 - 1:
        raise errors.UnusableRecord("rank is not a whole number")
    if value < 1:
        raise errors.UnusableRecord("rank below 1")
    return int(value)


def _score(value: Any) -> float:
    if not _is_finite_number(value):
        raise errors.UnusableRecord("score is not a finite number")
    return float(value)


def _is_finite_number(value: Any) -> bool:
    """Returns whether a value is a number in the range of a float; booleans do not count as numbers."""
    try:
        return not isinstance(value, bool) and isinstance(value, int | float) and math.isfinite(value)
    except OverflowError:
        return False


def _number(fields: Mapping[str, Any], key: str) -> float | None:
    if key not in fields:
        return None
    if isinstance(fields[key], bool) or not isinstance(fields[key], int | float):
        raise errors.DataError(f"{key!r} has type {type(fields[key]).__name__}; it must be a number")
    return _score(fields[key])


def _pair_scores(fields: Mapping[str, Any]) -> tuple[float, float] | None:
    chosen, rejected = (_number(fields, key) for key in ("score_chosen", "score_rejected"))
    return None if chosen is None or rejected is None else (chosen, rejected)


def _disagree(ranks: Sequence[int], scores: Sequence[float]) -> bool:
    return any(a < b and x < y for a, x in zip(ranks, scores) for b, y in zip(ranks, scores))


def _margin(margin: float | None, n_answers: int, scores: Sequence[float] | None) -> float | None:
    """Returns the margin of a ranking, given the record's margin and its scores, best first."""
    if n_answers > 2:
        if margin is not None:
            raise errors.UnusableRecord("margin of more than two answers")
        return None
    if margin is not None and margin < 0:
        raise errors.UnusableRecord("margin below 0")
    if scores is None:
        return margin
    difference = scores[0] - scores[1]
    if not math.isfinite(difference):
        raise errors.UnusableRecord("score is not a finite number")
    if margin is None:
        return difference
    if abs(margin - difference) > _MARGIN_TOLERANCE * max(margin, *map(abs, scores)):
        raise errors.UnusableRecord("margin and scores disagree")
    return margin
