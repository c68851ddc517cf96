"""Labels of hh.py from people, who fill in a file between two starts of the run, and from a judge."""

import contextlib
import dataclasses
import json
import pathlib
import types as types_lib
from typing import Any

import dry_run
import hh
import jax
import killed_run
import numpy as np
import pytest
from launch.settings import SettingError
from online import comparison_sets, hh_settings, label_files, label_sources
from recipe import world_words

from rlhf_jax import feedback
from rlhf_jax.data import errors, padding
from rlhf_jax.feedback import few_shot
from rlhf_jax.simulation import gold, prompts
from rlhf_jax.simulation import world as world_lib

# ----------------------------------------------------------------------------------------------------------- the file

PAIRS = [
    label_files.Pair("1-train_helpful-0", "helpful", (("user", "hi"),), "yes", "no", swapped=False),
    label_files.Pair("1-train_helpful-1", "helpful", (("user", "hi"),), "yes\u2028sir", "no", swapped=True),
    label_files.Pair(
        "1-train_harmless-0", "harmless", (("user", "a"), ("assistant", "b"), ("user", "c")), "x", "y", True
    ),
]


def rows_of(path: pathlib.Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().split("\n") if line]


def write_rows(path: pathlib.Path, rows: list[Any]) -> None:
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))


def test_people_see_the_answers_as_a_and_b_and_labels_are_about_the_first(tmp_path):
    path = tmp_path / "pairs.jsonl"
    label_files.write_pairs(path, PAIRS)
    rows = rows_of(path)
    assert [(row["response_a"], row["response_b"]) for row in rows[:2]] == [("yes", "no"), ("no", "yes\u2028sir")]
    assert rows[2]["prompt"][1] == {"role": "assistant", "content": "b"} and rows[2]["domain"] == "harmless"
    assert {row["preference"] for row in rows} == {None} and label_files.read_labels(path, PAIRS) == {}
    for values, expected in (
        (("A", "A", "tie"), (1.0, 0.0, "tie")),
        (("B", "B", "skip"), (0.0, 1.0, "skip")),
        ((0.75, 0.75, 1), (0.75, 0.25, 0.0)),
    ):
        write_rows(path, ["", *(row | {"preference": value} for row, value in reversed(list(zip(rows, values))))])
        assert label_files.read_labels(path, PAIRS) == dict(zip([pair.id for pair in PAIRS], expected))
    write_rows(path, [rows[0] | {"preference": ""}, rows[1] | {"preference": "A"}])
    assert label_files.read_labels(path, PAIRS) == {PAIRS[1].id: 0.0}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        *(
            ({"preference": value}, "line 2: preference is")
            for value in ("a", "C", 1.01, -0.1, True, [1], float("nan"))
        ),
        ({"id": "1-train_helpful-9"}, "line 2: the line has no id of a pair of this round"),
        ({"id": "1-train_helpful-0"}, "line 2: the pair 1-train_helpful-0 is already in line 1"),
        ({"response_a": "No."}, "line 2: response_a has changed"),
        ({"swapped": False}, "line 2: swapped has changed"),
        ("{", "line 2: not valid JSON"),
        ("3", "line 2: the line has no id"),
    ],
)
def test_lines_that_are_no_labels_are_errors_with_their_number(tmp_path, change, message):
    path = tmp_path / "pairs.jsonl"
    label_files.write_pairs(path, PAIRS)
    rows: list[Any] = rows_of(path)
    rows[1] = change if isinstance(change, str) else rows[1] | change
    write_rows(path, rows)
    with pytest.raises(errors.DataError, match=message):
        label_files.read_labels(path, PAIRS)


# ---------------------------------------------------------------------------------------------------------- the sources

N = 4


def asked(split="train", domain: Any = "harmless") -> label_sources.Asked:
    """Returns a part of N pairs, of which the first answer has the higher gold utility and the last are equal."""
    tokens_B2L = np.arange(N * 2 * 3, dtype=np.int32).reshape(N, 2, 3)
    part: Any = comparison_sets.Part(
        split,
        domain,
        types_lib.SimpleNamespace(asked_B=np.arange(N)),  # pyright: ignore[reportArgumentType]
        comparison_sets.unlabelled(tokens_B2L, tokens_B2L >= 0),
        np.zeros((N, 2, 1)),
        jax.random.key(0),
    )
    pairs = [
        label_files.Pair(
            f"1-{split}_{domain}-{b}", domain, (("user", f"{split} {b}"),), f"good {b}", f"bad {b}", swapped=b % 2 == 0
        )
        for b in range(N)
    ]
    pairs[-1] = pairs[-1]._replace(second=pairs[-1].first)
    return label_sources.Asked(part, pairs, np.tile([1.0, 0.0], (N, 1)))


