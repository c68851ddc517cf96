"""The commands that sample from a user's own models and evaluate them, on tiny models."""

import dataclasses
import functools
import json
import pathlib
import shutil
import types
from typing import Any

import dpo
import evaluate
import instructgpt
import jax.numpy as jnp
import numpy as np
import ppo
import pytest
import reward_model as reward_model_command
import sample
import sft
import word_models
from finetune import answers, reward_functions
from judging import compared_policies, judges, reward_scores
from launch import initial_model, run_folder
from launch import settings as launch_settings
from recipe import jobs

from rlhf_jax import diagnostics, lm
from rlhf_jax.data import chat, dialogues, errors, readers, tokenizers

WORDS = ("tea", "milk", "bread", "salt", "rice", "fish", "corn", "plum", "what", "is", "no", "yes")
DIALOGUES = [f"{a} is {b} {c}" for a in WORDS[:8] for b in WORDS[4:8] for c in WORDS[:2]]


save_model = functools.partial(word_models.save, words=WORDS)


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
    return sample.SampleSettings(**(defaults | {"n": 2, "batch": 4} | changes))  # pyright: ignore[reportArgumentType]


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
    file.append([whole[7] | {"note": "a\u2028b\ud800"}, *whole[8:12]])
    with pytest.raises(run_folder.SettingError, match="another process writes to --out"):
        sample.run(interrupted)
    file._stream.close()
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
        assert a | {"logprob": 0} == {key: b[key] for key in a} | {"logprob": 0} and a["logprob"] == pytest.approx(
            b["logprob"], abs=1e-4
        )
    with pytest.raises(run_folder.SettingError, match="exists already; delete it or choose another name"):
        sample.run(interrupted)
    other = sample.run(settings(policies, prompts, tmp_path, out=str(tmp_path / "other.jsonl"), seed=1))
    assert [line["response"] for line in other] != [line["response"] for line in whole]


@pytest.mark.slow
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
        (["--temperature", "-1"], "--temperature is -1.0; it must be at least 0"),
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
        "def column(prompts, responses, *, records):\n    return [each['weight'] for each in records]\n"
        "def nothing(prompts, responses):\n    return [None for _ in prompts]\n"
        "def leave(prompts, responses):\n    import sys\n    sys.exit(3)\n"
        "def alone(prompts):\n    return [0.0 for _ in prompts]\n"
    )
    monkeypatch.chdir(tmp_path)
    prompt = [{"role": "user", "content": "tea"}]
    for name in ("own_rewards", str(tmp_path / "own_rewards.py")):
        scores = reward_functions.load(f"{name}:length")([prompt] * 2, ["abc", ""], [{}] * 2)
        np.testing.assert_array_equal(scores, [4, 1])
    with_records = reward_functions.load("own_rewards:column")([prompt], ["a"], [{"weight": 7}])
    np.testing.assert_array_equal(with_records, [7])
    error = run_folder.SettingError
    with pytest.raises(error, match=r"failed on 1 answer: KeyError: 'weight' \(.*own_rewards.py, line 8: .*no other"):
        reward_functions.load("own_rewards:column")([prompt], ["a"], [{}])
    with pytest.raises(error, match=r"KeyError: 'weight' \(.*\); the columns of the prompts are 'height', 'mass'$"):
        reward_functions.load("own_rewards:column")([prompt], ["a"], [{"mass": 1, "height": 2}])
    with pytest.raises(error, match="returned None for answer 0; it must"):
        reward_functions.load("own_rewards:nothing")([prompt], ["a"], [{}])
    with pytest.raises(error, match=r"failed on 1 answer: SystemExit: 3 \(.*own_rewards.py, line 13: "):
        reward_functions.load("own_rewards:leave")([prompt], ["a"], [{}])
    with pytest.raises(
        error, match=r"called with \(prompts, answers\), .* and with records and tokens if it has such "
    ):
        reward_functions.RewardFunction("own_rewards:alone")
    with pytest.raises(error, match=r"returned 1\.0 for 2 answers; it must return one finite number for each answer$"):
        reward_functions.load("own_rewards:one")([prompt] * 2, ["a", "b"], [{}] * 2)
    with pytest.raises(error, match="returned nan for the answer 'a'"):
        reward_functions.load("own_rewards:bad")([prompt], ["a"], [{}])
    for text, message in (
        ("own_rewards", "it must have the form module:function"),
        ("own_rewards:none", "own_rewards has no function none"),
        ("no_such_module:f", "cannot import no_such_module"),
        ("no/file.py:f", "no/file.py does not exist"),
    ):
        with pytest.raises(run_folder.SettingError, match=message):
            reward_functions.load(text, flag="--reward")


