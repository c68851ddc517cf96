"""Rendezvous of several hosts: every host connects to the first one, which compares the facts of all hosts."""

from __future__ import annotations

import contextlib
import json
import socket
import threading
import time
from typing import Any


class HostsError(RuntimeError):
    """The hosts could not connect, or their facts (such as settings) differ; the message names the hosts."""


class Connection:
    """A socket that carries one JSON object per line."""

    def __init__(self, sock: socket.socket) -> None:
        """Wraps a connected socket."""
        self.sock, self._buffer, self._lock = sock, b"", threading.Lock()
        self.pending: list[dict[str, Any]] = []
        """Messages that were received but not yet returned by `wait`."""
        sock.settimeout(10)
        with contextlib.suppress(OSError):  # some kinds of sockets do not have this option
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def send(self, **message: Any) -> None:
        """Sends a message; errors are ignored, because `receive` detects a broken connection."""
        with self._lock, contextlib.suppress(OSError):
            self.sock.sendall(json.dumps(message).encode() + b"\n")

    def receive(self) -> list[dict[str, Any]] | None:
        """Returns the complete messages that have arrived; None if the connection is closed or the data are invalid."""
        try:
            data = self.sock.recv(65536)
        except TimeoutError:
            return []
        except OSError:
            return None
        *lines, self._buffer = (self._buffer + data).split(b"\n")
        if not data or len(self._buffer) > 2**24:
            return None
        try:
            messages = [json.loads(line) for line in lines]
        except ValueError:
            return None
        return messages if all(isinstance(message, dict) for message in messages) else None

    def wait(self, deadline: float) -> dict[str, Any] | None:
        """Returns the next message; None if the connection closes or `time.monotonic` reaches ``deadline`` first."""
        self.sock.settimeout(0.5)
        while not self.pending and time.monotonic() < deadline:
            messages = self.receive()
            if messages is None:
                break
            self.pending += messages
        self.sock.settimeout(10)
        return self.pending.pop(0) if self.pending else None

    def closed(self) -> bool:
        """Returns whether the other end has closed the connection, without consuming data."""
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
        """Closes this end."""
        with contextlib.suppress(OSError):
            self.sock.close()


def error_summary(error: BaseException) -> str:
    """Returns the first line of an error message, truncated to 300 characters."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[0][:300]


def connect(coordinator: str, count: int, index: int, timeout: float, facts: dict[str, Any]) -> dict[int, Connection]:
    """Connects all hosts in a star around the first one.

    Args:
        coordinator: Address of the first host, ``HOST:PORT``.
        count: Number of hosts.
        index: Number of this host, counted from 0.
        timeout: Seconds to wait for all hosts.
        facts: Named JSON values that must be equal on all hosts.

    Returns:
        A dict from host numbers to connections. The first host is connected to all others, and every other host to the
        first.

    Raises:
        HostsError: If a host is missing, its index is invalid or used twice, or its facts differ from those of the
            first host. Every connected host raises the error.
    """
    facts = json.loads(json.dumps(facts))
    host, _, port = coordinator.rpartition(":")
    if index == 0:
        return _accept_all(int(port), count, timeout, facts)
    deadline = time.monotonic() + timeout
    connection, answer = _join(host.strip("[]"), int(port), deadline, {"hello": index, "count": count, "facts": facts})
    if connection is None:
        raise HostsError(
            f"host {index}: the coordinator {coordinator} did not answer within {timeout:g} s "
            f"({answer}); check that the first host is running and listening on this address"
        )
    if "refused" in answer:
        connection.close()
        raise HostsError(answer["refused"])
    return {0: connection}


def _join(host: str, port: int, deadline: float, hello: dict[str, Any]) -> tuple[Connection | None, Any]:
    """Returns the connection to the first host and that host's answer, or None and the reason for the failure."""
    reason: Any = "no answer"
    while (left := deadline - time.monotonic()) > 0:
        try:
            connection = Connection(socket.create_connection((host, port), timeout=min(left, 10)))
        except OSError as error:
            reason = error.strerror or str(error)
            time.sleep(min(0.2, max(left, 0)))
            continue
        connection.send(**hello)
        if connection.wait(min(deadline, time.monotonic() + 10)) is not None:
            # From here on, the first host enforces the timeout. It sends "waiting" every five seconds.
            while answer := connection.wait(time.monotonic() + 20):
                if "waiting" not in answer:
                    return connection, answer
            return None, "it answered at first, but then stopped"
        connection.close()
        reason = "another program is listening on this port"
        time.sleep(0.2)
    return None, reason


