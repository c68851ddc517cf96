"""Several hosts on one machine: how they meet, leave together, and end where one process ends."""

import json
import os
import pathlib
import random
import signal
import socket
import subprocess
import sys
import threading
import time

import numpy as np
import pytest

from rlhf_jax import metrics
from rlhf_jax.distributed import hosts, rendezvous

ROOT = pathlib.Path(__file__).parents[2]
CASES = str(ROOT / "tests" / "cases" / "hosts_cases.py")


def free_port():
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


# --- meeting ----------------------------------------------------------------------------------------------------------


def meet_all(facts, *, port=None, count=None, timeout=600.0, indices=None):
    """Each host's connections or error, from a thread for each."""
    port, count = port or free_port(), count or len(facts)
    found = {}

    def one(place, index):
        try:
            found[place] = rendezvous.meet(f"127.0.0.1:{port}", count, index, timeout, facts[place])
        except hosts.HostsError as error:
            found[place] = str(error)

    threads = [threading.Thread(target=one, args=each) for each in enumerate(indices or range(len(facts)))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(600)
    return [found[place] for place in range(len(facts))]


def close(lines):
    for each in lines:
        for line in each.values():
            line.close()


def test_hosts_that_were_given_the_same_form_a_star():
    found = meet_all([{"--seed": 0, "data": "ab"}] * 3)
    assert [sorted(each) for each in found] == [[1, 2], [0], [0]]
    found[1][0].send(word="up")
    assert found[0][1].wait(time.monotonic() + 10) == {"word": "up"}
    close(found)


def test_every_host_is_told_which_differs_in_what():
    plain = {"--seed": 0, "--ppo.batch": 64, "the contents of --data.path": "a" * 64}
    others = [plain | {"--seed": 1}, plain | {"the contents of --data.path": "b" * 64, "--only.here": None}]
    said = meet_all([plain, *others])
    assert set(said) == {
        "host 1 differs from host 0 in --seed (1, not 0); host 2 differs from host 0 in the contents of --data.path "
        f"({'b' * 57}..., not {'a' * 57}...)"
    }


def test_another_count_and_a_taken_index_are_said_too():
    said = meet_all([{}, {}, {}], indices=[0, 1, 1])
    assert all(each == "a host came as number 1, which there is already" for each in said[:1])
    assert "a host came as number 1, which there is already" in said[1:]
    port = free_port()
    found = {}

    def one(index, count):
        with pytest.raises(hosts.HostsError) as raised:
            rendezvous.meet(f"127.0.0.1:{port}", count, index, 600.0, {})
        found[index] = str(raised.value)

    threads = [threading.Thread(target=one, args=each) for each in ((0, 2), (1, 3))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(600)
    assert found[0] == found[1] == "host 1 differs from host 0 in --hosts.count (3, not 2)"


def test_who_does_not_come_is_named_on_those_that_came():
    said = meet_all([{}, {}], count=4, timeout=2.0)
    assert set(said) == {"after 2 s, of 4 hosts these had not come: 2, 3"}


def test_a_coordinator_that_does_not_answer_is_one_sentence_in_time():
    port = free_port()
    with pytest.raises(hosts.HostsError, match=rf"host 1: the coordinator 127.0.0.1:{port} did not answer within 1 s"):
        rendezvous.meet(f"127.0.0.1:{port}", 2, 1, 1.0, {})
    with socket.create_server(("127.0.0.1", port)):  # takes connections and says nothing
        with pytest.raises(hosts.HostsError, match="something else listens there"):
            rendezvous.meet(f"127.0.0.1:{port}", 2, 1, 1.0, {})
        with pytest.raises(hosts.HostsError, match=f"host 0 cannot listen at port {port}"):
            rendezvous.meet(f"127.0.0.1:{port}", 2, 0, 1.0, {})


def test_strangers_at_the_port_and_a_host_that_was_started_again_do_no_harm():
    port = free_port()

    def stranger(words):
        while True:
            try:
                sock = socket.create_connection(("127.0.0.1", port), timeout=5)
            except OSError:
                time.sleep(0.05)
                continue
            sock.sendall(words)
            return sock

    threads = [threading.Thread(target=stranger, args=(b"GET / HTTP/1.1\r\n\r\n",))]
    early = json.dumps({"hello": 1, "count": 3, "facts": {"old": True}}).encode() + b"\n"
    threads.append(threading.Thread(target=lambda: stranger(early).close()))
    for thread in threads:
        thread.start()

    def later(found):
        for thread in threads:  # the strangers came first
            thread.join(600)
        found.append(meet_rest(port))

    def meet_rest(port):
        lines = {}

        def one(index):
            lines[index] = rendezvous.meet(f"127.0.0.1:{port}", 3, index, 600.0, {})

        rest = [threading.Thread(target=one, args=(index,)) for index in (1, 2)]
        for thread in rest:
            thread.start()
        for thread in rest:
            thread.join(600)
        return lines

    found = []
    waiting = threading.Thread(target=later, args=(found,))
    waiting.start()
    mine = rendezvous.meet(f"127.0.0.1:{port}", 3, 0, 600.0, {})
    waiting.join(600)
    assert sorted(mine) == [1, 2] and sorted(found[0]) == [1, 2]
    close([mine, *found[0].values()])


@pytest.mark.parametrize(
    ("environment", "found"),
    [
        ({}, None),
        (
            {"SLURM_JOB_ID": "7", "SLURM_STEP_NODELIST": "node[3-4]", "SLURM_NTASKS": "2", "SLURM_PROCID": "1"}
            | {"SLURM_LOCALID": "0"},
            ("node3:61447", 2, 1, [0]),
        ),
        (
            {"SLURM_JOB_ID": "7", "SLURM_STEP_NODELIST": "node3", "SLURM_NTASKS": "1", "SLURM_PROCID": "0"}
            | {"SLURM_LOCALID": "0"},
            None,
        ),
        (
            {"OMPI_MCA_orte_hnp_uri": "4096.0;tcp://10.0.0.9:34911", "OMPI_COMM_WORLD_SIZE": "4"}
            | {"OMPI_COMM_WORLD_RANK": "3", "OMPI_COMM_WORLD_LOCAL_RANK": "1"},
            ("10.0.0.9:61441", 4, 3, [1]),
        ),
    ],
)
def test_slurm_and_open_mpi_are_recognised_and_a_single_process_stays_alone(monkeypatch, environment, found):
    for name in list(os.environ):
        if name.startswith(("SLURM_", "OMPI_", "JAX_COORDINATOR")):
            monkeypatch.delenv(name)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert hosts._detect(None, None, None, 1.0) == found


def test_alone_nothing_is_done_and_a_wish_to_stop_is_granted():
    with hosts.started() as group:
        assert group.first and (group.index, group.count) == (0, 1)
        agreed = group.stage()
        assert [agreed(3, False), agreed(3, True)] == [False, True]
        assert group.from_first("name", lambda: "made") == "made"


def test_open_mpi_5_which_does_not_say_where_the_first_is_wants_that_alone(monkeypatch):
    monkeypatch.delenv("OMPI_MCA_orte_hnp_uri", raising=False)
    monkeypatch.setenv("OMPI_COMM_WORLD_SIZE", "4")
    monkeypatch.setenv("OMPI_COMM_WORLD_RANK", "3")
    with pytest.raises(hosts.HostsError, match="the count 4 and the index 3, and no coordinator"):
        hosts._detect(None, None, None, 1.0)
    assert hosts._detect("first:1", None, None, 1.0) == ("first:1", 4, 3, None)


@pytest.mark.parametrize(
    ("how", "match"),
    [
        (dict(coordinator="here:1", count=2), "the coordinator here:1 and the count 2, and no index; give"),
        (dict(count=2, index=0), "and no coordinator"),
        (dict(coordinator="here", count=2, index=0), "'here'; it must be HOST:PORT"),
        (dict(coordinator="here:1", count=2, index=2), "index is 2; with 2 hosts"),
    ],
)
def test_half_an_address_is_refused(how, match):
    with pytest.raises(hosts.HostsError, match=match), hosts.started(**how):
        pass


@pytest.fixture(autouse=True)
def exits(monkeypatch, request):
    """Exit statuses of hosts that end on another's account, in place of the end of this process."""
    found, meant = [], "exits" in request.function.__code__.co_varnames

    def leave(status):
        found.append(status)
        raise SystemExit  # of the thread

    monkeypatch.setattr(hosts, "_exit", leave)
    monkeypatch.setattr(hosts.atexit, "register", lambda *what: None)
    yield found
    assert meant or found == [], "a host ended on another's account"


# --- leaving together -------------------------------------------------------------------------------------------------


def groups(count):
    """Hosts in one process, connected in a star."""
    ends = {i: socket.socketpair() for i in range(1, count)}
    first = hosts._Group(0, count, {i: rendezvous.Line(a) for i, (a, _) in ends.items()}, 30.0)
    return [first, *(hosts._Group(i, count, {0: rendezvous.Line(b)}, 30.0) for i, (_, b) in ends.items())]


class Devices:
    """A step is done when every host has begun it, and a loop is at most two steps ahead of what is done."""

    def __init__(self, count):
        self.begun, self.changed = [0] * count, threading.Condition()

    def step(self, host, number):
        with self.changed:
            self.begun[host] = number + 1
            self.changed.notify_all()
            assert self.changed.wait_for(lambda: min(self.begun) >= number, timeout=600), "a collective never ended"


@pytest.mark.parametrize("seed", range(6))
def test_all_leave_after_the_same_step_whoever_wants_to_and_whenever(seed):
    rng = random.Random(seed)
    count, stages = rng.choice([2, 3, 5]), [20, 30]
    wants = {rng.randrange(count): rng.randrange(50) for _ in range(rng.choice([1, 2]))}
    group, devices = groups(count), Devices(count)
    left = {}

    def host(index):
        mine = random.Random(100 * seed + index)
        for number, steps in enumerate(stages):
            agreed = group[index].stage()
            for done in range(steps + 1):
                at = number * stages[0] + done
                if agreed(done, at >= wants.get(index, 1000)):
                    left[index] = (number, done)
                    return
                if done < steps:
                    devices.step(index, at)
                    time.sleep(mine.choice([0.0, 0.0, 0.003, 0.01]))
        left[index] = "the end"

    threads = [threading.Thread(target=host, args=(index,)) for index in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(600)
    assert len(left) == count and len(set(left.values())) == 1
    first = min(wants.values())
    assert next(iter(left.values())) >= (*divmod(first, stages[0])[:1], 0)
    leave_all(group)


def leave_all(group):
    threads = [threading.Thread(target=each.leave, args=(0, "")) for each in group]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(600)
    assert not any(thread.is_alive() for thread in threads)


def test_a_step_in_which_nobody_wants_to_stop_says_nothing_to_anybody():
    group = groups(2)
    said = []
    for each in group:
        each._tell = lambda **message: said.append(message)
    agreed = group[0].stage()
    assert not any(agreed(done, False) for done in range(1000))
    assert [message for message in said if "alive" not in message] == []
    for each in group:
        del each._tell
    leave_all(group)


def test_what_the_first_makes_is_what_all_have():
    group = groups(3)
    found = [None] * 3

    def ask(index):
        found[index] = group[index].from_first("path", lambda: {"from": index})

    threads = [threading.Thread(target=ask, args=(index,)) for index in (2, 1, 0)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(600)
    assert found == [{"from": 0}] * 3
    leave_all(group)


def end(group):
    for each in group:
        each._closed = True
    for each in group:
        each._thread.join(600)


def wait_for(condition):
    until = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.01)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_silent_host_is_given_up_and_one_that_only_has_nothing_to_say_is_not(exits, capfd):
    mine, theirs = socket.socketpair()
    started = time.monotonic()
    group = hosts._Group(1, 2, {0: rendezvous.Line(mine)}, 1.0)
    line = rendezvous.Line(theirs)
    while time.monotonic() - started < 3.0:  # three times as long as it may be silent
        line.send(alive=True)
        time.sleep(0.1)
    assert exits == []
    wait_for(lambda: exits)  # and now it says nothing
    assert exits[0] == hosts.LOST
    assert "host 1 stops: host 0 is gone (there was no sign of it for 1 s); all hosts can" in capfd.readouterr().err
    end([group])
    line.close()


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_host_that_leaves_with_an_error_ends_the_others_with_its_status_and_reason(exits, capfd, monkeypatch):
    monkeypatch.setattr(hosts, "_GRACE", 0.5)
    group = groups(3)
    thread = threading.Thread(target=group[2].leave, args=(2, "CheckpointError: the disk is full"))
    thread.start()
    wait_for(lambda: len(exits) >= 2)
    said = capfd.readouterr().err
    for index in (0, 1):
        assert f"host {index} stops: host 2 has left (CheckpointError: the disk is full); all hosts" in said
    assert set(exits) == {2}
    thread.join(600)
    end(group)


# --- two processes ----------------------------------------------------------------------------------------------------


class Job:
    """Processes of `hosts_cases.py` that run one job, each with what it prints."""

    def __init__(self, out, cache, *, count=2, **asked):
        self.out, port = out, free_port()
        out.mkdir(parents=True, exist_ok=True)
        environment = os.environ | {"PYTHONUNBUFFERED": "1", "JAX_PLATFORMS": "cpu"}
        environment |= {"JAX_COMPILATION_CACHE_DIR": str(cache), "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.2"}
        self.logs = [out / f"host{i}-{port}.log" for i in range(count)]
        self.processes = []
        for i, path in enumerate(self.logs):
            own = {name: value[i] if isinstance(value, list) else value for name, value in asked.items()}
            words = json.dumps({"index": i, "count": count, "port": port, "out": str(out)} | own)
            with open(path, "w") as log:
                self.processes.append(
                    subprocess.Popen([sys.executable, CASES, words], stdout=log, stderr=log, env=environment, cwd=ROOT)
                )

    def said(self, host):
        return self.logs[host].read_text()

    def when(self, host, line):
        """Wait until a host has printed a line."""
        until = time.monotonic() + 1800
        while f"{line}\n" not in self.said(host):
            assert time.monotonic() < until and self.processes[host].poll() is None, self.said(host)[-3000:]
            time.sleep(0.02)
        return self

    def ended(self):
        """The exit statuses; nobody is left behind, whatever happens."""
        try:
            return [process.wait(timeout=1800) for process in self.processes]
        finally:
            for process in self.processes:
                process.kill()

    def finished(self):
        assert self.ended() == [0] * len(self.processes), "\n\n".join(map(self.said, range(len(self.logs))))[-5000:]
        return self

    def result(self, stage):
        with np.load(self.out / f"{stage}.npz") as saved:
            return [saved[name] for name in saved.files]


STAGES = {"sft": 4, "ppo": 2}


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("compiled")


@pytest.fixture(scope="module")
def one(tmp_path_factory, cache):
    """What a single process makes of it, on as many devices."""
    return Job(tmp_path_factory.mktemp("one"), cache, count=1, devices=4, stages=STAGES, save_every=1).finished()


def close_to(job, other, stages=STAGES, atol=1e-5):
    for stage in stages:
        mine, theirs = job.result(stage), other.result(stage)
        assert len(mine) == len(theirs)
        for x, y in zip(mine, theirs):
            assert x.shape == y.shape and x.dtype == y.dtype
            np.testing.assert_allclose(x.astype(float), y.astype(float), rtol=0, atol=atol)


def test_two_processes_of_which_one_is_killed_go_on_to_what_one_process_makes(one, cache, tmp_path):
    job = Job(tmp_path, cache, stages=STAGES, save_every=1, pause=0.3).when(1, "sft 2")
    job.processes[1].send_signal(signal.SIGKILL)
    assert job.ended() == [hosts.LOST, -signal.SIGKILL]
    assert "host 0 stops: host 1 is gone (its connection was closed); all hosts can go on" in job.said(0)
    again = Job(tmp_path, cache, stages=STAGES, save_every=1).finished()
    close_to(again, one)
    for stage in STAGES:
        rows, theirs = metrics.read(tmp_path / stage), metrics.read(one.out / stage)
        assert [row["step"] for row in rows] == [row["step"] for row in theirs]
        assert all(abs(row["loss"] - other["loss"]) < 1e-5 for row, other in zip(rows, theirs) if "loss" in row)


@pytest.mark.slow  # its short form stops a group of hosts in one process
def test_a_signal_to_one_process_stops_both_at_one_step_and_one_process_goes_on(one, cache, tmp_path):
    stages = {"sft": 4}
    job = Job(tmp_path, cache, stages=stages, save_every=None, pause=0.3).when(1, "sft 1")
    job.processes[1].send_signal(signal.SIGTERM)
    assert job.ended() == [75, 75], job.said(0)[-3000:] + job.said(1)[-3000:]
    said = {line for host in (0, 1) for line in job.said(host).splitlines() if line.startswith("Preempted")}
    assert len(said) == 1 and said.pop().endswith("a checkpoint of this step is on disk")
    close_to(Job(tmp_path, cache, count=1, devices=4, stages=stages).finished(), one, stages)


def test_data_that_differ_are_refused_by_both_before_jax_is_started(cache, tmp_path):
    job = Job(tmp_path, cache, stages={}, facts=[{"data": "x"}, {"data": "y"}])
    assert job.ended() == [2, 2]
    for host in (0, 1):
        assert job.said(host) == "HostsError: host 1 differs from host 0 in data (y, not x)\n"


# --- long forms -------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("mesh", [{"data": -1}, {"fsdp": 4}, {"tensor": 4}, {"fsdp": 2, "tensor": 2}], ids=str)
@pytest.mark.parametrize("victim", [0, 1])
def test_killed_anywhere_and_gone_on_with_is_bit_for_bit_the_run_that_was_not(cache, tmp_path, mesh, victim):
    stages = {"sft": 6, "ppo": 4}
    how = {"stages": stages, "save_every": 1, "mesh": mesh}
    single = Job(tmp_path / "single", cache, count=1, devices=4, **how).finished()
    whole = Job(tmp_path / "whole", cache, **how).finished()
    close_to(whole, single, stages)
    for place in ("sft 2", "sft 6", "ppo 2"):
        job = Job(tmp_path / "killed", cache, pause=0.2, **how).when(victim, place)
        job.processes[victim].send_signal(signal.SIGKILL)
        statuses = job.ended()
        assert statuses[victim] == -signal.SIGKILL and statuses[1 - victim] == hosts.LOST, job.said(1 - victim)[-3000:]
        assert f"host {1 - victim} stops: host {victim} is gone" in job.said(1 - victim)
    close_to(Job(tmp_path / "killed", cache, **how).finished(), whole, stages, atol=0.0)


@pytest.mark.slow
@pytest.mark.parametrize("numbers", [(0,), (1,), (0, 1)], ids=str)
def test_stopped_by_signals_on_some_hosts_all_save_one_step_and_another_number_of_hosts_goes_on(
    one, cache, tmp_path, numbers
):
    job = Job(tmp_path, cache, stages=STAGES, save_every=None, pause=0.3).when(numbers[0], "ppo 1")
    for number in numbers:
        job.processes[number].send_signal(signal.SIGTERM)
    assert job.ended() == [75, 75]
    close_to(Job(tmp_path, cache, count=4, devices=1, stages=STAGES).finished(), one)


SCRIPT = str(ROOT / "experiments" / "instructgpt.py")
TINY = [
    *("--preset", "smoke"),
    *("--pretrain.documents", "600"),
    *("--pretrain.steps", "8"),
    *("--pretrain.batch", "16"),
    *("--sft.demonstrations", "64"),
    *("--sft.epochs", "1"),
    *("--sft.mix-epochs", "1"),
    *("--comparisons.prompts", "16"),
    *("--comparisons.max-k", "4"),
    *("--evaluation.prompts", "16"),
    *("--evaluation.best-of-prompts", "4"),
    *("--evaluation.best-of", "2"),
    *("--evaluation.skills", "10"),
    *("--evaluation.pretraining-rows", "8"),
    *("--ppo.iterations", "3"),
    *("--ppo.batch", "16"),
    *("--saves", "3"),
]


def main_job(cache, log, *arguments, count=2):
    """The processes of the main job, as its users start them."""
    environment = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    environment |= {"JAX_PLATFORMS": "cpu", "JAX_COMPILATION_CACHE_DIR": str(cache), "COLUMNS": "120"}
    who = ["--hosts.coordinator", f"127.0.0.1:{free_port()}", "--hosts.count", count] if count > 1 else []
    processes = []
    for index in range(count):
        words = [*arguments, *who, *(["--hosts.index", index] if who else [])]
        with open(f"{log}{index}", "w") as file:
            command = [sys.executable, SCRIPT, *map(str, words)]
            processes.append(subprocess.Popen(command, stdout=file, stderr=file, cwd=ROOT, env=environment))
    return processes


def when_logged(processes, folder, stage, step):
    until = time.monotonic() + 1800
    wanted, path = f'"stage": "{stage}", "step": {step},', folder / "metrics.jsonl"
    while not path.exists() or wanted not in path.read_text():
        assert time.monotonic() < until and all(process.poll() is None for process in processes)
        time.sleep(0.05)


def results_of(folder):
    results = json.loads((folder / "results.json").read_text())
    return {name: value for name, value in results.items() if name not in ("seconds", "peak_rss_mb")}


@pytest.mark.slow
def test_the_main_job_on_two_hosts_killed_and_stopped_on_the_way_ends_in_the_results_of_one_process(cache, tmp_path):
    single = [*TINY, "--mesh.data", 2, "--mesh.simulate", 2, "--out", tmp_path / "one"]
    assert [process.wait() for process in main_job(cache, tmp_path / "log", *single, count=1)] == [0]
    out, log = tmp_path / "two", tmp_path / "two.log"
    both = main_job(cache, log, *TINY, "--mesh.data", 2, "--out", out)
    when_logged(both, out, "sft", 1)
    both[1].send_signal(signal.SIGTERM)
    assert [process.wait(timeout=1800) for process in both] == [75, 75]
    said = [pathlib.Path(f"{log}{i}").read_text().splitlines()[-1] for i in (0, 1)]
    assert said[0] == said[1] and said[0].endswith("a checkpoint of this step is on disk; go on with --resume")
    both = main_job(cache, log, "--resume", out)
    when_logged(both, out, "ppo", 1)
    both[0].send_signal(signal.SIGKILL)
    assert [process.wait(timeout=1800) for process in both] == [-signal.SIGKILL, hosts.LOST]
    assert "host 1 stops: host 0 is gone" in pathlib.Path(f"{log}1").read_text()
    both = main_job(cache, log, "--resume", out)
    assert [process.wait() for process in both] == [0, 0], pathlib.Path(f"{log}0").read_text()[-3000:]
    assert results_of(out) == results_of(tmp_path / "one")
    assert metrics.read(out) == metrics.read(tmp_path / "one")
    # The second host writes nothing, and says nothing but what Gloo does.
    assert [line for line in pathlib.Path(f"{log}1").read_text().splitlines() if not line.startswith("[Gloo]")] == []


@pytest.mark.slow
def test_the_main_job_says_which_host_has_other_settings_or_data_or_is_not_there(cache, tmp_path):
    files = [tmp_path / "a.jsonl", tmp_path / "b.jsonl"]
    for file, words in zip(files, ("yes", "no")):
        file.write_text(json.dumps({"chosen": f"\n\nHuman: Hi\n\nAssistant: {words}", "rejected": "x"}) + "\n")
    cases = [
        ([["--seed", "0"], ["--seed", "1"]], "host 1 differs from host 0 in --seed (1, not 0)"),
        ([["--data.path", "d.jsonl"]] * 2, "host 1 differs from host 0 in the contents of --data.path"),
    ]
    for number, (own, wanted) in enumerate(cases):
        port, running = free_port(), []
        for index in (0, 1):
            folder = tmp_path / f"{number}{index}"
            folder.mkdir()
            (folder / "d.jsonl").write_bytes(files[index].read_bytes())
            words = ["--hosts.coordinator", f"127.0.0.1:{port}", "--hosts.count", "2", "--hosts.index", str(index)]
            command = [sys.executable, SCRIPT, *own[index], *words]
            running.append(subprocess.Popen(command, stderr=subprocess.PIPE, text=True, cwd=folder))
        for process in running:
            assert wanted in process.communicate(timeout=1800)[1] and process.returncode == 2
        assert not any((tmp_path / f"{number}{index}" / "runs").exists() for index in (0, 1))
    words = ["--hosts.coordinator", f"127.0.0.1:{free_port()}", "--hosts.count", "2", "--hosts.timeout", "3"]
    for index, wanted in ((0, "after 3 s, of 2 hosts these had not come: 1"), (1, "did not answer within 3 s")):
        command = [sys.executable, SCRIPT, *words, "--hosts.index", str(index)]
        found = subprocess.run(command, stderr=subprocess.PIPE, text=True, cwd=tmp_path, timeout=300, check=False)
        assert found.returncode == 2 and wanted in found.stderr and found.stderr.count("\n") == 1