def test_columns_that_only_the_functions_read_are_not_called_unused(tmp_path):
    (tmp_path / "f.py").write_text("def plain(p, a):\n    return a\ndef reads(p, a, records):\n    return a\n")
    path = tmp_path / "prompts.jsonl"
    path.write_text('{"prompt": "tea", "solution": "milk tea", "notes": ["salt and rice"]}\n')
    for kind in (reward_functions.load, reward_functions.RewardFunction):
        plain, reads = (kind(f"{tmp_path / 'f.py'}:{name}") for name in ("plain", "reads"))
        for functions, remark, left in (
            ([plain], "", {"solution": 1, "notes": 1}),
            ([plain, reads], "kept for the reward functions, not shown to the model: 'solution'", {"notes": 1}),
        ):
            found, counts = readers.read_prompts(path)
            assert reward_functions.note_of_read_columns(functions, counts, found) == remark
            assert counts.unused == left


NOT_CALLABLE = """
def no_answers(prompts):
    return [0.0 for _ in prompts]

def more(prompts, answers, weight):
    return [weight for _ in prompts]

def tokens(prompts, answers, tokens):
    return [[0.0] * len(each) for each in tokens]

async def later(prompts, answers):
    return [0.0 for _ in prompts]

def calls(prompts, answers):
    return no_answers(prompts, answers)

def text(prompts, answers):
    return ["good"] * len(answers)

def matrix(prompts, answers):
    return [[0.0, 1.0]] * len(answers)

def nothing(prompts, answers):
    pass

def by_answer(prompts, answers):
    return {each: 0.0 for each in answers}

def lazily(prompts, answers):
    return (float(i) for i in range(len(answers)))
"""


def test_errors_of_reward_functions_are_about_the_users_code(tmp_path):
    path = tmp_path / "wrong.py"
    path.write_text(NOT_CALLABLE)
    for name, message in (
        (
            "no_answers",
            r"cannot be used: too many positional arguments; it is no_answers\(prompts\), but is called with",
        ),
        ("more", r"missing a required argument: 'weight'; it is more\(prompts, answers, weight\), but is called with"),
        ("tokens", "missing a required argument: 'tokens'"),
        ("later", "it is a coroutine function"),
    ):
        for make in (reward_functions.load, reward_functions.RewardFunction):
            if name != "tokens" or make is reward_functions.load:
                with pytest.raises(run_folder.SettingError, match=f"^--reward {path}:{name} .*{message}"):
                    make(f"{path}:{name}")
    prompts, answers_, tokens = [[{"role": "user", "content": "tea"}]] * 2, ["a", "b"], [["a"], ["b"]]
    for name, message in (
        ("calls", r'failed on 2 answers: TypeError: .*positional argument.*wrong.py, line 15: "return no_answers\(pro'),
        ("text", r"returned the str 'good' for answer 0; it must return one finite number for each answer"),
        ("nothing", r"returned None for 2 answers; it must"),
        ("by_answer", r"returned the dict \{'a': 0.0, 'b': 0.0\} for 2 answers; it must"),
        ("matrix", r"returned (an array of shape \(2,\)|shape \(2,\)) for"),
    ):
        with pytest.raises(run_folder.SettingError, match=message) as caught:
            reward_functions.load(f"{path}:{name}")(prompts, answers_, [{}, {}])
        assert "reward_functions.py" not in str(caught.value)
        with pytest.raises(run_folder.SettingError, match=message):
            reward_functions.RewardFunction(f"{path}:{name}")(prompts, answers_, tokens, [{}, {}])
    np.testing.assert_array_equal(reward_functions.load(f"{path}:lazily")(prompts, answers_, [{}, {}]), [0, 1])


