"""Every number among the settings of the commands is checked before anything is loaded, and named by its flag."""

import ast
import dataclasses
import math
import pathlib
import re
from typing import Any

import distill
import dpo
import evaluate
import gate
import instructgpt
import ppo
import pytest
import reward_model
import sample
import sft
import sweep
from launch import command_line, setting_checks
from launch.run_settings import SettingError
from sweeps import frontier_plot, grids

from rlhf_jax import report

COMMANDS = {
    "sft": (sft, ["--model", "tiny", "--data.path", "f"]),
    "reward_model": (reward_model, ["--model", "m", "--data.path", "f"]),
    "reward_model-lora": (reward_model, ["--model", "m", "--data.path", "f", "--lora.rank", "2"]),
    "reward_model-pmp": (
        reward_model,
        ["--model", "m", "--data.path", "f", "--pmp.path", "c", "--pmp.learning-rate", "0.1"],
    ),
    "reward_model-pmp-rate": (
        reward_model,
        ["--model", "m", "--data.path", "f", "--pmp.path", "c", "--pmp.pretraining-rate", "0.1"],
    ),
    "reward_model-world": (reward_model, ["--pmp.prompts", "9"]),
    "reward_model-folds": (reward_model, ["--folds", "2", "--data.path", "f", "--pmp.prompts", "9"]),
    "ppo": (ppo, ["--policy", "p", "--prompts", "f", "--reward-model", "r", "--reward-weights", "1", "--ptx", "f"]),
    "ppo-optional": (
        ppo,
        [
            *("--policy", "p", "--prompts", "f", "--reward", "m:f", "--ppo.kl-target", "6", "--ppo.reward-clip", "5"),
            *("--ppo.missing-stop-score", "-1", "--stop-at-kl", "9", "--ppo.learning-rate", "0.1"),
            *("--ppo.critic-learning-rate", "0.1", "--prompt-width", "9", "--ppo.reference-ema", "0.5"),
            *("--ppo.correct-sampler", "--ppo.top-p", "0.9", "--ppo.top-k", "5", "--critic", "zero-head"),
        ],
    ),
    "dpo": (dpo, ["--model", "m", "--data.path", "f", "--beta", "0.1", "--learning-rate", "0.1"]),
    "dpo-simpo": (dpo, ["--model", "m", "--data.path", "f", "--loss", "simpo", "--margin", "1"]),
    "dpo-kto": (dpo, ["--model", "m", "--data.path", "f", "--loss", "kto"]),
    "dpo-world": (dpo, ["--rounds", "2", "--loss", "cdpo", "--label-smoothing", "0.1"]),
    "sample": (sample, ["--model", "m", "--prompts", "f", "--top-p", "0.9", "--top-k", "3", "--limit", "3"]),
    "distill": (
        distill,
        [
            *("--model", "m", "--data.path", "f", "--prompt", "p", "--k", "9", "--learning-rate", "0.1"),
            *("--data.pretraining", "f", "--mix", "0.2", "--data.held-out", "0.1", "--data.width", "9"),
        ],
    ),
    "distill-world": (distill, ["--learning-rate", "0.1"]),
    "gate": (gate, ["--model", "m", "--prompts", "f", "--unusual", "f", "--layer", "1", "--limit", "3"]),
    "evaluate": (evaluate, ["--policies", "a", "b", "--prompts", "f", "--reward", "m:f", "--width", "9"]),
    "instructgpt": (instructgpt, []),
    "sweep": (sweep, ["--over", "ppo.clip=0.1,0.2"]),
}
SIGNED = {"world.polite_taste", "pmp.polite_taste"}
"""Numbers that may be negative."""
SHARES = re.compile(
    r"(held_out|max_dropped|lapse|agreement|label_smoothing|word_dropout|lambda_|discount|ema|top_p|\bb[12]|adam_b2|"
    r"sft\.mix)$"
)


def set_to(settings, name, value):
    group, _, last = name.partition(".")
    new = value if not last else set_to(getattr(settings, group), last, value)
    return dataclasses.replace(settings, **{group: new})


