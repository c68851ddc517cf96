"""The commands of a comparison store: what they add, write and print, and what they refuse."""

import json
import os
import pathlib
import re
import shlex
import stat
import subprocess
import sys

import pytest

from rlhf_jax.feedback import __main__ as command_line
from rlhf_jax.feedback import store
from rlhf_jax.feedback.commands import assign
from rlhf_jax.feedback.judgements import Judgement

PAIRS = [{"prompt": f"Question {n}?", "chosen": f"good {n}", "rejected": f"bad {n}"} for n in range(10)]


@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
    """Returns a function that runs a command line in an empty folder and returns what it prints."""
    monkeypatch.chdir(tmp_path)

    def call(line, *more):
        command_line.main([*line.split(), *more])
        return capsys.readouterr().out

    return call


@pytest.fixture
def fails(run, capsys):
    """Returns a function that runs a command line, which must fail, and returns the error that it prints."""

    def call(line, *more):
        with pytest.raises(SystemExit) as left:
            run(line, *more)
        assert left.value.code == 2
        printed = capsys.readouterr().err
        assert printed.startswith("error: ") and printed.count("\n") == 1
        return printed.removeprefix("error: ").strip()

    return call


def write(path, lines):
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")


def test_help_names_the_commands():
    environment = os.environ | {"COLUMNS": "100"}
    done = subprocess.run(
        [sys.executable, "-m", "rlhf_jax.feedback", "--help"], capture_output=True, text=True, env=environment
    )
    assert done.returncode == 0 and "{serve,assign,report,export,import}" in done.stdout


def test_the_commands_of_the_documentation_run(run, tmp_path, monkeypatch):
    page = (pathlib.Path(__file__).parents[3] / "docs" / "labeling.md").read_text(encoding="utf-8")
    blocks = re.findall(r"^```console\n(.*?)^```$", page, re.MULTILINE | re.DOTALL)
    commands = [
        re.findall(r"^\$ python -m rlhf_jax\.feedback ((?:import|assign) .*)$", b, re.MULTILINE) for b in blocks
    ]
    assert len(commands[0]) >= 5 and sum(map(bool, commands)) >= 2
    for n, lines in enumerate(commands):  # each block has a store of its own
        (folder := tmp_path / str(n)).mkdir()
        monkeypatch.chdir(folder)
        for name, letters in (("sft", "ab"), ("rl", "cd")):
            write(folder / f"{name}.jsonl", [{"prompt": "Why?", "response": letter} for letter in letters])
        write(folder / "gold.jsonl", PAIRS[:1])
        assert all(run("", *shlex.split(line, comments=True)) for line in lines)
    with store.Store(tmp_path / "0" / "people.sqlite") as opened:
        assert len(opened.items("round 1")) == 3 and len(opened.labelers()) == 2
        assert {each.prompt.domain for each in opened.items().values()} == {"helpful"}
    monkeypatch.chdir(tmp_path)
    (task,) = re.findall(r"^```json\n(.*?)^```$", page, re.MULTILINE | re.DOTALL)
    (tmp_path / "tasks.json").write_text(task)
    assert "1 item and 1 judgement\n" in run("import people.sqlite tasks.json --set tasks")


@pytest.mark.parametrize("name", ["serve", "assign", "report", "export", "import"])
def test_every_setting_has_help(name, capsys):
    with pytest.raises(SystemExit) as left:
        command_line.main([name, "--help"])
    printed = capsys.readouterr().out
    if name != "serve":
        assert " STORE " in printed and "(default: )" not in printed
    assert left.value.code == 0 and printed.count("STR  ") <= printed.count("(required)") + printed.count("(default")


