"""A judge behind HTTP, against a local server that answers, fails, hangs and talks nonsense."""

import http.server
import json
import math
import threading
import time
from typing import Any

import pytest

pytest.importorskip("httpx")
pytest.importorskip("tenacity")

from rlhf_jax import feedback
from rlhf_jax.feedback.endpoint import Endpoint

PAIRS = [feedback.Pair(f"question {i}", f"good {i}", f"bad {i}") for i in range(6)]
PRINCIPLE = "Which reply is better?"


def completion(*, text="A", tokens=(("A", 0.6), ("B", 0.2), ("The", 0.1))):
    listed = [{"token": token, "logprob": math.log(p)} for token, p in tokens]
    return {
        "choices": [{"message": {"content": text}, "logprobs": {"content": [{"top_logprobs": listed}]}}],
        "usage": {"total_tokens": 7},
    }


@pytest.fixture
def server():
    """A server whose ``reply(request, number)`` returns a status and a body; it records requests and headers."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self):
            request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            with own.lock:
                own.requests.append(request)
                own.headers.append(dict(self.headers))
                number = len(own.requests)
            status, body = own.reply(request, number)
            content = body if isinstance(body, bytes) else json.dumps(body).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *args):
            pass

    class Server(http.server.ThreadingHTTPServer):
        daemon_threads = True

        def handle_error(self, request, client_address):
            pass  # a client that gave up

    own: Any = Server(("127.0.0.1", 0), Handler)
    own.requests, own.headers, own.lock, own.reply = (
        [],
        [],
        threading.Lock(),
        lambda request, number: (200, completion()),
    )
    threading.Thread(target=own.serve_forever, daemon=True).start()
    yield own
    own.shutdown()
    own.server_close()


def endpoint(server, **options):
    url = f"http://127.0.0.1:{server.server_port}/v1/"
    return Endpoint(url, **({"model": "judge", "pause": 0.01, "timeout": 10.0} | options))


def label(server, **options):
    return feedback.label(PAIRS, endpoint(server, **options), principle=PRINCIPLE)


def test_the_probability_is_that_of_a_among_a_and_b(server):
    listed = (("A", 0.3), (" a", 0.1), ("(B", 0.2), ("Both", 0.4))
    server.reply = lambda request, number: (200, completion(tokens=listed))
    answer: Any
    ((_, answer),) = endpoint(server, key="secret")(["question ("])
    assert answer.probability == pytest.approx(0.4 / 0.6) and answer.tokens == 7
    (request,) = server.requests
    assert request["messages"] == [{"role": "user", "content": "question ("}]
    assert (request["model"], request["max_tokens"], request["temperature"]) == ("judge", 1, 0.0)
    assert request["logprobs"] is True and server.headers[0]["Authorization"] == "Bearer secret"
    assert "secret" not in endpoint(server, key="secret").name


def test_failures_are_tried_again(server):
    seen = {}

    def reply(request, number):
        text = request["messages"][0]["content"]
        seen[text] = seen.get(text, 0) + 1
        bad = [(503, b"busy"), (200, b"not JSON"), (200, {"choices": []}), (429, b"slow down")]
        return bad[seen[text] - 1] if seen[text] <= 4 else (200, completion())

    server.reply = reply
    labels = label(server, attempts=5)
    assert labels.errors == {} and labels.asked == 12 and set(seen.values()) == {5}
    assert list(labels.preference_N) == [0.5] * 6


def test_a_server_that_always_fails_is_reported_and_nothing_is_stored(server, tmp_path):
    server.reply = lambda request, number: (500, b"")
    path = tmp_path / "answers.jsonl"
    failing = endpoint(server, attempts=2)
    labels = feedback.label(PAIRS, failing, principle=PRINCIPLE, answers=path)
    assert labels.errors == {"RefusedError: status 500": 12} and len(server.requests) == 24
    assert not path.exists()
    server.reply = lambda request, number: (200, completion())
    labels = feedback.label(PAIRS, failing, principle=PRINCIPLE, answers=path)
    assert labels.errors == {} and labels.asked == 12 and len(path.read_text().splitlines()) == 12


def test_a_refused_key_is_not_tried_again(server):
    server.reply = lambda request, number: (401, b"wrong key")
    labels = label(server)
    assert labels.errors == {"ValueError: status 401: wrong key": 12} and len(server.requests) == 12


def test_a_server_that_hangs_is_given_up(server):
    def reply(request, number):
        if "question 3\n" in request["messages"][0]["content"]:
            time.sleep(3)
        return 200, completion()

    server.reply = reply
    labels = label(server, attempts=2, timeout=0.3)
    assert sum(labels.errors.values()) == 2 and "Timeout" in next(iter(labels.errors))
    assert [math.isnan(x) for x in labels.preference_N] == [i == 3 for i in range(6)]


def test_no_server_is_an_error_of_every_question():
    judge = Endpoint("http://127.0.0.1:9", model="judge", attempts=2, pause=0.01)
    labels = feedback.label(PAIRS, judge, principle=PRINCIPLE)
    assert sum(labels.errors.values()) == 12 and labels.asked == 12


def test_an_answer_without_a_choice_is_unclear_and_not_asked_again(server, tmp_path):
    server.reply = lambda request, number: (200, completion(tokens=(("I", 0.9), ("Sorry", 0.1))))
    for _ in range(2):
        labels = feedback.label(PAIRS, endpoint(server), principle=PRINCIPLE, answers=tmp_path / "answers.jsonl")
    assert labels.unclear == 12 and labels.asked == 0 and len(server.requests) == 12


@pytest.mark.parametrize("logprob", [5.0, math.nan])
def test_numbers_that_are_no_log_probabilities_are_refused(server, logprob):
    body = completion()
    body["choices"][0]["logprobs"]["content"][0]["top_logprobs"][0]["logprob"] = logprob
    server.reply = lambda request, number: (200, body)
    labels = label(server, attempts=1)
    assert sum(labels.errors.values()) == 12 and "not a completion" in next(iter(labels.errors))


def test_a_chain_of_thought_precedes_the_answer(server):
    server.reply = lambda request, number: (200, completion(text="The first is kinder."))
    answer: Any
    ((_, answer),) = endpoint(server, think_tokens=50)(["Which? Answer with A or B.\nAnswer: ("])
    thought, last = server.requests
    assert thought["max_tokens"] == 50 and thought["temperature"] == 1.0 and "logprobs" not in thought
    assert "Answer: (" not in thought["messages"][0]["content"]
    assert last["messages"][1] == {"role": "assistant", "content": "The first is kinder."}
    assert answer.tokens == 14 and answer.probability == pytest.approx(0.75)
    assert endpoint(server, think_tokens=50).name != endpoint(server).name


def test_requests_run_at_the_same_time(server):
    most, now = 0, 0

    def reply(request, number):
        nonlocal most, now
        with server.lock:
            now += 1
            most = max(most, now)
        time.sleep(0.1)
        with server.lock:
            now -= 1
        return 200, completion()

    server.reply = reply
    assert label(server, concurrency=4).asked == 12
    assert most == 4


def revise(server, prompts=2, **options):
    model = endpoint(server, **options)
    texts = [f"question {i}" for i in range(prompts)]
    return feedback.revise(
        texts, ["reply"] * prompts, model.generate, name=model.name, principles=feedback.HARMLESSNESS, rounds=1
    )


def test_a_server_writes_critiques_and_revisions(server):
    server.reply = lambda request, number: (200, completion(text=" better "))
    found = revise(server)
    assert [each.responses for each in found.revised_N] == [("reply", "better")] * 2
    assert (found.asked, found.tokens) == (4, 28)
    for request in server.requests:
        assert "logprobs" not in request and (request["max_tokens"], request["temperature"]) == (512, 1.0)


def test_texts_are_asked_for_again_after_failures_and_nonsense(server):
    seen = {}

    def reply(request, number):
        text = request["messages"][0]["content"]
        seen[text] = seen.get(text, 0) + 1
        no_text = {"choices": [{"message": {"content": None}}]}
        bad = [(503, b"busy"), (200, b"not JSON"), (200, no_text), (429, b"slow down")]
        return bad[seen[text] - 1] if seen[text] <= 4 else (200, completion(text="better"))

    server.reply = reply
    found = revise(server, attempts=5)
    assert found.errors == {} and len(found.complete(1)) == 2 and set(seen.values()) == {5}


def test_a_text_that_never_comes_is_an_error_of_its_own_response(server):
    def reply(request, number):
        if "question 1\n" in request["messages"][0]["content"]:
            time.sleep(3)
        return 200, completion(text="better")

    server.reply = reply
    found = revise(server, attempts=2, timeout=0.3)
    assert found.complete(1) == [0] and found.revised_N[1].responses == ("reply",)
    assert "Timeout" in next(iter(found.errors))