@pytest.fixture
def job():
    """A job that records what it prints."""
    printed: list[str] = []
    noted: list[str] = []
    return types_lib.SimpleNamespace(
        settings=types_lib.SimpleNamespace(seed=0),
        task=types_lib.SimpleNamespace(world=object()),
        progress=types_lib.SimpleNamespace(message=lambda stage, text: printed.append(text)),
        note=lambda stage, text: noted.append(text),
        printed=printed,
        noted=noted,
    )


def test_the_run_waits_until_people_have_labelled_enough(job, tmp_path):
    parts = [asked(), asked("validation")]
    strict, lenient = (label_sources.People(tmp_path, least) for least in (1.0, 0.5))
    path = tmp_path / "pairs-1.jsonl"
    with pytest.raises(label_sources.Waiting, match=r"pairs-1.jsonl: 0 of 6 pairs have a label; .*\n.*--resume"):
        strict(job, "comparisons-1", parts, None)
    rows = rows_of(path)
    assert len(rows) == 6, "equal answers are not labelled"
    given = dict(zip(sorted(row["id"] for row in rows), ("A", "tie", 0.25)))
    write_rows(path, [row | {"preference": given.get(row["id"])} for row in rows])
    before = path.read_bytes()
    with pytest.raises(label_sources.Waiting, match="3 of 6"):
        strict(job, "comparisons-1", parts, None)
    assert path.read_bytes() == before, "labels are never overwritten"
    found = lenient(job, "comparisons-1", parts, None)
    np.testing.assert_equal(found.preference_B[0], [0.0, np.nan, 0.75, np.nan])  # pairs 0 and 2 are swapped
    assert np.isnan(found.preference_B[1]).all()
    assert found.facts == {"agreement": {}, "ties": 1, "skipped": 0, "unlabelled": 3}
    with pytest.raises(label_sources.Waiting, match=r"3 of 6 pairs have a label \(at least 4 are needed\)"):
        label_sources.People(tmp_path, 0.6)(job, "comparisons-1", parts, None)


def test_soft_labels_are_targets_of_the_preferred_answer():
    preference_B = np.array([0.9, 0.2, np.nan, 0.5])
    rows, kept_B = label_sources.with_preferences(asked().part, preference_B)
    assert kept_B.tolist() == [True, True, False, True] and np.asarray(rows.domain_B).tolist() == [1, 1, 1]
    assert np.asarray(rows.ranks_BK).tolist() == [[1, 2], [2, 1], [1, 2]]
    np.testing.assert_allclose(rows.loss_inputs["target"], [0.9, 0.8, 0.5], rtol=1e-6)
    held, kept_B = label_sources.with_preferences(asked("validation").part, preference_B)
    assert kept_B.tolist() == [True, True, False, False] and len(held.loss_inputs["target"]) == 2


class StubJudge:
    """Prefers replies that begin with "good" with probability 0.9; answers at most ``most`` questions."""

    name = "stub"

    def __init__(self, most=1000):
        self.questions: list[str] = []
        self.most = most

    def __call__(self, questions):
        for i, text in enumerate(questions):
            if len(self.questions) == self.most:
                yield i, RuntimeError("overloaded")
                continue
            self.questions.append(text)
            first = text.rpartition("Conversation:")[2].index("good") < text.rpartition("Conversation:")[2].index("bad")
            yield i, feedback.Answer(0.9 if first else 0.1)


def judge_settings(**changes):
    settings = hh.parse(["--online.labels", "judge", "--judge", "http://localhost/v1", "--judge-model", "m"])
    return dataclasses.replace(settings, **changes)


def test_a_judge_labels_held_out_pairs_first_and_is_asked_once(job, tmp_path):
    parts = [asked(domain="helpful"), asked(), asked("validation", "helpful"), asked("validation")]
    judge = StubJudge()
    for expected in (2 * 3 * 4, 0):
        judge.questions.clear()
        source = label_sources.JudgeLabels(judge_settings(), judge, tmp_path / "labels.jsonl")
        found = source(job, "comparisons-1", parts, None)
        assert len(judge.questions) == expected
        for preference_B in found.preference_B:
            np.testing.assert_allclose(preference_B, [0.9, 0.9, 0.9, np.nan])
        assert found.facts["agreement"]["helpful"][0] == 1 == found.facts["agreement"]["harmless"][0]
    assert job.printed[0].startswith("the judge agrees with 100.0% of 3 held-out gold labels of helpfulness")