def test_labels_are_imported_judged_and_exported(run, fails, tmp_path):
    write(tmp_path / "pairs.jsonl", PAIRS)
    printed = run("import people.sqlite pairs.jsonl --set first --labeler crowd --domain helpful --policy sft")
    assert printed == (
        "added to set 'first' of the new store people.sqlite: 10 items and 10 judgements\n"
        "data: 10 records; dropped 0, truncated 0\n"
    )
    assert "of people.sqlite: 0 items and 0 judgements" in run(
        "import people.sqlite pairs.jsonl --set first --labeler crowd --domain helpful --policy sft"
    )
    with store.Store(tmp_path / "people.sqlite") as opened:
        [item, *_] = opened.items("first").values()
        assert item.prompt.domain == "helpful" and [each.policy for each in item.completions] == ["sft", "sft"]
        assert [each.name for each in opened.labelers()] == ["crowd"]
    assert run("export people.sqlite out.jsonl --form hh") == "wrote out.jsonl\n"
    [line, *_] = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert line["chosen"] == "\n\nHuman: Question 0?\n\nAssistant: good 0"
    assert fails("export people.sqlite out.jsonl --form jsonl").startswith("out.jsonl exists; choose another file")
    for form in ("jsonl", "preference", "label-studio", "argilla", "judgements"):
        assert run(f"export people.sqlite out.jsonl --overwrite --set first --form {form}") == "wrote out.jsonl\n"
    assert len((tmp_path / "out.jsonl").read_text().splitlines()) == 10
    assert fails("export people.sqlite x.json --set other --form hh") == (
        "people.sqlite has no set 'other'; its sets are 'first'"
    )
    assert "cannot be opened as a comparison store" in fails("export none.sqlite x.json --form hh")
    assert not (tmp_path / "x.json").exists() and not (tmp_path / "none.sqlite").exists()


def test_completions_and_gold_questions_are_imported(run, tmp_path):
    write(tmp_path / "samples.jsonl", [{"prompt": "Why?", "responses": ["a", "b", "c"]}])
    write(tmp_path / "gold.jsonl", PAIRS[:2])
    assert "1 item and 0 judgements" in run("import p.sqlite samples.jsonl --set a --as ranking")
    assert "2 items and 0 judgements" in run("import p.sqlite samples.jsonl --set b --pairs-per-prompt 2 --seed 3")
    assert "2 gold questions and 0 judgements" in run("import p.sqlite gold.jsonl --set a --gold")
    printed = run("export p.sqlite tasks.json --form label-studio")
    assert printed == "wrote tasks.json; gold question skipped 2\n"


def test_the_number_of_completions_chooses_what_is_asked(run, tmp_path):
    lines = [{"prompt": f"{n}?", "responses": [f"answer {i}" for i in range(n)]} for n in (1, 2, 3, 5)]
    write(tmp_path / "samples.jsonl", lines)
    assert "4 items" in run("import p.sqlite samples.jsonl --set a --as by-count")
    with store.Store(tmp_path / "p.sqlite") as opened:
        assert [each.kind for each in opened.items().values()] == ["likert", "pair", "ranking", "ranking"]


FORMS = ("jsonl", "hh", "preference", "label-studio", "argilla", "judgements")


@pytest.mark.parametrize(
    "command", [*(f"export p.sqlite FILE --form {form}" for form in FORMS), "report p.sqlite --html FILE"]
)
def test_outputs_replace_no_store_and_other_files_only_if_told_to(run, fails, tmp_path, command):
    write(tmp_path / "pairs.jsonl", PAIRS)
    for name in ("p", "other"):
        run(f"import {name}.sqlite pairs.jsonl --set a")
    (tmp_path / "folder").mkdir()
    (tmp_path / "link").symlink_to("p.sqlite")
    os.link(tmp_path / "p.sqlite", tmp_path / "hard")
    (tmp_path / "old").write_text("old")
    before = {path: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()}
    for name, message in {
        "p.sqlite": "would replace the store p.sqlite",
        "folder/../p.sqlite": "would replace the store",
        "link": "would replace the store",
        "hard": "would replace the store",
        "p.sqlite-wal": "would replace the store",
        "other.sqlite": "is an SQLite database, which is never replaced",
        "folder": "is not a regular file",
        "no/file": f"cannot be written: the folder {tmp_path / 'no'} does not exist",
        "x" * 300: "cannot be written (File name too long)",
    }.items():
        assert fails(f"{command.replace('FILE', name)} --overwrite").startswith(f"{name} {message}")
    assert fails(command.replace("FILE", "old")) == "old exists; choose another file, or replace it with --overwrite"
    assert {path: path.read_bytes() for path in before} == before and not list(tmp_path.glob("*.tmp"))
    assert "wrote old" in run(f"{command.replace('FILE', 'old')} --overwrite")
    assert "wrote new" in run(command.replace("FILE", "new"))


