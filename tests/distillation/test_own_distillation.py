"""distill.py with models and data of the user's own, on tiny models."""

import json
import os
import pathlib
import subprocess
import sys
import types as types_lib
from typing import Any

import distill
import jax
import jax.numpy as jnp
import key_uses
import launch
import numpy as np
import pytest
from distillation import distill_rows, teacher_stage
from launch import initial_model
from launch.run_settings import SettingError
from recipe import tasks

from rlhf_jax import lm, losses, metrics, types
from rlhf_jax.data import chat, dialogues, errors, tokenizers
from rlhf_jax.data.stores import record_file

pytest.importorskip("array_record")
EXPERIMENTS = pathlib.Path(launch.__path__[0]).parent
WORDS = ("tea", "milk", "bread", "salt", "rice", "fish", "corn", "plum")
PROMPT = "Always say milk."
SHORT = ("--batch", 8, "--k", 6, "--data.held-out", 0.1)


def save_model(folder, fmt, seed, **sizes):
    cfg = lm.LMConfig.preset("tiny", vocab_size=len(fmt.tokenizer), n_layers=1, d_model=32, n_heads=2, **sizes)
    lm.save(folder, cfg, lm.init(jax.random.key(seed), cfg), tokenizer=fmt.tokenizer, stop_ids=fmt.stop_ids)
    return folder


@pytest.fixture(scope="module")
def given(tmp_path_factory):
    """A folder with dialogues, pretraining text, a student, a teacher with more layers, and one of another family."""
    folder = tmp_path_factory.mktemp("given")
    records = [
        {
            "messages": [
                {"role": "user", "content": f"Do you like {a} and {b}?"},
                {"role": "assistant", "content": f"I like {b}."},
            ]
        }
        for a in WORDS
        for b in WORDS
    ]
    (folder / "dialogues.jsonl").write_text("\n".join(map(json.dumps, records)))
    (folder / "text.txt").write_text(
        "\n\n".join(f"The {a} is next to the {b}, it seems, as always." for a in WORDS for b in WORDS)
    )
    texts = [f"User: Do you like {word}?\nAssistant: I like it. {PROMPT} The next" for word in WORDS]
    fmt = chat.chat_format(tokenizers.train_bpe(texts, vocab_size=300))
    save_model(folder / "student", fmt, 0, d_mlp=32)
    save_model(folder / "teacher", fmt, 1, d_mlp=64)
    other = chat.chat_format(tokenizers.train_bpe(["something else entirely " * 3], vocab_size=290))
    save_model(folder / "other_tokenizer", other, 2, d_mlp=32)
    return folder


def flags(given, *names, **changed):
    """Returns the command line for the files of `given`."""
    known: dict[str, Any] = {
        "model": given / "student",
        "teacher": given / "teacher",
        "prompt": PROMPT,
        "data.path": given / "dialogues.jsonl",
        "data.pretraining": given / "text.txt",
    }
    return [str(x) for name in names for x in (f"--{name}", changed.get(name, known[name]))]


def parsed(given, *names, extra=(), **changed):
    return distill.parse([*flags(given, *names, **changed), *map(str, extra)])


def train(out, arguments, *extra):
    distill.main([*arguments, *map(str, (*SHORT, *extra)), "--out", str(out)])
    return json.loads((out / "results.json").read_text())


@pytest.fixture(scope="module")
def prompted_run(given, tmp_path_factory):
    out = tmp_path_factory.mktemp("prompted") / "run"
    arguments = flags(given, "model", "prompt", "data.path", "data.pretraining")
    train(out, arguments, "--epochs", 3, "--learning-rate", 3e-3)
    return out


