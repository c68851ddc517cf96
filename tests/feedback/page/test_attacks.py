"""Attacks on the labelling page must not succeed, change the store or stop the server."""

import hashlib
import json
import socket
import time
from urllib.parse import quote

import pytest

pytest.importorskip("starlette")
import page_cases as cases
from page_cases import HTML, hidden
from starlette.testclient import TestClient

from rlhf_jax.feedback import store
from rlhf_jax.feedback.judgements import Completion, Item, Prompt
from rlhf_jax.feedback.page import protection, sessions, web_server

SCRIPT = "<script>alert(1)</script>\"'><img src=x onerror=alert(2)>\x1b[31m\u202e{{7*7}}"


class Scene:
    """A store with two labelers and an owner, and their clients."""

    def __init__(self, path, **options):
        self.opened = store.Store(path)
        prompt = Prompt(({"role": f"user{SCRIPT}", "content": SCRIPT},), SCRIPT, SCRIPT)
        completions = (Completion(SCRIPT, SCRIPT), Completion("b", extra={"tool_calls": [{SCRIPT: SCRIPT}]}))
        self.ids = self.opened.add(cases.pairs(3), set_name="a")
        self.ids += self.opened.add([Item(prompt=prompt, completions=completions)], set_name="a")
        self.app = cases.make_app(self.opened, instructions=SCRIPT, **options)
        self.tokens = {}
        for name, role in (("Ada", "labeler"), ("Ben", "labeler"), ("Owner", "owner")):
            self.tokens[name[:3]] = self.opened.add_labeler(name, role=role)
        with self.opened.transaction(write=True) as db:  # a name that `add_labeler` refuses
            db.execute("UPDATE labelers SET name = ? WHERE name = 'Ben'", (f"Ben{SCRIPT}",))
        self.ada, self.ben, self.owner = (self.client(name) for name in ("Ada", "Ben", "Own"))

    def client(self, name=None, **options):
        found = TestClient(self.app, **options)
        if name is not None:
            assert cases.sign_in(found, self.tokens[name]).status_code == 303
        return found

    def form(self, client=None):
        return hidden((client or self.ada).get("/judge", headers=HTML).text) | {"answer": "1"}

    def with_cookie(self, value):
        return self.client().get("/judge", headers={"cookie": f"{protection.COOKIE}={value}"})

    def state(self):
        rows = self.opened._db.execute("SELECT * FROM judgements").fetchall()
        return len(rows), len(self.opened.items()), [tuple(each) for each in self.opened.labelers()]


@pytest.fixture(scope="module")
def scene(tmp_path_factory):
    return Scene(tmp_path_factory.mktemp("attacks") / "a.sqlite", requests_per_second=1000.0)


def ask_without_session(path, method="GET"):
    def attack(scene):
        return scene.client().request(method, path, data={"x": "1"} if method == "POST" else None)

    return attack


def cookie(make):
    return lambda scene: scene.with_cookie(make(scene))


def token(make):
    return lambda scene: cases.sign_in(scene.client(), make(scene))


def post(path="/judge", headers=None, **changes):
    """Sends the form of the next item with changed fields; None removes a field."""

    def attack(scene):
        form = scene.form() | {name.replace("_at_", "-"): value for name, value in changes.items()}
        form = {name: value(scene) if callable(value) else value for name, value in form.items() if value is not None}
        return scene.ada.post(path, data=form, headers=headers, follow_redirects=False)

    return attack


def raw(body, headers=None, path="/judge"):
    def attack(scene):
        sent = {"content-type": "application/x-www-form-urlencoded"} | (headers or {})
        return scene.ada.post(path, content=body, headers=sent, follow_redirects=False)

    return attack


def get(path, name="ada", headers=None):
    return lambda scene: getattr(scene, name).get(
        path(scene) if callable(path) else path, headers=headers, follow_redirects=False
    )


def replayed(scene):
    client = scene.client("Ada")
    secret = client.cookies[protection.COOKIE]
    client.post("/sign-out", data={"form_token": sessions.form_token(secret)})
    return scene.with_cookie(secret)


def revoked(scene):
    name = f"Cleo {time.monotonic_ns()}"
    scene.tokens["Cle"] = scene.opened.add_labeler(name)
    client = scene.client("Cle")
    scene.opened.revoke(name)
    return client.get("/judge")


