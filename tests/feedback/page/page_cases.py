"""A labelling page for tests: its store, people and forms, and a server process that can be killed."""

import html
import pathlib
import re
import socket
import subprocess
import sys
import time

import httpx

from rlhf_jax.feedback import page, store
from rlhf_jax.feedback.judgements import Completion, Item, Prompt

HTML = {"accept": "text/html"}
ROOT = pathlib.Path(__file__).parents[3]


def pairs(n, start=0, text="Question {}?", **others):
    return [
        Item(
            prompt=Prompt(({"role": "user", "content": text.format(i)},)),
            completions=(Completion(f"good {i}", "policy-one"), Completion(f"bad {i}", "policy-two")),
            **others,
        )
        for i in range(start, start + n)
    ]


def rankings(n, k=5):
    prompts = [Prompt(({"role": "user", "content": f"Rank {i}?"},)) for i in range(n)]
    return [Item(prompt=each, completions=tuple(Completion(f"answer {j}") for j in range(k))) for each in prompts]


def echo(messages, sample):
    """A policy for the chat."""
    return f"sample {sample} about {messages[-1]['content']}"


def make_app(opened, **options):
    options = {
        "set_name": "a",
        "policy": echo,
        "policy_name": "echo",
        "hosts": ("testserver", *page.LOOPBACK),
    } | options
    return page.make_app(opened, page.Options(**options))


def hidden(text):
    """Returns the hidden fields of the main form of a page."""
    main = text[text.index("<main") :]
    fields = re.findall(r'<input type="hidden" name="([^"]*)" value="([^"]*)"', main)
    return {name: html.unescape(value) for name, value in fields}


def sign_in(client, token, **others):
    return client.post("/sign-in", data={"token": token, **others}, headers=HTML, follow_redirects=False)


def label_next(client, choose=lambda text: {"answer": "2"}):
    """Answers the next item through the page; returns False if nothing is left."""
    text = client.get("/judge", headers=HTML).raise_for_status().text
    if "Nothing is left" in text:
        return False
    response = client.post("/judge", data=hidden(text) | choose(text), follow_redirects=False)
    assert response.status_code == 303, response.text
    return True


def shown_texts(text):
    """Returns the completions of a page in the order in which they are shown."""
    sections = re.findall(r'<section class="completion".*?</section>', text, re.DOTALL)
    return ["\n".join(re.findall(r'<div class="text" dir="auto">(.*?)</div>', each, re.DOTALL)) for each in sections]


def free_port():
    with socket.create_server(("127.0.0.1", 0)) as found:
        return found.getsockname()[1]


def wait_for(url, process):
    """Waits until a server process answers."""
    for _ in range(2400):
        try:
            return httpx.get(url)
        except httpx.TransportError:
            assert process.poll() is None, "the server has ended"
            time.sleep(0.05)
    raise AssertionError("the server does not answer")


class Server:
    """A server process."""

    def __init__(self, path, port, before=""):
        self.path, self.port, self.before, self.process = path, port, before, None
        self.url = f"http://127.0.0.1:{port}"

    def start(self):
        code = f"{self.before}\nimport page_cases\npage_cases.main({str(self.path)!r}, {self.port})"
        self.process = subprocess.Popen([sys.executable, "-c", code], cwd=pathlib.Path(__file__).parent)
        wait_for(self.url, self.process)
        return self

    def kill(self):
        assert self.process is not None
        self.process.kill()
        self.process.wait()

    def __enter__(self):
        return self.start()

    def __exit__(self, *_):
        self.kill()


def main(path, port):
    """Serves the set "a" of a store, with a policy that answers at once."""
    with store.Store(path) as opened:
        page.serve(make_app(opened), page.listen("127.0.0.1", port))
