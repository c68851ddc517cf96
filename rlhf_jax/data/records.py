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
form. An answer is a string or a message list of one assistant turn. Texts are kept as written. A null is as good as
nothing.

Every other field that is a string, a number or a boolean goes into ``metadata``: who annotated, how sure, which subset
or domain. So do those of an object ``metadata``. Lists and other objects do not.

A record of the wrong form (a field is missing or of another type) is an error that names file and line. One whose
content is of no use is a `Flaw`: dropped and counted, under the reasons that stand at each reader.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

from rlhf_jax.data import dialogues, errors, files

Scalar = str | int | float | bool
Prompted = tuple[dialogues.Turn, ...]

_HUMAN = "\n\nHuman:"
_FORM = {"prompt", "messages", "response", "completion", "responses", "ranks", "scores", "metadata"}
_FORM |= {"chosen", "rejected", "margin", "score_chosen", "score_rejected"}


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
    """K answers to one prompt, K >= 2, not all of one rank; a pair has the chosen answer first."""

    responses: tuple[str, ...]
    ranks: tuple[int, ...]
    """1 or more, lower is better, equal ranks are ties."""
    scores: tuple[float, ...] | None = None
    """Higher is better; where the record had them."""
    margin: float | None = None
    """By how much the first answer of a pair is better, 0 or more; where the record said so, or had scores."""


class Flaw(Exception):
    """Why a record is dropped, in the words it is counted under."""


class MissingError(errors.DataError):
    """A record has none of some fields."""

    def __init__(self, *names: str) -> None:
        """The first of ``names`` is the one to be missed most."""
        others = " or ".join(map(repr, names[1:]))
        super().__init__(f"the record has no {names[0]!r}" + (f", and no {others} either" if others else ""))
        self.names = names


# ------------------------------------------------------------------------------------------------- one record of each


def parse_demonstration(fields: Mapping[str, Any], *, where: str = "") -> Demonstration:
    """One record out of its fields; see the table of this module."""
    fields = _told(fields)
    prompt, response = _prompt_and_answer(fields)
    return Demonstration(prompt=prompt, response=response, metadata=_metadata(fields), where=where)


def parse_judged(fields: Mapping[str, Any], *, where: str = "") -> Judged:
    """One record out of its fields; see the table of this module."""
    fields = _told(fields)
    label = fields.get("label")
    if label is None:
        raise MissingError("label")
    if label not in (False, True):
        raise errors.DataError(f"'label' is {label!r}, not true or false")
    prompt, response = _prompt_and_answer(fields)
    metadata = _metadata({key: value for key, value in fields.items() if key != "label"})
    return Judged(prompt=prompt, response=response, good=bool(label), metadata=metadata, where=where)


def parse_prompt(fields: Mapping[str, Any], *, where: str = "") -> Prompt:
    """One record out of its fields; see the table of this module."""
    fields = _told(fields)
    return Prompt(prompt=_prompt(fields), metadata=_metadata(fields), where=where)


def parse_ranking(fields: Mapping[str, Any], *, where: str = "") -> Ranking:
    """One record out of its fields; see the table of this module."""
    fields = _told(fields)
    margin = _number(fields, "margin")
    if "responses" in fields:
        prompt, responses, ranks, scores = _ranked(fields)
    elif "chosen" in fields and "rejected" in fields:
        prompt, responses = _pair(fields)
        ranks, scores = (1, 2), _pair_scores(fields)
        if margin is None and scores is not None:
            margin = scores[0] - scores[1]
    else:
        raise MissingError("rejected" if "chosen" in fields else "chosen", "responses")
    _check_answers(responses)
    if len(set(ranks)) == 1:
        raise Flaw("all tied")
    if scores is not None and _disagree(ranks, scores):
        raise Flaw("ranks and scores disagree")
    if margin is not None and margin < 0:
        raise Flaw("margin below 0")
    return Ranking(
        prompt=prompt,
        responses=responses,
        ranks=ranks,
        scores=scores,
        margin=margin,
        metadata=_metadata(fields),
        where=where,
    )


def _told(fields: Mapping[str, Any]) -> dict[str, Any]:
    """The fields that say something: a Parquet file has a null in every column that a row does without."""
    return {key: value for key, value in fields.items() if value is not None}


def _metadata(fields: Mapping[str, Any]) -> dict[str, Scalar]:
    given = fields.get("metadata")
    others = {key: value for key, value in fields.items() if key not in _FORM}
    if isinstance(given, Mapping):
        others |= given
    return {key: value for key, value in others.items() if isinstance(value, str | int | float)}


# -------------------------------------------------------------------------------------------------- prompts and answers


def _prompt(fields: Mapping[str, Any]) -> Prompted:
    if "prompt" not in fields:
        raise MissingError("prompt")
    value = fields["prompt"]
    if isinstance(value, list | Mapping):
        turns = _turns(value, "prompt")
    elif files.text(value, "prompt").startswith(_HUMAN):
        opened = value if value.rstrip().endswith("\n\nAssistant:") else value + "\n\nAssistant:"
        turns = dialogues.parse_dialogue(opened)[:-1]
    else:
        turns = (dialogues.Turn(dialogues.USER, value),)
    return _asked(turns)


def _asked(turns: Prompted) -> Prompted:
    if not any(turn.text.strip() for turn in turns):
        raise Flaw("empty prompt")
    return turns


