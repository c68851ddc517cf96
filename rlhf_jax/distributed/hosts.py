"""Several hosts: how they meet, check that they are doing the same, and leave together.

Every process runs the same program. Before jax is started they meet at the coordinator, over plain sockets: whoever
does not come, comes twice or was given other settings or other data is named in one sentence, on all hosts, within a
set time. The sockets stay open. Over them a host that dies is noticed, and hosts agree after which step to stop; none
of it touches a device, and nothing is said in a step in which nobody wants to stop::

    with hosts.started("10.0.0.1:8476", count=2, index=i, facts={"data": digest}) as group:
        mesh = parallel.make_mesh(fsdp=jax.device_count())
        loop.fit(..., should_stop=group.stage())
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

__all__ = ["LOST", "Agreed", "Hosts", "HostsError", "current", "started"]

LOST = 76
"""Exit status of a host that stopped because another one is gone (EX_PROTOCOL)."""

_GRACE = 15.0
"""Seconds in which a host may come to the same end as one that has left, before it is made to."""

Agreed = Callable[[int, bool], bool]


class Hosts:
    """This process among those of a job; alone it is the first and the only one, and everything is as it says.

    Attributes:
        index: From 0; ``jax.process_index()``.
        count: ``jax.process_count()``.
    """

    index, count = 0, 1

    @property
    def first(self) -> bool:
        """Whether this is the host that prints, logs and writes."""
        return self.index == 0

    def from_first(self, name: str, make: Callable[[], Any]) -> Any:
        """What ``make()`` gives on the first host, in JSON's types; each name once in a job."""
        del name
        return make()

    def stage(self) -> Agreed:
        """for `loop.fit`: ``should_stop(done, wanted)``, whether all hosts stop after ``done`` iterations.

        Call it once for each stage, in the same order on all hosts. Where nobody wants to stop, nothing is waited for.
        """
        return lambda done, wanted: wanted


_current = Hosts()


def current() -> Hosts:
    """The hosts of this process: those of the `started` block that it is in, else itself alone."""
    return _current


@contextlib.contextmanager
def started(
    coordinator: str | None = None,
    *,
    count: int | None = None,
    index: int | None = None,
    timeout: float = 300.0,
    silence: float = 30.0,
    facts: Callable[[], Mapping[str, Any]] | Mapping[str, Any] | None = None,
    status: Callable[[BaseException], int] = lambda error: 1,
) -> Iterator[Hosts]:
    """Meet the other hosts, start jax on all of them, and leave together.

    Without a coordinator, what a TPU VM, SLURM, Open MPI or Kubernetes says of the job is taken, as jax finds it; where
    there is nothing, or a single process, nothing is done at all. To be entered before jax touches a device.

    A host that dies in the block, or is silent, ends this process too: one sentence on stderr, exit status `LOST`. One
    that leaves with an exception ends it with that one's status, unless it comes to an end of its own soon.

    Args:
        coordinator: ``HOST:PORT`` of the first host, where it listens.
        count: How many hosts there are.
        index: Which of them this is, from 0.
        timeout: Seconds to wait for all hosts to come.
        silence: Seconds without any sign of a host after which it is given up. A closed connection is seen at once.
        facts: What has to be the same on all hosts, by name: settings, digests of data and code; in JSON's types. Or a
            function that gives it, called where there are other hosts.
        status: The exit status that an exception will end this process with, told to the other hosts.

    Raises:
        HostsError: A host did not come, or differs; on all hosts that came.
    """
    global _current
    found = _detect(coordinator, count, index, timeout)
    if found is None:
        yield Hosts()
        return
    lines = rendezvous.meet(*found[:3], timeout, dict((facts() if callable(facts) else facts) or {}))
    group = _Group(found[2], found[1], lines, silence)
    _slow_abort(True)
    try:
        jax.config.update("jax_enable_preemption_service", False)  # it would swallow SIGTERM
        _start_jax(*found, timeout)
        _current = group
        yield group
    except BaseException as error:
        # What another host's death made go wrong here is that host's news; the thread has it, or will in a moment.
        group.heed()
        group.leave(status(error), f"{type(error).__name__}: {rendezvous.first_line(error)}")
        raise
    else:
        group.leave(0, "")
    finally:
        _slow_abort(False)
        _current = Hosts()


def _start_jax(coordinator: str, count: int, index: int, devices: Sequence[int] | None, timeout: float) -> None:
    try:
        jax.distributed.initialize(
            coordinator,
            count,
            index,
            devices,
            initialization_timeout=max(1, int(timeout)),
            # A day: jax's own watch ends processes by an abort, and where all of them were suspended for so long, all.
            heartbeat_timeout_seconds=86_400,
            shutdown_timeout_seconds=30,
        )
    except RuntimeError as error:
        raise HostsError(
            f"host {index}: jax could not be started at {coordinator}: {rendezvous.first_line(error)}"
        ) from error


