"""Distils a teacher with a prompt into a student without it (context distillation, Bai et al. 2022, A.1).

    python experiments/distill.py                            the built-in world
    python experiments/distill.py --preset smoke             all stages, too short to learn much
    python experiments/distill.py --model MODEL --data.path FILE --prompt TEXT
                                                             your own model and data; other settings apply, which --help
                                                             shows if it follows --model
    python experiments/distill.py --resume runs/NAME         resume an interrupted run

A model of the built-in world is fine-tuned on flawless answers to questions after a prompt, and on ordinary answers to
questions without it. It is the teacher. For each row of dialogues and pretraining text, its 50 most likely tokens at
every position after the prompt are saved in a file. The student starts from the same parameters and learns to predict
the same distributions without the prompt.

The results are the KL from the teacher with the prompt to the student without it, per token of the teacher's answers to
held-out questions, and the gold utility of both and of the teacher without the prompt. With the default settings, the
KL falls from about 0.14 to about 0.01 nats per token.

The run folder contains results.json, report.html, config.json, metrics.jsonl, tensorboard/, checkpoints/,
teacher.array_record and model/, the student in Hugging Face format.

The run takes at most 6 minutes on two CPU cores.
"""

from __future__ import annotations

from typing import Any

from distillation import distill_settings
from distillation.distill_settings import OwnDistillSettings, WorldDistillSettings
from finetune import preference_settings
from launch import command_line, process_setup
from launch.settings import peek

OWN = """Distils a teacher into a student of your own, on your own text (Bai et al. 2022, A.1).

    python experiments/distill.py --model MODEL --prompt FILE_OR_TEXT --data.path FILE
                                                             context distillation: MODEL learns to behave without the
                                                             prompt as it does with it
    python experiments/distill.py --model MODEL --teacher TEACHER --data.path FILE
                                                             knowledge distillation from a larger model
    python experiments/distill.py --model MODEL --teacher TEACHER --prompt FILE_OR_TEXT --data.path FILE
                                                             both
    python experiments/distill.py --model MODEL --teacher-file FILE
                                                             another student of the same teacher
    python experiments/distill.py --model MODEL --prompt TEXT --data.path FILE --data.pretraining FILE
                                                             half of the rows are pretraining text (--mix)
    python experiments/distill.py --resume runs/NAME         resume an interrupted run

MODEL and TEACHER are folders in Hugging Face format or output folders of earlier commands, with the same tokenizer. The
dialogues have any of the forms of docs/data.md. The teacher reads the prompt and then each row: a dialogue, or
pretraining text after the start of a user turn. Its --k most likely tokens at every position after the prompt are
saved in a file (--teacher-file), which students of other sizes can use. The student learns to predict these tokens,
and the total probability of all others, without the prompt. Without --model, distill.py trains both models in the
built-in world; --help shows the settings of these runs if it does not follow --model.

The run folder contains model/, in Hugging Face format with its tokenizer, results.json (the KL from the teacher on
held-out rows, before and after), report.html, config.json, metrics.jsonl, tensorboard/, checkpoints/ and, without
--teacher-file, teacher.array_record. Other commands accept the run folder as their --model.
"""


def parse(arguments: list[str]) -> Any:
    """Parses the command line; raises SettingError for invalid settings."""
    kinds: Any = {"own": OwnDistillSettings, "world": WorldDistillSettings}
    if preference_settings.is_own(arguments, None, needed=("--model",), **kinds):
        settings = command_line.parse_stage(OwnDistillSettings, arguments, doc=OWN)
        settings = distill_settings.resolve(settings)
        distill_settings.check_own(settings)
        return settings
    preset = distill_settings.preset(peek(arguments, "--preset") or "default")
    check = distill_settings.check_world
    return command_line.parse_stage(WorldDistillSettings, arguments, doc=__doc__, check=check, preset=preset)


if __name__ == "__main__":
    command_line.answer_help(parse)
    process_setup.use_huge_pages()

from distillation import distilled_world, student_training
from launch import entry_point


def run(settings: Any) -> dict[str, Any]:
    """Runs all stages and returns the contents of results.json."""
    if isinstance(settings, OwnDistillSettings):
        return student_training.run(settings)
    return distilled_world.run(settings)


def main(arguments: list[str] | None = None) -> None:
    """Runs the command."""
    entry_point.execute(run, parse, arguments)


if __name__ == "__main__":
    main()