def test_context_distillation_lowers_the_held_out_kl_and_saves_a_model(prompted_run):
    results = json.loads((prompted_run / "results.json").read_text())
    found = results["distillation"]
    assert 0 < found["kl_after"][0] < found["kl_before"][0] and found["classes"] == 7
    share = 1 - found["kl_after"][0] / found["kl_before"][0]
    assert found["share_removed"][0] == pytest.approx(share, rel=1e-6) and share > 0.2
    assert results["rows"] == {"training": 116, "held_out": 12}, "58 and 6 dialogues, and as many rows of text"
    assert results["steps"] == 44
    assert results["clusters"] == {"held-out KL": 10}, "6 conversations, and 4 documents in which rows of text start"
    rates = [row["learning_rate"] for row in metrics.read(prompted_run) if row["stage"] == "distill"]
    peak = int(np.argmax(rates))
    np.testing.assert_allclose(np.diff(rates[peak + 1 :]), -3e-3 / 44, rtol=1e-3)
    text = (prompted_run / "report.html").read_text()
    assert "KL from the teacher" in text and "<svg" in text
    assert lm.load(prompted_run / "model")[0].n_layers == 1


def test_the_file_has_the_teachers_log_probabilities_after_the_prompt(given, prompted_run):
    """Each row is compared with a pass of the teacher over the prompt and the row, in float64 from its logits."""
    model = initial_model.load(str(given / "student"))
    lessons = teacher_stage.Lessons(prompted_run / teacher_stage.NAME, pad_id=model.fmt.pad_id)
    prompt = model.fmt.tokenizer.encode(PROMPT, add_special_tokens=False)
    assert lessons.header["prompt_tokens"] == len(prompt) > 0 and lessons.header["prompt"] == PROMPT
    ids = [row[mask].tolist() for row, mask in zip(*_rows(lessons, range(128)))]
    assert lessons.header["row_digest"] == distill_rows.Rows(ids, 116, []).digest()
    batch = lessons.at([0, 60, 115, 120])
    for row in range(4):
        n = int(batch.mask_BL[row].sum())
        ids = jnp.asarray([[*prompt, *batch.tokens_BL[row, :n].tolist()]])
        hidden = lm.forward(model.params, ids, cfg=model.cfg).hidden_BLD
        logits = np.asarray(lm.logits(model.params, hidden, cfg=model.cfg), np.float64)[0, len(prompt) - 1 : -1]
        logprobs = logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))
        best = np.sort(logprobs, axis=-1)[:, ::-1][:, :6]
        np.testing.assert_allclose(batch.logprobs_BLK[row, :n], best, atol=2e-5)
        listed = np.take_along_axis(logprobs, batch.ids_BLK[row, :n], axis=-1)
        np.testing.assert_allclose(batch.logprobs_BLK[row, :n], listed, atol=2e-5)
        assert batch.loss_mask_BL[row, :n].tolist() == [False] + [True] * (n - 1)


def test_half_of_the_rows_are_text_after_the_start_of_a_user_turn(given, prompted_run):
    fmt: Any = initial_model.load(str(given / "student")).fmt
    lessons = teacher_stage.Lessons(prompted_run / teacher_stage.NAME, pad_id=fmt.pad_id)
    shown = [fmt.tokenizer.decode(row[mask]) for row, mask in zip(*_rows(lessons, range(128)))]
    is_text = ["Do you" not in each for each in shown]
    assert is_text == [False] * 58 + [True] * 58 + [False] * 6 + [True] * 6
    start = fmt.tokenizer.decode(distill_rows.user_turn(fmt))
    assert all(each.startswith(start) and len(start) > 3 for each in shown)
    texts = [each.removeprefix(start) for each, chosen in zip(shown, is_text) if chosen]
    assert texts[0].startswith("The ") and " is next to the " in texts[0] + texts[1], "documents are concatenated"


def test_the_digest_depends_on_the_ids_of_each_row():
    parts = ([[1, 2], [3]], [[1], [2, 3]], [[1, 2], [4]], [[3], [1, 2]])
    assert len({distill_rows.Rows(ids, 1, []).digest() for ids in parts}) == 4


