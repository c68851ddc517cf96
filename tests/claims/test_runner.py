"""Claims are measured in other processes, and what is stored is not measured again."""

import json
import os
import pathlib
import subprocess
import sys
import time

import claims
import pytest
from claims import catalogue, claim_report, claim_results, runner

from rlhf_jax.report import plots


def run_quickly(folder, work, processes=1):
    done = {}
    runner.measure_all(
        work, store=folder, quick=True, processes=processes, on_done=lambda each, result: done.update({each: result})
    )
    return done


def test_every_module_of_a_claim_is_found():
    ids = {path.stem[:3].upper() for path in pathlib.Path(claims.__path__[0]).glob("*/c[0-9]*.py")}
    assert {each[:3] for each in catalogue.CLAIMS} == ids and len(ids) > 20


def test_every_claim_has_a_test_of_its_decision():
    tests = "".join(path.read_text() for path in pathlib.Path(__file__).parent.glob("*_claims.py"))
    tests += (pathlib.Path(__file__).parent / "test_claims.py").read_text()
    modules = [claim.measure.__module__.rpartition(".")[2] for claim in catalogue.CLAIMS.values()]
    assert not [name for name in modules if f"{name}.CLAIM" not in tests and f"({name}, " not in tests]


def test_a_claim_is_measured_once_and_reported(tmp_path, monkeypatch):
    work = runner.Work("C41", 100)
    first = runner.measure(work, store=tmp_path / "store", quick=True)
    assert first.seconds > 0 and first.shared_seconds == 0
    claim = catalogue.CLAIMS["C41"]
    monkeypatch.setattr(claim_results, "commit", lambda: "0123456789")
    decided = claim_results.decide(claim, [first], seeds=[100], settings={"quick": True})
    assert decided["verdict"] == "not shown" and decided["ci"] == [None, None]  # one seed gives no interval
    assert decided["seconds"] == first.seconds
    (tmp_path / "C41.json").write_text(json.dumps(decided))
    (tmp_path / "C41.svg").write_text(plots.standalone(claim.plot([first.measured])))
    assert claim_results.read(tmp_path) == [decided]
    page = claim_report.write(tmp_path, [decided]).read_text()
    assert claim.claim in page and "<svg" in page and "verdicts mean nothing" in page
    assert "var(--" not in page, "the page defines no variables"
    table = (tmp_path / "table.md").read_text()
    assert "| not shown |" in table and table.endswith(
        "Seeds 100 to 100; " + decided["date"] + "; commit 0123456789.\n"
    )
    assert "| not shown | 1: C41 |" in (tmp_path / "compact.md").read_text()

    runner._trial.cache_clear()
    files = set((tmp_path / "store").rglob("*.pickle"))
    again = runner.measure(work, store=tmp_path / "store", quick=True)
    assert again.seconds == first.seconds and set((tmp_path / "store").rglob("*.pickle")) == files
    assert again.measured.keys() == first.measured.keys()


def test_a_failure_in_another_process_is_reported_after_the_others_are_done(tmp_path):
    with pytest.raises(RuntimeError, match=r"(?s)C00 with seed 7 failed: .*KeyError: 'C00'.*C00 with seed 8 failed"):
        run_quickly(tmp_path, [runner.Work("C00", 7), runner.Work("C00", 8)], processes=2)


def test_other_processes_end_when_the_first_is_killed(tmp_path):
    code = "import pathlib; from claims import runner\nif __name__ == '__main__':\n"
    code += f"    work = [runner.Work('C09', 100)]; store = pathlib.Path({str(tmp_path)!r})\n"
    code += "    runner.measure_all(work, store=store, quick=True, processes=1, on_done=print)\n"
    (tmp_path / "first.py").write_text(code)
    paths = os.pathsep.join((str(pathlib.Path(claims.__path__[0]).parent), os.environ.get("PYTHONPATH", "")))
    first = subprocess.Popen([sys.executable, tmp_path / "first.py"], env=os.environ | {"PYTHONPATH": paths})
    children = pathlib.Path(f"/proc/{first.pid}/task/{first.pid}/children")
    waited = (time.sleep(0.1) for _ in range(600))
    others = next(found for _ in waited if (found := children.read_text().split()))
    first.kill()
    first.wait()
    for _ in range(100):  # the work takes longer than these ten seconds
        if not any(pathlib.Path(f"/proc/{each}/exe").exists() for each in others):
            return
        time.sleep(0.1)
    raise AssertionError("the other processes go on")