def ended(scene):
    return scene.with_cookie(sessions.start(scene.opened, "Ada", now=0.0))


def bens_item(scene):
    """Adds an item that Ben is asked about and Ada is not."""
    start = len(scene.opened.items())
    [id] = scene.opened.add(cases.pairs(1, start=start), set_name="of Ben")
    scene.opened.assign(scene.opened.labelers()[1].name, set_name="of Ben", item=id)
    return id


def bens_chat(scene):
    page = scene.ben.get("/chat?conversation=new", headers=HTML)
    form = hidden(page.text) | {"message": "private"}
    scene.ben.post("/chat", data=form).raise_for_status()
    return form["conversation"]


def in_bens_chat(scene):
    form = hidden(scene.ada.get("/chat", headers=HTML).text) | {"conversation": bens_chat(scene), "turn": "1"}
    return scene.ada.post("/chat", data=form | {"message": "I am Ben"})


ATTACKS = {
    "judge without a session": (ask_without_session("/judge"), {401}),
    "answers without a session": (ask_without_session("/answers"), {401}),
    "report without a session": (ask_without_session("/report"), {401}),
    "export without a session": (ask_without_session("/export"), {401}),
    "chat without a session": (ask_without_session("/chat"), {401}),
    "send a judgement without a session": (ask_without_session("/judge", "POST"), {401}),
    "send a message without a session": (ask_without_session("/chat", "POST"), {401}),
    "sign out without a session": (ask_without_session("/sign-out", "POST"), {403}),
    "delete": (ask_without_session("/judge", "DELETE"), {405, 415}),
    "trace": (ask_without_session("/judge", "TRACE"), {405, 415}),
    "an invented cookie": (cookie(lambda scene: "A" * 43), {401}),
    "an empty cookie": (cookie(lambda scene: ""), {401}),
    "the token as a cookie": (cookie(lambda scene: scene.tokens["Ada"]), {401}),
    "a cookie with SQL": (cookie(lambda scene: "' OR '1'='1"), {401}),
    "a very long cookie": (cookie(lambda scene: "A" * 60_000), {401}),
    "a cookie from before the sign-out": (replayed, {401}),
    "a cookie of a revoked labeler": (revoked, {401}),
    "a cookie of an ended session": (ended, {401}),
    "the stored hash as a cookie": (
        cookie(lambda scene: hashlib.sha256(scene.ada.cookies[protection.COOKIE].encode()).hexdigest()),
        {401},
    ),
    "an empty token": (token(lambda scene: ""), {403}),
    "a token with SQL": (token(lambda scene: "' OR 1=1 --"), {403}),
    "a part of a token": (token(lambda scene: scene.tokens["Ada"][:-1]), {403}),
    "the name as a token": (token(lambda scene: "Ada"), {403}),
    "no form token": (post(form_token=None), {403}),
    "an invented form token": (post(form_token="0" * 64), {403}),
    "a form token with other letters": (post(form_token="é☃"), {403}),
    "another's form token": (
        post(form_token=lambda scene: sessions.form_token(scene.ben.cookies[protection.COOKIE])),
        {403},
    ),
    "another origin": (post(headers={"origin": "https://evil.example"}), {403}),
    "an origin that begins alike": (post(headers={"origin": "http://testserver.evil.example"}), {403}),
    "another port": (post(headers={"origin": "http://testserver:81"}), {403}),
    "no origin": (post(headers={"origin": "null"}), {403}),
    "a form on another site": (post(headers={"sec-fetch-site": "cross-site"}), {403}),
    "a form on a sibling domain": (post(headers={"sec-fetch-site": "same-site"}), {403}),
    "JSON": (raw(b'{"answer": 1}', {"content-type": "application/json"}), {415}),
    "plain text": (raw(b"answer=1", {"content-type": "text/plain"}), {415}),
    "another host": (get("/judge", headers={"host": "evil.example"}), {400}),
    "a host with a user": (get("/judge", headers={"host": "testserver@evil.example"}), {400}),
    "a malformed host": (get("/judge", headers={"host": "[::1"}), {400}),
    "another labeler's item": (get(lambda scene: f"/judge?item={bens_item(scene)}"), {404}),
    "a judgement on another labeler's item": (post(item=bens_item), {404}),
    "another labeler's chat": (get(lambda scene: f"/chat?conversation={bens_chat(scene)}"), {400}),
    "a message in another labeler's chat": (in_bens_chat, {400}),
    "an item that does not exist": (post(item="0" * 32), {404}),
    "an item with SQL": (post(item="' OR 1=1; DROP TABLE judgements; --"), {404}),
    "a conversation with SQL": (get("/chat?conversation=' OR 1=1 --"), {400}),
    "a conversation with a line break": (get("/chat?conversation=abcdefgh%0d%0aSet-Cookie:%20x=1"), {400}),
    "a strength of 0": (post(answer="0"), {400}),
    "a strength of 9": (post(answer="9"), {400}),
    "a strength with a sign": (post(answer="+1"), {400}),
    "no answer": (post(answer=None), {400}),
    "a ranking of a pair": (post(answer=None, rank_at_0="1", rank_at_1="2"), {400}),
    "a later revision": (post(revision="7"), {400}),
    "a negative revision": (post(revision="-1"), {400}),
    "no revision": (post(revision=None), {400}),
    "a long comment": (post(comment="x" * 20_000), {400}),
    "a repeated field": (raw(b"answer=1&answer=8"), {400}),
    "many fields": (raw(b"&".join(b"f%d=1" % i for i in range(5000))), {400}),
    "a malformed form": (raw(b"\xff\xfe=1&&&=%zz"), {400}),
    "half a surrogate": (raw(b"answer=%ED%A0%80"), {400}),
    "a large body": (raw(b"a=" + b"x" * 10_000_000), {413}),
    "a large body in pieces": (raw(iter([b"x" * 60_000] * 20)), {413}),
    "a path": (get("/static/../../setup.cfg"), {404}),
    "an encoded path": (get("/static/%2e%2e%2f%2e%2e%2fetc/passwd"), {404}),
    "a path after a file": (get("/static/page.css/../../../etc/passwd"), {404}),
    "a path as an item": (get("/judge?item=../../../etc/passwd"), {404}),
    "a null byte": (get("/judge?item=%00"), {404}),
    "an export by a labeler": (get("/export"), {403}),
    "a report by a labeler": (get("/report"), {403}),
    "a script in a request": (get(f"/judge?item={quote(SCRIPT)}", headers=HTML), {404}),
}


