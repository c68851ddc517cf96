r"""One record out of its fields: a demonstration, a ranking, a judged answer or a prompt; `reading` reads whole files.

What a record may look like; a message list is ``[{"role": "user", "content": "..."}, ...]``:

==============  ======================================================================================================
record          fields
==============  ======================================================================================================
demonstrations  ``prompt`` and ``response`` (or ``completion``)
                ``messages``: the last turn, the assistant's, is the answer
rankings        ``prompt``, ``responses`` and ``ranks`` (1 is best, equal is a tie) or ``scores`` (higher is better)
                ``prompt``, ``chosen`` and ``rejected``, a pair; ``margin``, ``score_chosen``, ``score_rejected`` may
                be there
                ``chosen`` and ``rejected`` as whole message lists, with or without a ``prompt`` that repeats theirs
                ``chosen`` and ``rejected`` as whole texts of the hh-rlhf form (`dialogues`)
judged          a demonstration with ``label``: true, thumb up, or false
prompts         ``prompt``
==============  ======================================================================================================

A prompt is a message list, or a string: one user turn, unless it begins with ``"\n\nHuman:"`` and so is of the hh-rlhf
form. Its last turn asks. An answer is a string or a message list of one assistant turn. Texts are kept as written,
those of the hh-rlhf form without the white space around them. A null is as good as nothing. Where ``messages`` stands
beside ``prompt`` or an answer, they must say the same.

Every other field that is a string, a finite number or a boolean goes into ``metadata``: who annotated, how sure, which
subset or domain. So do those of an object ``metadata``. Lists and other objects do not.

A record of the wrong form (a field is missing or of another type, or the record is of two forms) is an error that names
file and line. One whose content is of no use is an `errors.Flaw`: dropped and counted, under the reasons that stand at
each reader; so are ranks and scores that are no such numbers.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

from rlhf_jax.data import dialogues, errors, files

Scalar = str | int | float | bool
Prompted = tuple[dialogues.Turn, ...]

_ANSWERED = {"prompt", "messages", "response", "completion"}
_RANKED = {"prompt", "responses", "ranks", "scores", "margin"}
_PAIR = {"prompt", "chosen", "rejected", "score_chosen", "score_rejected", "margin"}
_ROUNDING = 0.01
"""By so much of the largest of them may a margin and two scores disagree."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Prompt:
    """What is asked."""

    prompt: Prompted
    metadata: Mapping[str, Scalar] = dataclasses.field(default_factory=dict)
    where: str = dataclasses.field(default="", compare=False)
    """File and line; of no account when records are compared."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Demonstration(Prompt):
    """An answer to imitate."""

    response: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class Judged(Demonstration):
    """One answer with a thumb up or down."""

    good: bool


@dataclasses.dataclass(frozen=True, kw_only=True)
class Ranking(Prompt):
    """K answers to one prompt, K >= 2, not all of one rank; the parsers put the best first, ties as they stood."""

    responses: tuple[str, ...]
    ranks: tuple[int, ...]
    """1 or more, lower is better, equal ranks are ties."""
    scores: tuple[float, ...] | None = None
    """Higher is better; where the record had them."""
    margin: float | None = None
    """By how much the first answer of a pair is better, 0 or more; where the record said so, or had scores. None where
    K > 2."""


# ------------------------------------------------------------------------------------------------- one record of each


def parse_demonstration(fields: Mapping[str, Any], *, where: str = "") -> Demonstration:
    """One record out of its fields; see the table of this module."""
    fields = _told(fields)
    prompt, response = _prompt_and_answer(fields)
    return Demonstration(prompt=prompt, response=response, metadata=_metadata(fields, _ANSWERED), where=where)


def parse_judged(fields: Mapping[str, Any], *, where: str = "") -> Judged:
    """One record out of its fields; see the table of this module."""
    fields = _told(fields)
    label = fields.get("label")
    if label is None:
        raise errors.MissingError("label")
    if label not in (False, True):
        raise errors.DataError(f"'label' is {label!r}, not true or false")
    prompt, response = _prompt_and_answer(fields)
    metadata = _metadata(fields, _ANSWERED | {"label"})
    return Judged(prompt=prompt, response=response, good=bool(label), metadata=metadata, where=where)


def parse_prompt(fields: Mapping[str, Any], *, where: str = "") -> Prompt:
    """One record out of its fields; see the table of this module."""
    fields = _told(fields)
    return Prompt(prompt=_prompt(fields), metadata=_metadata(fields, {"prompt"}), where=where)


def parse_ranking(fields: Mapping[str, Any], *, where: str = "") -> Ranking:
    """One record out of its fields; see the table of this module."""
    fields = _told(fields)
    margin = _number(fields, "margin")
    form = _RANKED if "responses" in fields else _PAIR
    if form is _RANKED:
        _one_form(fields, "responses", "chosen", "rejected")
        prompt, responses, ranks, scores = _ranked(fields)
    elif "chosen" in fields and "rejected" in fields:
        prompt, responses = _pair(fields)
        ranks, scores = (1, 2), _pair_scores(fields)
    else:
        raise errors.MissingError("rejected" if "chosen" in fields else "chosen", "responses")
    _check_answers(responses, ranks)
    if len(set(ranks)) == 1:
        raise errors.Flaw("all tied")
    if scores is not None and _disagree(ranks, scores):
        raise errors.Flaw("ranks and scores disagree")
    order = sorted(range(len(ranks)), key=ranks.__getitem__)
    scores = None if scores is None else tuple(scores[i] for i in order)
    return Ranking(
        prompt=prompt,
        responses=tuple(responses[i] for i in order),
        ranks=tuple(ranks[i] for i in order),
        scores=scores,
        margin=_margin(margin, len(ranks), scores),
        metadata=_metadata(fields, form),
        where=where,
    )


def _told(fields: Mapping[str, Any]) -> dict[str, Any]:
    """The fields that say something: a Parquet file has a null in every column that a row does without."""
    return {key: value for key, value in fields.items() if value is not None}


def _metadata(fields: Mapping[str, Any], form: set[str]) -> dict[str, Scalar]:
    others = {key: value for key, value in fields.items() if key not in form}
    if isinstance(given := others.get("metadata"), Mapping):
        others = {key: value for key, value in others.items() if key != "metadata"} | dict(given)
    kept = {}
    for key, value in others.items():
        if isinstance(value, str):
            files.text(value, key)
        # A number that is none (a missing one in a table) or is infinite has no place in JSON.
        if isinstance(value, str | int) or (isinstance(value, float) and math.isfinite(value)):
            kept[files.text(key, "the name of a field")] = value
    return kept


def _one_form(fields: Mapping[str, Any], mine: str, *others: str) -> None:
    for name in others:
        if name in fields:
            raise errors.DataError(f"the record is of two forms: it has {mine!r} and {name!r}")


# -------------------------------------------------------------------------------------------------- prompts and answers


def _prompt(fields: Mapping[str, Any]) -> Prompted:
    if "prompt" not in fields:
        raise errors.MissingError("prompt")
    value = fields["prompt"]
    if isinstance(value, list | Mapping):
        turns = _turns(value, "prompt")
    elif dialogues.is_dialogue(files.text(value, "prompt")):
        turns = dialogues.parse_dialogue(value + "\n\nAssistant:")[:-1]
        if turns[-1] == dialogues.Turn(dialogues.ASSISTANT, ""):  # the text opened the answer itself
            turns = turns[:-1]
    else:
        turns = (dialogues.Turn(dialogues.USER, value),)
    return _asked(turns)


def _asked(turns: Prompted) -> Prompted:
    if (reason := dialogues.unasked(turns)) is not None:
        raise errors.Flaw(reason)
    return turns


def _turns(value: Any, key: str) -> Prompted:
    if isinstance(value, Mapping) and isinstance(value.get("role"), list) and isinstance(value.get("content"), list):
        # The way in which TFDS and Hugging Face keep a list of objects: by column.
        roles, contents = value["role"], value["content"]
        if len(roles) != len(contents):
            raise errors.DataError(f"{key!r} has {len(roles)} roles and {len(contents)} contents")
        value = [{"role": role, "content": content} for role, content in zip(roles, contents)]
    if not isinstance(value, list):
        raise errors.DataError(f"{key!r} is a {type(value).__name__}, not a string or a list of messages")
    turns = []
    for n, message in enumerate(value, start=1):
        if not isinstance(message, Mapping):
            raise errors.DataError(f"message {n} of {key!r} is a {type(message).__name__}, not an object")
        for name in ("role", "content"):
            if name not in message:
                raise errors.DataError(f"message {n} of {key!r} has no {name!r}")
        if message["content"] is None:
            raise errors.Flaw("content is null")
        role = files.text(message["role"], f"role of message {n} of {key}")
        turns.append(dialogues.Turn(role, files.text(message["content"], f"content of message {n} of {key}")))
    return tuple(turns)


def _answer(value: Any, key: str) -> str:
    if value is None:
        raise errors.Flaw("an answer is null")
    if not isinstance(value, list | Mapping):
        return files.text(value, key)
    before, answer = _split(_turns(value, key))
    if before:
        raise errors.DataError(f"{key!r} holds {len(before) + 1} messages, not the answer alone")
    return answer


def _split(turns: Prompted) -> tuple[Prompted, str]:
    if not turns:
        raise errors.Flaw("empty answer")
    if turns[-1].role != dialogues.ASSISTANT:
        raise errors.Flaw("ends in a human turn")
    return dialogues.split_answer(turns)


def _prompt_and_answer(fields: Mapping[str, Any]) -> tuple[Prompted, str]:
    key = next((key for key in ("response", "completion") if key in fields), None)
    if key == "response":
        _one_form(fields, "response", "completion")
    if "messages" in fields:
        prompt, answer = _split(_turns(fields["messages"], "messages"))
        prompt = _asked(prompt)
        if "prompt" in fields and not _repeats(_prompt(fields), prompt):
            raise errors.Flaw("prompts differ")
        if key is not None and _answer(fields[key], key).strip() != answer.strip():
            raise errors.Flaw("answers differ")
    elif key is not None:
        prompt, answer = _prompt(fields), _answer(fields[key], key)
    else:
        raise errors.MissingError("response" if "prompt" in fields else "prompt", "messages")
    if not answer.strip():
        raise errors.Flaw("empty answer")
    return prompt, answer


# ------------------------------------------------------------------------------------------------ pairs and rankings


def _pair(fields: Mapping[str, Any]) -> tuple[Prompted, tuple[str, str]]:
    chosen, rejected = fields["chosen"], fields["rejected"]
    texts = isinstance(chosen, str) and isinstance(rejected, str)
    if texts and dialogues.is_dialogue(chosen) and dialogues.is_dialogue(rejected):
        return _dialogues(fields)
    if texts or not (isinstance(chosen, list | Mapping) and isinstance(rejected, list | Mapping)):
        return _prompt(fields), (_answer(chosen, "chosen"), _answer(rejected, "rejected"))
    (before, better), (other, worse) = (_split(_turns(fields[key], key)) for key in ("chosen", "rejected"))
    if before != other:
        raise errors.Flaw("prompts differ")
    if not before:
        return _prompt(fields), (better, worse)
    if "prompt" in fields and not _repeats(_prompt(fields), before):
        raise errors.Flaw("prompts differ")
    return _asked(before), (better, worse)


def _dialogues(fields: Mapping[str, Any]) -> tuple[Prompted, tuple[str, str]]:
    """A pair of whole dialogues in the hh-rlhf form."""
    chosen, rejected = (dialogues.dialogue_field(fields, key) for key in ("chosen", "rejected"))
    reason = dialogues.flaw(chosen, rejected)
    prompt, answer = chosen[:-1], chosen[-1].text
    if reason is None and "prompt" in fields and not _repeats(_prompt(fields), prompt):
        reason = "prompts differ"
    if reason is not None:
        raise errors.Flaw(reason)
    return prompt, (answer, rejected[-1].text)


def _repeats(prompt: Prompted, before: Prompted) -> bool:
    """Whether a prompt is what stands before the answers: all of it, or the first or last question as a string.

    White space around the texts says nothing: some forms keep it, and others do not.
    """
    prompt, before = _bare(prompt), _bare(before)
    questions = [turn for turn in before if turn.role == dialogues.USER]
    return prompt == before or any(prompt == (question,) for question in (*questions[:1], *questions[-1:]))


def _bare(turns: Prompted) -> Prompted:
    return tuple(dialogues.Turn(turn.role, turn.text.replace("\r\n", "\n").strip()) for turn in turns)


def _ranked(fields: Mapping[str, Any]) -> tuple[Prompted, tuple[str, ...], tuple[int, ...], tuple[float, ...] | None]:
    prompt = _prompt(fields)
    responses = tuple(_answer(value, "responses") for value in _list(fields, "responses"))
    if len(responses) < 2:
        raise errors.Flaw("fewer than two answers")
    ranks, scores = (_list(fields, key) if key in fields else None for key in ("ranks", "scores"))
    if ranks is None and scores is None:
        raise errors.MissingError("ranks", "scores")
    if scores is not None:
        if len(scores) != len(responses):
            raise errors.Flaw("scores and answers differ in number")
        scores = tuple(_score(score) for score in scores)
    if ranks is None:
        assert scores is not None
        places = {score: place for place, score in enumerate(sorted(set(scores), reverse=True), start=1)}
        return prompt, responses, tuple(places[score] for score in scores), scores
    if len(ranks) != len(responses):
        raise errors.Flaw("ranks and answers differ in number")
    return prompt, responses, tuple(_rank(rank) for rank in ranks), scores


def _list(fields: Mapping[str, Any], key: str) -> list[Any]:
    if not isinstance(fields[key], list):
        raise errors.DataError(f"{key!r} is a {type(fields[key]).__name__}, not a list")
    return fields[key]


def _check_answers(responses: Sequence[str], ranks: Sequence[int]) -> None:
    texts = [text.strip() for text in responses]
    if not all(texts):
        raise errors.Flaw("empty answer")
    rank_of: dict[str, int] = {}
    if any(rank_of.setdefault(text, rank) != rank for text, rank in zip(texts, ranks)):
        raise errors.Flaw("same answer twice")


def _rank(value: Any) -> int:
    if not _is_number(value) or value != int(value) or value > 2**31 - 1:
        raise errors.Flaw("rank is no whole number")
    if value < 1:
        raise errors.Flaw("rank below 1")
    return int(value)


def _score(value: Any) -> float:
    if not _is_number(value):
        raise errors.Flaw("score is no finite number")
    return float(value)


def _is_number(value: Any) -> bool:
    """Whether a value is a number that a float can hold; true and false are none."""
    try:
        return not isinstance(value, bool) and isinstance(value, int | float) and math.isfinite(value)
    except OverflowError:
        return False


def _number(fields: Mapping[str, Any], key: str) -> float | None:
    if key not in fields:
        return None
    if isinstance(fields[key], bool) or not isinstance(fields[key], int | float):
        raise errors.DataError(f"{key!r} is a {type(fields[key]).__name__}, not a number")
    return _score(fields[key])


def _pair_scores(fields: Mapping[str, Any]) -> tuple[float, float] | None:
    chosen, rejected = (_number(fields, key) for key in ("score_chosen", "score_rejected"))
    return None if chosen is None or rejected is None else (chosen, rejected)


def _disagree(ranks: Sequence[int], scores: Sequence[float]) -> bool:
    return any(a < b and x < y for a, x in zip(ranks, scores) for b, y in zip(ranks, scores))


def _margin(margin: float | None, answers: int, scores: Sequence[float] | None) -> float | None:
    """The margin of a ranking whose best answer stands first, out of what the record says of it and the scores."""
    if answers > 2:
        if margin is not None:
            raise errors.Flaw("margin of more than two answers")
        return None
    if margin is not None and margin < 0:
        raise errors.Flaw("margin below 0")
    if scores is None:
        return margin
    difference = scores[0] - scores[1]
    if not math.isfinite(difference):
        raise errors.Flaw("score is no finite number")
    if margin is None:
        return difference
    if abs(margin - difference) > _ROUNDING * max(margin, *map(abs, scores)):
        raise errors.Flaw("margin and scores disagree")
    return margin
