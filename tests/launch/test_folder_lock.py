"""Only one process at a time uses a run folder."""

import errno
import fcntl
import json
import os
import pathlib
import socket
import subprocess
import sys

import launch
import pytest
from launch import config_file, folder_lock, run_folder
from launch.settings import SettingError, Settings
from preferences.reward_settings import RewardSettings

EXPERIMENTS = pathlib.Path(launch.__path__[0]).parent


@pytest.fixture(autouse=True)
def release():
    yield
    folder_lock.release_all()


@pytest.fixture
def holder(tmp_path):
    """A process with a forked child that has locked the folder until it is killed."""
    code = (
        "import os, pathlib, sys, time; sys.argv[0] = 'holder.py'; from launch import folder_lock;"
        f"folder_lock.acquire(pathlib.Path({str(tmp_path)!r})); child = os.fork();"
        "child and print(child, flush=True); time.sleep(600)"
    )
    environment = os.environ | {"PYTHONPATH": str(EXPERIMENTS)}
    process = subprocess.Popen([sys.executable, "-c", code], env=environment, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    child = int(process.stdout.readline())
    yield process
    process.kill()
    process.wait()
    os.kill(child, 9)


def test_folder_of_a_living_process_is_refused_and_that_of_a_killed_one_is_free(tmp_path, holder):
    (tmp_path / config_file.NAME).write_text("{}")
    named = f"holder.py on host {socket.gethostname()} (process {holder.pid}, since 20"
    with pytest.raises(folder_lock.LockedError) as error:
        folder_lock.acquire(tmp_path)
    assert str(error.value).startswith(named) and folder_lock.owner(tmp_path) == str(error.value)
    with pytest.raises(SettingError) as error:
        run_folder.resume(tmp_path, Settings())
    assert str(error.value).startswith(f"--resume {tmp_path} is in use by {named}")
    with pytest.raises(SettingError) as error:
        run_folder.free_folder(str(tmp_path), kind="sft")
    assert str(error.value).startswith(f"--out {tmp_path} is in use by {named}")
    holder.kill()
    holder.wait()  # its child lives
    folder_lock.acquire(tmp_path)
    assert json.loads((tmp_path / "lock").read_text())["pid"] == os.getpid()


def test_folder_that_another_process_has_just_created_is_refused(tmp_path, holder):
    with pytest.raises(SettingError, match=r"--out .* is in use by holder.py"):
        run_folder.create(tmp_path, Settings())
    holder.kill()
    holder.wait()
    run_folder.create(tmp_path, Settings())  # a folder with only the lock of a dead process is empty


def test_folder_with_a_checkpoint_is_refused_and_one_without_is_used_again(tmp_path):
    run_folder.create(tmp_path, Settings())
    run_folder.create(tmp_path, Settings(seed=1)).note("sft", "a warning")
    folder = run_folder.create(tmp_path, Settings(seed=2))
    assert config_file.read(str(tmp_path))["seed"] == 2 and folder.incidents() == []
    (tmp_path / "checkpoints" / "sft" / "1").mkdir(parents=True)
    run_folder.create(tmp_path, Settings(seed=3))
    (tmp_path / "checkpoints" / "sft" / "1").mkdir(parents=True)
    (tmp_path / "checkpoints" / "sft" / "1" / "data").touch()
    with pytest.raises(SettingError, match="already contains a run"):
        run_folder.create(tmp_path, Settings())
    (tmp_path / "checkpoints" / "sft" / "1" / "data").unlink()
    (tmp_path / "results.json").touch()
    with pytest.raises(SettingError, match="already contains a run"):
        run_folder.create(tmp_path, Settings())


def test_lock_is_reentrant_and_released(tmp_path):
    assert folder_lock.held() is None and folder_lock.owner(tmp_path / "missing") is None
    folder_lock.acquire(tmp_path)
    folder_lock.acquire(tmp_path)
    assert folder_lock.held() == tmp_path.resolve() and folder_lock.owner(tmp_path) is None
    folder_lock.release_all()
    folder_lock.acquire(tmp_path)


def test_without_locks_a_living_process_of_this_host_counts(tmp_path, monkeypatch, holder):
    def unsupported(descriptor, mode):
        raise OSError(errno.EOPNOTSUPP, "not supported")

    monkeypatch.setattr(fcntl, "flock", unsupported)
    with pytest.raises(folder_lock.LockedError, match=f"process {holder.pid}"):
        folder_lock.acquire(tmp_path)
    owner = json.loads((tmp_path / "lock").read_text())
    for change in ({"host": "another"}, {"ticks": "1"}, {"pid": 2**22 + 1}):  # another host, an older process, none
        (tmp_path / "lock").write_text(json.dumps(owner | change))
        folder_lock.acquire(tmp_path)
        folder_lock.release_all()


def test_folder_of_another_command_is_not_resumed(tmp_path):
    run_folder.create(tmp_path, RewardSettings())
    with pytest.raises(SettingError, match=r"is a run of reward_model.py; resume it with that command"):
        config_file.read_settings(Settings, str(tmp_path))
