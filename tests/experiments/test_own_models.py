"""The commands that train a user's own models on their own data, on tiny models."""

import json
import pathlib
import subprocess
import sys

import dpo
import evaluate
import instructgpt
import launch
import ppo
import pytest
import reward_model
import sample
import sft
from finetune import demonstrations as demonstrations_lib
from launch import run_folder
from launch.run_settings import SettingError

from rlhf_jax import lm
from rlhf_jax.data import errors

EXPERIMENTS = pathlib.Path(launch.__path__[0]).parent


def command(script: str, *arguments: object, status: int = 0) -> str:
    """Runs a command and returns its output."""
    done = subprocess.run(
        [sys.executable, str(EXPERIMENTS / script), *map(str, arguments)], capture_output=True, text=True
    )
    assert done.returncode == status, done.stdout[-2000:] + done.stderr[-3000:]
    return done.stdout + done.stderr


@pytest.mark.parametrize("text", ["{bad", "[1]", "3"])
def test_broken_template_options_are_refused_before_anything_is_loaded(text):
    for script, flags in (
        (sft, "--model tiny --data.path F"),
        (sft, "--model M --data.path F"),
        (ppo, "--policy P --prompts F --reward f:g"),
        (dpo, "--model M --data.path F"),
        (reward_model, "--model M --data.path F --folds 5"),
        (instructgpt, "--model M"),
        (sample, "--model M --prompts F"),
        (evaluate, "--policies A B --prompts F --reward f:g"),
    ):
        with pytest.raises(SettingError, match=r"--template\.options is .*; it must be a JSON object"):
            script.parse([*flags.split(), "--template.options", text])
    with pytest.raises(SettingError, match=r"--template\.options has no effect with --model tiny, whose chat template"):
        sft.parse(["--model", "tiny", "--data.path", "F", "--template.options", '{"a": 1}'])


@pytest.fixture(scope="session")
def demonstrations(tmp_path_factory) -> pathlib.Path:
    path = tmp_path_factory.mktemp("own") / "demonstrations.jsonl"
    words = ("tea", "milk", "bread", "salt", "rice", "fish", "corn", "plum")
    records = [
        {
            "messages": [
                {"role": "user", "content": f"Do you like {a} and {b}?"},
                {"role": "assistant", "content": f"I like {b}."},
            ]
        }
        for a in words
        for b in words
    ]
    path.write_text("\n".join(map(json.dumps, records)))
    return path


def test_widths_and_shares_that_leave_nothing_are_named(demonstrations, tmp_path):
    for flags, message in (
        (
            ("--data.width", 4),
            "64 of 64 conversations leave no room for an answer within 4 tokens; raise --data.width",
        ),
        (
            ("--data.held-out", 0.999),
            "--data.held-out is 0.999, which leaves none of 64 conversations to train on; lower it",
        ),
    ):
        given = ("--model", "tiny", "--data.path", demonstrations, "--data.vocab-size", 300, "--out", tmp_path / "run")
        with pytest.raises((SettingError, errors.DataError)) as caught:
            sft.run(sft.parse([str(each) for each in (*given, *flags)]))
        assert str(caught.value) == message
    assert not (tmp_path / "run").exists()


def test_resuming_with_other_settings_names_the_flags_that_differ(tmp_path):
    run_folder.create(
        tmp_path / "run", sft.parse(["--model", "tiny", "--data.path", "F", "--out", str(tmp_path / "run")])
    )
    resume = ["--resume", str(tmp_path / "run")]
    assert sft.parse([*resume, "--mesh.data", "1"]).resume == resume[1]
    start = f"--resume {resume[1]} takes all settings from its config.json; leave out "
    for flags, message in (
        (("--data.width", "9", "--seed", "3"), "--seed and --data.width (only --mesh.* may differ)"),
        (
            ("--steps", "9"),
            "--steps (only --mesh.* may differ); to train for longer, start a new run whose model is the",
        ),
    ):
        with pytest.raises(SettingError) as caught:
            sft.parse([*resume, *flags])
        assert str(caught.value).startswith(start + message)


