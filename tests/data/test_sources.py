"""Raw records from every file type, and errors for files that cannot be read."""

import bz2
import datetime
import decimal
import gzip
import json
import lzma
import sys

import pyarrow
import pyarrow.parquet
import pytest

from rlhf_jax.data import dialogues, errors, readers, records, sources

ASK = {"role": "user", "content": "why"}
SAY = {"role": "assistant", "content": "so"}


def write(path, rows):
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    path.write_bytes(gzip.compress(lines.encode()) if path.name.endswith(".gz") else lines.encode())
    return path


ROWS = [{"prompt": f"q{i}", "response": f"a{i}", "domain": "x"} for i in range(5)]


def read_rows(path):
    parsed, _ = readers.read_demonstrations(path)
    assert [(r.prompt[0].text, r.response, r.metadata) for r in parsed] == [
        (f"q{i}", f"a{i}", {"domain": "x"}) for i in range(5)
    ]
    return parsed


def test_every_file_type_yields_the_same_records(tmp_path):
    for name in ("d.jsonl", "d.jsonl.gz", "d.json", "d.json.gz", "d.txt"):
        assert read_rows(write(tmp_path / name, ROWS))[-1].location.endswith(f"{name}, line 5")
    array = json.dumps(ROWS, indent=1)
    (tmp_path / "a.json").write_text(array)
    (tmp_path / "a.json.gz").write_bytes(gzip.compress(array.encode()))
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), tmp_path / "d.parquet", row_group_size=2)
    for name, unit in (("a.json", "record"), ("a.json.gz", "record"), ("d.parquet", "row")):
        assert read_rows(tmp_path / name)[-1].location.endswith(f"{name}, {unit} 5")
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS[:2]), tmp_path / "part-0.parquet")
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS[2:]), tmp_path / "part-1.parquet")
    read_rows(tmp_path / "part-*.parquet")
    read_rows([tmp_path / "part-0.parquet", str(tmp_path / "part-1.parquet")])


def test_parquet_messages_and_null_columns_are_read(tmp_path):
    rows = [
        {"messages": [ASK, SAY], "prompt": None, "response": None},
        {"messages": None, "prompt": "why", "response": "so"},
    ]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "d.parquet")
    parsed, _ = readers.read_demonstrations(tmp_path / "d.parquet")
    assert parsed == [records.Demonstration(prompt=(dialogues.Turn("user", "why"),), response="so")] * 2