def test_models_and_functions_of_the_wrong_kind_are_refused_before_weights_are_read(
    policies, prompts, reward_model, tmp_path, monkeypatch
):
    (tmp_path / "own.py").write_text("def score(prompts):\n    return 0\n")
    (tmp_path / "tokenizer").mkdir()
    for file in pathlib.Path(policies[0]).glob("tokenizer*"):
        (tmp_path / "tokenizer" / file.name).write_bytes(file.read_bytes())

    def read(*args, **options):
        raise AssertionError("weights were read")

    monkeypatch.setattr(lm, "load", read)
    function, tokenizer = f"{tmp_path}/own.py:score", str(tmp_path / "tokenizer")
    policy, out = policies[0], str(tmp_path / "out")
    data = ("--prompts", prompts, "--out", out)
    for command, flags, message in (
        (ppo, ("--policy", policy, *data, "--reward", function), "own.py:score cannot be used"),
        (
            ppo,
            ("--policy", reward_model, *data, "--reward-model", reward_model),
            "it is a reward model, not a language",
        ),
        (ppo, ("--policy", policy, *data, "--reward-model", policy), "it is a language model, not a reward"),
        (ppo, ("--policy", policy, *data, "--reward-model", reward_model, "--critic", policy), "cannot use --critic"),
        (ppo, ("--policy", policy, *data, "--reward-model", reward_model, "--reference", tokenizer), "no model, which"),
        (evaluate, ("--policies", policy, policy, *data, "--reward", function), "own.py:score cannot be used"),
        (evaluate, ("--policies", policy, policy, *data, "--reward-model", policy), "it is a language model"),
        (evaluate, ("--policies", policy, tokenizer, *data, "--reward-model", reward_model), "has a tokenizer but no"),
        (sample, ("--model", reward_model, *data), "it is a reward model, not a language model"),
        (sft, ("--model", tokenizer, "--data.path", prompts, "--out", out), "has a tokenizer but no model"),
        (dpo, ("--model", reward_model, "--data.path", prompts, "--out", out), "it is a reward model"),
        (reward_model_command, ("--model", tokenizer, "--data.path", prompts, "--out", out), "has a tokenizer but no"),
        (instructgpt, ("--model", reward_model, "--preset", "smoke", "--out", out), "it is a reward model"),
    ):
        with pytest.raises(run_folder.SettingError, match=message):
            command.run(command.parse(list(flags)))
        assert not pathlib.Path(out).exists()


# --------------------------------------------------------------------------------------------------------- evaluate.py


def evaluation(tmp_path, **changes):
    defaults = {"max_new_tokens": 6, "n": 2, "batch": 4, "out": str(tmp_path / "out"), "transcripts": 3}
    return evaluate.EvaluateSettings(**(defaults | changes))


@pytest.fixture(scope="module")
def reward_model(tmp_path_factory):
    """A reward model whose tokenizer has the words in another order than the policies'."""
    folder = tmp_path_factory.mktemp("run") / "judge" / "reward_model"
    return save_model(folder, seed=20, words=WORDS[::-1], head=True)


@pytest.fixture(scope="module")
def compared(policies, prompts, reward_model, tmp_path_factory):
    """The settings, the results and the samples of a comparison of two policies by two judges."""
    folder = tmp_path_factory.mktemp("compared")
    (folder / "own.py").write_text("def length(prompts, responses):\n    return [len(r) for r in responses]\n")
    options = {"policies": tuple(policies), "prompts": prompts, "reward_model": (reward_model,), "temperature": 0.9}
    made = evaluation(folder, **options, reward=(f"{folder}/own.py:length",))
    results = evaluate.run(made)
    files = sorted((folder / "out" / "samples").iterdir())
    return made, results, [[json.loads(line) for line in file.read_text().splitlines()] for file in files]


def score(model, line):
    """Returns the score of one answer, computed on its own."""
    turns = tuple(dialogues.Turn(each["role"], each["content"]) for each in line["prompt"])
    ids = chat.encode_answer(model.fmt, turns, line["response"])
    row = chat.encode_prompt(model.fmt, turns) + (ids if line["stopped"] else ids[:-1])
    return float(lm.score(model.params, jnp.array([row]), cfg=model.cfg)[0])


