"""Settings of constitutional.py with a model and prompts of one's own. The docstring of a field is its help text."""

from __future__ import annotations

import dataclasses
import os
from typing import ClassVar, Literal

from finetune import sampling_settings
from launch import config_file, setting_checks
from launch import settings as settings_lib
from launch.run_settings import RunSettings, SettingError
from launch.setting_checks import require

from constitution.constitution_settings import PRINCIPLES

OWN = """Writes demonstrations and comparisons with feedback of a model (Bai et al. 2022, Constitutional AI).

    python experiments/constitutional.py --model MODEL --data.path PROMPTS --judge JUDGE
    python experiments/constitutional.py --model MODEL --data.path PROMPTS --judge http://localhost:8000/v1 \\
        --judge-model NAME                                          a judge behind an interface of OpenAI's form
    python experiments/constitutional.py --resume runs/NAME         resume an interrupted run

--model answers each prompt twice at --temperature. The first answer is criticised and revised --rounds times by
--editor, each time by a principle that is sampled from 16. The two answers are compared by --judge, in both orders, by
sampled principles. The run folder then contains

    demonstrations.jsonl    the revisions of all rounds; train SL-CAI on them with sft.py
    comparisons.jsonl       pairs with the judge's probability as `preference`; train on them with reward_model.py
    results.json, report.html, config.json, samples.jsonl, revisions.jsonl and labels.jsonl

To compare answers of SL-CAI, as in the paper, run the command again with its folder as --model and with --rounds 0.
With --held-out, the agreement of the judge with the labels of people is reported before its labels are used.
"""


@dataclasses.dataclass(frozen=True)
class PromptFile:
    """The red-team prompts."""

    path: str
    """JSONL, JSON (also compressed) or Parquet file with prompts in any of the forms in docs/data.md."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class OwnConstitutionalSettings(sampling_settings.Sampling, RunSettings):
    """Settings of constitutional.py with --model and --data.path."""

    command: ClassVar[str] = "constitutional"
    inputs: ClassVar[tuple[str, ...]] = ("model", "data.path", "held_out")

    model: str
    """The helpful-only model: a folder in Hugging Face format, or the output folder of an earlier command."""
    data: PromptFile
    judge: str | None = None
    """The judge: a folder in Hugging Face format, or the address of an interface of OpenAI's form, such as
    http://localhost:8000/v1. None writes no comparisons."""
    editor: str | None = None
    """The model that criticises and revises, a folder or an address as for --judge. None is --model."""
    judge_model: str | None = None
    """Name of the model at the address of --judge or --editor."""
    key_variable: str = "OPENAI_API_KEY"
    """Environment variable with the key for an address. It is not saved."""
    think_tokens: int = 0
    """Maximum number of tokens of the judge's chain of thought, with an address; 0 for none. Use --clamp too."""
    clamp: tuple[float, float] = (0.0, 1.0)
    """Bounds of the judge's probabilities, such as 0.4 0.6 after a chain of thought."""
    rounds: int = 4
    """Number of revisions of each answer; 0 writes no demonstrations."""
    critique: bool = True
    """Ask for a critique before each revision. --no-critique revises directly."""
    principles: int = PRINCIPLES
    """Number of principles, of which one is sampled for each revision and each comparison."""
    few_shot: bool = True
    """Show two examples before each request and question."""
    style: Literal["chat", "text"] | None = None
    """Whether requests to models in folders are user turns of a chat or plain text, which suits base models. None is
    `chat` if the tokenizer has a chat template."""
    held_out: str | None = None
    """File of pairs with the labels of people, in any of the forms in docs/data.md. The agreement of the judge with
    them is reported before its labels are used."""
    max_requests: int | None = None
    """Maximum number of requests to the editor, and of questions to the judge about held-out and other pairs together,
    that this process makes. None for no limit. --resume makes the others."""

    @property
    def spec_name(self) -> str:
        """The settings of sampling on which texts depend, for the keys of stored texts."""
        return f"{self.temperature} {self.top_k} {self.top_p} {self.max_new_tokens} {self.seed} {self.style}"


def is_own(arguments: list[str]) -> bool:
    """Returns whether a command line, or the run that it resumes, has a model and prompts of its own."""
    if resume := settings_lib.peek(arguments, "--resume"):
        return "few_shot" in config_file.read(resume)
    return all(settings_lib.peek(arguments, flag) is not None for flag in ("--model", "--data.path"))


def is_address(text: str | None) -> bool:
    """Returns whether a setting is the address of a server."""
    return text is not None and text.startswith(("http://", "https://"))


def check(settings: OwnConstitutionalSettings) -> None:
    """Raises SettingError for the first setting that is out of range or has no effect."""
    sampling_settings.check(settings)
    require(settings.n == 1, settings, "n", "left out: two answers are compared and one is revised")
    require(settings.rounds >= 0, settings, "rounds", "at least 0")
    require(1 <= settings.principles <= PRINCIPLES, settings, "principles", f"from 1 to {PRINCIPLES}")
    require(settings.max_requests is None or settings.max_requests >= 1, settings, "max_requests", "at least 1")
    require(settings.think_tokens >= 0, settings, "think_tokens", "at least 0")
    low, high = settings.clamp
    require(0 <= low <= 0.5 <= high <= 1, settings, "clamp", "two numbers from 0 to 1 around 0.5")
    if settings.rounds == 0 and settings.judge is None:
        raise SettingError("--rounds is 0 and there is no --judge, so there is nothing to write; give one of them")
    default = dataclasses.replace(
        settings,
        **{
            field.name: field.default
            for field in dataclasses.fields(settings)
            if field.default is not dataclasses.MISSING
        },
    )
    servers = [each for each in (settings.judge, settings.editor) if is_address(each)]
    if servers and settings.judge_model is None:
        raise SettingError(f"--judge-model is missing; give the name of the model at {servers[0]}")
    unused: list[tuple[tuple[str, ...], str]] = [
        (("saves", "max_skipped", "log"), "with --model, which is not trained")
    ]
    if not servers:
        unused.append((("judge_model", "key_variable"), "without an address in --judge or --editor"))
    if not is_address(settings.judge):
        unused.append((("think_tokens",), "without an address in --judge"))
    if settings.judge is None:
        unused.append((("clamp", "held_out"), "without --judge"))
    if settings.rounds == 0:
        unused.append((("editor", "critique"), "with --rounds 0"))
    setting_checks.refuse_changed(settings, default, unused)


def server_key(settings: OwnConstitutionalSettings) -> str | None:
    """Returns the key of the server; None if the environment has none."""
    return os.environ.get(settings.key_variable)