def test_a_store_is_not_written_as_the_temporary_file_of_an_output(run, fails, tmp_path):
    write(tmp_path / "pairs.jsonl", PAIRS)
    run("import p.tmp pairs.jsonl --set a")
    before = (tmp_path / "p.tmp").read_bytes()
    assert fails("export p.tmp p --form jsonl").startswith("p would replace the store p.tmp")
    assert (tmp_path / "p.tmp").read_bytes() == before and not (tmp_path / "p").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--overwrite", "--overwrite has no effect without --html"),
        ("--min-agreement 75", "--min-agreement is 75.0; it must be between 0 and 1"),
        ("--min-score 0", "--min-score is 0.0; it must be between 1 and 7"),
        ("--min-seconds nan", "--min-seconds is nan; it must be at least 0"),
    ],
)
def test_reports_refuse_settings_outside_their_range(fails, arguments, message):
    assert fails(f"report p.sqlite {arguments}").startswith(message)


def test_files_that_cannot_be_imported_leave_no_store(run, fails, tmp_path):
    write(tmp_path / "pairs.jsonl", PAIRS)
    (tmp_path / "cut.json").write_text(json.dumps([{"data": {"prompt": "a"}}])[:-3])
    write(tmp_path / "wrong.jsonl", [*PAIRS, {"prompt": "a", "chosen": 3, "rejected": "c"}])
    write(tmp_path / "missing.jsonl", [*PAIRS, {"prompt": "a", "chosen": "b"}])
    for name, message in {
        "cut.json": "cut.json: the file is not JSON",
        "wrong.jsonl": "wrong.jsonl, line 11: 'chosen' has type int",
        "missing.jsonl": "missing.jsonl, line 11: the record has neither 'rejected' nor 'responses'",
        "none.jsonl": "none.jsonl does not exist",
    }.items():
        assert fails(f"import new.sqlite pairs.jsonl {name} --set a").startswith(message)
    assert not (tmp_path / "new.sqlite").exists()
    (tmp_path / "text.sqlite").write_text("This is text.")
    assert "text.sqlite" in fails("import text.sqlite pairs.jsonl --set a")
    assert "--max-dropped = 1.0%" in fails("import new.sqlite pairs.jsonl empty.jsonl --set a", *empty(tmp_path))
    assert fails("import new.sqlite pairs.jsonl --set a --pairs-per-prompt 0").startswith("--pairs-per-prompt is 0")
    assert fails("import new.sqlite pairs.jsonl --set a --max-dropped 2").startswith("--max-dropped is 2.0")
    assert fails("import new.sqlite pairs.jsonl --labeler x --set", " ").startswith("the name of --set ' ' is empty")
    assert fails("import new.sqlite pairs.jsonl --set a --labeler", "x\ny").startswith(
        "the name of --labeler 'x\\ny' has"
    )
    assert fails("import none/new.sqlite pairs.jsonl --set a") == (
        f"none/new.sqlite cannot be written: the folder {tmp_path / 'none'} does not exist"
    )
    write(tmp_path / "samples.jsonl", [{"prompt": "Why?", "responses": ["a", "b"]}])
    assert fails("import new.sqlite samples.jsonl --set a --gold").startswith("samples.jsonl: no record has a label")
    assert not (tmp_path / "new.sqlite").exists() and not (tmp_path / "none").exists()
    task = {"data": {"prompt": "a", "answer1": "b", "answer2": "c"}, "annotations": []}
    for side in ("left", "right"):
        result = {"type": "pairwise", "value": {"selected": side}}
        task["annotations"].append({"completed_by": side, "result": [result]})
    (tmp_path / "differ.json").write_text(json.dumps([task]))
    assert "record whose labels disagree skipped 1" in fails("import new.sqlite differ.json --set a --gold")


def empty(tmp_path):
    write(tmp_path / "empty.jsonl", [{"prompt": "a", "chosen": "", "rejected": "b"}])
    return ()


