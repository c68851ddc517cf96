"""Runs the benchmarks without peer libraries. The timings are meaningless, but all results must be present."""

import json
import os
import pathlib
import subprocess
import sys

import pytest
from benchmarks import speed_ratios, suite

EXPERIMENTS = pathlib.Path(__file__).parents[2] / "experiments"


def run(*arguments):
    return subprocess.run(
        [sys.executable, *map(str, arguments)],
        cwd=EXPERIMENTS,
        capture_output=True,
        text=True,
        timeout=300,
        env=os.environ | {"COLUMNS": "80"},
        check=False,
    )


@pytest.mark.slow
def test_the_table_is_complete_without_peers(tmp_path):
    done = run("benchmark.py", "--quick", "--repeats", 1, "--only", "dpo-s", "--ours-only", "--out", tmp_path)
    assert done.returncode == 0, done.stderr
    assert "not installed" in done.stdout and "DPO step S" in done.stdout
    results = json.loads((tmp_path / "results.json").read_text())
    assert {each["against"] for each in results["comparisons"]} == {"TRL f32", "TRL bf16", "Tunix"}
    for each in results["comparisons"]:
        assert each["ratio"] is None and each["met"] is None and each["ours"] > 0
    (program,) = results["programs"]
    assert program["program"] == "ours.dpo-s" and program["peak_mb"] > 0 and program["compile_s"] > 0
    assert results["machine"]["cores"] == os.cpu_count()
    assert "| DPO step S |" in (tmp_path / "results.md").read_text()


def test_a_single_workload_prints_one_line():
    done = run("-m", "benchmarks.workload", "decode-s-2", "--quick", "--repeats", 2, "--json")
    assert done.returncode == 0, done.stderr
    record = json.loads(done.stdout)
    assert record["name"] == "decode-s-2" and len(record["seconds"]) == 2 and record["tokens"] == 2


def test_an_unknown_row_is_refused():
    done = run("benchmark.py", "--only", "sft-x")
    assert done.returncode == 2 and "sft-x" in done.stderr and "decode-m-64" in done.stderr


def record(seconds, **facts):
    return {"seconds": seconds, "first_s": 9.0, "peak_mb": 1, **facts}


def test_the_fastest_setting_of_a_peer_counts():
    (row,) = suite.select("dpo-s")
    huge, small = row.against[0].programs
    records = {program.key: {"missing": "not installed"} for program in row.programs}
    records |= {
        row.ours.key: record([3.0, 1.0, 2.0], tokens=100),
        huge.key: record([9.0], tokens=100),
        small.key: record([6.0], tokens=100),
        row.against[1].programs[0].key: record([1.0], tokens=100),
    }
    float32, defaults, tunix = speed_ratios.compare(row, records)
    assert (float32["ratio"], float32["met"], float32["theirs_program"]) == (3.0, True, small.key)
    assert (defaults["ratio"], defaults["met"]) == (0.5, None), "shown but not required"
    assert (tunix["theirs"], tunix["ratio"], tunix["met"]) == ("not installed", None, None)


def test_flops_are_compared_with_the_rate_of_the_machine():
    (row,) = suite.select("sft-m")
    records = {program.key: {"missing": "not installed"} for program in row.programs}
    records |= {
        row.ours.key: record([2.0], tokens=100, operations=60.0),
        row.against[-1].programs[0].key: record([1.0], operations=40.0),
    }
    rate = speed_ratios.compare(row, records)[-1]
    assert (rate["ratio"], rate["met"]) == (0.75, True)


def test_the_time_per_token_must_be_near_the_minimum():
    (row,) = suite.select("decode-m-4")
    records = {row.ours.key: record([0.3], tokens=4), row.against[0].programs[0].key: record([0.1], tokens=4)}
    (comparison,) = speed_ratios.compare(row, records)
    assert comparison["ratio"] == pytest.approx(3.0) and comparison["met"] is False
