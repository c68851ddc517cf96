"""The web server of the labelling page: uvicorn, with limits on slow and numerous connections."""

from __future__ import annotations

import asyncio
import collections
import contextlib
import resource
import socket
from typing import Any, ClassVar

import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

HEADER_TIMEOUT = 10.0
"""Number of seconds in which the head of a request must arrive."""
MAX_CONNECTIONS = 512
"""Number of connections from one address."""


class _Protocol(H11Protocol):
    """HTTP/1.1 that closes connections whose requests do not arrive, which uvicorn itself would keep."""

    _timer: asyncio.TimerHandle | None = None
    _of_address: ClassVar[collections.Counter[str]] = collections.Counter()

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self._address = self.client[0] if self.client else ""
        self._of_address[self._address] += 1
        if self._of_address[self._address] > MAX_CONNECTIONS:
            transport.abort()
        self._start()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop()
        self._of_address[self._address] -= 1
        if not self._of_address[self._address]:
            del self._of_address[self._address]
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if self._answering:
            self._stop()
        elif self._timer is None:
            self._start()

    @property
    def _answering(self) -> bool:
        return self.cycle is not None and not self.cycle.response_complete

    def _start(self) -> None:
        self._timer = self.loop.call_later(HEADER_TIMEOUT, self._give_up)

    def _stop(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _give_up(self) -> None:
        self._timer = None
        if not self._answering:
            self.transport.abort()


def listen(host: str, port: int) -> socket.socket:
    """Returns a socket that listens at an address and a port, 0 for a free one; raises OSError if it cannot."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    return socket.create_server((host, port), family=family, backlog=1024)


def serve(
    app: Any,
    listener: socket.socket,
    *,
    certificate: str | None = None,
    key: str | None = None,
    behind_proxy: bool = False,
) -> None:
    """Serves an application until the process receives SIGINT or SIGTERM.

    Args:
        app: An ASGI application, such as that of `make_app`.
        listener: The socket, from `listen`.
        certificate: File of a certificate, for HTTPS, and
        key: of its private key.
        behind_proxy: Whether a reverse proxy on this machine passes requests on and names the address of their sender.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(max(soft, 65536), hard), hard))
    config = uvicorn.Config(
        app,
        http=_Protocol,
        ws="none",
        lifespan="off",
        access_log=False,
        log_level="warning",
        server_header=False,
        proxy_headers=behind_proxy,
        timeout_graceful_shutdown=5,
        ssl_certfile=certificate,
        ssl_keyfile=key,
    )
    with contextlib.suppress(KeyboardInterrupt):
        uvicorn.Server(config).run(sockets=[listener])
