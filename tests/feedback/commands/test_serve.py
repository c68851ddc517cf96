"""The command that serves the labelling page: what it refuses, and the policy with which people chat."""

import pathlib
import socket
from typing import Any

import jax
import pytest

pytest.importorskip("starlette")
from starlette.testclient import TestClient

from rlhf_jax import lm
from rlhf_jax.data import tokenizers
from rlhf_jax.feedback import judgements, page, store
from rlhf_jax.feedback.commands import serve


@pytest.fixture
def path(tmp_path):
    with store.Store(tmp_path / "a.sqlite") as opened:
        prompt = judgements.Prompt(({"role": "user", "content": "Why?"},))
        answers = (judgements.Completion("So.", "one"), judgements.Completion("No.", "two"))
        opened.add([judgements.Item(prompt=prompt, completions=answers)], set_name="a")
    return str(tmp_path / "a.sqlite")


@pytest.fixture
def served(monkeypatch):
    """What would be served: the applications, with the address and other options."""
    found = []
    monkeypatch.setattr(page, "listen", lambda host, port: found.append((host, port)) or socket.socket())
    monkeypatch.setattr(page, "serve", lambda app, listener, **options: found.append((app, options)))
    return found


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"host": "192.0.2.7"}, "--host 192.0.2.7 lets other machines in; give --secret-file FILE"),
        ({"host": "0.0.0.0", "secret_file": "LONG"}, "--host 0.0.0.0 needs --names"),
        ({"secret_file": "SHORT"}, "the secret has 5 characters; use at least 16"),
        ({"set": "b"}, "has no set 'b'; its sets are 'a'"),
        ({"certificate": "c.pem"}, "--certificate and --key are given together"),
        ({"red_team": True}, "--red-team has no effect without --policy"),
        ({"temperature": 0.5}, "--temperature has no effect without --policy"),
        ({"policy": "P", "temperature": 0.0}, "--temperature is 0; it must be positive, since two samples"),
        ({"policy": "P", "max_new_tokens": 0}, "--max-new-tokens is 0"),
        ({"port": 99999}, "--port is 99999; it must be from 0"),
        ({"judgements": 0}, "--judgements is 0; it must be at least 1"),
        ({"lease_minutes": -3.0}, "--lease-minutes is -3; it must be positive"),
        ({"instructions": "LATIN"}, "is not in UTF-8"),
        ({"store": "/no/such/store.sqlite"}, "does not exist; make a store with import or assign"),
        ({"policy": "/no/such/folder"}, "--policy /no/such/folder cannot be used: "),
    ],
)
def test_settings_that_cannot_be_used_are_refused(path, served, tmp_path, settings: Any, message):
    files = {"SHORT": b"short", "LONG": b"x" * 16, "LATIN": b"\xe9"}
    for name, text in files.items():
        (tmp_path / name).write_bytes(text)
    settings = {k: str(tmp_path / v) if v in files else v for k, v in settings.items()}
    with pytest.raises(store.StoreError) as caught:
        serve.run(serve.Serve(**{"store": path, **settings}))
    assert message in str(caught.value) and not served


def test_other_machines_need_a_secret_and_a_name(path, served, tmp_path, capsys):
    (tmp_path / "secret").write_text("a secret of some length\n")
    names = ("labels.example.org",)
    serve.run(serve.Serve(store=path, host="0.0.0.0", names=names, secret_file=str(tmp_path / "secret")))
    [address, (app, options)] = served
    assert address == ("0.0.0.0", 8080) and options == {"certificate": None, "key": None, "behind_proxy": False}
    printed = capsys.readouterr()
    assert "set 'a'" in printed.out and "http://labels.example.org:" in printed.out
    assert "the connection is not encrypted" in printed.err and "nobody can sign in yet" in printed.err
    assert TestClient(app, base_url="http://labels.example.org").get("/").status_code == 200
    assert TestClient(app, base_url="http://evil.example").get("/").status_code == 400
    assert "Access secret" in TestClient(app, base_url="http://localhost").get("/").text


def test_the_owner_downloads_a_report(path, monkeypatch):
    def check(app, listener, **options):
        with store.Store(path) as opened:
            token = opened.add_labeler("Owner", role="owner")
            opened.add_labeler("Ada")
            [id] = opened.items("a")
            opened.record("Ada", id, judgements.Judgement(strength=1), key="1")
        client = TestClient(app, base_url="http://localhost")
        client.post("/sign-in", data={"token": token})
        assert 'href="/labelers"' in client.get("/report").text
        found = client.get("/labelers")
        assert "attachment" in found.headers["content-disposition"] and "Ada" in found.text

    monkeypatch.setattr(page, "serve", check)
    serve.run(serve.Serve(store=path, port=0))


def test_a_port_in_use_is_named(path):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(
            store.StoreError, match=rf"cannot listen at 127\.0\.0\.1, port {port} .*; choose another --port"
        ):
            serve.run(serve.Serve(store=path, port=port))
    with pytest.raises(store.StoreError, match=r"cannot listen at no-such-host\.invalid"):
        pathlib.Path(path + ".secret").write_text("x" * 16)
        serve.run(serve.Serve(store=path, host="no-such-host.invalid", secret_file=path + ".secret"))


def test_the_set_may_be_left_out_after_a_chat(path, served):
    with store.Store(path) as opened:
        opened.add([*opened.items("a").values()], set_name="a (chat)")
    serve.run(serve.Serve(store=path))
    assert served


@pytest.mark.parametrize("in_run", [False, True])
def test_a_model_answers_twice_and_the_same_after_a_restart(tmp_path, in_run):
    folder = tmp_path / "run" / "model" if in_run else tmp_path / "run"
    tokenizer = tokenizers.word_level([f"w{i}" for i in range(40)])
    cfg = lm.LMConfig.preset("tiny", vocab_size=len(tokenizer))
    lm.save(folder, cfg, lm.init(jax.random.key(0), cfg), tokenizer)
    settings = serve.Serve(store="", policy=str(tmp_path / "run"), max_new_tokens=8)
    first, second = (serve.load_policy(settings) for _ in range(2))
    messages = [{"role": "user", "content": "w1 w2"}]
    texts = [first["policy"](messages, sample) for sample in (0, 1)]
    assert texts[0] != texts[1] and texts == [second["policy"](messages, sample) for sample in (0, 1)]
    assert first["policy_name"] == "run" and first["sampling"]["temperature"] == 1.0
    with pytest.raises(ValueError, match="too long"):
        first["policy"]([{"role": "user", "content": "w1 " * cfg.max_length}], 0)
