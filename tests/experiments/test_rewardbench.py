"""Tests the reader, the scores and the command line of experiments/rewardbench.py, and the reward-model plots."""
# pyright: reportAttributeAccessIssue=false

import gzip
import json
import math
from typing import Any

import jax
import numpy as np
import pytest
import rewardbench
from html_page import Page
from recipe import reward_diagnosis

from rlhf_jax import diagnostics, lm, report
from rlhf_jax.data import chat, dialogues, errors, tokenizers
from rlhf_jax.diagnostics import overoptimisation as over
from rlhf_jax.report import results as results_lib
from rlhf_jax.report import reward_plots

WORDS = ["what", "is", "the", "color", "of", "a", "fox", "red", "blue", "green", "tell", "me", "please", "not", "it"]
SUBSETS = ("colors", "stories", "colors", None)


def records(n=24, seed=0):
    """Returns prompts and answers of many lengths, with words from the tokenizer's vocabulary."""
    rng = np.random.default_rng(seed)

    def text():
        return " ".join(rng.choice(WORDS, size=rng.integers(1, 30)))

    rows = [{"prompt": text(), "chosen": text(), "rejected": text(), "subset": SUBSETS[i % 4]} for i in range(n)]
    rows[0]["prompt"] = [{"role": role, "content": text()} for role in ("user", "assistant", "user")]
    return rows


def write(path, rows):
    text = "".join(json.dumps(row) + "\n" for row in rows).encode()
    path.write_bytes(gzip.compress(text) if path.name.endswith(".gz") else text)
    return path


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """Returns a run folder like that of instructgpt.py, with an untrained reward model."""
    tokenizer = tokenizers.word_level(WORDS)
    cfg = lm.LMConfig(vocab_size=len(tokenizer), n_layers=1, d_model=32, n_heads=2, d_mlp=32, max_length=128)
    params = lm.with_head(jax.random.key(1), lm.init(jax.random.key(0), cfg=cfg), cfg)
    params = lm.heads.shift_bias(params, 0.25)
    path = tmp_path_factory.mktemp("model") / "reward_model"
    lm.save(path, cfg, params, tokenizer=tokenizer)
    lm.save(path.with_name("policy"), cfg, lm.without_head(params), tokenizer=tokenizer)
    return path, cfg, params