def _detect(
    coordinator: str | None, count: int | None, index: int | None, timeout: float
) -> tuple[str, int, int, Sequence[int] | None] | None:
    """``(coordinator, count, index, local device ids)``, or None for a single process."""
    devices = None
    if None in (coordinator, count, index):
        from jax._src import clusters

        detect = clusters.ClusterEnv.auto_detect_unset_distributed_params
        coordinator, count, index, devices = detect(coordinator, count, index, None, None, int(timeout))
        # Open MPI says who is who; only its versions before 5 say where the first one is, too.
        count = int(os.environ.get("OMPI_COMM_WORLD_SIZE", 0)) or None if count is None else count
        index = int(os.environ.get("OMPI_COMM_WORLD_RANK", -1)) if index is None else index
        index = None if index == -1 else index
    if count == 1 or (coordinator is None and count is None and index is None):
        return None
    if coordinator is None or count is None or index is None:
        known = {"coordinator": coordinator, "count": count, "index": index}
        there = " and ".join(f"the {name} {value}" for name, value in known.items() if value is not None)
        missing = " and ".join(f"no {name}" for name, value in known.items() if value is None)
        raise HostsError(f"of several hosts there is {there}, and {missing}; give --hosts.coordinator, count and index")
    host, _, port = coordinator.rpartition(":")
    if not host or not port.isdigit():
        raise HostsError(f"the coordinator is {coordinator!r}; it must be HOST:PORT")
    if not 0 <= index < count:
        raise HostsError(f"the host's index is {index}; with {count} hosts it must be from 0 to {count - 1}")
    return coordinator, count, index, devices


# --- staying together -------------------------------------------------------------------------------------------------


