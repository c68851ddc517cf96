"""Labels of hh.py from people, who judge pairs in a store between two starts of the run, and from a judge."""

import contextlib
import dataclasses
import types as types_lib
from typing import Any

import dry_run
import hh
import jax
import killed_run
import numpy as np
import pytest
from launch.settings import SettingError
from online import comparison_sets, hh_settings, label_sources
from recipe import world_words

from rlhf_jax import feedback
from rlhf_jax.data import errors, padding
from rlhf_jax.feedback import few_shot, judgements, store
from rlhf_jax.simulation import gold, prompts
from rlhf_jax.simulation import world as world_lib

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
    items = [
        judgements.Item(
            prompt=judgements.Prompt([{"role": "user", "content": f"{split} {b}"}], domain),
            completions=[
                judgements.Completion(text) for text in (f"good {b}", f"bad {b}" if b < N - 1 else f"good {b}")
            ],
            metadata={"pair": f"1-{split}_{domain}-{b}"},
        )
        for b in range(N)
    ]
    return label_sources.Asked(part, items, np.tile([1.0, 0.0], (N, 1)))


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


def record(opened: store.Store, labeler: str, answers: dict[str, judgements.Judgement], name="round 1") -> None:
    """Records answers of a labeler, by the pair in the metadata of the items."""
    if labeler not in {each.name for each in opened.labelers()}:
        opened.add_labeler(labeler)
    ids = {str(item.metadata.get("pair")): id for id, item in opened.items(name).items()}
    for pair, answer in answers.items():
        opened.record(labeler, ids[pair], answer, key=f"{pair} {answer}")


FIRST, SECOND = judgements.Judgement(strength=2), judgements.Judgement(strength=7)
TIE, UNSURE = judgements.Judgement(tie=True), judgements.Judgement(unsure=True)
PAIRS = [f"1-{split}_harmless-{b}" for split in ("train", "validation") for b in range(N - 1)]
"""The pairs whose answers differ."""


@pytest.fixture
def people(job, tmp_path):
    """Returns a function of the least share, which asks people, and the open store."""
    path = tmp_path / "people.sqlite"

    def ask(least=1.0):
        parts = [asked(), asked("validation")]
        return label_sources.People(tmp_path, path, least)(job, "comparisons-1", parts, None)

    with store.Store(path) as opened:  # as by the server of the page
        yield ask, opened


def test_the_run_waits_until_people_have_labelled_enough(people, tmp_path):
    ask, opened = people
    lines = [
        r"\S+people.sqlite: 0 of 6 pairs have a label; .*",
        r" +python -m rlhf_jax.feedback assign \S+people.sqlite --labelers NAME",
        r' +python -m rlhf_jax.feedback serve \S+people.sqlite --set "round 1"',
        f" +python experiments/hh.py --resume {tmp_path}",
    ]
    with pytest.raises(label_sources.Waiting, match="\n".join(lines)):
        ask()
    items = list(opened.items("round 1").values())
    shown = [item.metadata["pair"] for item in items]
    assert sorted(shown) == PAIRS != shown, "in random order, without equal answers"
    assert {item.prompt.domain for item in items} == {"harmless"}
    record(opened, "Ada", {PAIRS[0]: FIRST, PAIRS[2]: TIE})
    record(opened, "Ada", {PAIRS[0]: SECOND, PAIRS[1]: UNSURE})  # the first label is corrected
    for least, needed in ((1.0, ";"), (0.6, r" \(at least 4 are needed\);")):
        with pytest.raises(label_sources.Waiting, match=f"3 of 6 pairs have a label{needed}"):
            ask(least)
    found = ask(0.5)
    assert list(opened.items()) == list(opened.items("round 1")) and len(opened.items()) == 6, "nothing is added again"
    np.testing.assert_equal(found.preference_B, [[0.0, np.nan, 0.5, np.nan], [np.nan] * N])
    counts = {"ties": 1, "unsure": 1, "unlabelled": 3, "labelers": 1, "labeler_agreement": None}
    assert found.facts == {"agreement": {}} | counts


def test_several_labelers_give_soft_labels(people):
    ask, opened = people
    with pytest.raises(label_sources.Waiting):
        ask()
    record(opened, "Ada", dict(zip(PAIRS, (FIRST, FIRST, FIRST, SECOND, UNSURE, FIRST))))
    record(opened, "Ben", dict(zip(PAIRS, (FIRST, SECOND, TIE, SECOND, SECOND, FIRST))))
    record(opened, "Cem", dict(zip(PAIRS, (SECOND, UNSURE))))
    found = ask()
    np.testing.assert_allclose(found.preference_B, [[2 / 3, 0.5, 0.75, np.nan], [0.0, 0.0, 1.0, np.nan]])
    agreement = found.facts.pop("agreement")
    np.testing.assert_allclose(agreement["harmless"][0], 1 / 3)
    # Of the pairs of votes, 1 of 3 agree on the first pair, and 0, 0, 1 and 1 of 1 on others.
    counts = {"ties": 1, "unsure": 0, "unlabelled": 0, "labelers": 3, "labeler_agreement": 3 / 7}
    assert found.facts == pytest.approx(counts)


