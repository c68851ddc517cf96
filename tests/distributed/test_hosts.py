"""Several hosts on one machine: rendezvous, agreement on when to stop, and equality with a single process."""

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


# --- rendezvous -------------------------------------------------------------------------------------------------------


def run_threads(fn, arguments):
    """Calls ``fn`` with each tuple of arguments in a separate thread and waits for all of them."""
    threads = [threading.Thread(target=fn, args=each) for each in arguments]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(600)
    assert not any(thread.is_alive() for thread in threads)


def connect_all(facts, *, count=None, timeout=600.0, indices=None):
    """Returns the connections or the error of each host."""
    port, count = free_port(), count or len(facts)
    results = {}

    def one(place, index):
        try:
            results[place] = rendezvous.connect(f"127.0.0.1:{port}", count, index, timeout, facts[place])
        except hosts.HostsError as error:
            results[place] = str(error)

    run_threads(one, enumerate(indices or range(len(facts))))
    return [results[place] for place in range(len(facts))]


def close(connections):
    for each in connections:
        for connection in each.values():
            connection.close()


def test_hosts_with_equal_facts_connect_in_a_star():
    connections = connect_all([{"--seed": 0, "data": "ab"}] * 3)
    assert [sorted(each) for each in connections] == [[1, 2], [0], [0]]
    connections[1][0].send(word="up")
    assert connections[0][1].wait(time.monotonic() + 10) == {"word": "up"}
    close(connections)


def test_all_hosts_raise_an_error_that_names_the_differences():
    plain = {"--seed": 0, "--ppo.batch": 64, "the contents of --data.path": "a" * 64}
    others = [plain | {"--seed": 1}, plain | {"the contents of --data.path": "b" * 64, "--only.here": None}]
    errors = connect_all([plain, *others])
    assert set(errors) == {
        "host 1 differs from host 0 in --seed (1, not 0); host 2 differs from host 0 in the contents of --data.path "
        f"({'b' * 57}..., not {'a' * 57}...)"
    }


def test_a_duplicate_index_and_a_different_host_count_are_errors():
    errors = connect_all([{}, {}, {}], indices=[0, 1, 1])
    assert errors[0] == "two hosts have the index 1" and errors[0] in errors[1:]
    port = free_port()
    errors = {}

    def one(index, count):
        with pytest.raises(hosts.HostsError) as raised:
            rendezvous.connect(f"127.0.0.1:{port}", count, index, 600.0, {})
        errors[index] = str(raised.value)

    run_threads(one, ((0, 2), (1, 3)))
    assert errors[0] == errors[1] == "host 1 differs from host 0 in the number of hosts (3, not 2)"


def test_connected_hosts_name_the_missing_hosts():
    errors = connect_all([{}, {}], count=4, timeout=2.0)
    assert set(errors) == {"of 4 hosts, these did not connect within 2 s: 2, 3"}


def test_a_coordinator_that_does_not_answer_is_an_error_within_the_timeout():
    port = free_port()
    with pytest.raises(hosts.HostsError, match=rf"host 1: the coordinator 127.0.0.1:{port} did not answer within 1 s"):
        rendezvous.connect(f"127.0.0.1:{port}", 2, 1, 1.0, {})
    with socket.create_server(("127.0.0.1", port)):  # accepts connections but does not answer
        with pytest.raises(hosts.HostsError, match="another program is listening on this port"):
            rendezvous.connect(f"127.0.0.1:{port}", 2, 1, 1.0, {})
        with pytest.raises(hosts.HostsError, match=f"host 0 cannot listen on port {port}"):
            rendezvous.connect(f"127.0.0.1:{port}", 2, 0, 1.0, {})


def test_a_host_that_exits_before_the_others_connect_is_waited_for_again():
    port, connections = free_port(), {}

    def one(index):
        connections[index] = rendezvous.connect(f"127.0.0.1:{port}", 3, index, 60.0, {})

    threads = [threading.Thread(target=one, args=(index,)) for index in (0, 2, 1)]
    threads[0].start()
    while True:
        try:
            exiting = socket.create_connection(("127.0.0.1", port), timeout=5)
            break
        except OSError:
            time.sleep(0.05)
    exiting.sendall(json.dumps({"hello": 1, "count": 3, "facts": {"old": True}}).encode() + b"\n")
    assert exiting.recv(1), "host 0 has accepted the connection"
    exiting.close()
    threads[1].start()
    time.sleep(0.5)
    threads[2].start()
    for thread in threads:
        thread.join(60)
    assert sorted(connections[0]) == [1, 2] and sorted(connections) == [0, 1, 2]
    close([connections[0], connections[1], connections[2]])