def test_evaluate_agrees_with_a_direct_computation(compared, reward_model):
    _, results, samples = compared
    model = initial_model.load(reward_model, kind=initial_model.REWARD_MODEL)
    first, second = results["policies"].values()
    assert list(results["policies"]) == ["policy-0", "policy-10"] == [results["baseline"], "policy-10"]
    assert results["judges"] == ["judge", "own.py:length"] and results["held_out"] == {"prompts": 12}
    scores = np.array([[score(model, line) for line in lines] for lines in samples])
    numbers = [[line["index"] for line in lines] for lines in samples]
    assert numbers == [[i for i in range(12) for _ in range(2)]] * 2
    questions = [line["prompt"][0]["content"] for line in samples[0]]
    asked = [questions.index(each) for each in questions]
    assert len(set(asked)) < 12, "the file has a prompt twice, which is one cluster"
    for row, own in zip((first, second), scores):
        assert row["score"] == pytest.approx(list(diagnostics.clustered_mean(own, asked)), rel=1e-4, abs=1e-5)
    wins = np.mean((scores[1] > scores[0]) + 0.5 * (scores[1] == scores[0]))
    assert second["win_rate"][0] == pytest.approx(wins) and "win_rate" not in first
    lengths = np.array([[len(line["response"]) for line in lines] for lines in samples], float)
    assert second["score (own.py:length)"][0] == pytest.approx(lengths[1].mean())
    wins = np.mean((lengths[1] > lengths[0]) + 0.5 * (lengths[1] == lengths[0]))
    assert second["judges"]["own.py:length"]["win_rate"][0] == pytest.approx(wins)
    controlled = diagnostics.length_controlled_win_rates(
        diagnostics.win_outcomes(scores[1], scores[0]), lengths[1] + 1, lengths[0] + 1, clusters=asked
    )
    assert second["length_controlled_win_rate"] == pytest.approx(list(controlled.rates[0]), rel=1e-5)
    for row, lines in zip((first, second), samples):
        assert row["length"][0] == pytest.approx(np.mean([line["tokens"] for line in lines]))
        assert row["stopped"][0] == pytest.approx(np.mean([line["stopped"] for line in lines]))
    words = [[line["response"].split() for line in lines] for lines in samples]
    assert [row["diversity"] for row in (first, second)] == pytest.approx(diagnostics.equal_distinct_n(words, n=2))
    assert results["diversity_pairs"] == min(sum(max(len(row) - 1, 0) for row in each) for each in words)
    assert [row["self_bleu"] for row in (first, second)] == pytest.approx(
        [diagnostics.self_bleu(each) for each in words]
    )
    for row, lines in zip((first, second), samples):
        logprob, tokens = (sum(line[name] for line in lines) for name in ("logprob", "tokens"))
        assert row["entropy"][0] == pytest.approx(-logprob / tokens, rel=1e-3)
    assert second["entropy_ratio"][0] == pytest.approx(second["entropy"][0] / first["entropy"][0])
    assert "entropy_ratio" not in first


def test_the_kl_is_the_mean_log_ratio_at_the_sampling_temperature(compared, policies):
    made, results, samples = compared
    models = [initial_model.load(path) for path in policies]
    found = compared_policies.sample(
        made,
        answers.read_prompts(made, made.prompts, errors.DropCount()),
        name="policy-10",
        path=policies[1],
        number=1,
        mesh=None,
        measure=False,
        counts=errors.DropCount(),
        on_progress=lambda *_: None,
    )
    assert judges.flat(found) == samples[1], "a policy's samples do not depend on the other policies"
    ratios = []
    for prompt, each in found.ids:  # pyright: ignore[reportOptionalIterable]
        for ids in each:
            row = jnp.array([prompt + ids])
            a, b = (
                float(lm.token_logprobs(m.params, row, cfg=m.cfg, temperature=0.9)[0, len(prompt) :].sum())
                for m in models[::-1]
            )
            ratios.append(a - b)
    assert results["policies"]["policy-10"]["kl"][0] == pytest.approx(np.mean(ratios), rel=1e-4)
    assert "kl" not in results["policies"]["policy-0"] and np.mean(ratios) > 0
    logprobs = [line["logprob"] for line in samples[1]]
    own = compared_policies._logprobs(made, models[1], found, None, lambda *_: None)
    np.testing.assert_allclose(own.ravel(), logprobs, rtol=1e-4, atol=1e-4)


