"""The commands that sample from a user's own models and evaluate them, on tiny models."""

import json
import pathlib
import types
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import sample
from finetune import answers, reward_functions, reward_scores
from launch import initial_model, run_folder
from launch import settings as launch_settings
from recipe import jobs

from rlhf_jax import lm
from rlhf_jax.data import chat, dialogues, errors, readers, tokenizers

WORDS = ("tea", "milk", "bread", "salt", "rice", "fish", "corn", "plum", "what", "is", "no", "yes")
DIALOGUES = [f"{a} is {b} {c}" for a in WORDS[:8] for b in WORDS[4:8] for c in WORDS[:2]]


def save_model(path, *, seed, words=WORDS, head=False, max_length=64, positions="rope"):
    """Saves a tiny random model whose tokens are words."""
    fmt = chat.chat_format(tokenizers.word_level(words))
    cfg = lm.LMConfig(
        vocab_size=len(fmt.tokenizer),
        n_layers=1,
        d_model=16,
        n_heads=2,
        d_mlp=32,
        max_length=max_length,
        positions=positions,
        tie_embeddings=True,
    )
    params = jax.tree.map(lambda x: 4.0 * x, lm.init(jax.random.key(seed), cfg))
    if head:
        params = lm.with_head(jax.random.key(seed + 1), params, cfg)
        params["head"]["kernel"] = jax.random.normal(jax.random.key(seed + 2), params["head"]["kernel"].shape)
    lm.save(path, cfg, params, tokenizer=fmt.tokenizer, stop_ids=fmt.stop_ids)
    return str(path)


@pytest.fixture(scope="module")
def policies(tmp_path_factory):
    folder = tmp_path_factory.mktemp("policies")
    return [save_model(folder / f"policy-{seed}", seed=seed) for seed in (0, 10)]


@pytest.fixture(scope="module")
def prompts(tmp_path_factory):
    """A file of 12 prompts of different lengths; the first has two questions."""
    path = tmp_path_factory.mktemp("prompts") / "prompts.jsonl"
    turn = [{"role": "user", "content": "what is tea"}, {"role": "assistant", "content": "tea"}]
    records = [{"prompt": [*turn, {"role": "user", "content": "is milk tea"}], "source": "first"}]
    records += [{"prompt": " ".join(WORDS[i % 8 : i % 8 + 1 + i % 4]), "source": f"s{i}"} for i in range(1, 12)]
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return str(path)


def settings(policies, prompts, tmp_path, **changes):
    defaults = {"model": policies[0], "prompts": prompts, "out": str(tmp_path / "s.jsonl"), "max_new_tokens": 6}
    return sample.SampleSettings(**(defaults | {"n": 2, "batch": 4} | changes))


def test_sample_writes_each_answer_with_its_log_probability(policies, prompts, tmp_path, capsys):
    lines = sample.run(settings(policies, prompts, tmp_path, temperature=0.7))
    assert [(line["index"], line["sample"]) for line in lines] == [(i, k) for i in range(12) for k in range(2)]
    assert lines == [json.loads(line) for line in (tmp_path / "s.jsonl").read_text().splitlines()]
    assert {line["metadata"]["source"] for line in lines} == {"first", *(f"s{i}" for i in range(1, 12))}
    shown = capsys.readouterr().out
    assert "answer 0:" in shown and "24 answers" in shown
    model = initial_model.load(policies[0])
    found, _ = readers.read_prompts(prompts)
    assert any(line["stopped"] for line in lines) and not all(line["stopped"] for line in lines)
    for line in lines:
        prompt = chat.encode_prompt(model.fmt, found[line["index"]].prompt)
        answer = model.fmt.tokenizer.encode(line["response"], add_special_tokens=False)
        answer += [model.fmt.stop_ids[0]] * line["stopped"]
        if len(answer) != line["tokens"]:  # a special token, which the text does not show
            continue
        row = jnp.array([prompt + answer])
        logits = lm.logits(model.params, lm.forward(model.params, row, cfg=model.cfg).hidden_BLD, cfg=model.cfg)
        scaled = np.asarray(logits, np.float64)[0, len(prompt) - 1 : -1] / 0.7
        logprobs = scaled - np.log(np.exp(scaled).sum(-1, keepdims=True))
        assert line["logprob"] == pytest.approx(logprobs[np.arange(len(answer)), answer].sum(), rel=1e-4, abs=1e-4)
    # The file is itself a file of prompts and of demonstrations.
    assert readers.read_prompts(str(tmp_path / "s.jsonl"))[0][2].prompt == found[1].prompt
    assert readers.read_prompts(str(tmp_path / "s.jsonl"))[0][2].metadata["source"] == "s1"