@pytest.fixture(scope="module")
def judged(model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("judged")
    path = write(folder / "file.jsonl.gz", records())
    out = folder / "out"
    rewardbench.main(["--model", str(model[0]), "--data.path", str(path), "--out", str(out), "--batch", "10"])
    return out


# The command


def test_scores_equal_those_of_each_dialogue_alone(judged, model):
    _, cfg, params = model
    fmt = chat.chat_format(tokenizers.load(model[0]))
    rows = [json.loads(line) for line in (judged / "scores.jsonl").read_text().splitlines()]
    score = jax.jit(lambda params, ids: lm.score(params, ids, cfg=cfg))
    assert [row["record"].split(", ")[-1] for row in rows] == [f"line {n}" for n in range(1, 25)]
    for row, record in list(zip(rows, records()))[:3]:
        prompt: Any = record["prompt"]
        prompt = prompt if isinstance(prompt, list) else [{"role": "user", "content": prompt}]
        turns = [dialogues.Turn(message["role"], message["content"]) for message in prompt]
        for side in ("chosen", "rejected"):
            ids, _ = chat.encode_dialogue(fmt, [*turns, dialogues.Turn("assistant", record[side])])
            assert row[side] == pytest.approx(float(score(params, np.array([ids]))[0]), abs=1e-5)


def test_results_follow_from_the_scores(judged):
    rows = [json.loads(line) for line in (judged / "scores.jsonl").read_text().splitlines()]
    results = json.loads((judged / "results.json").read_text())["reward_model"]
    chosen, rejected = (np.array([row[side] for row in rows]) for side in ("chosen", "rejected"))
    assert results["pairs"] == 24
    outcomes = diagnostics.win_outcomes(chosen, rejected)
    np.testing.assert_allclose(results["accuracy"], diagnostics.clustered_mean(outcomes, rate=True))
    subsets = {each["name"]: each for each in results["strata"]["subset"]}
    assert {name: each["count"] for name, each in subsets.items()} == {"colors": 12, "stories": 6, None: 6}
    for name, each in subsets.items():
        correct = [row["chosen"] > row["rejected"] for row in rows if row["subset"] == name]
        assert each["accuracy"][0] == pytest.approx(np.mean(correct))
    assert results["mean_subset_accuracy"][0] == pytest.approx(np.mean([e["accuracy"][0] for e in subsets.values()]))
    assert sum(each["count"] for each in results["strata"]["tokens of the longer answer"]) == 24
    lengths = [[len(row[side].split()) + 1 for side in ("chosen", "rejected")] for row in records()]
    bias = diagnostics.length_bias(chosen, rejected, *np.transpose(lengths), prompts=range(24))
    np.testing.assert_allclose(results["length_bias"]["prefers_longer"], bias.prefers_longer)
    slope, temperature = results["calibration"]["slope"][0], results["calibration"]["temperature"]
    assert slope == pytest.approx(diagnostics.calibration_slope(chosen, rejected).mean)
    assert temperature == (pytest.approx(1 / slope) if slope > 0 else None)


def test_pairs_of_the_same_prompt_are_not_independent():
    def measure(repeats):
        prompts = [(dialogues.Turn("user", f"question {i}"),) for i in range(8)] * repeats
        pairs = [rewardbench.Pair(prompt, "a", "b", None, "") for prompt in prompts]
        chosen, lengths = np.tile([1.0, 2.0, -1.0, 3.0, 0.5, -2.0, 1.0, -0.5], repeats), np.arange(8.0 * repeats) + 1
        return rewardbench.measure(rewardbench.Scored(pairs, chosen, 0 * chosen, lengths, lengths[::-1]), bins=1)

    once, often = measure(1), measure(5)
    assert often["pairs"] == 40 and once["accuracy"][0] == often["accuracy"][0] == 5 / 8
    np.testing.assert_allclose(often["calibration"]["slope"], once["calibration"]["slope"], rtol=1e-6)
    for name in ("accuracy", "strict_accuracy"):
        (_, low, high), (_, low_once, high_once) = often[name], once[name]
        assert high - low == pytest.approx(high_once - low_once, rel=0.02), "repeated pairs add no information"


def test_the_report_shows_strata_calibration_and_length(judged):
    page = Page((judged / "report.html").read_text())
    assert "The reward model agrees with" in page.text
    for words in ("Accuracy by group", "Calibration", "Length bias", "colors (n = 12)", "unknown (n = 6)"):
        assert words in page.text
    assert json.loads((judged / "config.json").read_text())["batch"] == 10
    assert {path.name for path in judged.iterdir()} == FILES


FILES = {"config.json", "results.json", "report.html", "scores.jsonl", "lock"}


def test_order_and_batch_size_do_not_change_scores():
    rows = [[1] * n for n in (3, 40, 5, 90, 33, 1)]
    shapes = []

    def score(tokens_BL, mask_BL):
        shapes.append(tokens_BL.shape)
        return mask_BL.sum(axis=1) + 0.5

    done = []
    for batch in (1, 4, 16):
        scores = rewardbench.reward_scores.score_rows(
            rows, score, batch=batch, max_length=90, pad_id=0, on_progress=done.append
        )
        np.testing.assert_array_equal(scores, [3.5, 40.5, 5.5, 90.5, 33.5, 1.5])
    assert {width for _, width in shapes} == {32, 64, 90} and done[-1] == 6


def refused(capsys, *arguments):
    """Returns the error of a command that exits with status 2."""
    with pytest.raises(SystemExit) as exit:
        rewardbench.main([str(argument) for argument in arguments])
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert exit.value.code == 2 and error.startswith("error: ")
    return error


def test_invalid_input_is_a_one_line_error_and_writes_nothing(model, judged, tmp_path, capsys, monkeypatch):
    path, out = write(tmp_path / "file.jsonl", records()), tmp_path / "out"
    valid = ("--model", model[0], "--data.path", path, "--out", out)
    assert "it is a language model" in refused(
        capsys, "--model", model[0].with_name("policy"), "--data.path", path, "--out", out
    )
    assert "does not exist; give a folder" in refused(
        capsys, "--model", tmp_path / "no", "--data.path", path, "--out", out
    )
    assert "already contains files; give a new" in refused(capsys, *valid[:4], "--out", judged)
    assert "--batch is 0" in refused(capsys, *valid, "--batch", 0)
    assert "--data.max-dropped is 2.0" in refused(capsys, *valid, "--data.max-dropped", 2)
    assert "prompt too long" in refused(capsys, *valid, "--max-length", 20)
    unknown = write(tmp_path / "unknown.jsonl", [records()[1] | {"prompt": "zebra"}])
    error = refused(capsys, "--model", model[0], "--data.path", unknown, "--out", out)
    assert "unknown.jsonl" in error and "zebra" in error
    assert not out.exists()
    monkeypatch.setattr(
        rewardbench.reward_scores, "score_rows", lambda *_, **__: pytest.fail("scored before the folder was made")
    )
    (tmp_path / "file").write_text("in the way")
    assert "is a file; give a new or empty folder" in refused(capsys, *valid[:4], "--out", tmp_path / "file" / "out")


def test_long_pairs_lose_turns_and_then_the_end_of_their_answers(model):
    fmt = chat.chat_format(tokenizers.load(model[0]))
    pairs = [("red", "red blue green"), ("red", "blue"), (" ".join(["red"] * 9), "red")]
    records = [rewardbench.Pair((dialogues.Turn("user", "what"),), *pair, None, "") for pair in pairs]
    counts = errors.DropCount(max_dropped=1.0)
    kept, rows, lengths = rewardbench.encode(fmt, records, max_length=8, counts=counts)
    assert kept == records and not counts.dropped and counts.truncated == {"answer truncated": 1}
    assert lengths.tolist() == [2, 2, 4, 4, 2, 2] and [len(row) for row in rows] == [6, 6, 8, 8, 6, 6]
    kept, _, _ = rewardbench.encode(fmt, records, max_length=5, counts=counts)
    assert kept == [records[1]] and counts.dropped == {"same answer within the width": 2}
    with pytest.raises(errors.DataError, match="no record is left"):
        rewardbench.encode(fmt, records, max_length=4, counts=counts)


def test_tools_and_calls_reach_the_chat_template(model, tmp_path):
    tokenizer = tokenizers.load(model[0])
    template = (
        "{% for tool in tools or [] %}{{ tool.name + ' ' }}{% endfor %}{% for m in messages %}{{ m.content }}"
        "{% for call in m.tool_calls or [] %}{{ ' ' + call.name }}{% endfor %}"
        "{% if m.role == 'assistant' %}{{ eos_token }}{% else %}{{ ' ' }}{% endif %}{% endfor %}"
    )
    fmt = chat.chat_format(tokenizer, template=template)
    call = {"role": "assistant", "content": "red", "tool_calls": [{"name": "blue"}]}
    row = {"prompt": "what", "chosen": call, "rejected": "red", "tools": [{"name": "fox"}]}
    pairs = rewardbench.read(str(write(tmp_path / "file.jsonl", [row])), counts=errors.DropCount())
    _, rows, _ = rewardbench.encode(fmt, pairs, max_length=16, counts=errors.DropCount())
    assert [tokenizer.decode(ids, skip_special_tokens=True).split() for ids in rows] == [
        ["fox", "what", "red", "blue"],
        ["fox", "what", "red"],
    ]


# The reader


def test_pairs_of_every_format_and_file_type_are_read_and_other_records_counted(tmp_path):
    parquet = pytest.importorskip("pyarrow.parquet")
    import pyarrow

    rows = records()[1:]
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "file.parquet")
    counts = errors.DropCount(max_dropped=0.5)
    from_parquet = rewardbench.read(str(tmp_path / "file.parquet"), counts=counts)
    from_lines = rewardbench.read(str(write(tmp_path / "file.jsonl", rows)), counts=counts)
    assert [pair[:4] for pair in from_parquet] == [pair[:4] for pair in from_lines] and not counts.dropped
    assert from_lines[2][1:5] == (rows[2]["chosen"], rows[2]["rejected"], None, f"{tmp_path / 'file.jsonl'}, line 3")
    two = {"prompt": "what", "responses": ["red", "blue"], "ranks": [2, 1], "subset": 3}
    three = two | {"responses": ["red", "blue", "fox"], "ranks": [1, 2, 3]}
    (pair,) = rewardbench.read(str(write(tmp_path / "ranked", [two, three])), counts=counts)
    assert pair[1:4] == ("blue", "red", "3") and counts.dropped == {"not a pair": 1}


