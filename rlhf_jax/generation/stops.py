"""Stop strings, which end a response in the compiled loop and are trimmed from its text on the host.

Different token sequences can spell the same string, and a string can begin or end inside a token. The compiled loop
stops only at the most common tokenizations of a stop string, those with and without a leading space. This saves time
but can miss a stop string; trimming the text afterwards gives the exact result::

    sampling = Sampling(stop_sequences=stops.sequences(encode, ["\\n\\nHuman:"]))
    ...
    text, stop = stops.trim(tokenizer.decode(ids), ["\\n\\nHuman:"])
"""

from __future__ import annotations

from collections.abc import Callable, Sequence


def sequences(encode: Callable[[str], Sequence[int]], strings: Sequence[str]) -> tuple[tuple[int, ...], ...]:
    """Converts stop strings to ``Sampling.stop_sequences``: each string is tokenized with and without a leading space.

    ``encode`` must return the ids of a text without special tokens. Raises ``ValueError`` for an empty string.

    Example:
        >>> from rlhf_jax.generation import stops
        >>> stops.sequences(lambda text: [ord(c) for c in text], ["\\n\\n"])
        ((10, 10), (32, 10, 10))
    """
    unique: dict[tuple[int, ...], None] = {}
    for string in strings:
        if not string:
            raise ValueError("a stop string is empty, which would end every response")
        for spelled in (string, " " + string):
            ids = tuple(int(token) for token in encode(spelled))
            if ids:
                unique[ids] = None
    return tuple(unique)


def trim(text: str, strings: Sequence[str]) -> tuple[str, str | None]:
    """Returns the text before the first stop string and the stop string itself, or ``(text, None)`` if there is none.

    If several stop strings begin at the same position, the longest is returned.

    Example:
        >>> from rlhf_jax.generation import stops
        >>> stops.trim("Paris.\\n\\nHuman: thanks", ["\\n\\nHuman:"])
        ('Paris.', '\\n\\nHuman:')
    """
    places = [(text.find(string), -len(string), string) for string in strings if string and string in text]
    if not places:
        return text, None
    start, _, string = min(places)
    return text[:start], string