def test_an_answer_does_not_depend_on_its_batch_and_an_interrupted_run_continues(policies, prompts, tmp_path):
    whole = sample.run(settings(policies, prompts, tmp_path))
    interrupted = settings(policies, prompts, tmp_path, out=str(tmp_path / "again.jsonl"), batch=3)
    model = initial_model.load(policies[0])
    file = answers.SampleFile(interrupted.out, answers.identity(interrupted, model, prompts))
    file.append(whole[7:12])
    partial = pathlib.Path(f"{interrupted.out}{answers.PARTIAL}")
    with partial.open("a") as stream:
        stream.write('{"index": 9, "sam')  # the process was killed in the middle of a line
    with pytest.raises(run_folder.SettingError, match="--temperature was different"):
        sample.run(settings(policies, prompts, tmp_path, out=interrupted.out, temperature=0.5))
    with pytest.raises(run_folder.SettingError, match="the model was different"):
        sample.run(settings(policies[1:], prompts, tmp_path, out=interrupted.out))
    calls, keep = [], answers.Sampler.__call__
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(answers.Sampler, "__call__", lambda *args, **kw: calls.append(args[3]) or keep(*args, **kw))
        continued = sample.run(interrupted)
    assert len(calls[0]) == 19 and not partial.exists()
    for a, b in zip(whole, continued, strict=True):
        assert a | {"logprob": 0} == b | {"logprob": 0} and a["logprob"] == pytest.approx(b["logprob"], abs=1e-4)
    with pytest.raises(run_folder.SettingError, match="exists already; delete it or choose another name"):
        sample.run(interrupted)
    other = sample.run(settings(policies, prompts, tmp_path, out=str(tmp_path / "other.jsonl"), seed=1))
    assert [line["response"] for line in other] != [line["response"] for line in whole]


def test_greedy_answers_are_equal_and_truncated_sampling_draws_likely_tokens(policies, prompts, tmp_path):
    greedy = sample.run(settings(policies, prompts, tmp_path, temperature=0.0, limit=5, n=3))
    assert len(greedy) == 15
    for i in range(5):
        assert len({line["response"] for line in greedy[3 * i : 3 * i + 3]}) == 1
    one = sample.run(settings(policies, prompts, tmp_path, top_k=1, limit=5, n=1, out=str(tmp_path / "k.jsonl")))
    assert [line["response"] for line in one] == [line["response"] for line in greedy[::3]]
    assert all(line["logprob"] == 0 for line in one), "the log-probability is that of the distribution sampled from"
    nucleus = settings(policies, prompts, tmp_path, top_p=1e-6, limit=5, n=1, out=str(tmp_path / "p.jsonl"))
    assert [line["response"] for line in sample.run(nucleus)] == [line["response"] for line in greedy[::3]]


def test_long_prompts_lose_their_oldest_turns_and_are_counted(policies, prompts, tmp_path, capsys):
    found, _ = readers.read_prompts(prompts)
    model = initial_model.load(policies[0])
    length = len(chat.encode_prompt(model.fmt, found[0].prompt))
    counts = errors.DropCount()
    short = answers.encode_prompts(model, found, width=length - 1, max_new_tokens=6, counts=counts)
    assert counts.truncated == {"prompt turns dropped": 1}
    assert short.ids[0] == chat.encode_prompt(model.fmt, found[0].prompt[2:])
    assert answers.encode_prompts(model, found, width=None, max_new_tokens=6, counts=counts).ids[0] != short.ids[0]
    lines = sample.run(settings(policies, prompts, tmp_path, prompt_width=length - 1, limit=1, n=1))
    assert "truncated 1 (prompt turns dropped 1)" in capsys.readouterr().out
    assert len(lines[0]["prompt"]) == 3, "the file has the prompt as it was given"
    for changes, message in (
        ({"max_new_tokens": 64}, "--max-new-tokens is 64; it must be below 64"),
        ({"prompt_width": 59}, "--prompt-width is 59; it must be at most 58"),
    ):
        with pytest.raises(run_folder.SettingError, match=message):
            sample.run(settings(policies, prompts, tmp_path, out=str(tmp_path / "long.jsonl"), **changes))
    assert not list(tmp_path.glob("long*")), "unusable settings leave no file"


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--n", "0"], "--n is 0; it must be at least 1"),
        (["--temperature", "-1"], "--temperature is -1.0; it must be between 0 and"),
        (["--top-p", "0"], "--top-p is 0.0; it must be above 0 and at most 1"),
        (["--mesh.data", "3"], "--batch is 16; it must be a multiple of 3"),
    ],
)
def test_sample_refuses_settings_that_are_out_of_range(flags, message):
    with pytest.raises(run_folder.SettingError, match=message):
        sample.parse(["--model", "m", "--prompts", "p", *flags])


