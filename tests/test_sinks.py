"""Logging to services, with a fake package in place of theirs."""

import sys
import types

import pytest
from launch import setting_checks
from launch.settings import SettingError, Settings

from rlhf_jax import metrics, sinks


@pytest.fixture
def calls(monkeypatch):
    """The calls of the packages wandb and trackio."""
    calls = []

    class Run:
        def __getattr__(self, name):
            return lambda *args, **options: calls.append((name, *args, *options.items()))

    for name in ("wandb", "trackio"):
        package = types.ModuleType(name)
        package.init = lambda **options: calls.append(("init", options)) or Run()  # type: ignore
        monkeypatch.setitem(sys.modules, name, package)
    return calls


def log_two_stages(folder, sink):
    with metrics.MetricLog(folder, sinks=[sink]) as log:
        log.write("sft", 1, {"loss": 2.5, "bad": float("nan")})
        log.write("sft", 2, {"loss": 1.5})
        log.write("ppo", 1, {"kl": 0.5})


def test_wandb_gets_metrics_by_stage_and_a_resumed_run_continues(tmp_path, calls):
    log_two_stages(tmp_path / "run", lambda folder: sinks.Wandb(folder, config={"seed": 3}))
    (_, options), *rest = calls
    name = options["id"]
    assert name.startswith("run-") and (tmp_path / "run" / "wandb_run.txt").read_text() == name
    expected = {"id": name, "name": name, "dir": str(tmp_path / "run"), "resume": "allow", "project": "rlhf_jax"}
    assert options == expected | {"config": {"seed": 3}}
    assert rest == [
        ("define_metric", "sft/step"),
        ("define_metric", "sft/*", ("step_metric", "sft/step")),
        ("log", {"sft/step": 1, "sft/loss": 2.5}),
        ("log", {"sft/step": 2, "sft/loss": 1.5}),
        ("define_metric", "ppo/step"),
        ("define_metric", "ppo/*", ("step_metric", "ppo/step")),
        ("log", {"ppo/step": 1, "ppo/kl": 0.5}),
        ("finish",),
    ]
    calls.clear()
    with metrics.MetricLog(tmp_path / "run", sinks=[sinks.Wandb]) as log:
        log.rewind("sft", 1)
        log.write("sft", 2, {"loss": 1.5})
    assert calls[0][1]["id"] == name and calls[-2] == ("log", {"sft/step": 2, "sft/loss": 1.5})
    assert not (tmp_path / "run" / "tensorboard").exists()


def test_trackio_gets_the_same_metrics(tmp_path, calls):
    log_two_stages(tmp_path / "run", sinks.Trackio)
    (_, options), *rest = calls
    assert options["project"] == "rlhf_jax" and options["name"].startswith("run-")
    assert [each for each in rest if each[0] == "log"][-1] == ("log", {"ppo/step": 1, "ppo/kl": 0.5})


def test_failure_of_a_service_is_one_line(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(metrics.LogError, match="wandb needs its package; install it with pip install -e '"):
        metrics.MetricLog(tmp_path, sinks=[sinks.Wandb])
    package = types.ModuleType("wandb")
    package.init = lambda **options: 1 / 0  # type: ignore
    monkeypatch.setitem(sys.modules, "wandb", package)
    with pytest.raises(metrics.LogError, match="cannot start a run of wandb: division by zero"):
        metrics.MetricLog(tmp_path, sinks=[sinks.Wandb])


def test_missing_package_is_refused_before_the_run(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    setting_checks.check_log(Settings())
    with pytest.raises(SettingError, match=r"--log trackio needs a package; install it with pip install -e '"):
        setting_checks.check_log(Settings(log=("tensorboard", "trackio")))
