"""Runs claims and collects their verdicts in JSON files."""

from __future__ import annotations

import dataclasses
import datetime
import json
import math
import pathlib
import subprocess
from collections.abc import Sequence
from typing import Any

import numpy as np

from claims import runner, verdicts
from claims.claim import Claim, Measured


def decide(claim: Claim, done_S: Sequence[runner.Done], *, seeds: Sequence[int], settings: dict[str, Any]) -> dict:
    """Returns the contents of a claim's JSON file.

    ``value`` and ``ci`` are those of the statistic that decides: the first one with the overall verdict.
    """
    parts = claim.decide([each.measured for each in done_S])
    verdict = verdicts.overall(parts)
    first = next(part for part in parts if part.verdict == verdict)
    return {
        "id": claim.id,
        "paper": claim.paper,
        "claim": claim.claim,
        "published": claim.published,
        "differs": claim.differs,
        "verdict": verdict,
        "statistic": first.statistic,
        "value": _finite(first.value),
        "ci": [_finite(each) for each in first.ci],
        "parts": [
            dataclasses.asdict(part) | {"value": _finite(part.value), "ci": [_finite(each) for each in part.ci]}
            for part in parts
        ],
        "seeds": list(seeds),
        "n_prompts": done_S[0].prompts,
        "seconds": sum(each.seconds for each in done_S),
        "shared_seconds": sum(each.shared_seconds for each in done_S),
        "settings": settings,
        "date": datetime.date.today().isoformat(),
        "commit": commit(),
    }


def _finite(x: float) -> float | None:
    return float(x) if math.isfinite(x) else None


def commit() -> str | None:
    """Returns the commit of the source, with ``+`` if files have changed since; None outside a git repository."""
    folder = pathlib.Path(__file__).parent

    def git(*arguments: str) -> str:
        return subprocess.run(["git", *arguments], cwd=folder, capture_output=True, text=True, check=True).stdout

    try:
        return git("rev-parse", "--short=10", "HEAD").strip() + ("+" if git("status", "--porcelain", "-uno") else "")
    except (OSError, subprocess.CalledProcessError):
        return None


def null_rate(claim: Claim, measured_S: Sequence[Measured], *, shuffles: int, seed: int = 0) -> float:
    """Returns how often a claim is shown if the arms are exchanged at random within each seed.

    Without a difference between the arms, the labels of the arms are exchangeable.
    """
    rng = np.random.default_rng(seed)
    shown = 0
    for _ in range(shuffles):
        exchanged = [_exchange(measured, rng) for measured in measured_S]
        shown += verdicts.overall(claim.decide(exchanged)) == "shown"
    return shown / shuffles


def _exchange(measured: Measured, rng: np.random.Generator) -> Measured:
    arms = list(measured.values())
    return {name: arms[i] for name, i in zip(measured, rng.permutation(len(arms)), strict=True)}


def read(folder: pathlib.Path) -> list[dict[str, Any]]:
    """Returns the contents of the JSON files of all claims in a folder, by id."""
    return [json.loads(path.read_text()) for path in sorted(folder.glob("C*.json"))]