def wrong_values(settings, name):
    """Yields values of a setting that make no sense."""
    value = setting_checks.value_of(settings, name)
    if isinstance(value, tuple) and value and isinstance(value[0], float):
        yield from ((math.nan,), (math.inf,))
    if isinstance(value, bool) or not isinstance(value, int | float):
        return
    if isinstance(value, float):
        yield from (math.nan, math.inf, -math.inf)
        yield from () if name in SIGNED else (1.0,) if name.endswith("missing_stop_score") else (-1.0,)
        yield from (1.5,) if SHARES.search(name) else ()
        yield from (0.0,) if name.endswith("learning_rate") else ()
    else:
        yield -2
        yield from (0,) if re.search(r"(width|batch|layers|max_new_tokens|rank)$", name) else ()


@pytest.mark.parametrize("name", COMMANDS)
def test_no_command_accepts_a_number_that_makes_no_sense(name, monkeypatch):
    command: Any
    command, arguments = COMMANDS[name]
    settings = command.parse(arguments)
    accepted = []
    for field in setting_checks.field_names(settings):
        for value in wrong_values(settings, field):
            changed = set_to(settings, field, value)
            monkeypatch.setattr(command_line, "parse_as", lambda *args, changed=changed, **options: changed)
            try:
                command.parse(arguments)
            except SettingError as error:
                assert "\n" not in str(error)
            else:
                accepted.append((field, value))
    assert not accepted


@pytest.mark.parametrize("name", ["ppo-optional", "instructgpt"])
def test_a_positive_score_of_unfinished_answers_is_refused(name):
    command: Any
    command, arguments = COMMANDS[name]
    message = r"^--ppo.missing-stop-score is 0.5; it must be at most 0, because a positive score rewards answers that"
    with pytest.raises(SettingError, match=message):
        command.parse([*arguments, "--ppo.missing-stop-score", "0.5"])


# ----------------------------------------------------------------------------------------------- the names of settings

TEXTS = re.compile(
    r"(?<![-\w.])(ppo|data|sft|reward_model|evaluation|training|cv|pretrain|comparisons)\.[a-z]+_[a-z_]+\b"
)
"""A setting as Python names it, such as ``ppo.kl_coef``, and not as a flag."""
ROOT = pathlib.Path(command_line.__file__).parents[2]


def test_reports_and_tables_name_settings_by_their_flags():
    settings = instructgpt.parse([])
    shown = setting_checks.by_flag(settings)
    assert shown["--ppo.kl-coef"] == settings.ppo.kl_coef and shown["--ppo.lambda_"] == settings.ppo.lambda_
    page = report.render({}, [], title="t", settings=shown)
    assert "--ppo.missing-stop-score" in page and not TEXTS.search(page)
    points = [{"kl_coef": 0.1, "ptx_coef": 2.0, "kl": [1.0, 0.5, 1.5]}]
    assert (
        frontier_plot.table(points, swept=["kl_coef", "ptx_coef"]).columns[0].header == "--ppo.kl-coef / --ppo.ptx-coef"
    )


@pytest.mark.parametrize("spelling", ["ppo.kl_coef", "ppo.kl-coef", "--ppo.kl-coef", "--ppo.kl_coef"])
def test_a_sweep_accepts_both_spellings(spelling):
    assert [each.values for each in grids.points([f"{spelling}=0,0.5"], sweep.parse([]).ppo)] == [
        {"kl_coef": 0.0},
        {"kl_coef": 0.5},
    ]


@pytest.mark.parametrize(
    "name", ["instructgpt", "ppo", "sft", "dpo", "sweep", "evaluate", "sample", "gate", "reward_model"]
)
def test_help_and_messages_name_settings_by_their_flags(name):
    """In strings of the sources, apart from names that are looked up and Python code."""
    files = [ROOT / "experiments" / f"{name}.py", *(ROOT / "experiments").glob("finetune/*settings.py")]
    for file in [*files, *(ROOT / "experiments" / "launch").glob("*settings.py")]:
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Constant) and isinstance(node.value, str) and " " in node.value:
                assert not TEXTS.search(node.value), f"{file.name}, line {node.lineno}"


def test_shell_commands_of_the_documentation_use_flags():
    for file in [*ROOT.glob("docs/**/*.md"), ROOT / "README.md", ROOT / "experiments" / "README.md"]:
        for line in file.read_text(encoding="utf-8").splitlines():
            assert not (line.startswith("$ ") and TEXTS.search(line)), f"{file.name}: {line}"
