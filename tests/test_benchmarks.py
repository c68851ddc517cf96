"""The benchmarks run, without peers: numbers of tiny shapes mean nothing, but all that is promised is there."""

import json
import os
import pathlib
import subprocess
import sys

import pytest

FOLDER = pathlib.Path(__file__).parents[1] / "experiments" / "benchmarks"


def run(script, *arguments):
    return subprocess.run(
        [sys.executable, str(FOLDER / script), *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=300,
        env=os.environ | {"COLUMNS": "120"},
        check=False,
    )


def test_a_table_without_peers(tmp_path):
    done = run("run.py", "--quick", "--repeats", 1, "--only", "dpo-s,decode-s-1", "--ours-only", "--out", tmp_path)
    assert done.returncode == 0, done.stderr
    assert "not installed" in done.stdout and "DPO step S" in done.stdout
    results = json.loads((tmp_path / "results.json").read_text())
    compared = {(found["row"], found["against"]): found for found in results["comparisons"]}
    assert compared["dpo-s", "TRL"]["ratio"] is None
    assert compared["dpo-s", "TRL"]["ours"] > 0
    token = compared["decode-s-1", "least time"]
    assert token["ratio"] == token["ours"] / token["theirs"]
    assert token["met"] == (token["ratio"] <= 2.5)
    assert {found["program"] for found in results["programs"]} == {"ours.dpo-s", "ours.decode-s-1", "ours.limit-s-1"}
    assert all(found["peak_mb"] > 0 for found in results["programs"])
    assert results["machine"]["cores"] == os.cpu_count()
    assert "| DPO step S |" in (tmp_path / "results.md").read_text()


@pytest.mark.parametrize("name", ["stream-s"])
def test_a_work_alone_prints_one_line(name):
    done = run("work.py", name, "--quick", "--repeats", 2, "--json")
    assert done.returncode == 0, done.stderr
    record = json.loads(done.stdout)
    assert record["name"] == name and len(record["seconds"]) == 2
    # 14 of 16 answers have 2 tokens, the others 16.
    assert record["tokens"] == 14 * 2 + 2 * 16


def test_an_unknown_row_is_named():
    done = run("run.py", "--only", "sft-x")
    assert done.returncode == 2 and "sft-x" in done.stderr and "decode-m-64" in done.stderr
