"""reward_model.py --pmp.path: a preference model is trained on a crowd's comparisons first, on tiny models."""

import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import time
from typing import Any

import jax
import key_uses
import numpy as np
import pytest
import reward_model
from finetune import reward_training
from launch.run_settings import SettingError

from rlhf_jax import lm, metrics
from rlhf_jax.data import errors

WORDS = ("tea", "milk", "bread", "salt", "rice", "fish", "corn", "plum")


def records(words, others, question="Do you like {} and {}?"):
    """Pairs in which an answer that likes something is preferred to a refusal."""
    return [
        {"prompt": question.format(a, b), "chosen": f"I like {b}.", "rejected": f"No, not {a}, I hate it."}
        for a in words
        for b in others
    ]


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> dict[str, pathlib.Path]:
    """Human comparisons, and a crowd's, which include them; one of the crowd's is a ranking of three answers."""
    folder = tmp_path_factory.mktemp("pmp_files")
    human = records(WORDS, WORDS)
    crowd: list[Any] = human + records(WORDS[:4], WORDS, "Shall we buy {} or {}?")
    crowd.append({"prompt": "Well?", "responses": ["I like it.", "Maybe so.", "No, I hate it."], "ranks": [1, 2, 3]})
    for name, rows in (("human", human), ("crowd", crowd)):
        (folder / name).with_suffix(".jsonl").write_text("\n".join(map(json.dumps, rows)))
    return {name: folder / f"{name}.jsonl" for name in ("human", "crowd")}


def command(files, out, *flags):
    new = ("--model", "tiny", "--data.vocab-size", 300, "--batch", 8, "--steps", 2, "--learning-rate", 1e-6)
    paths = ("--data.path", files["human"], "--pmp.path", files["crowd"])
    return [*map(str, (*new, *paths, *flags)), "--out", str(out)]


def train(files, out, *flags):
    reward_model.main(command(files, out, *flags))
    return json.loads((out / "results.json").read_text())


@pytest.fixture(scope="module")
def run(files, tmp_path_factory) -> pathlib.Path:
    out = tmp_path_factory.mktemp("pmp_run") / "run"
    train(files, out, "--pmp.no-binary")
    return out


def results_of(run):
    return json.loads((run / "results.json").read_text())


def test_what_the_crowd_prefers_is_known_before_the_human_comparisons(run):
    """With hardly any training on the human comparisons, the accuracy is that of the preference model."""
    results = results_of(run)
    assert results["pmp"]["accuracy"][0] > 0.9 and results["reward_model"]["accuracy"][0] > 0.9
    assert results["steps"] == 2 and results["pmp"]["learning_rate"] == 1e-3
    stages = [row["stage"] for row in metrics.read(run)]
    assert stages == sorted(stages) and set(stages) == {"pmp", "reward_model"}


def test_comparisons_that_open_like_held_out_ones_are_dropped(run, files):
    results = results_of(run)
    held_out = results["comparisons"]["held_out"]
    (note,) = [each["text"] for each in results["incidents"] if "open like" in each["text"]]
    assert note.startswith(f"{held_out} of 97 comparisons in {files['crowd']} open like held-out comparisons of")
    assert held_out > 0 and results["pmp"]["comparisons"] == 97 - held_out