@pytest.mark.parametrize("name", ATTACKS)
def test_attacks_change_nothing(scene, name):
    attack, codes = ATTACKS[name]
    n_judgements, n_items, people = scene.state()
    response = attack(scene)
    assert response.status_code in codes, (response.status_code, response.text)
    assert "<script>alert" not in response.text and "Set-Cookie: x" not in str(response.headers)
    after = scene.state()
    assert after[0] == n_judgements
    assert after[1] - n_items == ("another labeler's" in name)  # what Ben was asked
    assert [each for each in after[2] if not each[0].startswith("Cleo")] == [
        each for each in people if not each[0].startswith("Cleo")
    ]
    assert scene.ada.get("/judge", headers=HTML).status_code == 200


def test_texts_of_others_are_never_markup(scene):
    for client, path in ((scene.ben, "/judge"), (scene.ben, "/instructions"), (scene.owner, "/report")):
        text = client.get(path, headers=HTML).text
        assert "<script>alert" not in text and "<img" not in text
        assert not set(text) & set("\x1b\u202e")
    scene.opened.assign("Ada", set_name="a", item=scene.ids[3])
    text = scene.ada.get(f"/judge?item={scene.ids[3]}", headers=HTML).text
    assert text.count("&lt;script&gt;alert(1)&lt;/script&gt;") >= 4 and "<script>alert" not in text
    assert "{{7*7}}" in text
    assert 'U+001B</span>[31m<span class="control">U+202E' in text and not set(text) & set("\x1b\u202e")
    form = hidden(text) | {"answer": "1", "comment": SCRIPT}
    assert scene.ada.post("/judge", data=form).status_code == 200
    again = scene.ada.get(f"/judge?item={scene.ids[3]}", headers=HTML).text
    assert "<script>alert" not in again and "&lt;/script&gt;&#34;&#39;&gt;&lt;img" in again
    line = json.loads(scene.owner.get("/export").text.splitlines()[0])
    assert line["chosen"] == SCRIPT or line["rejected"] == SCRIPT