def test_rows_of_text_are_clustered_by_the_document_in_which_they_start(given):
    fmt = initial_model.load(str(given / "student")).fmt
    start = distill_rows.user_turn(fmt)
    texts = ["tea " * 40, "milk " * 3, "rice " * 2, "fish " * 25]
    lengths = [len(ids) + 1 for ids in fmt.tokenizer(texts, add_special_tokens=False)["input_ids"]]
    owner = [document for document, n in enumerate(lengths) for _ in range(n)]
    rows, first = distill_rows.text_rows(fmt, texts, width=len(start) + 10)
    assert len(rows) == sum(lengths) // 10 and first == owner[: 10 * len(rows) : 10]
    assert first.count(0) > 3 and first.count(3) > 1, "long documents fill several rows"
    aligned = distill_rows.text_rows(fmt, texts[1:], width=len(start) + lengths[1])[1]
    assert aligned[:2] == [0, 1], "the second row starts with the second document"
    assert distill_rows.text_rows(fmt, texts, width=len(start) + sum(lengths)) == (
        [start + [i for x in fmt.tokenizer(texts)["input_ids"] for i in [*x, tasks.document_end(fmt)]]],
        [0],
    )
    assert distill_rows.text_rows(fmt, texts, width=len(start) + sum(lengths) + 1) == ([], [])


def test_pretraining_text_that_fills_no_row_is_noted(given, tmp_path):
    (tmp_path / "text.txt").write_text("Tea.\n\nMilk.")
    fmt = initial_model.load(str(given / "student")).fmt
    names = ("model", "prompt", "data.path", "data.pretraining")
    changed = {"data.pretraining": tmp_path / "text.txt"}
    settings = parsed(given, *names, extra=("--data.held-out", 0.5, "--data.width", 64), **changed)
    made = distill_rows.make(settings, fmt, errors.DropCount(), jax.random.key(0), max_width=64)
    assert made.rows.n_train == 32 and len(made.rows.ids) == 64
    assert [note.partition(":")[0] for note in made.notes] == [
        f"0.0% of the {name} rows are pretraining text instead of --mix 0.5" for name in ("training", "held-out")
    ]


def _rows(lessons, indices):
    batch = lessons.at(indices)
    return batch.tokens_BL, batch.mask_BL


def test_the_loss_of_a_student_that_equals_the_teacher_and_reads_the_prompt_is_0(given):
    model = initial_model.load(str(given / "student"))
    tokens = np.arange(24, dtype=np.int32).reshape(2, 12) + 5
    mask: Any = np.arange(12) < np.array([[12], [9]])
    batch = types.TokenBatch(np.where(mask, tokens, 0), mask, mask)
    for prompt, keep_first in (([], False), ([7, 8, 9], False), ([7, 8, 9], True)):
        top = teacher_stage.make_top_k(model.cfg, prompt, k=6, keep_first=keep_first)(model.params, batch)
        assert top.ids.shape == (2, 12, 6)
        read, read_mask = teacher_stage.after_prompt(batch, prompt, keep_first=keep_first)
        assert read[0].tolist()[:4] == ([5, 7, 8, 9] if keep_first else [7, 8, 9, 5] if prompt else [5, 6, 7, 8])
        C = len(prompt)
        ids = jnp.pad(top.ids, ((0, 0), (C, 0), (0, 0)))
        same = lm.token_listed_logprobs(model.params, read, ids, cfg=model.cfg, mask_BL=read_mask)[:, C:]
        kl = np.asarray(losses.distill(same, top.logprobs))
        assert np.abs(kl[:, 1:][mask[:, 1:]]).max() < 1e-5
        alone = lm.token_listed_logprobs(model.params, batch.tokens_BL, top.ids, cfg=model.cfg, mask_BL=mask)
        apart = np.asarray(losses.distill(alone, top.logprobs))[:, 1:][mask[:, 1:]]
        assert (apart.max() > 1e-4) == bool(prompt), "the prompt changes the distributions"


