r"""Records and their parsers: demonstrations, rankings, judged answers and prompts. `readers` reads whole sources.

The table lists the forms of each kind of record. A *message list* is ``[{"role": "user", "content": "..."}, ...]``, or
has the keys ``from`` and ``value`` of ShareGPT.

==============  ======================================================================================================
record          fields
==============  ======================================================================================================
demonstrations  ``prompt`` and ``response`` (or ``completion``, ``output``, ``answer``)
                ``messages``, a message list whose last turn is the assistant's answer
rankings        ``prompt``, ``responses`` and ``ranks`` (1 is best, equal ranks are ties) or ``scores`` (higher is
                better, equal scores are ties)
                ``prompt``, ``chosen`` and ``rejected`` (one answer each, or lists of answers); optionally ``margin``,
                ``score_chosen``, ``score_rejected`` (or ``chosen_score``, ``chosen_rating`` and so on)
                ``chosen`` and ``rejected`` as whole dialogues, which are message lists or have the hh-rlhf form (see
                `dialogues`); optionally ``prompt``, which must agree with them, and the other fields of a pair
judged          the fields of a demonstration, and ``label`` (true means good, false means bad)
prompts         ``prompt``
                ``messages``, whose last turn is left out if it is the assistant's
                ``chosen`` and ``rejected``, as in rankings, of which only the prompt is used
==============  ======================================================================================================

A prompt is a message list or a string. A string is one user turn, unless it begins with ``"\n\nHuman:"``, which marks
the hh-rlhf form. The last turn of a prompt must have text, and must be neither an assistant turn nor a system turn. An
answer is a string or a message list that consists of one assistant turn. Texts are kept as written, except in the
hh-rlhf form, in which white space around a turn is removed and ``"\r\n"`` becomes ``"\n"``.

A prompt can also be named ``instruction``, ``question`` or ``query``, and a message list ``conversations`` or
``conversation``.
With every form, ``system`` or ``system_prompt`` contains the system text, and ``tools`` the functions that the
assistant may call. ``history`` contains the turns before the question, as ``[question, answer]`` pairs or as messages.
A text in ``input`` or ``context`` beside a prompt is refused, because its place in the prompt is unknown. An answer
with ``"weight": 0`` is not trained on, so its record is unusable.

A ``prompt`` *agrees* with a dialogue if it equals the dialogue's prompt or consists only of the first or the last user
turn in it; white space around texts is ignored. A ``prompt`` that is given in addition to ``messages`` must agree with
them, and an answer that is given in addition must equal theirs.

Other fields that hold a string, a finite number or a boolean, such as an annotator or a subset, are stored in
``metadata``. The fields of an object named ``metadata`` are stored there too. Lists and other objects are ignored.
``unused`` names the other fields that contain a text of several words, which may have been meant for the model.

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
    unused: tuple[str, ...] = dataclasses.field(default=(), compare=False)
    """Names of fields that contain text and are not part of the record, except as metadata; ignored when records are
    compared."""
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
    fields = _Fields(fields)
    prompt, response = _prompt_and_answer(fields)
    return Demonstration(prompt=prompt, response=response, **_other_fields(fields), location=location)


def parse_judged(fields: Mapping[str, Any], *, location: str = "") -> Judged:
    """Parses a judged answer; the module docstring lists its fields and the errors."""
    fields = _Fields(fields)
    label = fields.get("label")
    if label is None:
        raise errors.MissingFieldError("label")
    if label not in (False, True):
        raise errors.DataError(f"'label' is {label!r}; it must be true or false")
    prompt, response = _prompt_and_answer(fields)
    return Judged(prompt=prompt, response=response, good=bool(label), **_other_fields(fields), location=location)


def parse_prompt(fields: Mapping[str, Any], *, location: str = "") -> Prompt:
    """Parses a prompt; the module docstring lists its fields and the errors.

    >>> from rlhf_jax.data import records
    >>> pair = {"chosen": "\\n\\nHuman: Hi.\\n\\nAssistant: Hello.", "rejected": "\\n\\nHuman: Hi.\\n\\nAssistant: No."}
    >>> [turn.text for turn in records.parse_prompt(pair).prompt]
    ['Hi.']
    """
    fields = _Fields(fields)
    whole = conversations.first(fields, *conversations.PROMPTS, *conversations.CONVERSATIONS)
    if whole is None and "chosen" in fields and "rejected" in fields:
        prompt, _, _ = _pair(fields)
    elif whole in conversations.CONVERSATIONS and _is_answered(turns := conversations.turns(fields[whole], whole)):
        prompt = conversations.usable_prompt(conversations.with_system(fields, conversations.split_answer(turns)[0]))
    else:
        prompt = conversations.prompt(fields)
    return Prompt(prompt=prompt, **_other_fields(fields), location=location)


def _is_answered(turns: Turns) -> bool:
    return len(turns) > 1 and turns[-1].role == dialogues.ASSISTANT


def parse_ranking(fields: Mapping[str, Any], *, location: str = "") -> Ranking:
    """Parses a ranking or a pair; the module docstring lists its fields and the errors.

    >>> from rlhf_jax.data import records
    >>> ranking = records.parse_ranking({"prompt": "2 + 2?", "responses": ["5", "4"], "scores": [0.0, 1.0]})
    >>> ranking.responses, ranking.ranks, ranking.margin
    (('4', '5'), (1, 2), 1.0)
    """
    fields = _Fields(fields)
    margin = _number(fields, "margin")
    if "responses" in fields:
        _refuse_mixed_forms(fields, "responses", "chosen", "rejected")
        prompt, responses, ranks, scores = _ranked_answers(fields)
    elif "chosen" in fields and "rejected" in fields:
        prompt, chosen, rejected = _pair(fields)
        responses, ranks = (*chosen, *rejected), (1,) * len(chosen) + (2,) * len(rejected)
        scores = _pair_scores(fields, len(chosen), len(rejected))
    else:
        raise errors.MissingFieldError("rejected" if "chosen" in fields else "chosen", "responses")
    _check_answers(responses, ranks)
    if scores is not None:
        if _disagree(ranks, scores):
            raise errors.UnusableRecord("ranks and scores disagree")
        best = {score: min(rank for rank, other in zip(ranks, scores) if other == score) for score in scores}
        ranks = tuple(best[score] for score in scores)
    if len(set(ranks)) == 1:
        raise errors.UnusableRecord("all answers tied")
    order = sorted(range(len(ranks)), key=ranks.__getitem__)
    scores = None if scores is None else tuple(scores[i] for i in order)
    return Ranking(
        prompt=prompt,
        responses=tuple(responses[i] for i in order),
        ranks=tuple(ranks[i] for i in order),
        scores=scores,
        margin=_margin(margin, len(ranks), scores),
        **_other_fields(fields),
        location=location,
    )


class _Fields(dict[str, Any]):
    """The fields of a record, except null ones, and the names of those that have been used.

    A row of a Parquet file has a null field for each column that it does not use.
    """

    def __init__(self, fields: Mapping[str, Any]) -> None:
        super().__init__({key: value for key, value in fields.items() if value is not None})
        self.used: set[str] = set()

    def __getitem__(self, key: str) -> Any:
        self.used.add(key)
        return super().__getitem__(key)

    def get(self, key: str, default: Any = None) -> Any:
        return self[key] if key in self else default  # noqa: SIM401


def _other_fields(fields: _Fields) -> dict[str, Any]:
    """Returns the arguments ``tools``, ``metadata`` and ``unused`` of a record, from the fields that were not used."""
    conversations.refuse_media(fields)
    tools = conversations.tools(fields)
    others = {key: value for key, value in fields.items() if key not in fields.used}
    if isinstance(nested := others.get("metadata"), Mapping):
        del others["metadata"]
    metadata = {}
    for key, value in (others | (dict(nested) if isinstance(nested, Mapping) else {})).items():
        sources.require_text(key, "the name of a field")
        if isinstance(value, str):
            sources.require_text(value, key)
        # Infinity and NaN are ignored: JSON has neither, and tables use NaN for missing numbers.
        if isinstance(value, str | int) or (isinstance(value, float) and math.isfinite(value)):
            metadata[key] = value
    unused = tuple(key for key, value in others.items() if _contains_text(value))
    return {"tools": tools, "metadata": metadata, "unused": unused}


def _contains_text(value: Any) -> bool:
    """Returns whether a value contains a string of several words; a single word is a name or a label, not a text."""
    if isinstance(value, str):
        return not value.isascii() or len(value.split(maxsplit=1)) > 1
    items = value.values() if isinstance(value, Mapping) else value if isinstance(value, list) else ()
    return any(map(_contains_text, items))


def _refuse_mixed_forms(fields: Mapping[str, Any], key: str, *others: str) -> None:
    for other in others:
        if other in fields:
            raise errors.DataError(f"the record mixes two forms: it has both {key!r} and {other!r}")


# -------------------------------------------------------------------------------------------------- prompts and answers


def _prompt_and_answer(fields: Mapping[str, Any]) -> tuple[Turns, dialogues.Answer]:
    key = conversations.first(fields, "response", "completion")
    if key == "response":
        _refuse_mixed_forms(fields, "response", "completion")
    whole = conversations.first(fields, *(conversations.CONVERSATIONS if key is None else ("messages",)))
    if whole is not None:
        prompt, answer = conversations.split_answer(conversations.turns(fields[whole], whole))
        prompt = conversations.usable_prompt(conversations.with_system(fields, prompt))
        if not _agrees(fields, prompt):
            raise errors.UnusableRecord("prompts differ")
        if key is not None and _stripped(conversations.answer(fields[key], key)) != _stripped(answer):
            raise errors.UnusableRecord("answers differ")
    elif (key := key or conversations.first(fields, "output", "answer")) is not None:
        prompt, answer = conversations.prompt(fields), conversations.answer(fields[key], key)
    else:
        asked = conversations.first(fields, *conversations.PROMPTS)
        raise errors.MissingFieldError("prompt" if asked is None else "response", "messages")
    if dialogues.is_blank(dialogues.answer_turn(answer)):
        raise errors.UnusableRecord("empty answer")
    return prompt, answer


def _agrees(fields: Mapping[str, Any], whole: Turns) -> bool:
    """Returns whether the field ``prompt``, if there is one, agrees with the prompt of a whole conversation."""
    return "prompt" not in fields or conversations.repeats(
        conversations.usable_prompt(conversations.question(fields)), whole
    )


def _stripped(answer: dialogues.Answer) -> str:
    return dialogues.answer_turn(answer).text.strip()


# ------------------------------------------------------------------------------------------------ pairs and rankings

Answers = tuple[dialogues.Answer, ...]


def _pair(fields: Mapping[str, Any]) -> tuple[Turns, Answers, Answers]:
    """Returns the prompt, the chosen answers and the rejected answers; in most forms, there is one of each."""
    chosen, rejected = fields["chosen"], fields["rejected"]
    if all(isinstance(each, str) and dialogues.is_dialogue(each) for each in (chosen, rejected)):
        prompt, better, worse = _dialogue_pair(fields)
        return conversations.with_system(fields, prompt), (better,), (worse,)
    if all(isinstance(each, list | Mapping) and not _is_list_of_answers(each) for each in (chosen, rejected)):
        (prompt, better), (other_prompt, worse) = (
            conversations.split_answer(conversations.turns(fields[key], key)) for key in ("chosen", "rejected")
        )
        if not conversations.same(prompt, other_prompt) or (prompt and not _agrees(fields, prompt)):
            raise errors.UnusableRecord("prompts differ")
        whole = conversations.usable_prompt(conversations.with_system(fields, prompt)) if prompt else None
        return whole or conversations.prompt(fields), (better,), (worse,)
    better, worse = (
        tuple(conversations.answer(each, key) for each in (value if _is_list_of_answers(value) else [value]))
        for key, value in (("chosen", chosen), ("rejected", rejected))
    )
    return conversations.prompt(fields), better, worse


def _is_list_of_answers(value: Any) -> bool:
    """Returns whether a value is a list of texts or of message lists, as opposed to one message list."""
    return isinstance(value, list) and bool(value) and isinstance(value[0], str | list)


def _dialogue_pair(fields: Mapping[str, Any]) -> tuple[Turns, str, str]:
    """Parses a pair of whole dialogues in the hh-rlhf form."""
    chosen, rejected = (_dialogue(fields[key], key) for key in ("chosen", "rejected"))
    reason = dialogues.drop_reason(chosen, rejected)
    if reason is None and not _agrees(fields, chosen[:-1]):
        reason = "prompts differ"
    if reason is not None:
        raise errors.UnusableRecord(reason)
    return chosen[:-1], chosen[-1].text, rejected[-1].text


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


def _pair_scores(fields: _Fields, n_chosen: int, n_rejected: int) -> tuple[float, ...] | None:
    """Returns the scores of the chosen and the rejected answers; a list has one for each, None if some are missing."""
    names = ("score_chosen", "score_rejected")
    if not any(name in fields for name in names):
        # A file may use another name for something else, so values that are not numbers are ignored.
        others = (("chosen" + end, "rejected" + end) for end in ("_score", "_rating", "-rating"))
        names = next((pair for pair in others if all(_is_finite_number(dict.get(fields, key)) for key in pair)), names)
    scores: list[float] = []
    for key, n in zip(names, (n_chosen, n_rejected)):
        listed = isinstance(fields.get(key), list)
        found = [_score(each) for each in fields[key]] if listed else [_number(fields, key)]
        if found == [None]:
            return None
        if len(found) != n:
            raise errors.UnusableRecord("scores and answers differ in number")
        scores.extend(found)  # type: ignore[arg-type]
    return tuple(scores)


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