def test_other_items_of_the_store_are_ignored(people):
    ask, opened = people
    other = asked().items[0]
    gold = dataclasses.replace(other, expected=SECOND, metadata={})
    unknown = dataclasses.replace(other, metadata={"pair": "from another run"})
    others = opened.add([unknown, gold], set_name="round 1") + opened.add([unknown], set_name="before")
    with pytest.raises(label_sources.Waiting, match="0 of 6"):
        ask()
    repeated = dataclasses.replace(other, duplicate_of=list(opened.items("round 1"))[-1], metadata={})
    opened.add_labeler("Zoe")
    for id in [*others, *opened.add([repeated], set_name="round 1")]:
        opened.record("Zoe", id, SECOND, key=id)
    with pytest.raises(label_sources.Waiting, match="0 of 6"):
        ask()
    record(opened, "Ada", dict.fromkeys(PAIRS, FIRST))
    found = ask()
    np.testing.assert_equal(found.preference_B, [[1.0, 1.0, 1.0, np.nan]] * 2)
    assert found.facts["labelers"] == 1


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


def judged_by_gold(opened: store.Store, name: str) -> None:
    """Judges the items of a set by the gold utility of their texts, then by their length, in the place of people."""
    items = list(opened.items(name).values())
    tables = gold.make_tables(world_lib.make_world(hh_settings.HHSettings().seed))
    turns = [[(str(turn["role"]), str(turn["content"])) for turn in item.prompt.messages] for item in items]
    ids = [prompts.prompt_tokens(each) for each in turns]
    prompts_BP, _ = padding.pad_prompts(ids, width=prompts.PROMPT_WIDTH, pad_id=0)
    worth = []
    for k in range(2):
        ids = [prompts.answer_tokens(item.completions[k].text)[: prompts.RESPONSE_WIDTH] for item in items]
        words_BT = np.array([[*each, *[0] * (prompts.RESPONSE_WIDTH - len(each))] for each in ids], np.int32)
        mask_BT = np.arange(prompts.RESPONSE_WIDTH) < np.array([len(each) for each in ids])[:, None]
        utility = world_words.gold_utility(tables, prompts_BP, words_BT, mask_BT)
        domains_B = [getattr(utility, item.prompt.domain)[i] for i, item in enumerate(items)]
        worth.append([(float(x), -len(item.completions[k].text)) for x, item in zip(domains_B, items)])
    answers = [TIE if a == b else FIRST if a > b else SECOND for a, b in zip(*worth)]
    record(opened, "Ada", {str(item.metadata["pair"]): each for item, each in zip(items, answers)}, name)


@pytest.mark.parametrize("trained", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_a_run_continues_with_the_labels_of_people_as_if_it_had_never_stopped(tmp_path, monkeypatch, capsys, trained):
    stopped, whole = tmp_path / "stopped", tmp_path / "whole"
    path = stopped / label_sources.STORE
    with contextlib.nullcontext() if trained else dry_run.without_training(dry_run.Observed()):
        hh.main(["--out", str(stopped), *PEOPLE])
        for r in (1, 2):
            printed = capsys.readouterr().out
            with store.Store(path) as opened:
                assert f"{path}: 0 of {len(opened.items(f'round {r}'))} pairs have a label" in printed
                assert f"python experiments/hh.py --resume {stopped}" in printed
                assert not (stopped / "results.json").exists()
                judged_by_gold(opened, f"round {r}")
            if r == 1:
                path.rename(tmp_path / "moved.sqlite")
                with pytest.raises(SystemExit):
                    hh.main(["--resume", str(stopped)])
                assert f"{path} does not exist; restore it" in capsys.readouterr().err
                (tmp_path / "moved.sqlite").rename(path)
            hh.main(["--resume", str(stopped)])
        add = store.Store.add

        def add_and_judge(self, items, *, set_name):
            ids = add(self, items, set_name=set_name)
            judged_by_gold(self, set_name)
            return ids

        monkeypatch.setattr(store.Store, "add", add_and_judge)
        hh.main(["--out", str(whole), *PEOPLE, "--online.store", str(tmp_path / "elsewhere.sqlite")])
    results = killed_run.results_of(stopped)
    assert results == killed_run.results_of(whole) and results["labels"] == "people"
    assert not (whole / label_sources.STORE).exists()
    name = "policy/model.safetensors"
    assert (stopped / name).read_bytes() == (whole / name).read_bytes()
    with store.Store(path) as one, store.Store(tmp_path / "elsewhere.sqlite") as other:
        assert [*one.items().values()] == [*other.items().values()] and one.sets() == ["round 1", "round 2"]
    for each in results["sets"]:
        assert each["agreement"] and all(agreed[0] > 0.5 for agreed in each["agreement"].values())
        assert each["pairs"] == each["train_helpful"]["kept"] + each["train_harmless"]["kept"] > 0
        assert each["unlabelled"] == each["unsure"] == 0 and each["labelers"] == 1
    assert list(results["elo"]["overall"]) == ["SFT", "round 1", "round 2"]
    assert "Labels of people" in (stopped / "report.html").read_text()


def test_a_file_that_is_no_store_is_an_error_before_anything_is_trained(tmp_path, capsys):
    path = tmp_path / "notes.txt"
    path.write_text("Labels: none.\n" * 100)
    with pytest.raises(SystemExit):
        hh.main(["--out", str(tmp_path / "run"), *PEOPLE, "--online.store", str(path)])
    assert "notes.txt cannot be opened as a comparison store" in capsys.readouterr().err


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
        ("--online.store FILE", "--online.store has no effect with --online.labels simulated"),
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
