"""Settings of the main job: each is read somewhere, explained, and kept in the run's folder."""

import dataclasses
import pathlib
import re
import subprocess
import sys
from typing import Any

import pytest
from launch import config_file, setting_checks, settings

EXPERIMENTS = pathlib.Path(settings.__file__).parents[1]
SOURCE = "\n".join(
    p.read_text()
    for p in [*EXPERIMENTS.glob("launch/*.py"), *EXPERIMENTS.glob("recipe/*.py"), EXPERIMENTS / "instructgpt.py"]
    if p.stem != "settings"
)


def fields(cls: Any = settings.Settings):
    for field in dataclasses.fields(cls):
        if dataclasses.is_dataclass(field.default_factory):
            yield from fields(field.default_factory)
        else:
            yield cls, field.name


@pytest.mark.parametrize(("cls", "name"), list(fields()), ids=lambda x: getattr(x, "__name__", x))
def test_every_field_is_read_and_explained(cls, name):
    assert re.search(rf"\.{name}\b", SOURCE), f"no stage reads {cls.__name__}.{name}"
    text = pathlib.Path(settings.__file__).read_text()
    assert re.search(rf'^    {name}: [^\n]*\n    """.+', text, re.MULTILINE), f"{cls.__name__}.{name} has no help"


@pytest.mark.parametrize("name", ["default", "smoke"])
@pytest.mark.parametrize("dialogues", [False, True])
@pytest.mark.parametrize("started", [False, True])
def test_presets_are_in_range_and_survive_the_configuration_file(name, dialogues, started):
    made = settings.preset(name, dialogues=dialogues, pretrained=started)
    setting_checks.check(made)
    assert config_file.from_dict(settings.Settings, dataclasses.asdict(made)) == made


def test_a_configuration_of_another_version_is_refused():
    values = dataclasses.asdict(settings.preset("default"))
    values["ppo"] = {**values["ppo"], "new_field": 1}
    with pytest.raises(settings.SettingError, match="ppo"):
        config_file.from_dict(settings.Settings, values)


@pytest.mark.parametrize(("part", "name", "value"), [("ppo", "clip", 0.0), ("net", "heads", 5), ("sft", "mix", 1.0)])
def test_values_out_of_range_name_their_flag(part, name, value):
    made = settings.preset("default")
    broken = dataclasses.replace(made, **{part: dataclasses.replace(getattr(made, part), **{name: value})})
    with pytest.raises(settings.SettingError, match=f"--{part}.{name}"):
        setting_checks.check(broken)


def test_truncated_rollouts_are_refused_with_the_reason_unless_they_are_corrected_for():
    made = settings.preset("default")
    for change in (dict(top_k=10), dict(top_p=0.9)):
        cut = dataclasses.replace(made, ppo=dataclasses.replace(made.ppo, **change))
        with pytest.raises(settings.SettingError, match=r"--ppo.top-[kp] .*correct-sampler.*another distribution"):
            setting_checks.check(cut)
        setting_checks.check(dataclasses.replace(cut, ppo=dataclasses.replace(cut.ppo, correct_sampler=True)))


@pytest.mark.skipif(not pathlib.Path("/proc/self/status").exists(), reason="elsewhere the kernel does not say")
def test_peak_memory_is_that_of_the_process_and_not_of_its_parent():
    held = bytearray(600 * 2**20)
    held[:: 2**12] = bytes([1]) * (len(held) // 2**12)
    code = "from launch import process_setup; print(process_setup.peak_memory_mb())"
    told = subprocess.run([sys.executable, "-c", code], cwd=EXPERIMENTS, capture_output=True, text=True, check=True)
    assert 1 < float(told.stdout) < 300 < len(held) / 2**20