def test_other_clients_at_the_port_and_a_restarted_host_are_handled():
    port = free_port()

    def send(content):
        while True:
            try:
                sock = socket.create_connection(("127.0.0.1", port), timeout=5)
            except OSError:
                time.sleep(0.05)
                continue
            sock.sendall(content)
            return sock

    threads = [threading.Thread(target=send, args=(b"GET / HTTP/1.1\r\n\r\n",))]
    early = json.dumps({"hello": 1, "count": 3, "facts": {"old": True}}).encode() + b"\n"
    threads.append(threading.Thread(target=lambda: send(early).close()))
    for thread in threads:
        thread.start()
    others = {}

    def one(index):
        for thread in threads:  # the other clients connect first
            thread.join(600)
        others[index] = rendezvous.connect(f"127.0.0.1:{port}", 3, index, 600.0, {})

    waiting = threading.Thread(target=run_threads, args=(one, ((1,), (2,))))
    waiting.start()
    first = rendezvous.connect(f"127.0.0.1:{port}", 3, 0, 600.0, {})
    waiting.join(600)
    assert sorted(first) == [1, 2] and sorted(others) == [1, 2]
    close([first, *others.values()])


@pytest.mark.parametrize(
    ("environment", "job"),
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
def test_slurm_and_open_mpi_jobs_are_detected_and_a_single_process_is_not_a_job(monkeypatch, environment, job):
    for name in list(os.environ):
        if name.startswith(("SLURM_", "OMPI_", "JAX_COORDINATOR")):
            monkeypatch.delenv(name)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert hosts._detect(None, None, None, 1.0) == job


def test_a_single_process_needs_no_agreement():
    with hosts.connect() as group:
        assert group.first and (group.index, group.count) == (0, 1)
        agreed = group.stop_agreement()
        assert [agreed(3, False), agreed(3, True)] == [False, True]
        assert group.broadcast_from_first("name", lambda: "value") == "value"


def test_open_mpi_5_needs_only_the_coordinator(monkeypatch):
    monkeypatch.delenv("OMPI_MCA_orte_hnp_uri", raising=False)
    monkeypatch.setenv("OMPI_COMM_WORLD_SIZE", "4")
    monkeypatch.setenv("OMPI_COMM_WORLD_RANK", "3")
    with pytest.raises(hosts.HostsError, match="it has count 4 and index 3 but no coordinator"):
        hosts._detect(None, None, None, 1.0)
    assert hosts._detect("first:1", None, None, 1.0) == ("first:1", 4, 3, None)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        (dict(coordinator="here:1", count=2), "it has coordinator here:1 and count 2 but no index"),
        (dict(count=2, index=0), "but no coordinator"),
        (dict(coordinator="here", count=2, index=0), "'here'; it must be HOST:PORT"),
        (dict(coordinator="here:1", count=2, index=2), "index is 2; with 2 hosts"),
    ],
)
def test_an_incomplete_or_invalid_address_is_an_error(options, match):
    with pytest.raises(hosts.HostsError, match=match), hosts.connect(**options):
        pass


@pytest.fixture(autouse=True)
def exits(monkeypatch, request):
    """Collects the statuses of forced exits, which end a thread here instead of this process."""
    statuses, expected = [], "exits" in request.function.__code__.co_varnames

    def leave(status):
        statuses.append(status)
        raise SystemExit  # ends only the thread

    monkeypatch.setattr(hosts, "_exit", leave)
    monkeypatch.setattr(hosts.atexit, "register", lambda *what: None)
    yield statuses
    assert expected or statuses == [], "a host was forced to exit"


# --- agreement on when to stop ----------------------------------------------------------------------------------------


def groups(count):
    """Returns hosts in one process, connected in a star."""
    pairs = {i: socket.socketpair() for i in range(1, count)}
    first = hosts._Group(0, count, {i: rendezvous.Connection(a) for i, (a, _) in pairs.items()}, 30.0)
    return [first, *(hosts._Group(i, count, {0: rendezvous.Connection(b)}, 30.0) for i, (_, b) in pairs.items())]


class Devices:
    """Simulated collectives. A step ends when every host has started it; loops run at most two steps ahead."""

    def __init__(self, count):
        self.started, self.changed = [0] * count, threading.Condition()

    def step(self, host, number):
        with self.changed:
            self.started[host] = number + 1
            self.changed.notify_all()
            assert self.changed.wait_for(lambda: min(self.started) >= number, timeout=600), "a collective never ended"


