"""Settings of distill.py and their checks. This module imports neither JAX nor the library."""

from __future__ import annotations

import dataclasses
import math
import pathlib
from typing import Any, ClassVar, Literal, NamedTuple

from launch.run_settings import Optimizer, RunSettings, SettingError, StageSettings, is_architecture
from launch.setting_checks import require, value_of
from launch.settings import Net, Pretrain

WORLD_PROMPT = "answer with true facts and be good ."
"""The default prompt in the built-in world, in its words."""
_POSITIVE = (
    *("net.layers", "net.width", "net.heads", "net.mlp", "pretrain.documents", "pretrain.steps", "pretrain.batch"),
    *("pretrain.learning_rate", "teacher.demonstrations", "teacher.epochs", "teacher.learning_rate", "held_out"),
    "rows",
)


@dataclasses.dataclass(frozen=True)
class Text:
    """Text that the teacher reads."""

    path: str | None = None
    """JSONL, JSON (also compressed) or Parquet file of dialogues in any of the forms in docs/data.md. A pattern with *
    selects several files. Not needed if --teacher-file exists."""
    pretraining: str | None = None
    """File of pretraining text, which is placed after the start of a user turn: text with blank lines between documents
    (.txt), or records with a field `text`. None uses dialogues only."""
    max_dropped: float = 0.01
    """Maximum share of unusable records in --data.path. A file with a larger share is refused."""
    held_out: float | None = None
    """Share of the dialogues and of the documents held out to measure the KL before and after training. 0 holds out
    none. None uses 0.05."""
    width: int | None = None
    """Maximum number of tokens in a row, without the prompt. Longer dialogues lose their oldest turns, then the end of
    their answer. None uses the width that holds 99 % of them, at most what student and teacher can read."""


class Kept(NamedTuple):
    """What is kept of the teacher's distributions, and of which rows."""

    k: int = 50
    mix: float = 0.5
    held_out: float = 0.05


@dataclasses.dataclass(frozen=True, kw_only=True)
class OwnDistillSettings(StageSettings):
    """Settings of distill.py with --model."""

    command: ClassVar[str] = "distill"
    inputs: ClassVar[tuple[str, ...]] = ("model", "teacher", "data.path", "data.pretraining")

    model: str
    """The student: a folder in Hugging Face format, the output folder of an earlier command, or the name of an
    architecture (tiny, gpt2, pythia-1b, llama-3-8b) for random weights and the tokenizer of --teacher. Its tokenizer
    must be that of the teacher."""
    teacher: str | None = None
    """Folder of the teacher. None uses the student before training, which --prompt then distinguishes (context
    distillation)."""
    prompt: str | None = None
    """Text that only the teacher reads, before each row, or a file with this text. The spelling of a special token
    becomes this token, so that the text can be a system turn. None is no prompt (knowledge distillation from a larger
    teacher)."""
    teacher_file: str | None = None
    """File of the teacher's distributions. If it exists, it is used, and the settings from which it was made must fit;
    otherwise, it is made there. Students of any size can share it. None makes a file in the run folder."""
    k: int | None = None
    """Number of most likely tokens that are kept at each position. The loss treats all other tokens as one. None uses
    50 or, if --teacher-file exists, its number."""
    mix: float | None = None
    """Share of pretraining text among the rows; the others are dialogues. None uses 0.5."""
    learning_rate: float | None = None
    """Peak learning rate, with a linear warmup over the first tenth of the steps and linear decay to 0. None uses 2e-5
    for a given model, 0.05 times a typical rate of pretraining, 2e-4 with --lora.rank and 1e-3 for random weights."""
    batch: int = 32
    """Number of rows per step."""
    data: Text = dataclasses.field(default_factory=Text)


@dataclasses.dataclass(frozen=True)
class Teacher:
    """Supervised fine-tuning of the built-in world's teacher, with flawless answers after the prompt."""

    demonstrations: int = 3000
    """Number of questions, each with a flawless answer after --prompt and an ordinary one without it."""
    epochs: int = 2
    """Number of passes over the demonstrations."""
    learning_rate: float = 3e-3
    """Peak learning rate, with cosine decay to a tenth."""
    slips: float = 1.0
    """Factor applied to the probability of every flaw in an ordinary answer."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class WorldDistillSettings(Optimizer, RunSettings):
    """Settings of distill.py in the built-in world."""

    command: ClassVar[str] = "distill"

    preset: Literal["default", "smoke"] = "default"
    """`default`, or `smoke`, which runs all stages in seconds, too short to learn much."""
    prompt: str = WORLD_PROMPT
    """Text that only the teacher reads, before each question, in words of the built-in world."""
    k: int = Kept().k
    """Number of most likely tokens that are kept at each position. The loss treats all other tokens as one."""
    mix: float = Kept().mix
    """Share of pretraining text among the rows; the others are dialogues."""
    rows: int = 3000
    """Number of dialogues that the teacher reads, at most --teacher.demonstrations; --mix adds pretraining text."""
    learning_rate: float | None = None
    """Peak learning rate of the student, with linear decay to 0. None uses 0.05 times --pretrain.learning-rate."""
    optimizer: Literal["adamw", "muon", "adafactor", "lion"] = "muon"
    """Optimiser of the student. `muon` trains the kernels of the layers with Muon and the other parameters with
    AdamW."""
    epochs: int = 1
    """Number of passes over the rows."""
    batch: int = 32
    """Number of rows per step of the student."""
    held_out: int = 640
    """Number of held-out questions on which the models are compared."""
    transcripts: int = 12
    """Number of questions for which the report shows all answers."""
    net: Net = dataclasses.field(default_factory=Net)
    pretrain: Pretrain = dataclasses.field(default_factory=Pretrain)
    teacher: Teacher = dataclasses.field(default_factory=Teacher)

    def folder_name(self, kind: str | None = None) -> str:
        """Returns the beginning of the run folder's default name; ``kind`` defaults to the name of the command."""
        return f"{kind or self.command}-{self.preset}-seed-{self.seed}"

    def batches(self) -> dict[str, int]:
        """Returns the numbers of rows that must be multiples of --mesh.data x --mesh.fsdp, by flag or description."""
        return {"--pretrain.batch": self.pretrain.batch, "--batch": self.batch}


