"""Runs accelerator.py with tiny shapes, without the packages that a GPU machine may lack."""

import json
import os
import pathlib
import statistics
import subprocess
import sys
import time

import accelerator
import pytest
from benchmarks.accelerator_rows import report_table, row_context, row_runner

from rlhf_jax import atomic

ROOT = pathlib.Path(__file__).parents[2]
MISSING = ("grain", "tensorflow_datasets", "tyro", "tensorboardX", "array_record", "matplotlib", "pyarrow", "chex")


@pytest.fixture
def bare_environment(tmp_path):
    """Environment variables with which Python cannot import the packages in MISSING."""
    (tmp_path / "sitecustomize.py").write_text(
        # `import` raises ModuleNotFoundError, and importlib.util.find_spec returns None, as for missing packages.
        f"import sys\nsys.modules |= dict.fromkeys({MISSING!r})\n"
    )
    return os.environ | {"PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}"}


def test_the_library_needs_few_packages(bare_environment):
    code = "import rlhf_jax.lm, rlhf_jax.generation, rlhf_jax.train, rlhf_jax.losses, rlhf_jax.checkpoint"
    subprocess.run([sys.executable, "-c", code], env=bare_environment, check=True)
    done = subprocess.run([sys.executable, "-c", "import tyro"], env=bare_environment, capture_output=True)
    assert done.returncode == 1, "the packages must be missing for this test to mean anything"