@pytest.mark.parametrize("seed", range(6))
def test_all_hosts_stop_after_the_same_step(seed):
    rng = random.Random(seed)
    count, stages = rng.choice([2, 3, 5]), [20, 30]
    wants = {rng.randrange(count): rng.randrange(50) for _ in range(rng.choice([1, 2]))}
    group, devices = groups(count), Devices(count)
    left = {}

    def host(index):
        delays = random.Random(100 * seed + index)
        for number, steps in enumerate(stages):
            agreed = group[index].stop_agreement()
            for done in range(steps + 1):
                at = number * stages[0] + done
                if agreed(done, at >= wants.get(index, 1000)):
                    left[index] = (number, done)
                    return
                if done < steps:
                    devices.step(index, at)
                    time.sleep(delays.choice([0.0, 0.0, 0.003, 0.01]))
        left[index] = "the end"

    run_threads(host, [(index,) for index in range(count)])
    assert len(left) == count and len(set(left.values())) == 1
    first = min(wants.values())
    assert next(iter(left.values())) >= (*divmod(first, stages[0])[:1], 0)
    leave_all(group)


def leave_all(group):
    run_threads(lambda host: host.leave(0, ""), [(host,) for host in group])


def test_no_message_is_sent_if_no_host_wants_to_stop():
    group = groups(2)
    sent = []
    for host in group:
        host._send = lambda **message: sent.append(message)
    agreed = group[0].stop_agreement()
    assert not any(agreed(done, False) for done in range(1000))
    assert [message for message in sent if "heartbeat" not in message] == []
    for host in group:
        del host._send
    leave_all(group)


def test_all_hosts_receive_the_value_of_the_first_host():
    group = groups(3)
    values = [None] * 3

    def receive(index):
        values[index] = group[index].broadcast_from_first("path", lambda: {"from": index})

    run_threads(receive, [(2,), (1,), (0,)])
    assert values == [{"from": 0}] * 3
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
def test_a_silent_host_is_lost_and_a_host_that_sends_heartbeats_is_not(exits, capfd):
    own, other = socket.socketpair()
    started = time.monotonic()
    group = hosts._Group(1, 2, {0: rendezvous.Connection(own)}, 1.0)
    connection = rendezvous.Connection(other)
    while time.monotonic() - started < 3.0:  # three times as long as the heartbeat timeout
        connection.send(heartbeat=True)
        time.sleep(0.1)
    assert exits == []
    wait_for(lambda: exits)  # after the last heartbeat
    assert exits[0] == hosts.HOST_LOST
    assert "host 1 exits: host 0 was lost (it sent nothing for 1 s); resume all hosts" in capfd.readouterr().err
    end([group])
    connection.close()


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_failed_host_stops_the_others_with_its_status_and_reason(exits, capfd, monkeypatch):
    monkeypatch.setattr(hosts, "_GRACE", 0.5)
    group = groups(3)
    thread = threading.Thread(target=group[2].leave, args=(2, "CheckpointError: the disk is full"))
    thread.start()
    wait_for(lambda: len(exits) >= 2)
    printed = capfd.readouterr().err
    for index in (0, 1):
        assert f"host {index} exits: host 2 failed (CheckpointError: the disk is full); resume all hosts" in printed
    assert set(exits) == {2}
    thread.join(600)
    end(group)


# --- two processes ----------------------------------------------------------------------------------------------------


class Job:
    """Processes of `hosts_cases.py` that run one job, each with a separate log."""

    def __init__(self, out, cache, *, count=2, **options):
        self.out, port = out, free_port()
        out.mkdir(parents=True, exist_ok=True)
        environment = os.environ | {"PYTHONUNBUFFERED": "1", "JAX_PLATFORMS": "cpu"}
        environment |= {"JAX_COMPILATION_CACHE_DIR": str(cache), "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.2"}
        self.logs = [out / f"host{i}-{port}.log" for i in range(count)]
        self.processes = []
        for i, path in enumerate(self.logs):
            own = {name: value[i] if isinstance(value, list) else value for name, value in options.items()}
            argument = json.dumps({"index": i, "count": count, "port": port, "out": str(out)} | own)
            with open(path, "w") as log:
                self.processes.append(
                    subprocess.Popen(
                        [sys.executable, CASES, argument], stdout=log, stderr=log, env=environment, cwd=ROOT
                    )
                )

    def printed(self, host):
        return self.logs[host].read_text()

    def wait_for_line(self, host, line):
        """Waits until a host has printed a line."""
        until = time.monotonic() + 1800
        while f"{line}\n" not in self.printed(host):
            assert time.monotonic() < until and self.processes[host].poll() is None, self.printed(host)[-3000:]
            time.sleep(0.02)
        return self

    def statuses(self):
        """Returns the exit statuses of all processes; kills processes that do not end."""
        try:
            return [process.wait(timeout=1800) for process in self.processes]
        finally:
            for process in self.processes:
                process.kill()

    def succeed(self):
        assert self.statuses() == [0] * len(self.processes), "\n\n".join(map(self.printed, range(len(self.logs))))[
            -5000:
        ]
        return self

    def result(self, stage):
        with np.load(self.out / f"{stage}.npz") as saved:
            return [saved[name] for name in saved.files]