class _Group(Hosts):
    """Hosts in a star around the first; a thread of each listens.

    Where someone wants to stop, every host's *thread* says at once to which place its loop will come next whatever
    happens, and from then on the loop waits there. The furthest of these places is where all leave. A loop that waits
    for a collective of a host that waits for the answer would wait forever if the loops answered themselves.
    """

    def __init__(self, index: int, count: int, lines: dict[int, rendezvous.Line], silence: float) -> None:
        self.index, self.count = index, count
        self._lines, self._silence, self._tick = lines, silence, min(1.0, silence / 5)
        self._changed = threading.Condition()
        self._stages = itertools.count()
        self._place: tuple[int, int] = (0, 0)
        self._asked = False
        self._held: dict[int, tuple[int, int]] = {}
        self._leave_at: tuple[int, int] | None = None
        self._values: dict[str, Any] = {}
        self._left: dict[int, tuple[int, str, bool]] = {}
        self._out_at: float | None = None  # when this host is made to leave
        self._closed = False
        self._thread = threading.Thread(target=self._watch, name="hosts", daemon=True)
        self._thread.start()

    # what the loop calls

    def from_first(self, name: str, make: Callable[[], Any]) -> Any:
        if self.first:
            value = json.loads(json.dumps(make()))
            self._tell(value=[name, value])
            return value
        with self._changed:
            self._changed.wait_for(lambda: name in self._values)
            return self._values[name]

    def stage(self) -> Agreed:
        number = next(self._stages)

        def agreed(done: int, wanted: bool) -> bool:
            here = (number, done)
            with self._changed:
                self._place = here
                if wanted and not self._asked:
                    self._ask()
                self._changed.wait_for(lambda: not self._asked or self._leave_at is not None)
                if self._leave_at is not None:
                    return here >= self._leave_at
                self._place = (number, done + 1)
                return False

        return agreed

    def heed(self) -> None:
        """Give the thread a moment to find that the trouble is another host's; it ends the process then."""
        with self._changed:
            self._changed.wait_for(lambda: self._out_at is not None, timeout=0.5)

    def leave(self, status: int, why: str) -> None:
        """Say so, wait for the others, and take jax down in order where all came to their ends by themselves."""
        with self._changed:
            self._left[self.index] = (status, why, False)
            self._tell(left=[self.index, status, why, False])
            limit = None if status == 0 else _GRACE + 2 * self._tick
            self._changed.wait_for(lambda: self._all_left(status), timeout=limit)
            orderly = self._all_left(status) and not any(forced for _, _, forced in self._left.values())
            self._closed = True
        if orderly:
            jax.distributed.shutdown()
        else:
            atexit.register(_exit, status)  # jax's own farewell would wait for hosts that do not come
        for line in self._lines.values():
            line.close()

    def _all_left(self, status: int) -> bool:
        """Whether nobody is waited for. One who is through is ended by the thread where others are not."""
        return len(self._left) == self.count and (status != 0 or not any(each[0] for each in self._left.values()))

    # what the thread does

    def _watch(self) -> None:
        selector = selectors.DefaultSelector()
        for number, line in self._lines.items():
            selector.register(line.sock, selectors.EVENT_READ, number)
            with self._changed:
                for message in line.early:
                    self._hear(message)
        silent = dict.fromkeys(self._lines, 0.0)
        last = said = time.monotonic()
        while not self._closed:
            for key, _ in selector.select(self._tick / 2):
                messages = self._lines[key.data].receive()
                silent[key.data] = 0.0
                with self._changed:
                    for message in messages or []:
                        self._hear(message)
                if messages is None:
                    selector.unregister(key.fileobj)
                    silent.pop(key.data)
                    self._missing(key.data, "its connection was closed")
            now = time.monotonic()
            for number in silent:
                # A process that was suspended itself must not take its own sleep for another's silence.
                silent[number] += min(now - last, self._tick)
                if silent[number] > self._silence:
                    self._missing(number, f"there was no sign of it for {self._silence:g} s")
            if now - said > self._tick:
                self._tell(alive=True)
                said = now
            last = now
            if self._out_at is not None and now > self._out_at and self._left.get(self.index, (0,))[0] == 0:
                self._out()

    def _hear(self, message: dict[str, Any]) -> None:
        if "value" in message:
            self._values[message["value"][0]] = message["value"][1]
        elif "want" in message:
            if not self._asked:
                self._ask()
        elif "hold" in message:
            self._asked = True
            self._tell(held=[self.index, *self._place])
        elif "held" in message:
            self._hold(message["held"][0], tuple(message["held"][1:]))
        elif "leave_at" in message:
            self._leave_at = tuple(message["leave_at"])
        elif "left" in message:
            self._gone(*message["left"])
        self._changed.notify_all()

    def _ask(self) -> None:
        """Begin to agree on where to stop: everyone holds."""
        self._asked = self._asked or self.first
        if self.first:
            self._tell(hold=True)
            self._hold(0, self._place)
        else:
            self._tell(want=True)

    def _hold(self, number: int, place: Any) -> None:
        self._held[number] = place
        if len(self._held) == self.count:
            self._leave_at = max(self._held.values())
            self._tell(leave_at=self._leave_at)
            self._changed.notify_all()

    def _missing(self, number: int, why: str) -> None:
        with self._changed:
            if number not in self._left and not self._closed:
                self._gone(number, LOST, f"host {number} is gone ({why})", True)

    def _gone(self, number: int, status: int, why: str, forced: bool) -> None:
        """A host has left, by itself or not; the first one passes it on."""
        if number in self._left:
            return
        self._left[number] = (status, why, forced)
        if self.first:
            self._tell(left=[number, status, why, forced])
        if status != 0 and self._out_at is None:
            self._out_at = 0.0 if status == LOST else time.monotonic() + _GRACE
        self._changed.notify_all()

    def _out(self) -> NoReturn:
        """End this process on account of another one."""
        number, (status, why, _) = next((n, each) for n, each in self._left.items() if each[0] != 0)
        if status != LOST:
            why = f"host {number} has left ({why})"
        sys.stdout.flush()
        print(f"host {self.index} stops: {why}; all hosts can go on from the last checkpoint", file=sys.stderr)
        self._tell(left=[self.index, status, why, True])
        if self.first:  # whose end takes jax down on all hosts: last
            for line in self._lines.values():
                line.sock.settimeout(2)
                while line.receive():
                    pass
        _exit(status)

    def _tell(self, **message: Any) -> None:
        for line in self._lines.values():
            line.send(**message)


def _slow_abort(on: bool) -> None:
    """Let an abort of this process wait some seconds.

    jax aborts, with no way to be asked first, as soon as the first host's process is gone; the thread that says so in a
    sentence and leaves with a status of its own may see it some milliseconds later. The C library's ``sleep`` as the
    signal's handler, called with the signal's number, 6, gives it the time, and needs no Python to run.
    """
    with contextlib.suppress(AttributeError, OSError, TypeError):
        libc = ctypes.CDLL(None)
        libc.signal.argtypes, libc.signal.restype = [ctypes.c_int, ctypes.c_void_p], ctypes.c_void_p
        libc.signal(signal.SIGABRT, ctypes.cast(libc.sleep, ctypes.c_void_p) if on else None)


def _exit(status: int) -> NoReturn:
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)
