"""The claims that can be run: all modules of the sub-packages whose names start with ``c`` and a number."""

from __future__ import annotations

import importlib
import pathlib
import re

from claims.claim import Claim

_NAMES = [
    f"claims.{path.parent.name}.{path.stem}"
    for path in pathlib.Path(__file__).parent.glob("*/*.py")
    if re.match(r"c\d", path.stem)
]
_FOUND: list[Claim] = [importlib.import_module(name).CLAIM for name in _NAMES]
CLAIMS: dict[str, Claim] = {claim.id: claim for claim in sorted(_FOUND, key=lambda claim: claim.id)}