def test_the_agreement_is_reported_before_training_pairs_are_judged(job, tmp_path):
    parts = [asked(domain="helpful"), asked(), asked("validation", "helpful"), asked("validation")]
    source = label_sources.JudgeLabels(judge_settings(max_requests=12), StubJudge(), tmp_path / "labels.jsonl")
    with pytest.raises(label_sources.Waiting):
        source(job, "comparisons-1", parts, None)
    assert sum(line.startswith("the judge agrees") for line in job.printed) == 2


def test_the_questions_of_a_judge_fit_the_domain(job, tmp_path):
    judge = StubJudge()
    source = label_sources.JudgeLabels(judge_settings(), judge, tmp_path / "labels.jsonl")
    source(job, "comparisons-1", [asked(domain="helpful"), asked()], None)
    helpful, harmless = judge.questions[:6], judge.questions[6:]
    assert all(text.count(label_sources.HELPFULNESS) == 3 for text in helpful), "two examples and the question"
    for questions, examples in ((helpful, few_shot.HELPFUL_COMPARISONS), (harmless, few_shot.COMPARISONS)):
        assert all(examples[0].pair.prompt in text for text in questions)
    known = {each.question for each in feedback.HARMLESSNESS}
    assert all(any(text.count(each) == 3 for each in known) for text in harmless)


def test_a_judge_that_fails_or_reaches_its_budget_continues_later(job, tmp_path):
    path, parts = tmp_path / "labels.jsonl", [asked("validation"), asked()]
    with pytest.raises(errors.DataError, match=r"has not labelled 1 of 3 pairs \(2 x RuntimeError: overloaded\)"):
        label_sources.JudgeLabels(judge_settings(), StubJudge(most=4), path)(job, "comparisons-1", parts, None)
    with pytest.raises(label_sources.Waiting, match=r"--max-requests was reached, and 3 of 3 pairs"):
        label_sources.JudgeLabels(judge_settings(max_requests=2), StubJudge(), path)(job, "comparisons-1", parts, None)
    judge = StubJudge()
    label_sources.JudgeLabels(judge_settings(), judge, path)(job, "comparisons-1", parts, None)
    assert len(judge.questions) == 6


def test_a_judge_near_chance_is_an_incident(job):
    preference_B = np.array([0.9, 0.1, 0.9, 0.1])
    found = label_sources.agreement(job, "comparisons-1", asked("validation"), preference_B, "the judge")
    assert found["harmless"][0] == 0.5 and len(job.noted) == 1 and "no better than chance" in job.noted[0]


# ---------------------------------------------------------------------------------------------------------- the command

TINY = {
    "net.layers": 1, "net.width": 16, "net.heads": 2, "net.mlp": 16,
    "pretrain.documents": 200, "pretrain.steps": 2, "pretrain.batch": 8,
    "sft.demonstrations": 32, "sft.mix-epochs": 1,
    "ppo.iterations": 1, "ppo.batch": 16, "ppo.minibatches": 2, "ppo.warmup": 1,
    "evaluation.prompts": 16, "online.pairs": 24, "online.held-out": 8, "online.snapshots": 1, "pm.batch": 4,
}  # fmt: skip
ARGUMENTS = ["--preset", "smoke", *(text for name, value in TINY.items() for text in (f"--{name}", str(value)))]
PEOPLE = [*ARGUMENTS, "--online.labels", "people", "--online.no-static", "--online.sets", "base", "online"]


ANSWERS = ("response_a", "response_b")