def test_broken_files_are_named_and_unusable_records_counted(tmp_path):
    good = records()[1]
    flawed = [good] * 8 + [good | {"chosen": " "}, good | {"rejected": good["chosen"]}]
    counts = errors.DropCount(max_dropped=0.5)
    assert len(rewardbench.read(str(write(tmp_path / "flawed.jsonl", flawed)), counts=counts)) == 8
    assert counts.dropped == {"empty answer": 1, "same answer twice": 1}
    cases = {
        "file, line 2: the record has neither 'rejected' nor 'responses'": [good, {"prompt": "a", "chosen": "b"}],
        "file is empty": [],
        "2 of 10 records were dropped": flawed,
    }
    for words, rows in cases.items():
        with pytest.raises(errors.DataError, match=words):
            rewardbench.read(str(write(tmp_path / "file", rows)), counts=errors.DropCount())


# The measurements


def measure(chosen, rejected, subsets):
    pairs = [rewardbench.Pair((dialogues.Turn("user", "what"),), "red", "blue", name, "") for name in subsets]
    lengths = np.arange(1, len(pairs) + 1)
    return rewardbench.measure(
        rewardbench.Scored(pairs, np.array(chosen), np.array(rejected), lengths, lengths[::-1].copy()), bins=2
    )


def test_the_table_has_the_strict_accuracy_if_there_are_ties():
    results = measure([1.0, 2.0, 0.0, 3.0], [0.0, 2.0, 1.0, 3.0], ["a", "a", "b", "b"])
    assert results["accuracy"][0] == 0.5 and results["strict_accuracy"][0] == 0.25 and results["ties"] == 2
    assert "ties counted as wrong" in printed(results) and "ties counted" not in printed(results | {"ties": 0})


