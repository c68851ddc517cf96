"""Settings of commands: help texts, checks, config.json, and start-up without slow imports."""

import dataclasses
import itertools
import json
import os
import pathlib
import re
import subprocess
import sys
from typing import Any

import instructgpt
import pytest
import sweep
from launch import config_file, run_folder, setting_checks, settings

EXPERIMENTS = pathlib.Path(settings.__file__).parents[1]
SOURCE = "\n".join(
    p.read_text()
    for p in [*EXPERIMENTS.glob("launch/*.py"), *EXPERIMENTS.glob("recipe/*.py"), EXPERIMENTS / "instructgpt.py"]
    if p.stem not in ("settings", "run_settings")
)


def fields(cls: Any = settings.Settings):
    for field in dataclasses.fields(cls):
        if dataclasses.is_dataclass(field.default_factory):
            yield from fields(field.default_factory)
        else:
            yield cls, field.name


@pytest.mark.parametrize(("cls", "name"), list(fields()), ids=lambda x: getattr(x, "__name__", x))
def test_every_setting_is_used_and_has_a_help_text(cls, name):
    assert re.search(rf"\.{name}\b", SOURCE), f"no stage reads {cls.__name__}.{name}"
    text = "\n".join((EXPERIMENTS / "launch" / name).read_text() for name in ("settings.py", "run_settings.py"))
    assert re.search(rf'^    {name}: [^\n]*\n    """.+', text, re.MULTILINE), f"{cls.__name__}.{name} has no help"


@pytest.mark.parametrize("name", ["default", "smoke"])
@pytest.mark.parametrize("dialogues", [False, True])
@pytest.mark.parametrize("pretrained", [False, True])
def test_presets_are_in_range_and_survive_config_json(name, dialogues, pretrained):
    made = settings.preset(name, dialogues=dialogues, pretrained=pretrained)
    setting_checks.check(made)
    assert config_file.from_dict(settings.Settings, dataclasses.asdict(made)) == made


def test_settings_with_an_unknown_field_are_refused():
    values = dataclasses.asdict(settings.preset("default"))
    values["ppo"] = {**values["ppo"], "new_field": 1}
    with pytest.raises(settings.SettingError, match="ppo"):
        config_file.from_dict(settings.Settings, values)


@pytest.mark.parametrize(("part", "name", "value"), [("ppo", "clip", 0.0), ("net", "heads", 5), ("sft", "mix", 1.0)])
def test_errors_about_values_out_of_range_name_the_flag(part, name, value):
    made = settings.preset("default")
    broken = dataclasses.replace(made, **{part: dataclasses.replace(getattr(made, part), **{name: value})})
    with pytest.raises(settings.SettingError, match=f"--{part}.{name}"):
        setting_checks.check(broken)


def test_truncated_sampling_needs_the_sampler_correction():
    made = settings.preset("default")
    for change in (dict(top_k=10), dict(top_p=0.9)):
        cut = dataclasses.replace(made, ppo=dataclasses.replace(made.ppo, **change))
        with pytest.raises(settings.SettingError, match=r"--ppo.top-[kp] .*correct-sampler.*a distribution other than"):
            setting_checks.check(cut)
        setting_checks.check(dataclasses.replace(cut, ppo=dataclasses.replace(cut.ppo, correct_sampler=True)))