def test_evaluate_writes_a_report_with_all_numbers(compared, capsys):
    made, results, _ = compared
    page = (pathlib.Path(made.out) / "report.html").read_text()
    for words in ("Comparison with the baseline", "Wins vs the baseline", "policy-10", "Transcripts", "own.py:length"):
        assert words in page
    assert json.loads((pathlib.Path(made.out) / "results.json").read_text())["policies"] == results["policies"]
    assert len(results["transcripts"]) == 3 and set(results["transcripts"][0]["scores"]) == {"policy-0", "policy-10"}
    evaluate.Console(width=120).print(evaluate.results_table(results))
    shown = capsys.readouterr().out
    for words in ("wins vs baseline, %", "KL, nats per answer", "score, own.py:length", "policy-10"):
        assert words in shown


def test_evaluate_names_the_number_formats_and_is_no_model(
    policies, prompts, reward_model, tmp_path, monkeypatch, capsys
):
    half = tmp_path / "half"
    shutil.copytree(policies[0], half)
    config = json.loads((half / "config.json").read_text())
    (half / "config.json").write_text(json.dumps(config | {"rlhf_jax": config["rlhf_jax"] | {"dtype": "bfloat16"}}))
    monkeypatch.setattr(evaluate.console, "StageProgress", lambda *_, **__: 1 / 0)
    cases: list[tuple[Any, str]] = [
        (None, f"computing in float32 ({policies[0]}, {reward_model}) and bfloat16 ({half}), with parameters in"),
        ("bfloat16", "computing in bfloat16, with parameters in float32 (--compute.dtype)"),
    ]
    for dtype, text in cases:
        given = {"policies": (policies[0], str(half)), "prompts": prompts, "reward_model": (reward_model,)}
        made = evaluation(tmp_path, **given, compute=evaluate.sampling_settings.Compute(dtype=dtype))
        with pytest.raises(ZeroDivisionError):
            evaluate.run(dataclasses.replace(made, out=str(tmp_path / f"out-{dtype}")))
        assert text in capsys.readouterr().out
    with pytest.raises(run_folder.SettingError, match=r"it is a run of evaluate\.py, which has no model"):
        initial_model.check(str(tmp_path / "out-None"), kind=initial_model.REWARD_MODEL)


def test_refused_answers_count_neither_as_short_nor_as_finished(compared, tmp_path, capsys):
    _, _, samples = compared
    refusal = {"response": "no", "tokens": 0, "stopped": True, "logprob": 0.0, "refused": True}
    changed = [line | refusal if line["index"] % 3 == 0 else line for line in samples[0]]
    every = [line | refusal for line in samples[1]]
    files = [tmp_path / f"{name}.jsonl" for name in ("plain", "some", "all")]
    for file, lines in zip(files, (samples[0], changed, every)):
        file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    (tmp_path / "own.py").write_text("def length(prompts, responses):\n    return [len(r) for r in responses]\n")
    made = evaluation(tmp_path, samples=tuple(map(str, files)), reward=(f"{tmp_path}/own.py:length",))
    plain, some, none = evaluate.run(made)["policies"].values()
    answered = [line for line in samples[0] if line["index"] % 3]
    assert some["length"][0] == pytest.approx(np.mean([line["tokens"] for line in answered]))
    assert some["characters"][0] == pytest.approx(np.mean([len(line["response"]) for line in answered]))
    assert some["stopped"][0] == pytest.approx(np.mean([line["stopped"] for line in answered]))
    assert some["refused"][0] == pytest.approx(1 / 3) and none["refused"][0] == 1 and "refused" not in plain
    assert not {"length", "characters", "stopped"} & set(none) and none["score"][0] == 2
    assert "refused by a gate, %" in capsys.readouterr().out


