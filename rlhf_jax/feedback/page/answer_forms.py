"""Forms of the labelling page: what they send, and the judgement that it means."""

from __future__ import annotations

import math
from collections.abc import Mapping
from urllib.parse import parse_qsl

from rlhf_jax.feedback import judgements

LETTERS = "ABCDEFGHI"
"""Names of the answers, in the order in which they are shown."""
DEGREES = ("much", "clearly", "somewhat", "slightly", "slightly", "somewhat", "clearly", "much")
"""Meanings of the strengths of a preference."""
MAX_COMMENT = 10_000
"""Number of characters of a comment."""
MAX_SECONDS = 86400.0


def fields(body: bytes) -> dict[str, str]:
    """Parses the body of a form; raises ValueError if it is malformed or a field is repeated."""
    found = parse_qsl(
        body.decode("ascii"),
        keep_blank_values=True,
        strict_parsing=bool(body),
        encoding="utf-8",
        errors="strict",
        max_num_fields=64,
    )
    if len({name for name, _ in found}) < len(found):
        raise ValueError("a field is repeated")
    return dict(found)


def judgement(form: Mapping[str, str], *, kind: str, n: int) -> judgements.Judgement:
    """Returns the judgement of a form, about n completions in the order in which they are shown.

    Args:
        form: The field ``answer`` is "tie", "unsure" or, for a pair, the strength from 1 to 8, or, for a single
            completion, the rating from 1 to 7. The fields ``rank-0``, ``rank-1`` and so on are those of a ranking. The
            fields of `judgements.FLAGS`, ``comment`` and ``seconds`` may be missing.
        kind: Kind of the item.
        n: Number of its completions.

    Raises:
        ValueError: The form is no answer about such an item.
    """
    answer = form.get("answer", "")
    said: dict[str, object] = {}
    if kind == judgements.RANKING and answer and any(form.get(f"rank-{place}") for place in range(n)):
        raise ValueError("Choose ranks or “I cannot tell”, not both.")
    if answer in ("tie", "unsure"):
        said[answer] = True
    elif kind == judgements.RANKING:
        said["ranks"] = tuple(
            _number(form.get(f"rank-{place}", ""), f"The rank of answer {LETTERS[place]}", n) for place in range(n)
        )
    elif kind == judgements.PAIR:
        said["strength"] = _number(answer, "The preference", 8)
    else:
        said["rating"] = _number(answer, "The rating", 7)
    if kind == judgements.LIKERT and answer != "unsure":
        said["flags"] = {name: form.get(name) == "yes" for name in judgements.FLAGS}
    found = judgements.Judgement(
        **said,  # type: ignore[arg-type]
        comment=_comment(form.get("comment", "")),
        seconds=_seconds(form.get("seconds", "")),
    )
    judgements.check(found, kind=kind, n=n)
    return found


def reversed_scale(said: judgements.Judgement) -> judgements.Judgement:
    """Converts an answer to the question which completion is worse."""
    return said.in_item_order((1, 0))


def values(said: judgements.Judgement) -> dict[str, str]:
    """Returns the fields of a form that means a judgement in the order in which it is shown."""
    chosen = next((value for value in (said.strength, said.rating) if value is not None), "")
    if said.preference is not None:
        chosen = 1 + round(7 * (1 - said.preference))
    found = {"answer": "tie" if said.tie else "unsure" if said.unsure else str(chosen), "comment": said.comment}
    found |= {f"rank-{place}": str(rank) for place, rank in enumerate(said.ranks or ())}
    return found | {name: "yes" for name, given in said.flags.items() if given}


def describe(said: judgements.Judgement) -> str:
    """Returns a judgement, in the order in which the completions are shown, in words."""
    if said.ranks is not None:
        return ", ".join(f"{letter} {rank}" for letter, rank in zip(LETTERS, said.ranks))
    answer = values(said)["answer"]
    if answer in ("tie", "unsure"):
        return {"tie": "equally good", "unsure": "cannot tell"}[answer]
    if said.rating is not None:
        return f"{said.rating} of 7"
    return f"{'A' if int(answer) <= 4 else 'B'} is {DEGREES[int(answer) - 1]} better"


def _number(text: str, name: str, most: int) -> int:
    if text not in map(str, range(1, most + 1)):
        raise ValueError(f"{name} is missing." if not text else f"{name} must be a number from 1 to {most}.")
    return int(text)


def _comment(text: str) -> str:
    if len(text) > MAX_COMMENT:
        raise ValueError(f"The comment has {len(text)} characters; at most {MAX_COMMENT} are stored.")
    return text.replace("\r\n", "\n").strip()


def _seconds(text: str) -> float | None:
    try:
        seconds = float(text)
    except ValueError:
        return None
    return min(seconds, MAX_SECONDS) if 0 <= seconds < math.inf else None