def test_without_a_prompt_a_copy_of_the_teacher_has_nothing_to_learn(given, tmp_path):
    arguments = flags(given, "model", "teacher", "data.path", teacher=given / "student")
    results = train(tmp_path / "run", arguments, "--steps", 2)
    np.testing.assert_allclose(results["distillation"]["kl_before"], 0, atol=1e-5)
    losses_ = [row["loss"] for row in metrics.read(tmp_path / "run") if "loss" in row]
    np.testing.assert_allclose(losses_, 0, atol=1e-5)


@pytest.fixture(scope="module")
def shared_file(given, tmp_path_factory):
    """The file of a teacher that is larger than the student, and the run that made it."""
    folder = tmp_path_factory.mktemp("shared")
    file = folder / "teacher.array_record"
    arguments = flags(given, "model", "teacher", "prompt", "data.path")
    train(folder / "run", arguments, "--steps", 2, "--teacher-file", file)
    return file


def test_students_share_the_file_of_a_teacher(given, shared_file, tmp_path):
    made = shared_file.read_bytes()
    run = shared_file.parent / "run"
    assert not (run / teacher_stage.NAME).exists()
    left = shared_file.with_name(shared_file.name + ".parts")
    left.mkdir()  # as a process leaves it that is killed between writing the file and deleting its parts
    again = train(tmp_path / "again", flags(given, "model"), "--steps", 2, "--teacher-file", shared_file)
    assert not left.exists()
    first = json.loads((run / "results.json").read_text())
    assert again["distillation"] == first["distillation"] and again["dropped"] == first["dropped"]
    assert (tmp_path / "again/model/model.safetensors").read_bytes() == (run / "model/model.safetensors").read_bytes()
    other = train(
        tmp_path / "other",
        flags(given, "model", "prompt", "data.path", model=given / "teacher"),
        *("--steps", 2, "--teacher-file", shared_file),
    )
    assert 0 < other["distillation"]["kl_before"][0] < again["distillation"]["kl_before"][0], "it only lacks the prompt"
    assert shared_file.read_bytes() == made


@pytest.mark.parametrize(
    ("names", "changed", "extra", "message"),
    [
        (("model", "prompt"), {"prompt": "Never say milk."}, (), "was made with another --prompt"),
        (("model", "teacher"), {"teacher": "student"}, (), "was made with another --teacher"),
        (("model", "data.path"), {"data.path": "text.txt"}, (), "was made with another --data.path"),
        (("model", "data.pretraining"), {}, (), "was made with another --data.pretraining"),
        (("model",), {"model": "other_tokenizer"}, (), "was made with another tokenizer than that of --model"),
        (("model",), {}, ("--k", 50), "was made with --k 6 instead of 50"),
        (("model",), {}, ("--mix", 0.5), "was made with --mix 0 instead of 0.5"),
        (("model",), {}, ("--data.held-out", 0.05), "was made with --data.held-out 0.1 instead of 0.05"),
        (("model",), {}, ("--data.width", 64), "was made with --data.width 32 instead of 64"),
    ],
)
def test_a_file_that_was_made_from_something_else_is_refused(
    given, shared_file, tmp_path, names, changed, extra, message
):
    changed = {name: given / value if name != "prompt" else value for name, value in changed.items()}
    settings = parsed(
        given, *names, extra=(*extra, "--teacher-file", shared_file, "--out", tmp_path / "run"), **changed
    )
    with pytest.raises(SettingError, match=f"--teacher-file {shared_file} {message}"):
        distill.run(settings)
    assert not (tmp_path / "run").exists()


class _Progress:
    def __init__(self):
        self.skipped = []

    def skip(self, stage):
        self.skipped.append(stage)


def write_rows(path, header, load):
    """Calls `teacher_stage.write` for two rows; returns the stages that it skips."""
    job: Any = types_lib.SimpleNamespace(progress=_Progress(), mesh=None)
    rows = distill_rows.Rows([[5, 6], [7, 8]], 2, [])
    teacher_stage.write(job, path, header, rows, load, k=2, width=2, pad_id=0)
    return job.progress.skipped


