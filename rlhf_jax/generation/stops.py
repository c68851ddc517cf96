"""Stop strings. Tokens are watched inside the compiled loop, text is trimmed on the host.

A string can be spelled in more than one way by tokens, and can begin or end inside one. The loop watches for the usual
spellings, which saves the tokens behind them; what decides is the text::

    sampling = Sampling(stop_sequences=stops.sequences(encode, ["\\n\\nHuman:"]))
    ...
    text, found = stops.trim(tokenizer.decode(ids), ["\\n\\nHuman:"])
"""

from __future__ import annotations

from collections.abc import Callable, Sequence


def sequences(encode: Callable[[str], Sequence[int]], strings: Sequence[str]) -> tuple[tuple[int, ...], ...]:
    """Token sequences for ``Sampling.stop_sequences``: each string as ``encode`` spells it, alone and after a space.

    ``encode`` gives the ids of a text without special tokens. Raises ``ValueError`` for an empty string.
    """
    found: dict[tuple[int, ...], None] = {}
    for string in strings:
        if not string:
            raise ValueError("an empty stop string would stop everything")
        for spelled in (string, " " + string):
            ids = tuple(int(token) for token in encode(spelled))
            if ids:
                found[ids] = None
    return tuple(found)


def trim(text: str, strings: Sequence[str]) -> tuple[str, str | None]:
    """The text before the first of ``strings`` in it, and which one that was; all of it and None where none is there.

    Of several that begin at the same place, the longest is named.
    """
    places = [(text.find(string), -len(string), string) for string in strings if string and string in text]
    if not places:
        return text, None
    start, _, string = min(places)
    return text[:start], string