def test_people_receive_tokens_once(run, fails, tmp_path):
    printed = run("assign p.sqlite --labelers Ada", "Ben [x]")
    tokens = dict(re.findall(r"^(.+): (\S{43})$", printed, re.MULTILINE))
    assert list(tokens) == ["Ada", "Ben [x]"] and "cannot be shown again" not in tokens and "serve p.sqlite" in printed
    run("assign p.sqlite --labelers Olga --role owner --tokens-file t.jsonl")
    assert stat.S_IMODE((tmp_path / "t.jsonl").stat().st_mode) == 0o600
    olga = json.loads((tmp_path / "t.jsonl").read_text())
    with store.Store(tmp_path / "p.sqlite") as opened:
        assert opened.authenticate(olga["token"]) == ("Olga", "owner", False)
        assert [opened.authenticate(token).name for token in tokens.values()] == list(tokens)  # type: ignore[union-attr]
    # Nobody is added if a name is taken or the tokens cannot be written.
    assert fails("assign p.sqlite --labelers Cy Ada").startswith("p.sqlite has a labeler 'Ada' already; ")
    assert fails("assign p.sqlite --labelers Cy --tokens-file t.jsonl").endswith("choose another file")
    assert fails("assign p.sqlite --labelers Cy --tokens-file no/t.jsonl") == (
        "no/t.jsonl cannot be written (No such file or directory)"
    )
    assert fails("assign p.sqlite --labelers", "Cy\x1b[1m").startswith("the name of the labeler 'Cy\\x1b[1m' has")
    assert run("assign p.sqlite --revoke Ada") == "revoked: Ada\n"
    with store.Store(tmp_path / "p.sqlite") as opened:
        assert [each.name for each in opened.labelers()] == ["Ada", "Ben [x]", "Olga"]
        assert opened.authenticate(tokens["Ada"]) is None
    [renewed] = re.findall(r"^Ada: (\S{43})$", run("assign p.sqlite --renew Ada"), re.MULTILINE)
    with store.Store(tmp_path / "p.sqlite") as opened:
        assert opened.authenticate(renewed) == ("Ada", "labeler", False)
    assert fails("assign p.sqlite --renew Zoe") == "p.sqlite: the labeler 'Zoe' is unknown"


def test_only_new_people_create_a_store(run, fails, tmp_path):
    for what in ("--renew Ada", "--revoke Ada", "--duplicates 0.1 --set a", "--list"):
        assert fails(f"assign p.sqlite {what}").startswith("p.sqlite does not exist")
    assert fails("assign no/p.sqlite --labelers Ada").startswith("no/p.sqlite cannot be written: the folder ")
    assert not list(tmp_path.iterdir())
    assert run("assign p.sqlite --labelers Ada").startswith("new store: p.sqlite\n")
    assert "new store" not in run("assign p.sqlite --labelers Ben")


def test_duplicates_are_added_and_work_is_listed(run, fails, tmp_path):
    write(tmp_path / "pairs.jsonl", PAIRS)
    run("import p.sqlite pairs.jsonl --set a --labeler crowd")
    assert run("assign p.sqlite --duplicates 0.3 --set a") == "added to set 'a': 3 hidden duplicates\n"
    assert run("assign p.sqlite --duplicates 0.3 --set a") == "added to set 'a': 0 hidden duplicates\n"
    run("assign p.sqlite --labelers Ada")
    with store.Store(tmp_path / "p.sqlite") as opened:
        [id, *_] = opened.items("a")
        opened.record("Ada", id, Judgement(strength=1), key="1")
        opened.assign("Ada", set_name="a")
    rows = [line.split() for line in run("assign p.sqlite --list --judgements 2").splitlines()]
    assert ["crowd", "labeler", "a", "10", "0"] in rows and ["Ada", "labeler", "a", "1", "1"] in rows
    assert ["a", "10", "3", "9"] in rows
    assert "its sets are 'a'" in fails("assign p.sqlite --duplicates 0.3 --set b")
    assert "must be between 0 and 1" in fails("assign p.sqlite --duplicates 3 --set a")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("", "nothing to do"),
        ("--list --tokens-file x", "--tokens-file has no effect without --labelers"),
        ("--list --role owner", "--role has no effect"),
        ("--renew Ada --role owner", "--role has no effect"),
        ("--renew Ada --revoke Ada", "'Ada' is named by --renew and also by"),
        ("--duplicates 0.1", "--duplicates needs --set"),
        ("--labelers Ada --set a", "--set has no effect"),
        ("--list --seed 3", "--seed has no effect"),
        ("--labelers Ada --judgements 3", "--judgements has no effect"),
        ("--list --judgements 0", "--judgements is 0"),
    ],
)
def test_settings_without_effect_are_refused(fails, tmp_path, arguments, message):
    assert fails(f"assign p.sqlite {arguments}").startswith(message)
    assert not (tmp_path / "p.sqlite").exists()


def test_tables_are_empty_for_an_empty_store(tmp_path):
    with store.Store(tmp_path / "a.sqlite") as opened:
        assert assign.people_table(opened, []).row_count == assign.sets_table(opened, [], judgements=1).row_count == 0