def _turns(value: Any, key: str) -> Prompted:
    if isinstance(value, Mapping) and isinstance(value.get("role"), list) and isinstance(value.get("content"), list):
        # The way in which TFDS and Hugging Face keep a list of objects: by column.
        value = [{"role": role, "content": content} for role, content in zip(value["role"], value["content"])]
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
            raise Flaw("content is null")
        role = files.text(message["role"], f"role of message {n} of {key}")
        turns.append(dialogues.Turn(role, files.text(message["content"], f"content of message {n} of {key}")))
    return tuple(turns)


def _answer(value: Any, key: str) -> str:
    if value is None:
        raise Flaw("an answer is null")
    if not isinstance(value, list | Mapping):
        return files.text(value, key)
    before, answer = _split(_turns(value, key))
    if before:
        raise errors.DataError(f"{key!r} holds {len(before) + 1} messages, not the answer alone")
    return answer


def _split(turns: Prompted) -> tuple[Prompted, str]:
    if not turns:
        raise Flaw("empty answer")
    if turns[-1].role != dialogues.ASSISTANT:
        raise Flaw("ends in a human turn")
    return dialogues.split_answer(turns)


def _prompt_and_answer(fields: Mapping[str, Any]) -> tuple[Prompted, str]:
    key = next((key for key in ("response", "completion") if key in fields), None)
    if key is not None:
        prompt, answer = _prompt(fields), _answer(fields[key], key)
    elif "messages" in fields:
        prompt, answer = _split(_turns(fields["messages"], "messages"))
        prompt = _asked(prompt)
    else:
        raise MissingError("response" if "prompt" in fields else "prompt", "messages")
    if not answer.strip():
        raise Flaw("empty answer")
    return prompt, answer


# ------------------------------------------------------------------------------------------------ pairs and rankings


def _pair(fields: Mapping[str, Any]) -> tuple[Prompted, tuple[str, str]]:
    chosen, rejected = fields["chosen"], fields["rejected"]
    texts = isinstance(chosen, str) and isinstance(rejected, str)
    if texts and ("prompt" not in fields or (chosen.startswith(_HUMAN) and rejected.startswith(_HUMAN))):
        return _dialogues(fields)
    if texts or not (isinstance(chosen, list | Mapping) and isinstance(rejected, list | Mapping)):
        return _prompt(fields), (_answer(chosen, "chosen"), _answer(rejected, "rejected"))
    (before, better), (other, worse) = (_split(_turns(fields[key], key)) for key in ("chosen", "rejected"))
    if before != other:
        raise Flaw("prompts differ")
    if not before:
        return _prompt(fields), (better, worse)
    if "prompt" in fields and not _repeats(_prompt(fields), before):
        raise Flaw("prompts differ")
    return _asked(before), (better, worse)


def _dialogues(fields: Mapping[str, Any]) -> tuple[Prompted, tuple[str, str]]:
    """A pair of whole dialogues in the hh-rlhf form."""
    try:
        chosen, rejected = (dialogues.dialogue_field(fields, key) for key in ("chosen", "rejected"))
    except errors.DataError as error:
        told = "" if "prompt" in fields else "the record has no 'prompt', and "
        raise errors.DataError(f"{told}{error}") from None
    reason = dialogues.flaw(chosen, rejected)
    prompt, answer = chosen[:-1], chosen[-1].text
    if reason is None and "prompt" in fields and not _repeats(_prompt(fields), prompt):
        reason = "prompts differ"
    if reason is not None:
        raise Flaw(reason)
    return prompt, (answer, rejected[-1].text)


def _repeats(prompt: Prompted, before: Prompted) -> bool:
    """Whether a prompt is what stands before the answers: all of it, or the first or last question as a string."""
    questions = [turn for turn in before if turn.role == dialogues.USER]
    return prompt == before or any(prompt == (question,) for question in (*questions[:1], *questions[-1:]))


def _ranked(fields: Mapping[str, Any]) -> tuple[Prompted, tuple[str, ...], tuple[int, ...], tuple[float, ...] | None]:
    prompt = _prompt(fields)
    responses = tuple(_answer(value, "responses") for value in _list(fields, "responses"))
    if len(responses) < 2:
        raise Flaw("fewer than two answers")
    ranks, scores = (_list(fields, key) if key in fields else None for key in ("ranks", "scores"))
    if ranks is None and scores is None:
        raise MissingError("ranks", "scores")
    if scores is not None:
        if len(scores) != len(responses):
            raise Flaw("scores and answers differ in number")
        scores = tuple(_score(score) for score in scores)
    if ranks is None:
        assert scores is not None
        places = {score: place for place, score in enumerate(sorted(set(scores), reverse=True), start=1)}
        return prompt, responses, tuple(places[score] for score in scores), scores
    if len(ranks) != len(responses):
        raise Flaw("ranks and answers differ in number")
    return prompt, responses, tuple(_rank(rank) for rank in ranks), scores


def _list(fields: Mapping[str, Any], key: str) -> list[Any]:
    if not isinstance(fields[key], list):
        raise errors.DataError(f"{key!r} is a {type(fields[key]).__name__}, not a list")
    return fields[key]


def _check_answers(responses: Sequence[str]) -> None:
    texts = [text.strip() for text in responses]
    if not all(texts):
        raise Flaw("empty answer")
    if len(set(texts)) < len(texts):
        raise Flaw("same answer twice")


def _rank(value: Any) -> int:
    if not _is_number(value) or value != int(value) or value > 2**31 - 1:
        raise Flaw("rank is no whole number")
    if value < 1:
        raise Flaw("rank below 1")
    return int(value)


def _score(value: Any) -> float:
    if not _is_number(value):
        raise Flaw("score is no finite number")
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
