"""Multi-host runs: connecting the hosts, detecting lost hosts, and stopping all hosts after the same step.

All hosts run the same program, with one process each. Before JAX starts, the other hosts connect to the first one, the
coordinator, over plain sockets. All hosts raise an error, after a timeout at the latest, if a host is missing, if two
hosts have the same index, or if the ``facts`` of the hosts, such as settings or data digests, differ. The sockets stay
open to detect lost hosts and to agree on the step after which to stop. This communication does not involve the devices,
and a step sends no message unless a host wants to stop. For example::

    with hosts.connect("10.0.0.1:8476", count=2, index=i, facts={"data": digest}) as group:
        mesh = parallel.make_mesh(fsdp=jax.device_count())
        loop.fit(..., should_stop=group.stop_agreement())
        if group.first: print(...)
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import itertools
import json
import os
import selectors
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NoReturn

import jax

from rlhf_jax.distributed import rendezvous
from rlhf_jax.distributed.rendezvous import HostsError

__all__ = ["HOST_LOST", "Hosts", "HostsError", "StopAgreement", "connect", "current"]

HOST_LOST = 76
"""Exit status of a host that stopped because another host was lost (EX_PROTOCOL)."""

_GRACE = 15.0
"""Seconds that a host has to exit normally after another host has exited with an error."""

StopAgreement = Callable[[int, bool], bool]


class Hosts:
    """The hosts of a job, as seen from this process. This base class represents a job with a single host.

    Attributes:
        index: Number of this host, ``jax.process_index()``.
        count: Number of hosts, ``jax.process_count()``.
    """

    index, count = 0, 1

    @property
    def first(self) -> bool:
        """Whether this is the host that prints, logs and writes results."""
        return self.index == 0

    def broadcast_from_first(self, name: str, make: Callable[[], Any]) -> Any:
        """Returns the JSON value that ``make()`` returns on the first host.

        Each call must use a different ``name``, which must be the same on all hosts.
        """
        del name
        return make()

    def stop_agreement(self) -> StopAgreement:
        """Returns a function ``should_stop(done, wanted)`` for `loop.fit`.

        The function returns whether all hosts stop after ``done`` iterations, given whether this host wants to stop. It
        waits for the other hosts only if any host wants to stop. Call `stop_agreement` once for each training stage, in
        the same order on all hosts.
        """
        return lambda done, wanted: wanted


_current = Hosts()


def current() -> Hosts:
    """Returns the hosts of the enclosing `connect` block; outside such a block, a job with a single host."""
    return _current


@contextlib.contextmanager
def connect(
    coordinator: str | None = None,
    *,
    count: int | None = None,
    index: int | None = None,
    timeout: float = 300.0,
    heartbeat_timeout: float = 30.0,
    facts: Callable[[], Mapping[str, Any]] | Mapping[str, Any] | None = None,
    exit_status: Callable[[BaseException], int] = lambda error: 1,
) -> Iterator[Hosts]:
    """Returns a context manager that connects the hosts of a job and starts JAX on all of them.

    Enter it before JAX initialises its devices. Without arguments, JAX detects the job from the environment of a TPU
    VM, SLURM, Open MPI (before version 5) or Kubernetes. With a single process, the block runs without connecting.

    If another host is lost, this process prints one sentence to stderr and exits with `HOST_LOST`. If another host
    exits with an exception, this process exits with the same status after a grace period.

    Args:
        coordinator: Address of the first host, ``HOST:PORT``.
        count: Number of hosts.
        index: Number of this host, counted from 0.
        timeout: Seconds to wait for all hosts to connect.
        heartbeat_timeout: Seconds without a message after which a host is considered lost. A closed connection is
            detected immediately.
        facts: Named JSON values that must be equal on all hosts, such as settings and digests of data and code; or a
            function that returns them, which is called only if the job has several hosts.
        exit_status: Maps an exception raised in the block to the exit status of all processes.

    Yields:
        The `Hosts` of the job.

    Raises:
        HostsError: If the arguments are incomplete or invalid, JAX cannot connect, a host is missing, two hosts have
            the same index, or the facts differ. In the last three cases, every connected host raises the error.
    """
    global _current
    job = _detect(coordinator, count, index, timeout)
    if job is None:
        yield Hosts()
        return
    connections = rendezvous.connect(*job[:3], timeout, dict((facts() if callable(facts) else facts) or {}))
    group = _Group(job[2], job[1], connections, heartbeat_timeout)
    _delay_abort(True)
    try:
        jax.config.update("jax_enable_preemption_service", False)  # it would intercept SIGTERM
        _start_jax(*job, timeout)
        _current = group
        yield group
    except BaseException as error:
        # If a lost host caused this error, the thread of the group reports that host and ends this process.
        group.wait_for_lost_host()
        group.leave(exit_status(error), f"{type(error).__name__}: {rendezvous.error_summary(error)}")
        raise
    else:
        group.leave(0, "")
    finally:
        _delay_abort(False)
        _current = Hosts()


def _start_jax(coordinator: str, count: int, index: int, devices: Sequence[int] | None, timeout: float) -> None:
    try:
        jax.distributed.initialize(
            coordinator,
            count,
            index,
            devices,
            initialization_timeout=max(1, int(timeout)),
            # One day: with a shorter timeout, jax aborts the processes even if all of them were merely suspended.
            heartbeat_timeout_seconds=86_400,
            shutdown_timeout_seconds=30,
        )
    except RuntimeError as error:
        raise HostsError(
            f"host {index}: jax could not connect to {coordinator}: {rendezvous.error_summary(error)}"
        ) from error


def _detect(
    coordinator: str | None, count: int | None, index: int | None, timeout: float
) -> tuple[str, int, int, Sequence[int] | None] | None:
    """Returns ``(coordinator, count, index, local device ids)``, or None for a single process."""
    devices = None
    if None in (coordinator, count, index):
        from jax._src import clusters

        detect = clusters.ClusterEnv.auto_detect_unset_distributed_params
        coordinator, count, index, devices = detect(coordinator, count, index, None, None, int(timeout))
        # All versions of Open MPI set the count and the index; only versions before 5 set the coordinator.
        count = int(os.environ.get("OMPI_COMM_WORLD_SIZE", 0)) or None if count is None else count
        index = int(os.environ.get("OMPI_COMM_WORLD_RANK", -1)) if index is None else index
        index = None if index == -1 else index
    if count == 1 or (coordinator is None and count is None and index is None):
        return None
    if coordinator is None or count is None or index is None:
        known = {"coordinator": coordinator, "count": count, "index": index}
        present = " and ".join(f"{name} {value}" for name, value in known.items() if value is not None)
        missing = " and ".join(name for name, value in known.items() if value is None)
        raise HostsError(f"a multi-host run needs coordinator, count and index; it has {present} but no {missing}")
    host, _, port = coordinator.rpartition(":")
    if not host or not port.isdigit():
        raise HostsError(f"coordinator is {coordinator!r}; it must be HOST:PORT")
    if not 0 <= index < count:
        raise HostsError(f"index is {index}; with {count} hosts it must be from 0 to {count - 1}")
    return coordinator, count, index, devices


# --- heartbeats and agreement -----------------------------------------------------------------------------------------


class _Group(Hosts):
    """Several hosts, connected in a star around the first one. A thread on each host receives the messages.

    A position is ``(stage, iteration)``. To agree on where to stop, every host reports the position that its training
    loop reaches next, and the loop waits at that position. All hosts stop at the largest reported position. The
    *thread* sends the report, because the loop may be blocked in a collective operation, waiting for a host that is
    already waiting for the agreement.
    """

    def __init__(
        self, index: int, count: int, connections: dict[int, rendezvous.Connection], heartbeat_timeout: float
    ) -> None:
        self.index, self.count = index, count
        self._connections, self._heartbeat_timeout = connections, heartbeat_timeout
        self._tick = min(1.0, heartbeat_timeout / 5)
        self._changed = threading.Condition()
        self._stages = itertools.count()
        self._position: tuple[int, int] = (0, 0)
        self._stopping = False
        self._paused_at: dict[int, tuple[int, int]] = {}
        self._stop_at: tuple[int, int] | None = None
        self._values: dict[str, Any] = {}
        self._left: dict[int, tuple[int, str, bool]] = {}  # status, reason, whether the process was forced to exit
        self._exit_at: float | None = None  # time at which this host is forced to exit
        self._closed = False
        self._thread = threading.Thread(target=self._watch, name="hosts", daemon=True)
        self._thread.start()

    # called by the training loop

    def broadcast_from_first(self, name: str, make: Callable[[], Any]) -> Any:
        if self.first:
            value = json.loads(json.dumps(make()))
            self._send(value=[name, value])
            return value
        with self._changed:
            self._changed.wait_for(lambda: name in self._values)
            return self._values[name]

    def stop_agreement(self) -> StopAgreement:
        stage = next(self._stages)

        def should_stop(done: int, wanted: bool) -> bool:
            position = (stage, done)
            with self._changed:
                self._position = position
                if wanted and not self._stopping:
                    self._request_stop()
                self._changed.wait_for(lambda: not self._stopping or self._stop_at is not None)
                if self._stop_at is not None:
                    return position >= self._stop_at
                self._position = (stage, done + 1)
                return False

        return should_stop

    def wait_for_lost_host(self) -> None:
        """Gives the thread half a second to detect that another host was lost and to end this process."""
        with self._changed:
            self._changed.wait_for(lambda: self._exit_at is not None, timeout=0.5)

    def leave(self, status: int, reason: str) -> None:
        """Announces the exit and waits for the other hosts; shuts JAX down if all leave and none is forced to exit."""
        with self._changed:
            self._left[self.index] = (status, reason, False)
            self._send(left=[self.index, status, reason, False])
            timeout = None if status == 0 else _GRACE + 2 * self._tick
            self._changed.wait_for(lambda: self._all_left(status), timeout=timeout)
            orderly = self._all_left(status) and not any(forced for _, _, forced in self._left.values())
            self._closed = True
        if orderly:
            jax.distributed.shutdown()
        else:
            atexit.register(_exit, status)  # jax's own shutdown would wait for the missing hosts
        for connection in self._connections.values():
            connection.close()

    def _all_left(self, status: int) -> bool:
        """Returns whether all hosts have left.

        After a failure, the result is False on hosts without an error, which wait until `_force_exit` ends them.
        """
        return len(self._left) == self.count and (status != 0 or not any(host[0] for host in self._left.values()))

    # called by the thread

    def _watch(self) -> None:
        selector = selectors.DefaultSelector()
        for number, connection in self._connections.items():
            selector.register(connection.sock, selectors.EVENT_READ, number)
            with self._changed:
                for message in connection.pending:
                    self._handle(message)
        silence = dict.fromkeys(self._connections, 0.0)
        last = last_heartbeat = time.monotonic()
        while not self._closed:
            for key, _ in selector.select(self._tick / 2):
                messages = self._connections[key.data].receive()
                silence[key.data] = 0.0
                with self._changed:
                    for message in messages or []:
                        self._handle(message)
                if messages is None:
                    selector.unregister(key.fileobj)
                    silence.pop(key.data)
                    self._mark_lost(key.data, "its connection was closed")
            now = time.monotonic()
            for number in silence:
                # Capped at a tick, so that a suspension of this process does not look like silence of the others.
                silence[number] += min(now - last, self._tick)
                if silence[number] > self._heartbeat_timeout:
                    self._mark_lost(number, f"it sent nothing for {self._heartbeat_timeout:g} s")
            if now - last_heartbeat > self._tick:
                self._send(heartbeat=True)
                last_heartbeat = now
            last = now
            if self._exit_at is not None and now > self._exit_at and self._left.get(self.index, (0,))[0] == 0:
                self._force_exit()

    def _handle(self, message: dict[str, Any]) -> None:
        if "value" in message:
            self._values[message["value"][0]] = message["value"][1]
        elif "stop_request" in message:
            if not self._stopping:
                self._request_stop()
        elif "pause" in message:
            self._stopping = True
            self._send(paused_at=[self.index, *self._position])
        elif "paused_at" in message:
            self._add_position(message["paused_at"][0], tuple(message["paused_at"][1:]))
        elif "stop_at" in message:
            self._stop_at = tuple(message["stop_at"])
        elif "left" in message:
            self._mark_left(*message["left"])
        self._changed.notify_all()

    def _request_stop(self) -> None:
        """Starts the agreement: the first host asks all hosts to pause and to report their positions."""
        self._stopping = self._stopping or self.first
        if self.first:
            self._send(pause=True)
            self._add_position(0, self._position)
        else:
            self._send(stop_request=True)

    def _add_position(self, number: int, position: Any) -> None:
        self._paused_at[number] = position
        if len(self._paused_at) == self.count:
            self._stop_at = max(self._paused_at.values())
            self._send(stop_at=self._stop_at)
            self._changed.notify_all()

    def _mark_lost(self, number: int, reason: str) -> None:
        with self._changed:
            if number not in self._left and not self._closed:
                self._mark_left(number, HOST_LOST, f"host {number} was lost ({reason})", True)

    def _mark_left(self, number: int, status: int, reason: str, forced: bool) -> None:
        """Records that a host has left; the first host forwards the message to the others."""
        if number in self._left:
            return
        self._left[number] = (status, reason, forced)
        if self.first:
            self._send(left=[number, status, reason, forced])
        if status != 0 and self._exit_at is None:
            self._exit_at = 0.0 if status == HOST_LOST else time.monotonic() + _GRACE
        self._changed.notify_all()

    def _force_exit(self) -> NoReturn:
        """Ends this process because another host failed."""
        number, (status, reason, _) = next((n, host) for n, host in self._left.items() if host[0] != 0)
        if status != HOST_LOST:
            reason = f"host {number} failed ({reason})"
        sys.stdout.flush()
        print(f"host {self.index} exits: {reason}; resume all hosts from the last checkpoint", file=sys.stderr)
        self._send(left=[self.index, status, reason, True])
        if self.first:  # waits until the others have closed their connections, because this exit aborts jax on them
            for connection in self._connections.values():
                connection.sock.settimeout(2)
                while connection.receive():
                    pass
        _exit(status)

    def _send(self, **message: Any) -> None:
        for connection in self._connections.values():
            connection.send(**message)


def _delay_abort(enable: bool) -> None:
    """Delays an abort of this process by six seconds; with ``enable=False``, restores the immediate abort.

    As soon as the process of the first host ends, jax aborts this process and provides no hook. The thread of `_Group`
    may detect the lost host a few milliseconds later, and then needs time to print the reason and to exit with the
    right status. The signal handler is the C library's ``sleep``, which runs without Python. It receives the signal
    number, 6, as the number of seconds.
    """
    with contextlib.suppress(AttributeError, OSError, TypeError):
        libc = ctypes.CDLL(None)
        libc.signal.argtypes, libc.signal.restype = [ctypes.c_int, ctypes.c_void_p], ctypes.c_void_p
        libc.signal(signal.SIGABRT, ctypes.cast(libc.sleep, ctypes.c_void_p) if enable else None)


def _exit(status: int) -> NoReturn:
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)