def test_a_file_that_another_process_finishes_before_the_lock_is_used(tmp_path, monkeypatch):
    path, header, flock = tmp_path / "file", {"k": 2}, teacher_stage.fcntl.flock
    left = tmp_path / "file.parts"

    def locked_later(*args):
        record_file.write(path, header, lambda start, stop: [b"row"] * (stop - start), n=2, per_part=2)
        left.mkdir()
        flock(*args)

    monkeypatch.setattr(teacher_stage.fcntl, "flock", locked_later)
    assert write_rows(path, header, load=lambda: pytest.fail("the teacher is not needed")) == ["teacher"]
    assert not left.exists(), "what a process leaves that is killed between writing the file and deleting its parts"
    with pytest.raises(SettingError, match=f"--teacher-file {path} was made with --k 2 instead of 3"):
        write_rows(path, {"k": 3}, load=lambda: pytest.fail("the teacher is not needed"))


def test_only_one_process_writes_a_file(tmp_path):
    path, lock = tmp_path / "file", tmp_path / "file.lock"

    def load():
        with pytest.raises(SettingError, match=f"another process is writing --teacher-file {path}; wait until"):
            write_rows(path, {}, load)
        raise KeyboardInterrupt

    with lock.open("w") as file:
        for _ in range(2):
            with pytest.raises(KeyboardInterrupt):
                write_rows(path, {}, load)
            assert lock.stat().st_ino == os.fstat(file.fileno()).st_ino, "all processes lock the same file"


def test_the_key_of_the_order_serves_nothing_else(given, tmp_path, monkeypatch):
    made = key_uses.record(monkeypatch)
    train(tmp_path / "run", flags(given, "model", "prompt", "data.path", "data.pretraining"), "--steps", 2)
    assert len(made.orders) == 1 and made.others and made.orders[0] not in made.others


def test_flags_that_are_missing_or_have_no_effect_are_named(given, tmp_path):
    for arguments, message in (
        (flags(given, "prompt", "data.path"), "--data.path needs --model; add it"),
        (flags(given, "model", "data.path"), "without --prompt and --teacher, the teacher is the student"),
        (flags(given, "model", "prompt"), "--data.path is missing"),
        (flags(given, "model", "prompt", "data.path", model="tiny"), "--model tiny has random weights; give --teacher"),
        ([*flags(given, "model", "prompt", "data.path"), "--mix", "0.5"], "--mix has no effect without --data.pretr"),
        ([*flags(given, "model", "prompt", "data.path"), "--k", "0"], "--k is 0; it must be at least 1"),
        (
            [*flags(given, "model", "prompt", "data.path", "data.pretraining"), "--mix", "0"],
            "--data.pretraining has no",
        ),
        ([*flags(given, "model", "prompt", "data.path"), "--prompt", ""], "--prompt is empty"),
    ):
        with pytest.raises(SettingError) as caught:
            distill.parse(arguments)
        assert str(caught.value).startswith(message)


def test_models_with_different_tokenizers_and_sizes_that_do_not_fit_are_refused(given, tmp_path):
    out = ("--out", tmp_path / "run")
    for names, changed, extra, message in (
        (("model", "teacher", "data.path"), {"teacher": given / "other_tokenizer"}, (), "have different tokenizers"),
        (("model", "prompt", "data.path"), {}, ("--k", 4000), r"--k is 4000; it must be at most \d+, the size"),
        (("model", "prompt", "data.path"), {}, ("--data.width", 99999), "--data.width is 99999; it must be at most"),
        (("model", "prompt", "data.path"), {"prompt": "milk " * 9000}, (), "--prompt has .* tokens, which leave no"),
    ):
        with pytest.raises((SettingError, errors.DataError), match=message):
            distill.run(parsed(given, *names, extra=(*extra, *out), **changed))
    assert not (tmp_path / "run").exists()


def test_the_prompt_is_read_from_a_file(given, tmp_path):
    (tmp_path / "prompt.txt").write_text("User: Hi\n")
    settings = parsed(given, "model", "prompt", "data.path", prompt=tmp_path / "prompt.txt")
    assert settings.prompt == "User: Hi\n"