def test_unreadable_files_raise_a_one_sentence_error(tmp_path, monkeypatch):
    def expect_error(path, message):
        with pytest.raises(errors.DataError, match=message) as error:
            readers.read_demonstrations(path)
        assert "\n" not in str(error.value)

    for name in ("d.jsonl", "d.json", "d.parquet"):
        expect_error(tmp_path / f"nowhere-{name}", f"nowhere-{name} does not exist")
        (tmp_path / name).mkdir()
        expect_error(tmp_path / name, f"{name} is a directory")
    expect_error(tmp_path / "no*.jsonl", r"no file matches .*no\*\.jsonl")
    expect_error([], "no file was given")
    for name, content in (("e.jsonl", b""), ("e.json", b"[]"), ("e.jsonl.gz", gzip.compress(b""))):
        (tmp_path / name).write_bytes(content)
        expect_error(tmp_path / name, f"{name} is empty")

    whole = json.dumps(ROWS, indent=1)
    (tmp_path / "cut.json").write_text(whole[: len(whole) // 2])
    expect_error(tmp_path / "cut.json", r"cut\.json: the file is not JSON \(.* in line \d+\)")
    (tmp_path / "mixed.json").write_text('[{"prompt": "a", "response": "b"}, 3]')
    expect_error(tmp_path / "mixed.json", r"mixed\.json, record 2: the record has type int; it must be an object")
    packed = gzip.compress("".join(json.dumps(row) + "\n" for row in ROWS).encode())
    (tmp_path / "cut.jsonl.gz").write_bytes(packed[:-9])
    expect_error(tmp_path / "cut.jsonl.gz", r"cut\.jsonl\.gz, line \d: the gzip file is truncated here")

    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), tmp_path / "ok.parquet")
    content = (tmp_path / "ok.parquet").read_bytes()
    (tmp_path / "cut.parquet").write_bytes(content[: len(content) // 2])
    expect_error(tmp_path / "cut.parquet", r"cut\.parquet, row 1: the Parquet file cannot be read")
    for name, content in (
        ("t.txt", b"a text\n"),
        ("b.bin", b"\x00\x01\xff"),
        ("m.safetensors", b"\x08" + bytes(7) + b"{}"),
    ):
        (tmp_path / name).write_bytes(content)
        expect_error(
            tmp_path / name, r"line 1: .*; the file does not look like JSON Lines, JSON or Parquet, the formats"
        )
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    expect_error(tmp_path / "ok.parquet", r"needs pyarrow; install it with pip install -e '\.\[parquet\]'")


def test_byte_order_marks_and_blank_lines_at_the_end_are_ignored(tmp_path):
    text = "".join(json.dumps(row) + "\r\n" for row in ROWS)
    for name in ("d.jsonl", "d.json", "d.jsonl.gz"):
        content = b"\xef\xbb\xbf" + text.encode() + b"\r\n \n"
        (tmp_path / name).write_bytes(gzip.compress(content) if name.endswith(".gz") else content)
        read_rows(tmp_path / name)
    (tmp_path / "a.json").write_bytes(b"\xef\xbb\xbf\n\n " + json.dumps(ROWS).encode() + b"\n\n")
    read_rows(tmp_path / "a.json")
    (tmp_path / "gap.jsonl").write_text(text + "\n" + text)
    with pytest.raises(errors.DataError, match=r"gap\.jsonl, line 6: the line is not JSON"):
        readers.read_demonstrations(tmp_path / "gap.jsonl")
    (tmp_path / "blank.jsonl").write_text("\n\n")
    with pytest.raises(errors.DataError, match=r"blank\.jsonl is empty"):
        readers.read_demonstrations(tmp_path / "blank.jsonl")


def test_a_duplicate_field_is_refused(tmp_path):
    twice = '{"prompt": "a", "response": "b", "prompt": "c"}'
    for name, content, where in (("d.jsonl", twice, "d.jsonl, line 1"), ("a.json", f"[{twice}]", "a.json")):
        (tmp_path / name).write_text(content)
        with pytest.raises(errors.DataError, match=f"{where}: the field 'prompt' occurs twice in one object"):
            readers.read_demonstrations(tmp_path / name)


def test_only_a_star_is_special_in_a_file_name(tmp_path):
    for name in ("data[1]-a.jsonl", "data1-a.jsonl", "data?-a.jsonl"):
        write(tmp_path / name, ROWS)
    for name in ("data[1]", "data?"):
        locations = [raw.location for raw in sources.raw_records(tmp_path / f"{name}-*.jsonl")]
        assert locations == [f"{tmp_path / name}-a.jsonl, line {n}" for n in range(1, 6)]


BROKEN = {
    "a character is not UTF-8": b'{"prompt": "caf\xe9", "response": "a", "domain": "x"}',
    "a character is a lone surrogate": b'{"prompt": "q", "response": "\\ud83d", "domain": "x"}',
}


@pytest.mark.parametrize("reason", BROKEN)
def test_a_broken_character_drops_one_record(tmp_path, reason):
    lines = [json.dumps(row).encode() for row in ROWS]
    with_broken = [*lines[:2], BROKEN[reason], *lines[2:]]
    in_metadata = BROKEN[reason].replace(b'"domain"', b'"prompt"').replace(b'"prompt"', b'"domain"', 1)
    in_a_name = b'{"prompt": "q", "response": "a", "caf\xe9\\ud83d": 1}'
    for name, content, n in (
        ("d.jsonl", b"\n".join(with_broken), 1),
        ("d.json", b"[" + b",".join(with_broken) + b"]", 1),
        ("m.jsonl", b"\n".join([*lines[:2], in_metadata, in_a_name, *lines[2:]]), 2),
    ):
        (tmp_path / name).write_bytes(content)
        parsed, counts = readers.read_demonstrations(tmp_path / name, counts=errors.DropCount(max_dropped=1.0))
        assert [record.response for record in parsed] == [row["response"] for row in ROWS]
        assert (sum(counts.dropped.values()), counts.dropped[reason] >= 1) == (n, True)


def test_a_parquet_text_that_is_not_utf8_drops_its_row(tmp_path):
    texts = pyarrow.array([b"a", b"b", b"\xff", b"d"])
    broken = pyarrow.StringArray.from_buffers(4, *texts.buffers()[1:])
    for column in (broken, texts):
        pyarrow.parquet.write_table(pyarrow.table({"prompt": column}), tmp_path / "d.parquet")
        parsed, counts = readers.read_prompts(tmp_path / "d.parquet", counts=errors.DropCount(max_dropped=1.0))
        assert [record.prompt[0].text for record in parsed] == ["a", "b", "d"]
        assert parsed[2].location.endswith("row 4")
        assert counts.dropped == {"a character is not UTF-8": 1}


def test_null_fields_inside_a_parquet_object_are_those_that_it_lacks(tmp_path):
    calls = [
        {"function": {"name": "f", "arguments": {"city": "Rome"}}},
        {"function": {"name": "g", "arguments": {"n": 3}}},
    ]
    messages = [ASK, {"role": "assistant", "content": None, "tool_calls": calls}]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([{"messages": messages}]), tmp_path / "d.parquet")
    (record,), _ = readers.read_demonstrations(tmp_path / "d.parquet")
    assert record.prompt == (dialogues.Turn("user", "why"),)
    assert record.response == dialogues.Turn("assistant", "", {"tool_calls": calls})


def test_parquet_values_become_json_values(tmp_path):
    day = datetime.datetime(2024, 1, 2, 3, 4)
    messages = [{**ASK, "time": day, "cost": decimal.Decimal("1.5")}, {**SAY, "time": day}]
    row = {"messages": messages, "day": day, "name": b"caf\xc3\xa9", "other": b"\xff"}
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([row]), tmp_path / "d.parquet")
    (record,), _ = readers.read_demonstrations(tmp_path / "d.parquet")
    assert record.prompt == (dialogues.Turn("user", "why", {"time": "2024-01-02T03:04:00", "cost": 1.5}),)
    assert record.metadata == {"day": "2024-01-02T03:04:00", "name": "café"}