def test_evaluate_joins_files_of_samples_by_prompt(compared, reward_model, tmp_path):
    _, _, samples = compared
    files = [tmp_path / "a.jsonl", tmp_path / "b.jsonl"]
    kept = [line for line in samples[0] if line["index"] != 5]
    files[0].write_text("".join(json.dumps(line) + "\n" for line in kept))
    files[1].write_text(
        "".join(json.dumps(samples[1][i]) + "\n" for i in np.argsort(-np.arange(24) // 2, kind="stable"))
    )
    again = evaluate.run(evaluation(tmp_path, samples=tuple(map(str, files)), reward_model=(reward_model,)))
    assert again["held_out"]["prompts"] == 11 and list(again["policies"]) == ["a", "b"]
    model = initial_model.load(reward_model, kind=initial_model.REWARD_MODEL)
    expected = np.mean([score(model, line) for line in samples[1] if line["index"] != 5])
    assert again["policies"]["b"]["score"][0] == pytest.approx(expected, rel=1e-4)
    texts = [each["text"] for each in again["incidents"]]
    assert any("leaving out 1 prompt of b that" in text for text in texts)
    assert any("the KL is left out" in text for text in texts) and "kl" not in again["policies"]["b"]
    files[1].write_text('{"prompt": "tea"}\n')
    with pytest.raises(errors.DataError, match=r"b.jsonl, line 1 is not a sample"):
        evaluate.run(evaluation(tmp_path / "no", samples=tuple(map(str, files)), reward_model=(reward_model,)))
    assert not (tmp_path / "no").exists()


@pytest.mark.slow
def test_policies_with_other_tokenizers_are_compared_without_a_kl(policies, prompts, reward_model, tmp_path):
    other = save_model(tmp_path / "other", seed=3, words=WORDS[::-1])
    settings = evaluation(tmp_path, policies=(policies[0], other), prompts=prompts, reward_model=(reward_model,), n=1)
    results = evaluate.run(settings)
    assert "kl" not in results["policies"]["other"] and results["policies"]["other"]["win_rate"]
    assert "has another tokenizer" in results["incidents"][0]["text"]


@pytest.mark.slow
def test_a_policy_does_not_beat_itself_and_long_rows_are_shortened(policies, prompts, reward_model, tmp_path):
    same = dict(policies=(policies[0],) * 2, prompts=prompts, reward_model=(reward_model,), temperature=0.0)
    results = evaluate.run(evaluation(tmp_path, **same, width=10))
    assert results["policies"]["policy-0 (2)"]["win_rate"][0] == 0.5
    assert results["dropped"]["prompt turns dropped"] == 1
    assert results["policies"]["policy-0"]["score"] == results["policies"]["policy-0 (2)"]["score"]


@pytest.mark.parametrize("recorded", ["run", "run/model"])
def test_a_reward_model_with_which_the_policy_was_trained_is_recognised(tmp_path, recorded):
    for name in ("run/model", "ppo/model", "other/model"):
        (tmp_path / name).mkdir(parents=True)
    config = {"command": "ppo", "version": 4, "reward_model": [str(tmp_path / recorded)]}
    (tmp_path / "ppo" / "config.json").write_text(json.dumps(config))
    for policy in ("ppo", "ppo/model"):
        for judge, expected in (("run", True), ("run/model", True), ("other", False), ("other/model", False)):
            assert compared_policies.trained_on(str(tmp_path / policy), str(tmp_path / judge)) is expected
    assert not compared_policies.trained_on(str(tmp_path / "other"), str(tmp_path / "run"))


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--policies", "a", "--prompts", "p", "--reward", "m:f"], "it must be at least two models"),
        (["--policies", "a", "b", "--reward", "m:f"], "--prompts is missing"),
        (["--policies", "a", "b", "--prompts", "p"], "there is no judge; set --reward-model"),
        (["--samples", "a", "b", "--prompts", "p", "--reward", "m:f"], "--prompts has no effect with --samples"),
        (["--samples", "a", "--reward", "m:f"], "it must be at least two files"),
    ],
)
def test_evaluate_refuses_settings_that_do_not_fit_together(flags, message):
    with pytest.raises(run_folder.SettingError, match=message):
        evaluate.parse(flags)
