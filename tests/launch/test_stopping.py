"""SIGTERM and Ctrl-C at any moment end a command with exit status 75 and one line."""

import errno
import os
import pathlib
import signal
import subprocess
import sys
import time

import launch
import pytest
from launch import entry_point, folder_lock

from rlhf_jax import checkpoint

EXPERIMENTS = pathlib.Path(launch.__path__[0]).parent
SIGNALS = (signal.SIGINT, signal.SIGTERM)


def stopped(run, capsys):
    """Runs a command that is stopped and returns the line on stderr."""
    before = [signal.getsignal(number) for number in SIGNALS]
    with pytest.raises(SystemExit) as exit:
        entry_point.execute(run, lambda arguments: None, [])
    assert exit.value.code == 75 and [signal.getsignal(number) for number in SIGNALS] == before
    (line,) = capsys.readouterr().err.splitlines()
    return line


@pytest.mark.parametrize("number", SIGNALS)
def test_signal_between_stages_ends_the_command_with_one_line(number, tmp_path, capsys):
    def run(settings):
        (tmp_path / "config.json").write_text(config)
        folder_lock.acquire(tmp_path)
        signal.raise_signal(number)

    config = '{"command": "sft", "version": 4}'
    assert stopped(run, capsys) == f"stopped; continue with --resume {tmp_path}"
    config = "{}"  # of a command that cannot be resumed
    assert stopped(run, capsys) == "stopped; start it again"
    assert folder_lock.held() is None
    assert "before the run began" in stopped(lambda settings: signal.raise_signal(number), capsys)


class StopsWhenDeleted:
    """Python ignores the exception that a signal raises in a destructor."""

    def __init__(self, number):
        self.number = number

    def __del__(self):
        signal.raise_signal(self.number)


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_in_a_destructor_is_not_lost(number, capsys):
    def run(settings):
        StopsWhenDeleted(number)
        for _ in range(500):
            time.sleep(0.01)
        raise AssertionError("the command went on")

    hook = sys.unraisablehook
    assert stopped(run, capsys).startswith("stopped before the run began; ")
    assert sys.unraisablehook is hook


def test_later_signals_do_not_prevent_the_line(capsys):
    def run(settings):
        try:
            signal.raise_signal(signal.SIGINT)
        finally:  # the clean-up
            signal.raise_signal(signal.SIGTERM)
            signal.raise_signal(signal.SIGINT)

    assert stopped(run, capsys).startswith("stopped before the run began; ")


@pytest.mark.parametrize("number", SIGNALS)
def test_signal_during_the_imports_ends_the_command_with_one_line(number):
    code = "import signal; from launch import process_setup; process_setup.use_huge_pages(); "
    code += f"signal.raise_signal({number:d})"
    environment = os.environ | {"PYTHONPATH": str(EXPERIMENTS), "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (75, "stopped before the run began; start it again\n")


def test_full_disk_is_one_line_that_says_what_to_do(tmp_path, capsys):
    def fails(run):
        with pytest.raises(SystemExit) as exit:
            entry_point.execute(run, lambda arguments: None, [])
        assert exit.value.code == 2
        (line,) = capsys.readouterr().err.splitlines()
        return line

    def run(settings):
        (tmp_path / "config.json").write_text('{"command": "sft", "version": 4}')
        folder_lock.acquire(tmp_path)
        raise error

    error: Exception = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "results.json")
    full = "No space left on device"
    assert fails(run) == f"error: results.json: {full}; correct this and continue with --resume"
    error = checkpoint.CheckpointError(f"cannot save step 4: {full}")
    assert fails(run) == f"error: cannot save step 4: {full}; free space and continue with --resume"
    error = OSError("of another kind")
    with pytest.raises(OSError, match="of another kind"):
        entry_point.execute(run, lambda arguments: None, [])