@pytest.mark.skipif(not pathlib.Path("/proc/self/status").exists(), reason="only Linux reports it")
def test_peak_memory_excludes_the_parent_process():
    held = bytearray(600 * 2**20)
    held[:: 2**12] = bytes([1]) * (len(held) // 2**12)
    code = "from launch import process_setup; print(process_setup.peak_memory_mb())"
    done = subprocess.run([sys.executable, "-c", code], cwd=EXPERIMENTS, capture_output=True, text=True, check=True)
    assert 1 < float(done.stdout) < 300 < len(held) / 2**20


# ------------------------------------------------------------------------------------------------------------- resume


@pytest.mark.parametrize("version", [None, 1, 99])
def test_a_run_folder_of_another_version_raises_a_one_sentence_error(tmp_path, version):
    preset = settings.preset("smoke")
    run_folder.create(tmp_path / "run", preset)
    path = tmp_path / "run" / config_file.NAME
    values = json.loads(path.read_text())
    assert config_file.read_settings(settings.Settings, str(tmp_path / "run")) == preset
    del values["version"]
    path.write_text(json.dumps(values if version is None else values | {"version": version}))
    (tmp_path / "run" / run_folder.RESULTS).write_text("{}")  # finished or not
    with pytest.raises(
        settings.SettingError, match=r"config.json has .*version.*; start a new run with --out"
    ) as error:
        config_file.read_settings(settings.Settings, str(tmp_path / "run"))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("damage", [{"seed": "abc"}, {"ppo": [1]}, {"saves": None, "ppo": {}}, {"preset": 3}])
def test_a_damaged_config_raises_a_one_sentence_error(tmp_path, damage):
    run_folder.create(tmp_path / "run", settings.preset("smoke"))
    path = tmp_path / "run" / config_file.NAME
    path.write_text(json.dumps(json.loads(path.read_text()) | damage))
    with pytest.raises(settings.SettingError, match=r"config\.json") as error:
        config_file.read_settings(settings.Settings, str(tmp_path / "run"))
    assert "\n" not in str(error.value)


def test_a_run_of_another_command_is_refused(tmp_path):
    run_folder.create(tmp_path / "run", settings.preset("smoke"))
    with pytest.raises(settings.SettingError, match=r"is a run of instructgpt\.py; resume it with that command"):
        sweep.parse(["--resume", str(tmp_path / "run")])


# --------------------------------------------------------------------------------------------------------------- help

COMMANDS = sorted(path.name for path in EXPERIMENTS.glob("*.py"))
SLOW_MODULES = ("jax", "transformers", "matplotlib", "flax", "orbax")
ENVIRONMENT = {name: value for name, value in os.environ.items() if name != "GLIBC_TUNABLES"} | {"COLUMNS": "120"}


@pytest.mark.parametrize("command", COMMANDS)
def test_help_imports_no_slow_module(command):
    code = (
        "import runpy, sys\n"
        f"sys.argv = [{command!r}, '--help']\n"
        f"sys.path.insert(0, {str(EXPERIMENTS)!r})\n"
        "try:\n"
        f"    runpy.run_path({str(EXPERIMENTS / command)!r}, run_name='__main__')\n"
        "except SystemExit:\n"
        f"    sys.stderr.write(' '.join(sorted(sys.modules.keys() & set({SLOW_MODULES}))))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=ENVIRONMENT)
    assert done.returncode == 0 and not done.stderr, done.stderr
    assert done.stdout.startswith(f"usage: {command}")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--data.path", "a.jsonl", "--world.lapse", "0.5"], "--world.lapse has no effect with --data.path"),
        (["--data.path", "a.jsonl", "--sft.demonstrations", "9"], "--sft.demonstrations has no effect with"),
        (["--data.path", "a.jsonl", "--evaluation.split", "validation"], "--evaluation.split has no effect with"),
        (["--data.vocab-size", "300"], "--data.vocab-size has no effect without --data.path"),
        (["--model", "m", "--net.width", "64"], "--net.width has no effect with --model"),
        (["--model", "m", "--pretrain.steps", "9"], "--pretrain.steps has no effect with --model"),
        (["--preset", "smoke", "--data.held-out", "0.2"], "--data.held-out has no effect without --data.path"),
    ],
)
def test_settings_without_effect_on_the_run_are_refused(arguments, message):
    with pytest.raises(settings.SettingError, match=message):
        instructgpt.parse(arguments)
    instructgpt.parse(arguments[:-2])  # the rest is a valid command


@pytest.mark.parametrize("command", COMMANDS)
def test_help_breaks_no_line_in_mid_sentence(command):
    done = subprocess.run(
        [sys.executable, EXPERIMENTS / command, "--help"],
        capture_output=True,
        text=True,
        check=True,
        env=ENVIRONMENT,
    )
    description, _, boxes = done.stdout.partition("╭")
    assert all(line.startswith(" ") or line.endswith((".", ":")) for line in description.splitlines()[1:] if line)
    lines = [line[2:-2] for line in boxes.splitlines() if line.startswith("│")]
    for line, following in itertools.pairwise(lines):
        is_text = "  " in line.strip() or not line.startswith("-")
        if is_text and following.startswith(" ") and not line.rstrip().endswith((".", ")")):
            assert len(line.rstrip()) + 1 + len(following.split()[0]) > len(line), f"{line.rstrip()!r} ends too early"


@pytest.mark.parametrize("command", COMMANDS)
def test_help_into_a_closed_pipe_prints_no_traceback(command):
    read_end, write_end = os.pipe()
    os.close(read_end)
    try:
        done = subprocess.run(
            [sys.executable, EXPERIMENTS / command, "--help"],
            stdout=write_end,
            stderr=subprocess.PIPE,
            text=True,
            env=ENVIRONMENT,
        )
    finally:
        os.close(write_end)
    assert not done.stderr
