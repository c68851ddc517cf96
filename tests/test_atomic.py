"""Lines of JSON that an interrupted process leaves are completed or removed before the next one is appended."""

import json

import pytest

from rlhf_jax import atomic


@pytest.mark.parametrize(
    ("content", "kept"),
    [(None, []), ("", []), ('{"a": 1}\n', [{"a": 1}]), ('{"a": 1}', [{"a": 1}]), ('[1]\n{"a": ', [[1]]), ('{"a', [])],
)
def test_a_line_is_appended_to_whole_lines(tmp_path, content, kept):
    path = tmp_path / "lines.jsonl"
    if content is not None:
        path.write_text(content)
    for record in ({"text": "é\n"}, 2):
        atomic.append_line(path, record)
    lines = path.read_text().split("\n")
    assert [json.loads(line) for line in lines[:-1]] == [*kept, {"text": "é\n"}, 2] and lines[-1] == ""