SMOKE: dict[str, Any] = {
    "net": Net(layers=1, width=32, mlp=64),
    "pretrain": Pretrain(documents=1500, steps=20, batch=32),
    "teacher": Teacher(demonstrations=320, epochs=1),
    "rows": 160,
    "held_out": 64,
    "transcripts": 4,
}
"""Settings that the smoke preset changes."""


def preset(name: str) -> WorldDistillSettings:
    """Returns the settings of a preset; raises SettingError if it is unknown."""
    if name not in ("default", "smoke"):
        raise SettingError(f"--preset is {name!r}; it must be default or smoke")
    return WorldDistillSettings(preset=name, **(SMOKE if name == "smoke" else {}))


def resolve(settings: OwnDistillSettings) -> OwnDistillSettings:
    """Makes --teacher-file absolute and replaces --prompt by the contents of the file that it names, if it does.

    The settings of a resumed run are those of a command line that has been resolved.
    """
    if settings.teacher_file is not None:
        settings = dataclasses.replace(settings, teacher_file=str(pathlib.Path(settings.teacher_file).absolute()))
    if settings.prompt is None or settings.resume:
        return settings
    try:
        is_file = pathlib.Path(settings.prompt).is_file()
    except (OSError, ValueError):  # too long for the name of a file
        is_file = False
    if is_file:
        try:
            text = pathlib.Path(settings.prompt).read_text(encoding="utf-8")
        except (OSError, ValueError) as error:
            raise SettingError(f"cannot read --prompt {settings.prompt}: {error}") from error
        settings = dataclasses.replace(settings, prompt=text)
    if not settings.prompt:
        raise SettingError("--prompt is empty; give a text or a file with a text")
    return settings


def kept(settings: OwnDistillSettings) -> Kept:
    """Returns the settings of a file that is made, with the defaults of those that are not given."""
    given = {"k": settings.k, "mix": settings.mix, "held_out": settings.data.held_out}
    return Kept(**{name: value for name, value in given.items() if value is not None})


def has_file(settings: OwnDistillSettings) -> bool:
    """Returns whether --teacher-file exists, so that no teacher is needed."""
    return settings.teacher_file is not None and pathlib.Path(settings.teacher_file).exists()


def check_own(settings: OwnDistillSettings) -> None:
    """Raises SettingError, naming the flag, for a setting that is out of range, missing or has no effect."""
    _check_shared(settings)
    if settings.teacher_file is not None and pathlib.Path(settings.teacher_file).is_dir():
        raise SettingError(f"--teacher-file {settings.teacher_file} is a folder; give a file")
    if has_file(settings):
        if settings.data.max_dropped != Text.max_dropped and not settings.resume:
            raise SettingError("--data.max-dropped has no effect with a --teacher-file that exists; leave it out")
        return
    if settings.prompt is None and settings.teacher is None:
        raise SettingError(
            "without --prompt and --teacher, the teacher is the student; give --prompt (context distillation), "
            "--teacher (knowledge distillation) or a --teacher-file that exists"
        )
    if is_architecture(settings.model) and settings.teacher is None:
        raise SettingError(f"--model {settings.model} has random weights; give --teacher, whose tokenizer it gets")
    if settings.data.path is None:
        raise SettingError("--data.path is missing; give a file of dialogues, or a --teacher-file that exists")
    if settings.data.pretraining is None and settings.mix is not None:
        raise SettingError("--mix has no effect without --data.pretraining; leave it out")
    if settings.data.pretraining is not None and settings.mix == 0:
        raise SettingError("--data.pretraining has no effect with --mix 0; leave it out")


def check_world(settings: WorldDistillSettings) -> None:
    """Raises SettingError, naming the flag, for a setting of the built-in world that is out of range."""
    _check_shared(settings)
    for name in _POSITIVE:
        number = value_of(settings, name)
        require(0 < number < math.inf, settings, name, "positive and finite")
    for name in ("pretrain.warmup", "teacher.slips", "transcripts"):
        require(value_of(settings, name) >= 0, settings, name, "at least 0")
    require(settings.held_out >= 2, settings, "held_out", "at least 2, for an interval")
    most = settings.teacher.demonstrations
    require(settings.rows <= most, settings, "rows", f"at most {most}, --teacher.demonstrations")
    width, heads = settings.net.width, settings.net.heads
    requirement = f"such that --net.width {width} is a multiple of twice this number"
    require(width % (2 * heads) == 0, settings, "net.heads", requirement)


def _check_shared(settings: Any) -> None:
    require(settings.k is None or settings.k >= 1, settings, "k", "at least 1")
    require(settings.mix is None or 0 <= settings.mix < 1, settings, "mix", "at least 0 and below 1")
