"""The seconds of a run are those of all its processes, also of killed ones."""

import json
import time

import pytest
from launch import elapsed_time, process_setup, run_folder
from launch import settings as settings_lib
from recipe import run_setup


def open_as_new_process(folder, monkeypatch, *, ago):
    """Opens the time of a run in a process that started ``ago`` seconds ago."""
    monkeypatch.setattr(process_setup, "START_TIME", time.time() - ago)
    return elapsed_time.ElapsedTime(folder)


def test_seconds_are_summed_over_processes(tmp_path, monkeypatch):
    first = open_as_new_process(tmp_path, monkeypatch, ago=50)
    assert first.total == pytest.approx(50, abs=2)
    first.save()
    assert elapsed_time.ElapsedTime(tmp_path).total == pytest.approx(50, abs=2), "the same process counts once"
    second = open_as_new_process(tmp_path, monkeypatch, ago=7)
    assert second.total == pytest.approx(57, abs=2)
    second.save()
    second.save()
    assert open_as_new_process(tmp_path, monkeypatch, ago=3).total == pytest.approx(60, abs=2)
    for damaged in ("", "[]", '{"seconds": 1}', '{"seconds": "x", "earlier": null, "process": 1}'):
        (tmp_path / elapsed_time.NAME).write_text(damaged)
        assert open_as_new_process(tmp_path, monkeypatch, ago=3).total == pytest.approx(3, abs=2)
    elapsed_time.ElapsedTime(tmp_path / "missing").save()  # a full or missing disk stops no run


def test_a_killed_process_has_saved_its_time_while_it_trained(tmp_path, monkeypatch):
    folder = run_folder.create(tmp_path / "run", settings_lib.preset("smoke"))
    monkeypatch.setattr(process_setup, "START_TIME", time.time() - 20)
    with run_setup.make_progress([("sft", 1.0)], folder) as progress:
        progress.start("sft", 3)
        saved = []
        for step, interval in enumerate((100.0, 0.0, 0.0)):
            monkeypatch.setattr(elapsed_time, "INTERVAL", interval)
            time.sleep(0.01)
            progress.update("sft", step + 1, 3)
            saved.append(json.loads((tmp_path / "run" / elapsed_time.NAME).read_text())["seconds"])
    assert 20 <= saved[0] < saved[1] < saved[2] < 60
    assert open_as_new_process(tmp_path / "run", monkeypatch, ago=5).total == pytest.approx(saved[2] + 5, abs=2)
