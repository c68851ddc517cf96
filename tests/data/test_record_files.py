"""Files of records that are written in parts, and a teacher's rows in them."""

import hashlib
import json
import subprocess
import sys

import numpy as np
import pytest

from rlhf_jax import types
from rlhf_jax.data import errors
from rlhf_jax.data.stores import record_file, teacher_rows

pytest.importorskip("array_record")
HEADER = {"k": 2, "prompt": "be good"}


def numbers(start, stop):
    return [str(i).encode() * 5 for i in range(start, stop)]


def digest(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_records_are_read_in_any_order(tmp_path):
    record_file.write(tmp_path / "file", HEADER, numbers, n=10, per_part=3)
    file = record_file.RecordFile(tmp_path / "file")
    assert (len(file), file.header) == (10, HEADER)
    assert file.read([9, 0, 4, 4]) == [b"99999", b"00000", b"44444", b"44444"]
    assert [each.name for each in tmp_path.iterdir()] == ["file"], "the parts are removed"
    with pytest.raises(errors.DataError, match=r"cannot read .*file"):
        file.read([10])


@pytest.mark.parametrize("stop_at", [0, 3, 6, 9])
def test_a_write_that_was_interrupted_makes_only_the_missing_parts(tmp_path, stop_at):
    record_file.write(tmp_path / "whole", HEADER, numbers, n=10, per_part=3)
    made = []

    def interrupted(start, stop):
        if start == stop_at:
            raise KeyboardInterrupt
        return numbers(start, stop)

    def rest(start, stop):
        made.append(start)
        return numbers(start, stop)

    with pytest.raises(KeyboardInterrupt):
        record_file.write(tmp_path / "file", HEADER, interrupted, n=10, per_part=3)
    assert not (tmp_path / "file").exists()
    record_file.write(tmp_path / "file", HEADER, rest, n=10, per_part=3)
    assert made == [start for start in (0, 3, 6, 9) if start >= stop_at]
    assert digest(tmp_path / "file") == digest(tmp_path / "whole")


KILLED = """
import os, signal, sys
from rlhf_jax.data.stores import record_file
def records(start, stop):
    made = [str(i).encode() * 5 for i in range(start, stop)]
    if start == 6: os.kill(os.getpid(), signal.SIGKILL)
    return made
record_file.write(sys.argv[1], {"k": 2, "prompt": "be good"}, records, n=10, per_part=3)
"""


def test_a_killed_write_continues_with_the_same_bytes(tmp_path):
    done = subprocess.run([sys.executable, "-c", KILLED, str(tmp_path / "file")], capture_output=True)
    assert done.returncode == -9, done.stderr
    parts = tmp_path / "file.parts"
    assert sorted(each.name for each in parts.iterdir()) == ["000000000000", "000000000003", "header.json"]
    (parts / "000000000003").write_bytes((parts / "000000000003").read_bytes()[:20])  # a damaged part is made again
    record_file.write(tmp_path / "file", HEADER, numbers, n=10, per_part=3)
    record_file.write(tmp_path / "whole", HEADER, numbers, n=10, per_part=3)
    assert digest(tmp_path / "file") == digest(tmp_path / "whole")


@pytest.mark.parametrize("header", [{"k": 2, "prompt": "be bad"}, None])
def test_parts_of_another_or_an_unknown_header_are_neither_used_nor_deleted(tmp_path, header):
    """The header is unknown if a process is killed while it deletes the parts."""

    def stop(start, end):
        if start:
            raise KeyboardInterrupt
        return [b"old"] * (end - start)

    with pytest.raises(KeyboardInterrupt):
        record_file.write(tmp_path / "file", header or HEADER, stop, n=4, per_part=2)
    parts = tmp_path / "file.parts"
    if header is None:
        (parts / "header.json").unlink()
    before = {each.name: each.read_bytes() for each in parts.iterdir()}
    with pytest.raises(errors.DataError, match=f"^{parts} has parts of a file that was made from something else"):
        record_file.write(tmp_path / "file", HEADER, numbers, n=4, per_part=2)
    assert {each.name: each.read_bytes() for each in parts.iterdir()} == before and before
    record_file.remove_parts(tmp_path / "file")
    record_file.remove_parts(tmp_path / "file")  # nothing is left to remove
    parts.mkdir()
    (parts / "header.json.tmp").touch()  # of a process that was killed before it made a part
    record_file.write(tmp_path / "file", HEADER, numbers, n=4, per_part=2)
    assert record_file.RecordFile(tmp_path / "file").read(range(4)) == numbers(0, 4) and not parts.exists()


def test_files_that_are_damaged_or_are_something_else_are_refused(tmp_path):
    with pytest.raises(errors.DataError, match="is not a file"):
        record_file.RecordFile(tmp_path / "none")
    record_file.write(tmp_path / "file", HEADER, numbers, n=10, per_part=3)
    for content in (b"", b"text", (tmp_path / "file").read_bytes()[:-200]):
        (tmp_path / "other").write_bytes(content)
        with pytest.raises(errors.DataError, match="other is damaged or is not a file of records"):
            record_file.RecordFile(tmp_path / "other")
    with pytest.raises(errors.DataError, match="1 records were made instead of 3"):
        record_file.write(tmp_path / "short", HEADER, lambda start, stop: [b""], n=10, per_part=3)


def test_the_first_record_says_what_the_file_is_made_from(tmp_path):
    from array_record.python import array_record_module  # pyright: ignore[reportAttributeAccessIssue]

    record_file.write(tmp_path / "file", HEADER, numbers, n=2, per_part=3)
    reader = array_record_module.ArrayRecordReader(str(tmp_path / "file"))
    first = json.loads(reader.read_all()[0])
    assert first == {"format": "rlhf_jax.records.1", "records": 2, "header": HEADER}


def test_rows_are_read_as_they_were_written_without_their_padding():
    rng = np.random.default_rng(0)
    mask_BL = np.arange(6) < np.array([[6], [3], [1]])
    batch = types.DistillationBatch(
        np.where(mask_BL, rng.integers(100, size=(3, 6)), 7).astype(np.int32),
        mask_BL,
        mask_BL & (rng.random((3, 6)) < 0.5),
        ids_BLK=rng.integers(1 << 30, size=(3, 6, 4)).astype(np.int32),
        logprobs_BLK=rng.normal(size=(3, 6, 4)).astype(np.float32),
    )
    records = teacher_rows.encode(batch)
    assert [len(each) for each in records] == [8 + n * (5 + 8 * 4) for n in (6, 3, 1)]
    again = teacher_rows.decode([records[2], records[0]], width=8, pad_id=7)
    np.testing.assert_array_equal(again.tokens_BL[:, :6], batch.tokens_BL[[2, 0]])
    assert (again.tokens_BL[:, 6:] == 7).all() and not again.mask_BL[:, 6:].any()
    np.testing.assert_array_equal(again.mask_BL[:, :6], mask_BL[[2, 0]])
    np.testing.assert_array_equal(again.loss_mask_BL[:, :6], batch.loss_mask_BL[[2, 0]])
    for mine, theirs in ((again.ids_BLK, batch.ids_BLK), (again.logprobs_BLK, batch.logprobs_BLK)):
        np.testing.assert_array_equal(mine[:, :6], np.where(mask_BL[..., None], theirs, 0)[[2, 0]])
    with pytest.raises(ValueError, match="a row has 6 tokens"):
        teacher_rows.decode(records, width=5, pad_id=7)
