"""Settings of constitutional.py with a model and prompts of one's own. The docstring of a field is its help text."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

from finetune import sampling_settings
from launch import config_file, setting_checks
from launch import settings as settings_lib
from launch.run_settings import RunSettings, SettingError
from launch.setting_checks import require

from constitution import judge_settings

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
class OwnConstitutionalSettings(judge_settings.JudgeSettings, sampling_settings.Sampling, RunSettings):
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
    rounds: int = 4
    """Number of revisions of each answer; 0 writes no demonstrations."""
    critique: bool = True
    """Ask for a critique before each revision. --no-critique revises directly."""
    held_out: str | None = None
    """File of pairs with the labels of people, in any of the forms in docs/data.md. The agreement of the judge with
    them is reported before its labels are used."""

    @property
    def spec_name(self) -> str:
        """The settings of sampling on which texts depend, for the keys of stored texts."""
        return f"{self.temperature} {self.top_k} {self.top_p} {self.max_new_tokens} {self.seed} {self.style}"


def is_own(arguments: list[str]) -> bool:
    """Returns whether a command line, or the run that it resumes, has a model and prompts of its own."""
    if resume := settings_lib.peek(arguments, "--resume"):
        return "few_shot" in config_file.read(resume)
    return all(settings_lib.peek(arguments, flag) is not None for flag in ("--model", "--data.path"))


def check(settings: OwnConstitutionalSettings) -> None:
    """Raises SettingError for the first setting that is out of range or has no effect."""
    sampling_settings.check(settings)
    require(settings.n == 1, settings, "n", "left out: two answers are compared and one is revised")
    require(settings.rounds >= 0, settings, "rounds", "at least 0")
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
    servers = [each for each in (settings.judge, settings.editor) if each and judge_settings.is_address(each)]
    judge_settings.check(settings, servers)
    unused: list[tuple[tuple[str, ...], str]] = [
        (("saves", "max_skipped", "log"), "with --model, which is not trained")
    ]
    if not servers:
        unused.append((("judge_model", "key_variable"), "without an address in --judge or --editor"))
    if not judge_settings.is_address(settings.judge):
        unused.append((("think_tokens",), "without an address in --judge"))
    if settings.judge is None:
        unused.append((("clamp", "held_out"), "without --judge"))
    if settings.rounds == 0:
        unused.append((("editor", "critique"), "with --rounds 0"))
    setting_checks.refuse_changed(settings, default, unused)