def gold_labelled(path: pathlib.Path) -> None:
    """Labels a file by the gold utility of its texts, then by their length, in the place of people."""
    rows = rows_of(path)
    tables = gold.make_tables(world_lib.make_world(hh_settings.HHSettings().seed))
    turns = [[(turn["role"], turn["content"]) for turn in row["prompt"]] for row in rows]
    ids = [prompts.prompt_tokens(each) for each in turns]
    prompts_BP, _ = padding.pad_prompts(ids, width=prompts.PROMPT_WIDTH, pad_id=0)
    worth = []
    for name in ANSWERS:
        ids = [prompts.answer_tokens(row[name])[: prompts.RESPONSE_WIDTH] for row in rows]
        words_BT = np.array([[*each, *[0] * (prompts.RESPONSE_WIDTH - len(each))] for each in ids], np.int32)
        mask_BT = np.arange(prompts.RESPONSE_WIDTH) < np.array([len(each) for each in ids])[:, None]
        worth.append(world_words.gold_utility(tables, prompts_BP, words_BT, mask_BT))
    for i, row in enumerate(rows):
        a, b = ((float(getattr(each, row["domain"])[i]), -len(row[name])) for each, name in zip(worth, ANSWERS))
        row["preference"] = "tie" if a == b else "A" if a > b else "B"
    write_rows(path, rows)


@pytest.mark.parametrize("trained", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_a_run_continues_with_the_labels_of_people_as_if_it_had_never_stopped(tmp_path, monkeypatch, capsys, trained):
    stopped, whole = tmp_path / "stopped", tmp_path / "whole"
    with contextlib.nullcontext() if trained else dry_run.without_training(dry_run.Observed()):
        hh.main(["--out", str(stopped), *PEOPLE])
        for r in (1, 2):
            path = stopped / f"pairs-{r}.jsonl"
            printed = capsys.readouterr().out
            assert f"{path}: 0 of {len(rows_of(path))} pairs have a label" in printed
            assert f"python experiments/hh.py --resume {stopped}" in printed
            assert not (stopped / "results.json").exists()
            gold_labelled(path)
            hh.main(["--resume", str(stopped)])
        write = label_files.write_pairs
        monkeypatch.setattr(label_files, "write_pairs", lambda path, pairs: (write(path, pairs), gold_labelled(path)))
        hh.main(["--out", str(whole), *PEOPLE])
    results = killed_run.results_of(stopped)
    assert results == killed_run.results_of(whole) and results["labels"] == "people"
    for name in ("policy/model.safetensors", "pairs-2.jsonl"):
        assert (stopped / name).read_bytes() == (whole / name).read_bytes()
    for each in results["sets"]:
        assert each["agreement"] and all(agreed[0] > 0.5 for agreed in each["agreement"].values())
        assert each["pairs"] == each["train_helpful"]["kept"] + each["train_harmless"]["kept"] > 0
        assert each["unlabelled"] == each["skipped"] == 0
    assert list(results["elo"]["overall"]) == ["SFT", "round 1", "round 2"]
    assert "Labels of people" in (stopped / "report.html").read_text()


JUDGE = [*ARGUMENTS, "--online.labels", "judge", "--online.sets", "base", "online"]


@pytest.mark.slow
def test_a_run_with_a_judge_killed_anywhere_resumes_bit_identically(tmp_path):
    whole = tmp_path / "whole"
    killed_run.run("hh.py", "--out", whole, *JUDGE)
    results = killed_run.results_of(whole)
    assert results["labels"] == "judge" and "harmless" in results["sets"][0]["agreement"]
    for stage in ("pairs-1", "comparisons-1", "pairs-2", "pairs-100"):
        killed = tmp_path / stage
        killed_run.run_and_kill("hh.py", *JUDGE, folder=killed, when=killed_run.in_stage(stage))
        killed_run.run("hh.py", "--resume", killed)
        assert killed_run.results_of(killed) == results
        answers = [sorted((each / "labels.jsonl").read_text().splitlines()) for each in (killed, whole)]
        assert answers[0] == answers[1], "no question is asked twice"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--online.least-labels 0.5", "--online.least-labels has no effect with --online.labels simulated"),
        ("--judge DIR", "--judge has no effect with --online.labels simulated"),
        ("--online.labels people --judge DIR", "--judge has no effect with --online.labels people"),
        ("--online.labels people --world.lapse 0.3", "--world.lapse has no effect without simulated labelers"),
        ("--online.labels people --online.least-labels 0", "--online.least-labels"),
        ("--online.labels judge --judge http://localhost/v1", "--judge-model is missing"),
        ("--online.labels judge --judge DIR --think-tokens 5", "--think-tokens has no effect without an address"),
        ("--online.labels judge --no-few-shot", "--no-few-shot has no effect without --judge"),
        ("--online.labels judge --principles 17", "--principles"),
    ],
)
def test_settings_of_labels_that_do_not_fit_are_refused(arguments, message):
    with pytest.raises(SettingError, match=message):
        hh.parse(arguments.split())
