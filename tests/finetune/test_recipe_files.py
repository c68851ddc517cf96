"""instructgpt.py with a file of its own for each kind of data, and runs that stop after a stage."""

import dataclasses
import json
import pathlib
import subprocess
import sys

import instructgpt
import launch
import pytest
from launch import config_file, run_folder, run_settings
from launch.run_settings import SettingError
from recipe import jobs, tasks

from rlhf_jax.data import errors
from rlhf_jax.lm import config

WORDS = ("tea", "milk", "bread", "salt", "rice", "fish", "corn", "plum")
SMALL = ("--preset", "smoke", "--data.prompt-width", "40", "--data.response-width", "16", "--data.vocab-size", "300")


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> dict[str, pathlib.Path]:
    folder = tmp_path_factory.mktemp("files")
    pairs = [(a, b) for a in WORDS for b in WORDS]
    records = {
        "comparisons": [{"prompt": f"Like {a}, {b}?", "chosen": f"I like {b}.", "rejected": "No."} for a, b in pairs],
        "demonstrations": [{"prompt": f"Sell {a}?", "response": f"Yes, {a} and {b}."} for a, b in pairs[:20]],
        "prompts": [{"prompt": f"Do you eat {a} or {b}?"} for a, b in pairs[:30]],
    }
    for name, each in records.items():
        (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, each)))
    documents = [f"Of {a} and {b} they sang.\nThe song of {a} is long." for a, b in pairs]
    (folder / "pretraining.txt").write_text("\n\n".join(documents))
    (folder / "pretraining.jsonl").write_text("\n".join(json.dumps({"text": each}) for each in documents))
    return {path.name: path for path in folder.iterdir()}


def task_of(files: dict[str, pathlib.Path], *names: str) -> tasks.Task:
    given = [text for name in ("comparisons.jsonl", *names) for text in (f"--data.{name.split('.')[0]}", files[name])]
    return tasks.make_task(instructgpt.parse([*SMALL, *map(str, given)]))


def texts(task: tasks.Task, rows_BL) -> str:
    return " ".join(task.tokenizer.decode(row) for row in rows_BL)


def test_data_without_a_file_of_its_own_comes_from_the_comparisons(files):
    task = task_of(files)
    assert instructgpt.parse([*SMALL, f"--data.comparisons={files['comparisons.jsonl']}"]).data.path is not None
    assert task.comparisons is not None and len(task.rl_prompts) == len(task.comparisons[0].ranks_BK)
    assert "I like" in texts(task, task.demonstrations.tokens_BL) and "Like" in texts(task, task.pretraining_BL)


@pytest.mark.parametrize("pretraining", ["pretraining.txt", "pretraining.jsonl"])
def test_each_kind_of_data_can_have_a_file_of_its_own(files, pretraining):
    alone, task = task_of(files), task_of(files, "demonstrations.jsonl", "prompts.jsonl", pretraining)
    assert len(task.demonstrations.tokens_BL) == 20 and "Sell tea" in texts(task, task.demonstrations.tokens_BL[:1])
    assert (len(task.rl_prompts), len(task.eval_prompts)) == (27, 3)
    assert all("Do you eat" in text for text in (*task.rl_prompts.texts, *task.eval_prompts.texts))
    assert not set(task.rl_prompts.texts) & set(task.eval_prompts.texts)
    for rows_BL in (task.pretraining_BL, task.pretraining_held_out_BL):
        assert "they sang" in texts(task, rows_BL) and "I like" not in texts(task, rows_BL)
    for ours, theirs in zip(task.comparisons, alone.comparisons):  # type: ignore[arg-type]
        assert (ours.tokens_BKL == theirs.tokens_BKL).all(), "the comparisons and their split are the same"


def test_unusable_files_of_their_own_are_refused(files, tmp_path):
    with pytest.raises(SettingError, match=r"--data\.demonstrations has no effect without --data\.path"):
        instructgpt.parse(["--data.demonstrations", "x"])
    path = tmp_path / "pretraining.jsonl"
    path.write_text('{"document": "a"}\n')
    with pytest.raises(errors.DataError, match=r"pretraining\.jsonl, line 1: the record has no field 'text'"):
        task_of(files | {path.name: path}, path.name)


def test_a_run_that_stopped_is_not_finished_and_continues_with_another_stage(tmp_path):
    run_folder.create(tmp_path / "run", instructgpt.parse(["--preset", "smoke", "--stop-after", "sft"]))
    run_folder.write_json(tmp_path / "run" / run_folder.RESULTS, {"stopped_after": "sft"})
    resume = str(tmp_path / "run")
    assert run_folder.finished_results(resume) is None
    assert config_file.read(resume)["stop_after"] == "sft"
    assert instructgpt.parse(["--resume", resume]).stop_after is None
    assert instructgpt.parse(["--resume", resume, "--stop-after", "ppo"]).stop_after == "ppo"
    with pytest.raises(
        SettingError, match=r"leave out --seed \(only --mesh\.\* and --hosts\.\* and --stop-after may differ\)"
    ):
        instructgpt.parse(["--resume", resume, "--seed", "3"])
    assert [name for part in instructgpt._weights("comparisons") for name, _ in part] == [
        *("pretrain", "sft", "sft_mix", "comparisons"),
    ]
    assert [name for name, _ in instructgpt._weights("ppo")[1]] == ["ppo"]
    assert [name for name, _ in instructgpt._weights(None)[1]] == ["ppo", "ppo_ptx", "evaluate"]


def test_a_new_model_can_have_the_architecture_of_a_preset(files):
    assert set(run_settings.ARCHITECTURES) == set(config.PRESETS)
    given = ["--model", "gpt2", "--data.path", str(files["comparisons.jsonl"])]
    made = instructgpt.parse([*SMALL, *given])
    cfg = jobs.model_config(made, tasks.make_task(made), None)
    assert (cfg.n_layers, cfg.positions, made.given_model) == (12, "learned", None) and cfg.vocab_size <= 300
    assert made.ppo.learning_rate == instructgpt.parse(["--preset", "smoke"]).ppo.learning_rate, "from scratch"
    with pytest.raises(SettingError, match=r"--net\.layers has no effect with --model gpt2, which has its own size"):
        instructgpt.parse([*SMALL, *given, "--net.layers", "5"])
    long = instructgpt.parse([*SMALL, *given, "--data.prompt-width", "1020"])
    task = dataclasses.replace(tasks.make_task(made), prompt_width=1020)
    with pytest.raises(SettingError, match=r"has 1036 tokens, more than the 1024 of --model gpt2"):
        jobs.model_config(long, task, None)


@pytest.mark.slow
def test_models_of_a_stopped_run_are_saved_and_its_end_is_that_of_an_uninterrupted_run(tmp_path):
    script = str(pathlib.Path(launch.__path__[0]).parent / "instructgpt.py")

    def run(*flags: object) -> str:
        done = subprocess.run([sys.executable, script, *map(str, flags)], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-3000:]
        return done.stdout

    out, other = tmp_path / "run", tmp_path / "other"
    assert "stopped after sft_mix; saved base/, sft/, sft_mix/" in run(
        "--preset", "smoke", "--out", out, "--stop-after", "sft_mix"
    )
    results = json.loads((out / "results.json").read_text())
    assert results["stopped_after"] == "sft_mix" and "policies" not in results
    run("--resume", out)
    run("--preset", "smoke", "--out", other)
    for name in ("base", "sft", "sft_mix", "ppo", "policy", "reward_model"):
        saved = [(folder / name / "model.safetensors").read_bytes() for folder in (out, other)]
        assert saved[0] == saved[1], name