def test_an_undefined_temperature_is_not_printed():
    for sign in (1.0, -1.0):
        results = measure([sign, 2 * sign, 3 * sign], [0.0, 0.0, 0.0], [None] * 3)
        assert math.isnan(results["calibration"]["temperature"])
        page = report.render({"reward_model": rewardbench.run_folder.finite(results)}, [], title="t")
        assert "alibration temperature" not in page


def printed(results):
    console = rewardbench.Console(width=100)
    with console.capture() as output:
        console.print(rewardbench.accuracy_table(results))
    return output.get()


def test_subset_names_may_contain_markup():
    text = printed(measure([1.0, 2.0], [0.0, 3.0], ["[red]x[/red]", "a [/] b"]))
    assert "[red]x[/red]" in text and "a [/] b" in text


# Plots


def results_with_all_figures():
    """Returns results that have every figure of a reward model."""
    rng = np.random.default_rng(0)
    kl = np.linspace(0.5, 6.0, 12) ** 2
    gains = np.sqrt(kl) * (1 - 0.12 * np.sqrt(kl)) + 0.01 * rng.normal(size=12)
    fits = [fit._asdict() | {"form": fit.form.name} for fit in over.fit_both(kl, gains)]
    train = rng.normal(size=(6, 50)) + np.arange(6)[:, None]
    halves = diagnostics.split_halves(train, train - np.maximum(0, np.arange(6) - 3)[:, None])
    gap = diagnostics.generalisation_gap(rng.normal(2, 1, 90), np.zeros(90), rng.normal(1, 1, 90), np.zeros(90))
    return {
        "reward_model": {"accuracy": [0.7, 0.6, 0.8], "gap": gap._asdict()},
        "split_halves": reward_diagnosis.arrays_as_json(halves) | {"steps": [0, 10, 20, 30, 40, 50]},
        "overoptimisation": [{"name": "best of n", "kl": kl.tolist(), "gains": gains.tolist(), "fits": fits}],
    }


def test_the_report_draws_every_figure_and_is_deterministic():
    page = Page(report.render(results_with_all_figures(), [], title="t"))
    assert "Over-optimisation" in page.headings and "Training and held-out pairs" in page.text
    assert "best of n: R² 1.000" in page.text and "with the best of n form, peak at √KL = 4." in page.text
    assert "test reward model" in page.text
    assert report.render(results_with_all_figures(), [], title="t") == report.render(
        results_with_all_figures(), [], title="t"
    )


def test_flat_gains_and_infinite_intervals_are_drawn():
    results = results_with_all_figures()
    (curve,) = results["overoptimisation"]
    for fit in curve["fits"]:
        fit |= {"r_squared": math.nan, "peak_distance": [4.0, 2.5, math.inf]}
    curve |= {"lo": [-math.inf] * 12, "hi": [math.inf] * 12}
    page = Page(report.render(rewardbench.run_folder.finite(results), [], title="t"))
    assert "best of n: R² – with the best of n form, peak at √KL = 4.00 (from 2.50)" in page.text
    mean, bounds = results_lib.format_parts(results["reward_model"]["gap"]["accuracy_gap"], percent=True)
    assert f"Here the difference is {mean} percentage points ({bounds})." in page.text


def test_plots_of_missing_results_are_none():
    plots = reward_plots
    for draw in (plots.strata, plots.length_bias, plots.generalisation, plots.thresholds, plots.split_halves):
        assert draw(None) is None and draw({}) is None
    assert plots.overoptimisation([]) is None and plots.fit_summary(None) == ""
    assert plots.strata({"turn": [{"name": 1, "accuracy": [math.nan, 0.0, 1.0], "count": 0}]}) is None


def test_several_strata_have_headings_and_long_names_are_truncated():
    one = {"name": "x" * 40, "accuracy": [0.5, 0.2, 0.8], "count": 4}
    svg = reward_plots.strata({"turn": [one | {"name": 1}], "annotator": [one]}, 0.6)
    assert svg is not None and all(words in svg for words in (">turn<", ">annotator<", "x…", "n = 4", "20.0–80.0"))
    alone = reward_plots.strata({"turn": [one]})
    assert alone is not None and ">turn<" not in alone
