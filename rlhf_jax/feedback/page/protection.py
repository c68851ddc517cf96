"""Protection of the labelling page: an ASGI middleware that no request passes unchecked."""

from __future__ import annotations

import asyncio
import hashlib
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Collection
from http.cookies import CookieError, SimpleCookie
from typing import Any
from urllib.parse import urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import PlainTextResponse

MAX_BODY = 256 * 1024
"""Largest body of a request, in bytes."""
BODY_TIMEOUT = 10.0
"""Number of seconds in which a body must arrive."""
COOKIE = "labeling_session"

HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; "
    "connect-src 'self'; form-action 'self'; base-uri 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "same-origin",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Permissions-Policy": "camera=(), microphone=(), geolocation=()",
    "Cache-Control": "no-store",
}


class Rate:
    """Allows each key a number of events per second, after a first burst; a token bucket for each key."""

    def __init__(self, per_second: float, burst: int, *, clock: Callable[[], float] = time.monotonic) -> None:
        """Stores the arguments."""
        self._rate, self._burst, self._clock = per_second, burst, clock
        self._buckets: OrderedDict[str, tuple[float, float]] = OrderedDict()
        self._lock = threading.Lock()

    def allows(self, key: str, *, cost: float = 1.0) -> bool:
        """Counts an event and returns whether it is allowed; with a cost of 0, only asks."""
        with self._lock:
            now = self._clock()
            level, then = self._buckets.pop(key, (float(self._burst), now))
            level = min(self._burst, level + (now - then) * self._rate)
            allowed = level >= max(cost, 1.0)
            self._buckets[key] = (level - cost if allowed else level, now)
            if len(self._buckets) > 100_000:  # the oldest have filled up again
                self._buckets.popitem(last=False)
            return allowed


class Protection:
    """Checks the host, the origin, the rate and the size of each request, and adds headers to each response."""

    def __init__(self, app: Any, *, hosts: Collection[str], secure: bool, requests_per_second: float) -> None:
        """Stores the arguments.

        Args:
            app: The application.
            hosts: Names, without the port, under which the server is reached. Others are refused, so that a foreign
                name cannot be made to lead here.
            secure: Whether the server is reached over HTTPS only.
            requests_per_second: Number of requests of one session; of one address, ten times as many.
        """
        self._app, self._hosts = app, {name.lower() for name in hosts}
        self._headers = HEADERS | ({"Strict-Transport-Security": "max-age=31536000"} if secure else {})
        # A session is one person; an address can be a whole office.
        self._sessions = Rate(requests_per_second, int(3 * requests_per_second))
        self._addresses = Rate(10 * requests_per_second, int(50 * requests_per_second))

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Handles a request."""
        if scope["type"] != "http":
            if scope["type"] == "websocket":
                await send({"type": "websocket.close", "code": 1008})
                return
            await self._app(scope, receive, send)
            return

        async def send_with_headers(message: Any) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                for name, value in self._headers.items():
                    headers.setdefault(name, value)
            await send(message)

        refused = self._refusal(scope)
        if refused is None:
            try:
                body = await asyncio.wait_for(_read(receive), BODY_TIMEOUT)
            except TimeoutError:
                refused = PlainTextResponse("The request is too slow.", 408, {"Connection": "close"})
            except ValueError:
                refused = PlainTextResponse("The request is too large.", 413, {"Connection": "close"})
            else:
                if body is None:
                    return
                scope["body"] = body
        await (refused or self._app)(scope, receive, send_with_headers)

    def _refusal(self, scope: Any) -> PlainTextResponse | None:
        headers = Headers(scope=scope)
        secret = session_secret(headers)
        address = scope["client"][0] if scope.get("client") else ""
        allowed = self._addresses.allows(address)
        if secret:
            allowed = allowed and self._sessions.allows(hashlib.sha256(secret.encode()).hexdigest())
        if not allowed:
            return PlainTextResponse("Too many requests; wait a few seconds.", 429, {"Retry-After": "5"})
        hosts = headers.getlist("host")
        if len(hosts) != 1 or _name(f"//{hosts[0]}") not in self._hosts:
            return PlainTextResponse("The server does not have this name.", 400)
        if scope["method"] not in ("GET", "HEAD"):
            # Browsers send Origin with every form, and Sec-Fetch-Site over HTTPS and to this machine.
            origin, site = headers.get("origin"), headers.get("sec-fetch-site", "same-origin")
            if site not in ("same-origin", "none") or (origin is not None and origin.partition("//")[2] != hosts[0]):
                return PlainTextResponse("The request comes from another site.", 403)
            if headers.get("content-type", "").split(";")[0].strip() != "application/x-www-form-urlencoded":
                return PlainTextResponse("The request is not a form.", 415)
        return None


def session_secret(headers: Headers) -> str | None:
    """Returns the secret in the cookie of a request, or None."""
    try:
        cookies = SimpleCookie(headers.get("cookie", ""))
    except CookieError:
        return None
    return cookies[COOKIE].value if COOKIE in cookies else None


async def _read(receive: Any) -> bytes | None:
    """Returns the body of a request, or None if the client has gone; raises ValueError if it is too large."""
    body = b""
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            return None
        body += message.get("body", b"")
        if len(body) > MAX_BODY:
            raise ValueError
        if not message.get("more_body", False):
            return body


def _name(netloc: str) -> str:
    try:
        return (urlsplit(netloc).hostname or "").lower()
    except ValueError:
        return ""