def test_batches_contain_each_row_once_in_few_widths():
    lengths = np.random.default_rng(0).integers(1, 300, size=101).tolist()
    made = list(answers.batches(lengths, size=8, most=299))
    assert sorted(np.concatenate([rows for rows, _ in made])) == list(range(101))
    assert {width for _, width in made} <= {32, 64, 128, 256, 299}
    for rows, width in made:
        longest = max(lengths[i] for i in rows)
        assert longest <= width <= max(32, 2 * longest - 1)


# --------------------------------------------------------------------------------------------------- reward models

QUESTION, ANSWER, AGAIN = (
    dialogues.Turn(role, text)
    for role, text in (("user", "what is tea"), ("assistant", "tea"), ("user", "is milk tea"))
)


def test_long_rows_lose_their_oldest_turns_and_then_the_end_of_their_answers():
    fmt = chat.chat_format(tokenizers.word_level(WORDS))
    turns, reply = (QUESTION, ANSWER, AGAIN), "no no no no"
    whole, short = (chat.encode_prompt(fmt, part) for part in (turns, turns[2:]))
    ids = chat.encode_answer(fmt, turns, reply)
    for width in range(len(short), len(whole) + len(ids) + 2):
        counts = errors.DropCount(max_dropped=1.0)
        rows = reward_scores.encode(fmt, [turns], [(reply, "yes")], width=width, counts=counts)
        if width == len(short):
            assert not rows.kept and counts.dropped == {"prompt too long": 1}
            continue
        fits = width >= len(whole) + len(ids)
        prompt = whole if fits else short
        room = width - len(prompt)
        assert rows.prompts == [prompt] and rows.answers[0][0] == ids[:room]
        expected = {} if fits else {"prompt turns dropped": 1}
        cut = sum(len(each) > room for each in (ids, chat.encode_answer(fmt, turns, "yes")))
        assert counts.truncated == expected | ({"answer truncated": cut} if cut else {}) and not counts.dropped
    rows = reward_scores.encode(fmt, [turns], [(reply, "yes")], width=99, counts=counts, stopped=[(False, True)])
    assert rows.answers[0][0] == ids[:-1], "an answer that was cut off has no stop token"


def test_prompts_keep_as_many_turns_as_fit_and_their_system_turn():
    fmt = chat.chat_format(
        tokenizers.word_level(WORDS),
        template="{% for m in messages %}{{ m.content }}{% if m.role == 'assistant' %}{{ eos_token }}{% endif %} "
        "{% endfor %}",
    )
    turns = (dialogues.Turn("system", "salt"), QUESTION, ANSWER, AGAIN, ANSWER, QUESTION)
    for start in (1, 3, 5):
        kept = (turns[0], *turns[start:])
        width = len(chat.encode_prompt(fmt, kept)) + 2
        counts = errors.DropCount()
        rows = reward_scores.encode(fmt, [turns], [("yes", "no")], width=width, counts=counts)
        assert rows.prompts == [chat.encode_prompt(fmt, kept)]
        assert counts.truncated == ({"prompt turns dropped": 1} if start > 1 else {})


@pytest.mark.parametrize(("width", "length"), [(192, 4096), (5000, 5000)])
def test_a_new_model_is_not_limited_to_the_width_of_its_training(width, length):
    task: Any = types.SimpleNamespace(tokenizer=range(10), row_width=width)
    assert jobs.model_config(launch_settings.Settings(), task, None).max_length == length


# --------------------------------------------------------------------------------------------------- reward functions


def test_a_reward_function_is_loaded_from_a_module_or_a_file(tmp_path, monkeypatch):
    (tmp_path / "own_rewards.py").write_text(
        "def length(prompts, responses):\n    return [len(p) + len(r) for p, r in zip(prompts, responses)]\n"
        "def one(prompts, responses):\n    return 1.0\n"
        "def bad(prompts, responses):\n    return [float('nan') for _ in prompts]\n"
    )
    monkeypatch.chdir(tmp_path)
    prompt = [{"role": "user", "content": "tea"}]
    for name in ("own_rewards", str(tmp_path / "own_rewards.py")):
        np.testing.assert_array_equal(reward_functions.load(f"{name}:length")([prompt] * 2, ["abc", ""]), [4, 1])
    with pytest.raises(errors.DataError, match="it must return one number per answer"):
        reward_functions.load("own_rewards:one")([prompt] * 2, ["a", "b"])
    with pytest.raises(errors.DataError, match="returned nan for the answer 'a'"):
        reward_functions.load("own_rewards:bad")([prompt], ["a"])
    for text, message in (
        ("own_rewards", "it must have the form module:function"),
        ("own_rewards:none", "own_rewards has no function none"),
        ("no_such_module:f", "cannot import no_such_module"),
        ("no/file.py:f", "no/file.py does not exist"),
    ):
        with pytest.raises(run_folder.SettingError, match=message):
            reward_functions.load(text, flag="--reward")
