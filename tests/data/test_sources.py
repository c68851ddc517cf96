"""Raw records from every file type, and errors for files that cannot be read."""

import gzip
import json
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
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    expect_error(tmp_path / "ok.parquet", r"needs pyarrow; install it with pip install 'rlhf_jax\[parquet\]'")


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


def test_a_parquet_text_that_is_not_utf8_is_an_error_that_names_its_row(tmp_path):
    texts = pyarrow.array([b"a", b"b", b"\xff", b"d"])
    broken = pyarrow.StringArray.from_buffers(4, *texts.buffers()[1:])
    pyarrow.parquet.write_table(pyarrow.table({"prompt": broken}), tmp_path / "d.parquet")
    with pytest.raises(errors.DataError, match=r"d\.parquet, row 3: the Parquet file cannot be read \(.*utf-8"):
        readers.read_prompts(tmp_path / "d.parquet")