def test_compression_and_form_are_recognised_by_the_contents(tmp_path):
    text = "".join(json.dumps(row) + "\n" for row in ROWS).encode()
    halves = [text[: text.index(b"\n") + 1], text[text.index(b"\n") + 1 :]]
    array = json.dumps(ROWS).encode()

    def zstd(content):
        return pyarrow.compress(content, codec="zstd", asbytes=True)

    for compress in (gzip.compress, bz2.compress, lzma.compress, zstd, bytes):
        for name in ("d.jsonl", "d.JSONL.GZ", "d.jsonl.zst", "d"):
            for content in (compress(text), compress(halves[0]) + compress(halves[1]), compress(array)):
                (tmp_path / name).write_bytes(content)
                read_rows(tmp_path / name)
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), tmp_path / "d.PARQUET")
    read_rows(tmp_path / "d.PARQUET")
    read_rows((tmp_path / "d.PARQUET").rename(tmp_path / "0000"))
    for kind, compress in (
        ("bzip2", bz2.compress),
        ("xz", lzma.compress),
        ("Zstandard", zstd),
        ("gzip", gzip.compress),
    ):
        (tmp_path / "cut").write_bytes(compress(text)[:-9])
        with pytest.raises(errors.DataError, match=rf"cut, line \d: the {kind} file is truncated here"):
            readers.read_demonstrations(tmp_path / "cut")
        content = compress(text)
        (tmp_path / "bad").write_bytes(content[:10] + bytes(99) + content[99:])
        with pytest.raises(errors.DataError, match=rf"bad, line 1: the {kind} file is damaged"):
            readers.read_demonstrations(tmp_path / "bad")


def test_zstandard_needs_pyarrow(tmp_path, monkeypatch):
    (tmp_path / "d.zst").write_bytes(pyarrow.compress(b"{}", codec="zstd", asbytes=True))
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(
        errors.DataError, match=r"with Zstandard, which needs pyarrow; install it with pip install .* zstd -d"
    ):
        readers.read_demonstrations(tmp_path / "d.zst")


def test_one_object_is_a_record_or_contains_the_records(tmp_path):
    for indent in (None, 1):
        path = tmp_path / "d.json"
        path.write_text(json.dumps({"version": 1, "data": ROWS}, indent=indent))
        assert read_rows(path)[-1].location == f"{path}, record 5"
        path.write_text("\ufeff" + json.dumps(ROWS[0], indent=indent), encoding="utf-8")
        (record,), _ = readers.read_demonstrations(path)
        assert record.response == "a0"
    path.write_text(json.dumps({"train": ROWS}))
    with pytest.raises(errors.DataError, match=r"its fields are 'train': rename or convert them to one of the forms"):
        readers.read_demonstrations(path)
    path.write_text("{\n" + json.dumps(ROWS[0]))
    with pytest.raises(errors.DataError, match=r"d\.json, line 1: the line is not JSON"):
        readers.read_demonstrations(path)


def test_other_formats_are_refused_with_what_to_do(tmp_path):
    cases = {
        "d.csv": (b"prompt,response\na,b\n", "comma-separated values; convert it to JSON Lines"),
        "d.TSV.gz": (gzip.compress(b"prompt\tresponse\n"), "tab-separated values; convert it to JSON Lines"),
        "d.xlsx": (b"PK\x03\x04", "a spreadsheet; convert it"),
        "d.jsonl": (b"PK\x03\x04", "a zip archive; unpack it"),
        "d.arrow": (b"\xff\xff\xff\xff", "an Arrow file; convert it to Parquet"),
        "d.parquet": (b"version https://git-lfs.github.com/spec/v1\n", "Git LFS; download the file"),
        "d.json": (b"<!DOCTYPE html><html>", "a web page"),
        "u.jsonl": (json.dumps(ROWS[0]).encode("utf-16"), "UTF-16; convert it to UTF-8, for example with iconv"),
    }
    for name, (content, message) in cases.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(errors.DataError, match=f"{name} is .*{message}"):
            readers.read_demonstrations(tmp_path / name)
