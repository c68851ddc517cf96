"""A policy is served, people choose between its answers, and a reward model of their choices improves the policy.

Simulated labelers use the page as a browser does. They prefer long, polite answers.
"""

import json
import pathlib
import subprocess
import sys
import time

import pytest

pytest.importorskip("starlette")
import httpx
import jax
import launch
import page_cases as cases
from page_cases import HTML, hidden

from rlhf_jax import lm
from rlhf_jax.data import tokenizers
from rlhf_jax.feedback import store

EXPERIMENTS = pathlib.Path(launch.__path__[0]).parent
WORDS = ("tea", "milk", "bread", "salt", "rice", "fish", "corn", "plum")


def run(script, *arguments):
    done = subprocess.run(
        [sys.executable, str(EXPERIMENTS / script), *map(str, arguments)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]


def question(i):
    return f"Do you like {WORDS[i % 8]} and {WORDS[(3 * i + i // 8) % 8]}?"


def demonstrations(path):
    answers = ("I like {}.", "I like {} very much, thank you.")
    turns = [(question(i), each.format(WORDS[i % 8])) for i in range(64) for each in answers]
    lines = [{"messages": [{"role": r, "content": c} for r, c in zip(("user", "assistant"), t)]} for t in turns]
    path.write_text("\n".join(map(json.dumps, lines)))


def label_in_chat(server, token, n_pairs):
    """Chooses between two answers to each of a number of messages, one per conversation."""
    with httpx.Client(base_url=server, timeout=300.0, follow_redirects=True) as client:
        client.post("/sign-in", data={"token": token}).raise_for_status()
        for i in range(n_pairs):
            time.sleep(0.2)  # more requests than a person sends are refused
            page = client.get("/chat?conversation=new", headers=HTML)
            page = client.post("/chat", data=hidden(page.text) | {"message": question(i)}, headers=HTML)
            if page.status_code == 400:  # all samples were equal
                continue
            first, second = (("thank you" in text, len(text)) for text in cases.shown_texts(page.text))
            answer = "tie" if first == second else "2" if first > second else "7"
            client.post("/chat", data=hidden(page.text) | {"answer": answer}).raise_for_status()


def polite(path):
    return sum("thank you" in json.loads(line)["response"] for line in path.read_text().splitlines()) / 128


def serve_and_label(policy, labels, n_pairs):
    """Serves a policy with the command line while a simulated labeler chats with it."""
    with store.Store(labels) as opened:
        token = opened.add_labeler("Ada")
    port = cases.free_port()
    serve = ("rlhf_jax.feedback", "serve", labels, "--set", "round 1", "--policy", policy, "--port", port)
    command = [sys.executable, "-m", *map(str, serve), "--max-new-tokens", "24"]
    with subprocess.Popen(command, cwd=cases.ROOT) as server:
        try:
            cases.wait_for(f"http://127.0.0.1:{port}", server)
            label_in_chat(f"http://127.0.0.1:{port}", token, n_pairs)
        finally:
            server.kill()
    with store.Store(labels) as opened:
        return len(opened.latest("round 1 (chat)"))


def test_a_policy_is_served_and_its_answers_are_labelled(tmp_path):
    tokenizer = tokenizers.word_level(sorted({word for i in range(64) for word in question(i).split()}))
    cfg = lm.LMConfig.preset("tiny", vocab_size=len(tokenizer))
    lm.save(tmp_path / "policy", cfg, lm.init(jax.random.key(0), cfg), tokenizer)
    assert serve_and_label(tmp_path / "policy", tmp_path / "labels.sqlite", 2) == 2


@pytest.mark.slow
def test_choices_of_people_improve_a_policy(tmp_path):
    shown, labels = tmp_path / "demonstrations.jsonl", tmp_path / "labels.sqlite"
    sft, reward_model, ppo = (tmp_path / name for name in ("sft", "reward_model", "ppo"))
    demonstrations(shown)
    flags = ("--data.vocab-size", 300, "--data.width", 64, "--learning-rate", 0.003, "--batch", 8, "--steps", 200)
    run("sft.py", "--model", "tiny", "--data.path", shown, *flags, "--out", sft)
    assert serve_and_label(sft, labels, 30) >= 20
    flags = ("--epochs", 8, "--batch", 4, "--learning-rate", 0.001, "--data.held-out", 0.2)
    run("reward_model.py", "--model", sft, "--data.path", labels, *flags, "--out", reward_model)
    flags = ("--max-new-tokens", 24, "--ppo.iterations", 20, "--ppo.batch", 32, "--ppo.learning-rate", 0.0003)
    run("ppo.py", "--policy", sft, "--reward-model", reward_model, "--prompts", shown, *flags, "--out", ppo)
    for each in (sft, ppo):
        run("sample.py", "--model", each, "--prompts", shown, "--max-new-tokens", 24, "--out", each / "answers.jsonl")
    before, after = (polite(each / "answers.jsonl") for each in (sft, ppo))
    print(f"polite answers: {before:.2f} before, {after:.2f} after")
    assert 0.2 < before < 0.8 and after > before + 0.2