STAGES = {"sft": 4, "ppo": 2}


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("compiled")


@pytest.fixture(scope="module")
def single(tmp_path_factory, cache):
    """Runs the same job in a single process with the same number of devices."""
    return Job(tmp_path_factory.mktemp("single"), cache, count=1, devices=4, stages=STAGES, save_every=1).succeed()


def assert_close(job, other, stages=STAGES, atol=1e-5):
    for stage in stages:
        arrays, expected = job.result(stage), other.result(stage)
        assert len(arrays) == len(expected)
        for x, y in zip(arrays, expected):
            assert x.shape == y.shape and x.dtype == y.dtype
            np.testing.assert_allclose(x.astype(float), y.astype(float), rtol=0, atol=atol)


@pytest.mark.slow
def test_two_processes_resume_after_one_is_killed_and_match_a_single_process(single, cache, tmp_path):
    job = Job(tmp_path, cache, stages=STAGES, save_every=1, pause=0.3).wait_for_line(1, "sft 2")
    job.processes[1].send_signal(signal.SIGKILL)
    assert job.statuses() == [hosts.HOST_LOST, -signal.SIGKILL]
    assert "host 0 exits: host 1 was lost (its connection was closed); resume all hosts" in job.printed(0)
    again = Job(tmp_path, cache, stages=STAGES, save_every=1).succeed()
    assert_close(again, single)
    for stage in STAGES:
        rows, expected = metrics.read(tmp_path / stage), metrics.read(single.out / stage)
        assert [row["step"] for row in rows] == [row["step"] for row in expected]
        assert all(abs(row["loss"] - other["loss"]) < 1e-5 for row, other in zip(rows, expected) if "loss" in row)


@pytest.mark.slow  # test_all_hosts_stop_after_the_same_step is the fast version
def test_a_signal_to_one_process_stops_both_after_the_same_step_and_one_process_resumes(single, cache, tmp_path):
    stages = {"sft": 4}
    job = Job(tmp_path, cache, stages=stages, save_every=None, pause=0.3).wait_for_line(1, "sft 1")
    job.processes[1].send_signal(signal.SIGTERM)
    assert job.statuses() == [75, 75], job.printed(0)[-3000:] + job.printed(1)[-3000:]
    messages = {line for host in (0, 1) for line in job.printed(host).splitlines() if line.startswith("Preempted")}
    assert len(messages) == 1 and messages.pop().endswith("a checkpoint of this step is on disk")
    assert_close(Job(tmp_path, cache, count=1, devices=4, stages=stages).succeed(), single, stages)


def test_both_hosts_refuse_different_data_before_jax_starts(cache, tmp_path):
    job = Job(tmp_path, cache, stages={}, facts=[{"data": "x"}, {"data": "y"}])
    assert job.statuses() == [2, 2]
    for host in (0, 1):
        assert job.printed(host) == "HostsError: host 1 differs from host 0 in data (y, not x)\n"


# --- slow tests -------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("mesh", [{"data": -1}, {"fsdp": 4}, {"tensor": 4}, {"fsdp": 2, "tensor": 2}], ids=str)
@pytest.mark.parametrize("victim", [0, 1])
def test_a_killed_and_resumed_run_is_bit_identical_to_an_uninterrupted_run(cache, tmp_path, mesh, victim):
    stages = {"sft": 6, "ppo": 4}
    options = {"stages": stages, "save_every": 1, "mesh": mesh}
    single = Job(tmp_path / "single", cache, count=1, devices=4, **options).succeed()
    uninterrupted = Job(tmp_path / "uninterrupted", cache, **options).succeed()
    assert_close(uninterrupted, single, stages)
    for place in ("sft 2", "sft 6", "ppo 2"):
        job = Job(tmp_path / "killed", cache, pause=0.2, **options).wait_for_line(victim, place)
        job.processes[victim].send_signal(signal.SIGKILL)
        statuses = job.statuses()
        assert statuses[victim] == -signal.SIGKILL and statuses[1 - victim] == hosts.HOST_LOST, job.printed(1 - victim)[
            -3000:
        ]
        assert f"host {1 - victim} exits: host {victim} was lost" in job.printed(1 - victim)
    assert_close(Job(tmp_path / "killed", cache, **options).succeed(), uninterrupted, stages, atol=0.0)