def test_control_tokens_are_removed_after_training_on_marked_pairs(run, files, tmp_path):
    results, before = train(files, tmp_path / "run"), results_of(run)
    pairs = before["pmp"]["comparisons"] - 1 + 3  # the ranking has three pairs
    assert results["pmp"]["rows"] == 2 * pairs and results["pmp"]["steps"] == -(-2 * pairs // 8)
    (cfg, params), (plain, other) = (lm.load(each / "model") for each in (tmp_path / "run", run))
    assert cfg == plain and params["embed"]["tokens"].shape == other["embed"]["tokens"].shape


def test_the_key_of_the_crowds_order_serves_nothing_else(files, tmp_path, monkeypatch):
    made = key_uses.record(monkeypatch)
    train(files, tmp_path / "run", "--lora.rank", 2)
    assert len(made.orders) == 2 and made.others and made.orders[0] not in made.others


def test_the_tokens_are_at_the_start_of_the_answers(files, tmp_path):
    settings = reward_model.parse(command(files, tmp_path))
    prepared = reward_training._prepare(settings, None, errors.DropCount())
    crowd, n = prepared.inputs[-1], prepared.model.cfg.vocab_size
    tokens_BKL = np.asarray(crowd.rows.tokens_BKL)
    where = np.argwhere(tokens_BKL >= n)
    assert len(np.unique(where[:, 2])) == 1, "the marks are in one column"
    column = where[0, 2]
    assert (tokens_BKL[0::2, :, column] == [n, n + 1]).all() and (tokens_BKL[1::2, :, column] == [n + 1, n]).all()
    np.testing.assert_array_equal(np.delete(tokens_BKL[:, 0], column, 1), np.delete(tokens_BKL[:, 1], column, 1))


def test_an_interrupted_run_ends_in_the_same_bits(run, tmp_path):
    again = tmp_path / "run"
    shutil.copytree(run, again)
    _, newest = sorted((again / "checkpoints" / "pmp").glob("step_*"))
    for path in (newest, again / "checkpoints" / "reward_model", again / "model"):
        shutil.rmtree(path)
    (again / "results.json").unlink()
    reward_model.main(["--resume", str(again)])
    assert_same(again, run)


def assert_same(run, expected):
    ours, theirs = results_of(run), results_of(expected)
    assert ours["reward_model"] == theirs["reward_model"] and ours["pmp"]["accuracy"] == theirs["pmp"]["accuracy"]
    (_, first), (_, second) = (lm.load(each / "model") for each in (run, expected))
    jax.tree.map(np.testing.assert_array_equal, first, second)


@pytest.mark.slow
def test_a_run_killed_in_pretraining_ends_in_the_same_bits(files, run, tmp_path):
    out = tmp_path / "run"
    arguments = [sys.executable, reward_model.__file__, *command(files, out, "--pmp.no-binary")]
    process = subprocess.Popen(arguments, env=os.environ, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    log = out / "metrics.jsonl"
    for _ in range(3000):
        if process.poll() is not None or (log.exists() and log.read_text().count("\n") >= 3):
            break
        time.sleep(0.1)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert not (out / "results.json").exists(), "the run ended before it was killed"
    reward_model.main(["--resume", str(out)])
    assert_same(out, run)


@pytest.mark.slow
def test_adapters_are_trained_in_both_phases_and_leave_the_embedding_as_it_was(files, run, tmp_path):
    base, (cfg, _) = tmp_path / "base", lm.load(run / "model")
    params = lm.init(jax.random.key(3), cfg)
    tokenizer = reward_training.comparisons.initial_model.load(str(run), kind="reward model").fmt
    lm.save(base, cfg, params, tokenizer=tokenizer.tokenizer, stop_ids=tokenizer.stop_ids)
    flags = ("--model", base, "--lora.rank", 2, "--pmp.learning-rate", 1e-2, "--training.heads", 2)
    shared = [flag for flag in map(str, command(files, tmp_path / "run", *flags)) if flag != "tiny"]
    shared = shared[shared.index("--batch") :]  # without the first --model and its vocabulary
    reward_model.main(shared)
    _, trained = lm.load(tmp_path / "run" / "model")
    np.testing.assert_array_equal(trained["embed"]["tokens"], params["embed"]["tokens"])
    assert results_of(tmp_path / "run")["pmp"]["accuracy"][0] > 0.6
    changed = jax.tree.map(lambda a, b: bool((a != b).any()), params["layers"], trained["layers"])
    assert any(jax.tree.leaves(changed))


@pytest.mark.parametrize(
    ("flags", "rates"),
    [
        ((), (None, None)),
        (("--learning-rate", "1e-5"), (None, 1e-5)),
        (("--pmp.learning-rate", "1e-4"), (1e-4, None)),
        (("--pmp.pretraining-rate", "3e-4"), (3e-5, 3e-6)),
    ],
)
def test_the_rates_of_both_phases(flags, rates):
    settings = reward_model.parse(["--model", "M", "--data.path", "F", "--pmp.path", "C", "--epochs", "3", *flags])
    first, second = reward_training._phases(settings)
    for found, expected in zip((first.learning_rate, second.learning_rate), rates, strict=True):
        assert found == (None if expected is None else pytest.approx(expected))
    assert (first.epochs, second.epochs) == (1, 3), "preference-model pretraining takes one epoch"


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--pmp.no-binary", "--pmp.no-binary has no effect without --pmp.path"),
        ("--pmp.learning-rate 1e-4", "--pmp.learning-rate has no effect without --pmp.path"),
        ("--pmp.path C --pmp.learning-rate 0", "--pmp.learning-rate is 0.0; it must be above 0"),
        (
            "--pmp.path C --pmp.pretraining-rate 3e-4 --learning-rate 1e-5",
            "--learning-rate has no effect with --pmp.pretraining-rate, which sets both rates; leave it out",
        ),
    ],
)
def test_unused_and_wrong_rates_are_refused(flags, message):
    with pytest.raises(SettingError, match=f"^{message}"):
        reward_model.parse(["--model", "M", "--data.path", "F", *flags.split()])


def test_a_crowd_without_a_model_names_what_it_needs():
    with pytest.raises(SettingError, match=r"^--pmp\.path needs --model; add it"):
        reward_model.parse(["--data.path", "F", "--pmp.path", "C"])


def test_a_crowd_of_held_out_conversations_only_is_refused(files, tmp_path):
    crowd = tmp_path / "crowd.jsonl"
    settings = reward_model.parse(command(files | {"crowd": crowd}, tmp_path / "run"))
    _, data = reward_training.comparisons.load(settings, None, errors.DropCount())
    held_out = {each.prompt[0].text for each in data.held_out_records}
    rows = [each for each in records(WORDS, WORDS) if each["prompt"] in held_out]
    crowd.write_text("\n".join(map(json.dumps, rows)))
    with pytest.raises(errors.DataError, match=r"crowd\.jsonl has no usable record that is not held out"):
        reward_training._prepare(settings, None, errors.DropCount())