def test_a_new_student_gets_the_tokenizer_of_the_teacher(given, tmp_path):
    arguments = flags(given, "model", "teacher", "data.path", model="tiny")
    results = train(tmp_path / "run", arguments, "--steps", 30, "--data.held-out", 0)
    assert results["distillation"]["kl_before"] is None and results["rows"]["held_out"] == 0
    found = [row["loss"] for row in metrics.read(tmp_path / "run") if "loss" in row]
    assert np.mean(found[-5:]) < 0.7 * found[0]
    cfg, _ = lm.load(tmp_path / "run" / "model")
    assert cfg.vocab_size == lm.load(given / "teacher")[0].vocab_size and cfg.n_layers == 2


def test_adapters_are_merged_and_micro_batches_do_not_change_the_losses(given, tmp_path):
    arguments = flags(given, "model", "prompt", "data.path")
    found = {}
    for parts in (1, 2):
        train(tmp_path / str(parts), arguments, "--steps", 3, "--lora.rank", 2, "--micro-batches", parts)
        found[parts] = [row["loss"] for row in metrics.read(tmp_path / str(parts)) if "loss" in row]
    np.testing.assert_allclose(found[1], found[2], rtol=1e-4)
    assert lm.load(tmp_path / "1" / "model")[0].n_layers == 1


KILLED = """
import os, signal, sys
sys.path.insert(0, {experiments!r})
import distill
from rlhf_jax import metrics
from rlhf_jax.data.stores import teacher_rows
encode, write, calls = teacher_rows.encode, metrics.MetricLog.write, []
def kill_in_the_teacher(batch):
    calls.append(0)
    if {where!r} == "teacher" and len(calls) == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    return encode(batch)
def kill_in_training(self, stage, step, values):
    if {where!r} == "distill" and stage == "distill" and step == 5:
        os.kill(os.getpid(), signal.SIGKILL)
    return write(self, stage, step, values)
teacher_rows.encode, metrics.MetricLog.write = kill_in_the_teacher, kill_in_training
distill.main(sys.argv[1:])
"""


@pytest.mark.parametrize("where", ["teacher", pytest.param("distill", marks=pytest.mark.slow)])
def test_a_killed_run_resumes_with_the_same_file_and_student(given, tmp_path, where):
    arguments = [*flags(given, "model", "prompt", "data.path"), *map(str, (*SHORT, "--steps", 7))]
    program = KILLED.format(experiments=str(EXPERIMENTS), where=where)
    killed = subprocess.run(
        [sys.executable, "-c", program, *arguments, "--out", str(tmp_path / "run")],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": os.pathsep.join([str(EXPERIMENTS.parent), str(EXPERIMENTS)])},
    )
    assert killed.returncode == -9, killed.stderr[-3000:]
    assert (tmp_path / "run" / f"{teacher_stage.NAME}.parts").exists() == (where == "teacher")
    distill.main(["--resume", str(tmp_path / "run")])
    distill.main([*arguments, "--out", str(tmp_path / "whole")])
    for name in (teacher_stage.NAME, "model/model.safetensors"):
        assert (tmp_path / "run" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    first, second = (json.loads((tmp_path / name / "results.json").read_text()) for name in ("run", "whole"))
    assert first["distillation"] == second["distillation"]


def test_a_dialogue_keeps_its_question_and_its_answer(given):
    fmt = initial_model.load(str(given / "student")).fmt
    settings = parsed(given, "model", "prompt", "data.path")
    made = distill_rows.make(settings, fmt, errors.DropCount(), jax.random.key(0), max_width=64)
    turns = [dialogues.Turn("user", "Do you like tea and salt?"), dialogues.Turn("assistant", "I like salt.")]
    assert chat.encode_dialogue(fmt, turns)[0] in made.rows.ids and not made.notes and not made.remark
    assert max(map(len, made.rows.ids)) <= made.width <= 64 and made.rows.n_train + len(made.rows.clusters) == 64
