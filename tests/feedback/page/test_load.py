"""Many people label at once while the server is killed: nothing is lost or doubled.

With ``-m slow -s``, 200 people give one judgement every five seconds on average, at random times, for five minutes, and
the response times are printed.
"""

import asyncio
import random
import time

import numpy as np
import pytest

pytest.importorskip("starlette")
import httpx
import page_cases as cases
from page_cases import HTML, hidden

from rlhf_jax.feedback import store


class Person:
    """Labels like the script of the page: sends a form again until the server answers."""

    def __init__(self, server, token, seconds):
        self.client = httpx.AsyncClient(base_url=server.url, timeout=30.0)
        self.token, self.seconds, self.sent = token, seconds, 0
        self.rng = random.Random(token)

    async def ask(self, method, path, **options):
        while True:
            start = time.perf_counter()
            try:
                response = await self.client.request(method, path, **options)
            except httpx.TransportError:
                self.seconds.append((method, time.time(), np.inf))
                await asyncio.sleep(0.2)
                continue
            self.seconds.append((method, time.time(), time.perf_counter() - start))
            if response.status_code < 400:
                return response
            assert response.status_code in (429, 503), response.text
            await asyncio.sleep(0.2)

    async def label(self, every, until, delay):
        await asyncio.sleep(delay)
        await self.ask("POST", "/sign-in", data={"token": self.token})
        while time.time() < until:
            start, pause = time.time(), self.rng.expovariate(1 / every)
            page = await self.ask("GET", "/judge", headers=HTML)
            await self.ask("POST", "/judge", data=hidden(page.text) | {"answer": "3"})
            self.sent += 1
            await asyncio.sleep(max(0.0, start + pause - time.time()))
        await self.client.aclose()


@pytest.mark.parametrize(
    ("n_people", "every", "duration"), [(10, 0.2, 4.0), pytest.param(200, 5.0, 300.0, marks=pytest.mark.slow)]
)
def test_nothing_is_lost_or_doubled(tmp_path, n_people, every, duration):
    path = tmp_path / "a.sqlite"
    with store.Store(path) as opened:
        opened.add(cases.pairs(max(200, int(2 * n_people * duration / every))), set_name="a")
        tokens = [opened.add_labeler(f"labeler {i}") for i in range(n_people)]
    seconds, killed = [], []

    async def run(server):
        until = time.time() + duration
        people = [Person(server, token, seconds) for token in tokens]
        work = [each.label(every, until, every * i / n_people) for i, each in enumerate(people)]

        async def kill():
            await asyncio.sleep(duration / 2)
            killed.append(time.time())
            await asyncio.to_thread(server.kill)
            await asyncio.to_thread(server.start)
            killed.append(time.time())

        await asyncio.gather(kill(), *work)
        return sum(each.sent for each in people)

    with cases.Server(path, cases.free_port()) as server:
        sent = asyncio.run(run(server))
    with store.Store(path, read_only=True) as opened:
        history = opened.history("a")
        assert len(history) == sent >= n_people
        assert len({(each.labeler, each.item) for each in history}) == sent
    # Without the first seconds, in which all people sign in, and those in which the server is down or has just started.
    began = min(when for _, when, _ in seconds)
    steady = [each for each in seconds if each[1] > began + every and not killed[0] - 1 < each[1] < killed[1] + 10]
    print(f"\n{sent} judgements; response times in ms:")
    for method in ("GET", "POST"):
        taken = 1000 * np.array([took for name, _, took in steady if name == method])
        print(method, len(taken), ", ".join(f"p{q} {np.percentile(taken, q):.1f}" for q in (50, 95, 99, 99.9)))
