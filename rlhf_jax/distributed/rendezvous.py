"""How several hosts find each other: a star of sockets around the first, in which all were given the same."""

from __future__ import annotations

import contextlib
import json
import socket
import threading
import time
from typing import Any


class HostsError(RuntimeError):
    """Hosts could not meet, or are not doing the same; the message names them."""


class Line:
    """A connection that carries one JSON object a line."""

    def __init__(self, sock: socket.socket) -> None:
        """Wrap a connected socket."""
        self.sock, self._rest, self._lock = sock, b"", threading.Lock()
        self.early: list[dict[str, Any]] = []
        """Messages that came with one that was waited for."""
        sock.settimeout(10)
        with contextlib.suppress(OSError):  # not every kind of socket has it
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def send(self, **message: Any) -> None:
        """Send, or let it be: a broken connection is seen by whoever reads."""
        with self._lock, contextlib.suppress(OSError):
            self.sock.sendall(json.dumps(message).encode() + b"\n")

    def receive(self) -> list[dict[str, Any]] | None:
        """What has come, at least a part of a line of it; None where the connection is closed."""
        try:
            data = self.sock.recv(65536)
        except TimeoutError:
            return []
        except OSError:
            return None
        *whole, self._rest = (self._rest + data).split(b"\n")
        if not data or len(self._rest) > 2**24:
            return None
        try:
            found = [json.loads(line) for line in whole]
        except ValueError:
            return None
        return found if all(isinstance(each, dict) for each in found) else None

    def wait(self, deadline: float) -> dict[str, Any] | None:
        """The next message; None where the connection is closed, or nothing has come by then."""
        self.sock.settimeout(0.5)
        while not self.early and time.monotonic() < deadline:
            messages = self.receive()
            if messages is None:
                break
            self.early += messages
        self.sock.settimeout(10)
        return self.early.pop(0) if self.early else None

    def closed(self) -> bool:
        """Whether the other end is gone; to be asked while it has nothing to say."""
        self.sock.settimeout(0.0)
        try:
            return not self.sock.recv(1, socket.MSG_PEEK)
        except BlockingIOError:
            return False
        except OSError:
            return True
        finally:
            self.sock.settimeout(10)

    def close(self) -> None:
        """Close this end."""
        with contextlib.suppress(OSError):
            self.sock.close()


def first_line(error: BaseException) -> str:
    """The first line of what an error says, not too long."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[0][:300]


def meet(coordinator: str, count: int, index: int, timeout: float, facts: dict[str, Any]) -> dict[int, Line]:
    """The connections of a star: the first host's to all, everyone else's to the first."""
    facts = json.loads(json.dumps(facts))
    host, _, port = coordinator.rpartition(":")
    if index == 0:
        return _gather(int(port), count, timeout, facts)
    deadline = time.monotonic() + timeout
    line, answer = _greet(host.strip("[]"), int(port), deadline, {"hello": index, "count": count, "facts": facts})
    if line is None:
        raise HostsError(
            f"host {index}: the coordinator {coordinator} did not answer within {timeout:g} s "
            f"({answer}); is the first host running, and does it listen there?"
        )
    if "refused" in answer:
        line.close()
        raise HostsError(answer["refused"])
    return {0: line}


def _greet(host: str, port: int, deadline: float, hello: dict[str, Any]) -> tuple[Line | None, Any]:
    """The connection to the first host and its answer; or None, and why there is none."""
    why: Any = "no answer"
    while (left := deadline - time.monotonic()) > 0:
        try:
            line = Line(socket.create_connection((host, port), timeout=min(left, 10)))
        except OSError as error:
            why = error.strerror or str(error)
            time.sleep(min(0.2, max(left, 0)))
            continue
        line.send(**hello)
        if line.wait(min(deadline, time.monotonic() + 10)) is not None:
            # Seen: how long to wait for the others is the first host's business. Silent, it is given up all the same.
            while answer := line.wait(time.monotonic() + 20):
                if "met" not in answer:
                    return line, answer
            return None, "it stopped waiting for the others"
        line.close()
        why = "something else listens there"
        time.sleep(0.2)
    return None, why


def _gather(port: int, count: int, timeout: float, facts: dict[str, Any]) -> dict[int, Line]:
    """Wait for all other hosts, on the first; compare what they were given; let all in or none."""
    lines: dict[int, Line] = {}
    theirs: dict[int, Any] = {}
    try:
        family = {"family": socket.AF_INET6, "dualstack_ipv6": True} if socket.has_dualstack_ipv6() else {}
        listener = socket.create_server(("", port), backlog=count, **family)
    except OSError as error:
        raise HostsError(f"host 0 cannot listen at port {port}: {error.strerror}") from error
    with listener:
        why = _let_in(listener, count, time.monotonic() + timeout, lines, theirs)
    absent = ", ".join(str(i) for i in range(1, count) if i not in lines)
    if absent and not why:
        why = f"after {timeout:g} s, of {count} hosts these had not come: {absent}"
    why = why or _differences({"--hosts.count": count, **facts}, theirs)
    for line in lines.values():
        line.send(**({"refused": why} if why else {"welcome": True}))
        if why:
            line.close()
    if why:
        raise HostsError(why)
    return lines


def _let_in(listener: socket.socket, count: int, deadline: float, lines: Any, theirs: Any) -> str:
    """Fill ``lines`` and ``theirs`` with who comes; why to give up early, or ""."""
    listener.settimeout(0.5)
    told = time.monotonic()
    while len(lines) < count - 1 and time.monotonic() < deadline:
        if time.monotonic() - told > 5:
            told = time.monotonic()
            for line in lines.values():
                line.send(met=True)
        try:
            line = Line(listener.accept()[0])
        except TimeoutError:
            continue
        hello = line.wait(time.monotonic() + 5) or {}
        number = hello.get("hello")
        if not isinstance(number, int) or not isinstance(hello.get("facts"), dict):
            line.close()
            continue
        if number in lines and lines[number].closed():  # it was started again
            lines.pop(number).close()
        line.send(met=True)
        if number in lines or not 0 < number < count:
            why = f"a host came as number {number}, which " + (
                "there is already" if number in lines else f"is none of {count}"
            )
            line.send(refused=why)
            line.close()
            return why
        lines[number], theirs[number] = line, {"--hosts.count": hello.get("count"), **hello["facts"]}
    return ""


def _differences(mine: dict[str, Any], theirs: dict[int, dict[str, Any]]) -> str:
    """Which hosts differ from the first in what; "" where none does."""
    told = []
    for index, facts in sorted(theirs.items()):
        names = [name for name in {**mine, **facts} if mine.get(name) != facts.get(name)]
        each = [f"{name} ({_short(facts.get(name))}, not {_short(mine.get(name))})" for name in names]
        if each:
            more = f" and {len(each) - 3} more" if len(each) > 3 else ""
            told.append(f"host {index} differs from host 0 in {', '.join(each[:3])}{more}")
    return "; ".join(told)


def _short(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value)
    return text if len(text) <= 60 else text[:57] + "..."
