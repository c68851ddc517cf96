"""Settings of a judge, a model that compares answers. The docstring of a field is its help text."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Sequence
from typing import Any, Literal

from launch.run_settings import SettingError
from launch.setting_checks import require

from constitution.constitution_settings import PRINCIPLES


@dataclasses.dataclass(frozen=True, kw_only=True)
class JudgeSettings:
    """The judge, and how it is asked."""

    judge: str | None = None
    """The judge: a folder in Hugging Face format, or the address of an interface of OpenAI's form, such as
    http://localhost:8000/v1."""
    judge_model: str | None = None
    """Name of the model at an address."""
    key_variable: str = "OPENAI_API_KEY"
    """Environment variable with the key for an address. It is not saved."""
    think_tokens: int = 0
    """Maximum number of tokens of the judge's chain of thought, with an address; 0 for none. Use --clamp too."""
    clamp: tuple[float, float] = (0.0, 1.0)
    """Bounds of the judge's probabilities, such as 0.4 0.6 after a chain of thought."""
    principles: int = PRINCIPLES
    """Number of principles of harmlessness, of which one is sampled for each comparison and each revision."""
    few_shot: bool = True
    """Show two examples before each request and question."""
    style: Literal["chat", "text"] | None = None
    """Whether requests to models in folders are user turns of a chat or plain text, which suits base models. None is
    `chat` if the tokenizer has a chat template."""
    max_requests: int | None = None
    """Maximum number of requests to each model, about held-out and other pairs together, that this process makes. None
    for no limit. --resume makes the others."""


def is_address(text: str | None) -> bool:
    """Returns whether a setting is the address of a server."""
    return text is not None and text.startswith(("http://", "https://"))


def check(settings: Any, servers: Sequence[str]) -> None:
    """Raises SettingError for the first setting that is out of range; ``servers`` are the addresses that are used."""
    require(1 <= settings.principles <= PRINCIPLES, settings, "principles", f"from 1 to {PRINCIPLES}")
    require(settings.max_requests is None or settings.max_requests >= 1, settings, "max_requests", "at least 1")
    require(settings.think_tokens >= 0, settings, "think_tokens", "at least 0")
    low, high = settings.clamp
    require(0 <= low <= 0.5 <= high <= 1, settings, "clamp", "two numbers from 0 to 1 around 0.5")
    if servers and settings.judge_model is None:
        raise SettingError(f"--judge-model is missing; give the name of the model at {servers[0]}")


def server_key(settings: JudgeSettings) -> str | None:
    """Returns the key of the server; None if the environment has none."""
    return os.environ.get(settings.key_variable)