@pytest.mark.slow
@pytest.mark.parametrize("numbers", [(0,), (1,), (0, 1)], ids=str)
def test_after_signals_to_some_hosts_all_save_the_same_step_and_another_host_count_resumes(
    single, cache, tmp_path, numbers
):
    job = Job(tmp_path, cache, stages=STAGES, save_every=None, pause=0.3).wait_for_line(numbers[0], "ppo 1")
    for number in numbers:
        job.processes[number].send_signal(signal.SIGTERM)
    assert job.statuses() == [75, 75]
    assert_close(Job(tmp_path, cache, count=4, devices=1, stages=STAGES).succeed(), single)


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
    """Starts the processes of instructgpt.py as a user would."""
    environment = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    environment |= {"JAX_PLATFORMS": "cpu", "JAX_COMPILATION_CACHE_DIR": str(cache), "COLUMNS": "120"}
    address = ["--hosts.coordinator", f"127.0.0.1:{free_port()}", "--hosts.count", count] if count > 1 else []
    processes = []
    for index in range(count):
        flags = [*arguments, *address, *(["--hosts.index", index] if address else [])]
        with open(f"{log}{index}", "w") as file:
            command = [sys.executable, SCRIPT, *map(str, flags)]
            processes.append(subprocess.Popen(command, stdout=file, stderr=file, cwd=ROOT, env=environment))
    return processes


def wait_for_log(processes, folder, stage, step):
    until = time.monotonic() + 1800
    wanted, path = f'"stage": "{stage}", "step": {step},', folder / "metrics.jsonl"
    while not path.exists() or wanted not in path.read_text():
        assert time.monotonic() < until and all(process.poll() is None for process in processes)
        time.sleep(0.05)


def results_of(folder):
    results = json.loads((folder / "results.json").read_text())
    return {name: value for name, value in results.items() if name not in ("seconds", "peak_rss_mb")}


@pytest.mark.slow
def test_instructgpt_on_two_hosts_matches_a_single_process_after_interruptions(cache, tmp_path):
    single = [*TINY, "--mesh.data", 2, "--mesh.simulate", 2, "--out", tmp_path / "one"]
    assert [process.wait() for process in main_job(cache, tmp_path / "log", *single, count=1)] == [0]
    out, log = tmp_path / "two", tmp_path / "two.log"
    both = main_job(cache, log, *TINY, "--mesh.data", 2, "--out", out)
    wait_for_log(both, out, "sft", 1)
    both[1].send_signal(signal.SIGTERM)
    assert [process.wait(timeout=1800) for process in both] == [75, 75]
    messages = [pathlib.Path(f"{log}{i}").read_text().splitlines()[-1] for i in (0, 1)]
    assert all("a checkpoint of this step is on disk; continue with --resume" in message for message in messages)
    both = main_job(cache, log, "--resume", out)
    wait_for_log(both, out, "ppo", 1)
    both[0].send_signal(signal.SIGKILL)
    assert [process.wait(timeout=1800) for process in both] == [-signal.SIGKILL, hosts.HOST_LOST]
    assert "host 1 exits: host 0 was lost" in pathlib.Path(f"{log}1").read_text()
    both = main_job(cache, log, "--resume", out)
    assert [process.wait() for process in both] == [0, 0], pathlib.Path(f"{log}0").read_text()[-3000:]
    assert results_of(out) == results_of(tmp_path / "one")
    assert metrics.read(out) == metrics.read(tmp_path / "one")
    # The second host writes no results and prints nothing; Gloo logs its connections.
    assert [line for line in pathlib.Path(f"{log}1").read_text().splitlines() if not line.startswith("[Gloo]")] == []


@pytest.mark.slow
def test_instructgpt_names_the_host_that_is_missing_or_has_different_settings_or_data(cache, tmp_path):
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
    for index, wanted in ((0, "of 2 hosts, these did not connect within 3 s: 1"), (1, "did not answer within 3 s")):
        command = [sys.executable, SCRIPT, *words, "--hosts.index", str(index)]
        found = subprocess.run(command, stderr=subprocess.PIPE, text=True, cwd=tmp_path, timeout=300, check=False)
        assert found.returncode == 2 and wanted in found.stderr and found.stderr.count("\n") == 1