def records_of(environment, path, *flags):
    """Runs tiny rows; returns their records, by the names of rows and of measures, and the printed table."""
    command = [sys.executable, "accelerator.py", "--quick", "--out", str(path), "--minutes", "30", *flags]
    done = subprocess.run(
        command, cwd=ROOT / "experiments", env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    records = [json.loads(line) for line in path.read_text().splitlines()]
    rows = {each["row"] for each in records if "row_seconds" in each}
    return rows, {each["measure"]: each for each in records if "measure" in each}, done.stdout


def test_some_rows_run_with_tiny_shapes(bare_environment, tmp_path):
    rows, numbers, table = records_of(bare_environment, tmp_path / "rows.jsonl", "--rows", "limits,sft")
    assert rows == {"limits", "sft"} and "| SFT step |" in table
    step, limit = numbers["SFT step"], numbers["matrix products"]
    assert step["share"] == pytest.approx(step["flops"] / statistics.median(step["seconds"]) / limit["value"])


@pytest.mark.slow
def test_all_rows_run_with_tiny_shapes(bare_environment, tmp_path):
    rows, numbers, table = records_of(bare_environment, tmp_path / "rows.jsonl")
    assert rows == set(row_runner.ROWS)
    for name in ("SFT step", "DPO step", "reward model step", "generation, batch 1", "PPO iteration"):
        assert numbers[name]["value"] > 0
        assert f"| {name} |" in table
    assert numbers["first_ratio_error, float32"]["value"] == 0
    assert numbers["same seed, same bits"]["value"] is True
    assert numbers["same bits after a restored checkpoint"]["value"] is True


def test_torch_row_compares_with_ours(tmp_path):
    pytest.importorskip("torch")
    path = tmp_path / "rows.jsonl"
    context(path, "limits").record("device", platform="cpu")
    context(path, "sft").record("SFT step", 100.0, "tokens/s")
    row_runner.measure_row("torch", path, quick=True, run="now")
    numbers = {each.get("measure"): each for each in row_context.read(path, "now")}
    peer, ratio = numbers["torch SFT step"], numbers["ours / torch SFT step"]
    assert ratio["value"] == pytest.approx(100.0 / peer["value"])
    assert numbers["torch DPO step"]["value"] > 0 and numbers["torch generation, batch 4"]["value"] > 0
    assert (
        numbers["ours / torch DPO step"]["value"] is None and "not measured" in numbers["ours / torch DPO step"]["note"]
    )


def context(path, row="sft", shapes=row_context.QUICK, **fields):
    return row_context.Context(path, "now", row, shapes, **fields)


def test_a_cpu_is_refused_without_quick(tmp_path):
    command = [sys.executable, "accelerator.py", "--out", str(tmp_path / "rows.jsonl")]
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=ROOT / "experiments", env=environment, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "error: JAX finds neither a GPU nor a TPU; --quick makes a test run on the CPU\n"


def test_sigterm_stops_the_child_and_prints_the_table(tmp_path):
    path = tmp_path / "rows.jsonl"
    command = [sys.executable, "accelerator.py", "--quick", "--out", str(path)]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"}
    with subprocess.Popen(
        command, cwd=ROOT / "experiments", env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stderr is not None
        while not row_context.read(path):
            assert process.poll() is None
            time.sleep(0.1)
        process.terminate()
        out, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "| measurement |" in out and "error: interrupted" in errors and "Traceback" not in errors
    children = subprocess.run(["pgrep", "-f", str(path)], capture_output=True, text=True).stdout
    assert not children, "the child must not keep the device"
    assert accelerator.main(["--show", "--out", str(path)]) == 0


def test_lines_that_an_interrupted_process_left_are_skipped(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('[1]\n{"run": "now", "row": "sft", "mea')
    context(path).record("SFT step", 1.0, "tokens/s")
    (record,) = row_context.read(path, "now")
    assert record["measure"] == "SFT step"


def test_shares_are_of_the_limits_of_the_same_run(tmp_path):
    path = tmp_path / "rows.jsonl"
    context(path, "limits").record("matrix products", 200.0, "FLOP/s")
    atomic.append_line(path, {"run": "before", "row": "limits", "measure": "matrix products", "value": 1.0})
    now = context(path, earlier=row_context.read(path, "now"))
    share = now.share(50.0, "matrix products", at_least=0.5)
    assert share == {"share": 0.25, "share_of": "matrix products", "at_least": 0.5}
    assert now.share(50.0, "memory bandwidth", at_least=0.5) == {}, "no aim for a share of an unknown limit"


def test_a_row_that_raises_is_recorded_and_the_next_one_runs(tmp_path, monkeypatch):
    path = tmp_path / "rows.jsonl"
    monkeypatch.setitem(row_runner.ROWS, "broken", row_runner.Row("", "limit_rows.missing"))
    for name in ("broken", "limits"):
        row_runner.measure_row(name, path, quick=True, run="now")
    broken, *others = row_context.read(path, "now")
    assert broken["row"] == "broken" and "AttributeError" in broken["error"]
    assert "| broken | failed |" in report_table.markdown(row_context.read(path, "now"))
    assert {each.get("measure") for each in others} >= {"matrix products", "memory bandwidth"}


def test_rows_remain_if_the_process_dies(tmp_path, monkeypatch):
    """The first process dies in its second row; another one measures the third."""
    path, started, lines = tmp_path / "rows.jsonl", [], []

    def child(names, path, *, run, **options):
        started.append(list(names))
        done = names[:1] if len(started) == 1 else names
        for name in done:
            atomic.append_line(path, {"run": run, "row": name, "row_seconds": 1.0})
        return "the process ended with status -9" if len(started) == 1 else None

    monkeypatch.setattr(row_runner, "_run_child", child)
    row_runner.measure(["sft", "dpo", "reward"], path, quick=True, run="now", minutes=1, on_row=lines.append)
    assert started == [["sft", "dpo", "reward"], ["reward"]]
    errors = {each["row"]: each.get("error") for each in row_context.read(path, "now")}
    assert errors == {"sft": None, "dpo": "the process ended with status -9", "reward": None}
    assert lines == ["sft: 1 s", "dpo: the process ended with status -9", "reward: 1 s"]


def test_rows_after_the_time_limit_are_not_run(tmp_path):
    path = tmp_path / "rows.jsonl"
    row_runner.measure(["sft", "torch"], path, quick=True, run="now", minutes=0.0, on_row=lambda text: None)
    errors = [(each["row"], each["error"]) for each in row_context.read(path, "now")]
    assert errors == [("sft", "not run: the time limit was reached"), ("torch", "not run: the time limit was reached")]


def test_the_library_need_not_be_installed(tmp_path):
    (tmp_path / "sitecustomize.py").write_text(
        "import sys\n"
        f"sys.path[:] = [each for each in sys.path if each != {str(ROOT)!r}]\n"
        "sys.meta_path[:] = [each for each in sys.meta_path if 'editable' not in repr(each).lower()]\n"
    )
    environment = os.environ | {"PYTHONPATH": str(tmp_path)}
    code = "import rlhf_jax"
    assert subprocess.run([sys.executable, "-c", code], env=environment, cwd=tmp_path, capture_output=True).returncode
    command = [sys.executable, str(ROOT / "experiments" / "accelerator.py"), "--quick", "--rows", "sft"]
    command += ["--minutes", "0.001", "--out", str(tmp_path / "rows.jsonl")]
    done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 1 and "the time limit was reached" in done.stderr, done.stderr


def test_the_table_says_whether_an_aim_is_met(tmp_path):
    path = tmp_path / "rows.jsonl"
    now = context(path, shapes=row_context.Shapes())
    now.record("step", 1500.0, "tokens/s", share=0.49, share_of="matrix products", at_least=0.5)
    now.record("rollout", 0.02, "s", share=0.5, share_of="PPO iteration", at_most=0.5)
    now.record("ours / torch", 1.5, "x", at_least=1.5)
    now.record("matrix products", 7.9e14, "FLOP/s")
    now.record("same bits", False)
    rows = report_table.markdown(row_context.read(path, "now")).splitlines()[-5:]
    assert rows[0] == "| step | 1,500 tokens/s | 49 % of the matrix products | ≥ 50 % | no |  |"
    assert rows[1] == "| rollout | 20 ms | 50 % of the PPO iteration | ≤ 50 % | yes |  |"
    assert rows[2] == "| ours / torch | 1.50x |  | ≥ 1.5 | yes |  |"
    assert rows[3] == "| matrix products | 790 TFLOP/s |  |  |  |  |"
    assert rows[4] == "| same bits | no |  |  |  |  |"


def test_an_unknown_row_is_refused(capsys):
    with pytest.raises(SystemExit):
        accelerator.parse(["--rows", "sft,dqo"])
    assert "dqo" in capsys.readouterr().err