def test_every_response_has_the_headers_that_protect_it(scene):
    for path in ("/", "/judge", "/static/page.js", "/no-such-page", "/export"):
        headers = scene.ada.get(path, headers=HTML).headers
        for name, value in protection.HEADERS.items():
            assert headers[name] == value or name == "Cache-Control"
    assert "unsafe" not in protection.HEADERS["Content-Security-Policy"]


def test_pages_contain_no_inline_script_or_style(scene):
    pages = [scene.ada.get(path, headers=HTML) for path in ("/judge", "/chat", "/answers")]
    for text in (each.text for each in (*pages, scene.owner.get("/report", headers=HTML))):
        assert text.count("<script") == 1 and " style=" not in text and "<style" not in text and " onclick" not in text
        assert "http://" not in text and "https://" not in text


def test_the_access_secret_cannot_be_guessed_fast(tmp_path):
    with store.Store(tmp_path / "a.sqlite") as opened:
        ada, ben = opened.add_labeler("Ada"), opened.add_labeler("Ben")
        client = TestClient(cases.make_app(opened, access_secret="right"))
        codes = [cases.sign_in(client, ada, secret=f"guess {i}").status_code for i in range(30)]
        assert codes[0] == 403 and codes[-1] == 429
        assert cases.sign_in(client, ada, secret="right").status_code == 429
        assert cases.sign_in(client, ben, secret="right").status_code == 303  # others are not shut out


def test_one_session_cannot_flood_the_others(tmp_path):
    scene = Scene(tmp_path / "a.sqlite")
    codes = [scene.ada.get("/static/page.css").status_code for _ in range(200)]
    assert codes[0] == 200 and 429 in codes
    assert scene.ben.get("/judge", headers=HTML).status_code == 200


def test_a_rate_is_a_token_bucket():
    now = [0.0]
    rate = protection.Rate(2.0, 3, clock=lambda: now[0])
    assert [rate.allows("a") for _ in range(5)] == [True, True, True, False, False]
    assert rate.allows("b")
    now[0] = 1.0
    assert [rate.allows("a") for _ in range(3)] == [True, True, False]
    assert [rate.allows("c", cost=0.0) for _ in range(9)] == [True] * 9


def test_slow_requests_do_not_hold_the_server(tmp_path, monkeypatch):
    path = tmp_path / "a.sqlite"
    with store.Store(path) as opened:
        opened.add(cases.pairs(1), set_name="a")
    timeout = "from rlhf_jax.feedback.page import protection, web_server\n"
    timeout += "protection.BODY_TIMEOUT = web_server.HEADER_TIMEOUT = 0.5\nweb_server.MAX_CONNECTIONS = 60\n"
    assert protection.BODY_TIMEOUT == web_server.HEADER_TIMEOUT == 10.0
    with cases.Server(path, cases.free_port(), before=timeout) as server:
        address = ("127.0.0.1", server.port)
        slow = [socket.create_connection(address) for _ in range(50)]
        head = b"POST /sign-in HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/x-www-form-urlencoded\r\n"
        for i, each in enumerate(slow):
            each.sendall(b"GET / HT" if i % 2 else head + b"Content-Length: 9\r\n\r\nto")
        assert cases.httpx.get(server.url).status_code == 200
        for i, each in enumerate(slow):
            each.settimeout(20.0)
            received = b""
            while piece := each.recv(4096):
                received += piece
            assert received == b"" if i % 2 else received.startswith(b"HTTP/1.1 408")
        many = [socket.create_connection(address) for _ in range(80)]
        time.sleep(0.2)
        closed = 0
        for each in many:
            each.setblocking(False)
            try:
                closed += each.recv(1) == b""
            except ConnectionResetError:
                closed += 1
            except BlockingIOError:
                pass
        assert closed >= 20
        for each in many:
            each.close()
        assert cases.httpx.get(server.url).status_code == 200
        with socket.create_connection(address) as each:
            each.sendall(b"GET / HTTP/1.1\r\nHost: localhost\r\n" + b"X: " + b"y" * 200_000 + b"\r\n\r\n")
            assert each.recv(100).startswith(b"HTTP/1.1 4")
        assert cases.httpx.get(server.url).status_code == 200