@pytest.fixture(scope="session")
def sft_run(demonstrations, tmp_path_factory) -> pathlib.Path:
    out = tmp_path_factory.mktemp("sft") / "run"
    flags = ("--data.vocab-size", 300, "--steps", 12, "--batch", 4, "--data.width", 64, "--data.held-out", 0.1)
    command("sft.py", "--model", "tiny", "--data.path", demonstrations, "--out", out, *flags)
    return out


@pytest.mark.slow
def test_sft_lowers_the_held_out_loss_and_saves_a_model_that_commands_accept(sft_run, demonstrations, tmp_path):
    results = json.loads((sft_run / "results.json").read_text())
    before, after = results["held_out_loss"]["before"], results["held_out_loss"]["after"]
    assert after[2] < before[1] and results["steps"] == 12
    assert results["conversations"]["held_out"] == 6
    cfg, _ = lm.load(sft_run / "model")
    assert cfg.n_layers == 2 and (sft_run / "report.html").stat().st_size > 1000
    text = command(
        "sft.py",
        *(
            "--model",
            sft_run,
            "--data.path",
            demonstrations,
            "--out",
            tmp_path / "more",
            "--steps",
            2,
            "--data.held-out",
            0.1,
        ),
        *("--lora.rank", 2, "--optimizer", "lion", "--no-packing", "--micro-batches", 2, "--compute.dtype", "bfloat16"),
    )
    again = json.loads((tmp_path / "more" / "results.json").read_text())
    assert again["held_out_loss"]["before"][0] == pytest.approx(after[0], rel=0.01), "the saved model"
    assert "stage 2/2 evaluate done: 2 steps in" in text
    assert "58 training conversations, 6 held-out conversations" in text
    assert "bfloat16" in text and "already finished" in command("sft.py", "--resume", tmp_path / "more")


def test_data_that_is_too_small_is_refused_before_a_folder_is_created(demonstrations, tmp_path):
    few = tmp_path / "few.jsonl"
    few.write_text("\n".join(demonstrations.read_text().splitlines()[:3]))
    flags = ("--model", "tiny", "--data.path", few, "--data.vocab-size", 300, "--out", tmp_path / "run")
    text = command("sft.py", *flags, status=2)
    assert text.startswith("error: --data.held-out is 0.05, but the file has too few") and text.count("\n") == 1
    text = command("sft.py", *flags, "--data.held-out", 0, "--micro-batches", 8, status=2)
    assert text == "error: --micro-batches is 8; it must be at most 2, the number of rows of the data\n"
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_sft_trains_on_the_preferred_answers_of_comparisons(tmp_path):
    path = tmp_path / "pairs.jsonl"
    records = [{"prompt": f"Is {n} even?", "chosen": "Yes, it is.", "rejected": "No."} for n in range(0, 80, 2)]
    path.write_text("\n".join(map(json.dumps, records)))
    flags = ("--data.vocab-size", 280, "--steps", 1, "--batch", 4, "--data.held-out", 0.1, "--out", tmp_path / "run")
    text = command("sft.py", "--model", "tiny", "--data.path", path, *flags)
    assert "their preferred answers are the demonstrations" in text
    found, _ = demonstrations_lib.read(str(path), errors.DropCount())
    assert {each.response for each in found} == {"Yes, it is."}


def test_a_second_run_reuses_compiled_programs_and_gets_the_same_bits(tmp_path, monkeypatch):
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR", raising=False)
    monkeypatch.setenv("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
    row = json.dumps({"prompt": "hello there", "response": "good day to you"})
    (tmp_path / "data.jsonl").write_text(f"{row}\n" * 40)
    flags = ("--model", "tiny", "--data.path", tmp_path / "data.jsonl")
    models, programs = [], []
    for name in ("first", "second"):
        command("sft.py", *flags, "--out", tmp_path / name)
        models.append((tmp_path / name / "model/model.safetensors").read_bytes())
        programs.append({path.name: path.stat().st_mtime_ns for path in (tmp_path / "programs").iterdir()})
    assert programs[0] and programs[0] == programs[1] and models[0] == models[1]