def _accept_all(port: int, count: int, timeout: float, facts: dict[str, Any]) -> dict[int, Connection]:
    """Accepts all other hosts on the first one, compares their facts, and admits all of them or none."""
    connections: dict[int, Connection] = {}
    facts_of: dict[int, Any] = {}
    try:
        family = {"family": socket.AF_INET6, "dualstack_ipv6": True} if socket.has_dualstack_ipv6() else {}
        listener = socket.create_server(("", port), backlog=count, **family)
    except OSError as error:
        raise HostsError(f"host 0 cannot listen on port {port}: {error.strerror}") from error
    with listener:
        reason = _accept_hosts(listener, count, time.monotonic() + timeout, connections, facts_of)
    missing = ", ".join(str(i) for i in range(1, count) if i not in connections)
    if missing and not reason:
        reason = f"of {count} hosts, these did not connect within {timeout:g} s: {missing}"
    reason = reason or _differences({"the number of hosts": count, **facts}, facts_of)
    for connection in connections.values():
        connection.send(**({"refused": reason} if reason else {"admitted": True}))
        if reason:
            connection.close()
    if reason:
        raise HostsError(reason)
    return connections


def _accept_hosts(listener: socket.socket, count: int, deadline: float, connections: Any, facts_of: Any) -> str:
    """Fills ``connections`` and ``facts_of``; returns a reason to refuse all hosts immediately, or ""."""
    listener.settimeout(0.5)
    last_sent = time.monotonic()
    while time.monotonic() < deadline:
        for number in [number for number, connection in connections.items() if connection.closed()]:
            connections.pop(number).close()  # the host exited; it may be restarted and connect again
            facts_of.pop(number)
        if len(connections) == count - 1:
            break
        if time.monotonic() - last_sent > 5:
            last_sent = time.monotonic()
            for connection in connections.values():
                connection.send(waiting=True)
        try:
            connection = Connection(listener.accept()[0])
        except TimeoutError:
            continue
        hello = connection.wait(time.monotonic() + 5) or {}
        number = hello.get("hello")
        if not isinstance(number, int) or not isinstance(hello.get("facts"), dict):
            connection.close()
            continue
        if number in connections and connections[number].closed():
            connections.pop(number).close()
        connection.send(waiting=True)
        if number in connections or not 0 < number < count:
            reason = f"two hosts have the index {number}"
            if number not in connections:
                reason = f"a host has the index {number}; with {count} hosts it must be from 1 to {count - 1}"
            connection.send(refused=reason)
            connection.close()
            return reason
        connections[number] = connection
        facts_of[number] = {"the number of hosts": hello.get("count"), **hello["facts"]}
    return ""


def _differences(own: dict[str, Any], facts_of: dict[int, dict[str, Any]]) -> str:
    """Lists the facts in which other hosts differ from the first one; "" if all facts are equal."""
    messages = []
    for index, facts in sorted(facts_of.items()):
        names = [name for name in {**own, **facts} if own.get(name) != facts.get(name)]
        values = [f"{name} ({_short(facts.get(name))}, not {_short(own.get(name))})" for name in names]
        if values:
            more = f" and {len(values) - 3} more" if len(values) > 3 else ""
            messages.append(f"host {index} differs from host 0 in {', '.join(values[:3])}{more}")
    return "; ".join(messages)


def _short(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value)
    return text if len(text) <= 60 else text[:57] + "..."
