"""TFDS data sets, which the package's builders write and which are read without TensorFlow."""

import importlib.util
import json
import subprocess
import sys

import jax
import numpy as np
import pytest

tfds = pytest.importorskip("tensorflow_datasets")
pytest.importorskip("array_record")

from rlhf_jax.data import chat, encoding, errors, pipeline, readers, records, sources, tfds_builder, tokenizers  # noqa: E402

CALLS = [{"type": "function", "function": {"name": "f", "arguments": "{}"}}]
CALL = {"role": "assistant", "content": "", "tool_calls": CALLS}
TURNS = [{"role": "user", "content": "wärum"}, {"role": "assistant", "content": "só"}, {"role": "user", "content": "?"}]
KINDS = {
    "demonstrations": (
        tfds_builder.RlhfDemonstrations,
        readers.read_demonstrations,
        [
            {"prompt": "a", "response": "b"},
            {"messages": [*TURNS, {"role": "assistant", "content": " c\n"}], "domain": "x"},
            {"messages": [TURNS[0], CALL], "tools": [CALLS[0]["function"]]},
        ],
    ),
    "rankings": (
        tfds_builder.RlhfRankings,
        readers.read_rankings,
        [
            {"prompt": TURNS, "responses": ["a", "b", "c"], "ranks": [2, 1, 2], "annotator": "a7", "sure": 0.1},
            {"prompt": "a", "responses": ["a", "b"], "scores": [0.1, 1 / 3]},
            {"prompt": "a", "chosen": "a", "rejected": "b", "margin": 0.7, "turn": 2},
            {"chosen": "\n\nHuman: a\n\nAssistant: b", "rejected": "\n\nHuman: a\n\nAssistant: c"},
            {
                "prompt": [TURNS[0], CALL, {"role": "tool", "name": "f", "content": "3"}],
                "chosen": CALL,
                "rejected": "3",
            },
        ],
    ),
    "judged": (
        tfds_builder.RlhfJudged,
        readers.read_judged,
        [{"prompt": "a", "response": "b", "label": i % 2 == 0, "expert": True} for i in range(3)],
    ),
    "prompts": (
        tfds_builder.RlhfPrompts,
        readers.read_prompts,
        [{"prompt": f"q{i}", "n": i, "metadata": {"prompt": "x"}} for i in range(12)],
    ),
}


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    """Prepares one set of each kind, with two splits."""
    folder = tmp_path_factory.mktemp("sets")
    for kind, (builder, _, rows) in KINDS.items():
        train, test = write(folder / f"{kind}.jsonl", rows), write(folder / f"{kind}-test.jsonl", rows[:1])
        counts = tfds_builder.prepare(builder, "mine", {"train": train, "test": test}, data_dir=folder)
        assert counts.dropped == {}
    return folder


@pytest.mark.parametrize("kind", KINDS)
def test_a_data_set_yields_the_records_of_its_file_in_order(data_dir, kind):
    _, read, _ = KINDS[kind]
    from_file, _ = read(data_dir / f"{kind}.jsonl")
    name = f"rlhf_{kind}/mine"
    from_set, counts = read(sources.Tfds(name, data_dir=data_dir))
    assert from_set == from_file
    assert counts.dropped == {}
    assert from_set[-1].location == f"{name}[train], record {len(from_file)}"
    assert read(sources.Tfds(f"{name}:1.0.0", "test", data_dir))[0] == from_file[:1]
    assert read(sources.Tfds(name, "train[1:2]", data_dir))[0] == from_file[1:2]
    assert pipeline.fingerprint(from_set) == pipeline.fingerprint(from_file)


def test_a_data_set_is_stored_in_array_record_files_that_tfds_reads(data_dir):
    rows = tfds.data_source("rlhf_rankings/mine", split="train", data_dir=str(data_dir))
    assert len(rows) == 5
    assert [text.decode() for text in rows[0]["responses"]] == ["b", "a", "c"]
    np.testing.assert_array_equal(rows[0]["ranks"], [1, 2, 2])
    assert rows[0]["prompt"]["content"][0].decode() == "wärum"
    assert list((data_dir / "rlhf_rankings/mine/1.0.0").glob("*train.array_record*"))


def test_a_data_set_is_read_without_tensorflow_and_without_its_builder(data_dir):
    if importlib.util.find_spec("tensorflow"):
        pytest.skip("TensorFlow is installed here")
    program = """
import sys
from rlhf_jax.data import sources, readers

parsed, _ = readers.read_prompts(sources.Tfds("rlhf_prompts/mine", data_dir=sys.argv[1]))
print([record.prompt[0].text for record in parsed], "rlhf_jax.data.tfds_builder" in sys.modules)
"""
    out = subprocess.run([sys.executable, "-c", program, str(data_dir)], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == f"{[f'q{i}' for i in range(12)]} False"


def test_a_data_set_is_batched_lazily(data_dir):
    source = sources.tfds_source(sources.Tfds("rlhf_prompts/mine", data_dir=data_dir))

    def numbers(examples):
        return np.asarray([sources.plain_fields(example)["metadata"]["n"] for example in examples])

    batches = pipeline.from_source(source, collate=numbers, batch_size=4, seed=0, epochs=1, prefetch=0)
    seen = list(batches)
    assert sorted(np.concatenate(seen)) == list(range(12))
    from_arrays = pipeline.from_arrays(np.arange(12), batch_size=4, seed=0, epochs=1, prefetch=0)
    jax.tree.map(np.testing.assert_array_equal, seen, list(from_arrays))
    again = sources.tfds_source(sources.Tfds("rlhf_prompts/mine", data_dir=data_dir))
    assert pipeline.fingerprint(again) == batches.fingerprint["data"]


def test_a_data_set_is_encoded_lazily(tmp_path):
    rows = [{"prompt": "w0", "chosen": f"w{i}", "rejected": f"w{i + 1}"} for i in range(1, 9)]
    path = write(tmp_path / "pairs.jsonl", rows)
    tfds_builder.prepare(tfds_builder.RlhfRankings, "mine", {"train": path}, data_dir=tmp_path)
    fmt = chat.chat_format(tokenizers.word_level([f"w{i}" for i in range(10)]))
    widths = {"prompt_width": 4, "response_width": 2, "max_answers": 2}

    def collate(part):
        parsed = [records.parse_ranking(sources.plain_fields(row)) for row in part]
        return encoding.encode_rankings(fmt, parsed, counts=errors.DropCount(max_dropped=0.0), **widths)[0]

    source = sources.tfds_source(sources.Tfds("rlhf_rankings/mine", "train", tmp_path))
    batches = pipeline.from_source(
        source, collate=collate, identity=widths, batch_size=4, seed=0, shuffle=False, prefetch=0
    )
    all_at_once, _ = encoding.encode_rankings(fmt, readers.read_rankings(path)[0], counts=errors.DropCount(), **widths)
    jax.tree.map(np.testing.assert_array_equal, batches.batch_at(1), jax.tree.map(lambda x: x[4:], all_at_once))


def test_a_data_set_keeps_metadata_as_json(tmp_path):
    path = write(tmp_path / "p.jsonl", [{"prompt": "a", "sure": float("nan"), "far": float("inf"), "n": 0.5}])
    tfds_builder.prepare(tfds_builder.RlhfPrompts, "mine", {"train": path}, data_dir=tmp_path)
    (row,) = tfds.data_source("rlhf_prompts/mine", split="train", data_dir=str(tmp_path))
    assert json.loads(row[sources.JSON_FIELD], parse_constant=pytest.fail) == {"metadata": {"n": 0.5}}


def test_missing_data_sets_raise_a_one_sentence_error(data_dir):
    cases = [
        (sources.Tfds("rlhf_prompts/other", data_dir=data_dir), "TFDS has no such prepared set"),
        (sources.Tfds("rlhf_prompts/mine:2.0.0", data_dir=data_dir), "TFDS has no such prepared set"),
        (sources.Tfds("rlhf_prompts/mine", "validation", data_dir), "Unknown split 'validation'"),
        (sources.Tfds("rlhf_prompts/mine", "train[:0]", data_dir), r"^rlhf_prompts/mine\[train\[:0\]\] is empty$"),
        (sources.Tfds("no_such_set", data_dir=data_dir), "TFDS has no such prepared set"),
        (sources.Tfds("huggingface:imdb", data_dir=data_dir), "are not downloaded; download the files"),
    ]
    for source, message in cases:
        with pytest.raises(errors.DataError, match=message) as error:
            readers.read_prompts(source)
        assert "\n" not in str(error.value)


def test_a_data_set_with_damaged_files_is_refused(data_dir, tmp_path):
    path = write(tmp_path / "p.jsonl", [{"prompt": "a"}] * 3)
    tfds_builder.prepare(tfds_builder.RlhfPrompts, "mine", {"train": path}, data_dir=tmp_path)
    (shard,) = (tmp_path / "rlhf_prompts/mine/1.0.0").glob("*array_record*")
    source = sources.Tfds("rlhf_prompts/mine", data_dir=tmp_path)
    content = shard.read_bytes()
    for broken in (content[: len(content) // 2], content[:-100], b""):
        shard.write_bytes(broken)
        with pytest.raises(errors.DataError, match="record 1: the set cannot be read; its files may be damaged"):
            readers.read_prompts(source)
    shard.unlink()
    with pytest.raises(errors.DataError, match="No such file"):
        readers.read_prompts(source)


def test_data_sets_that_cannot_be_prepared_are_errors(data_dir, tmp_path):
    good, broken = write(tmp_path / "a.jsonl", [{"prompt": "a"}] * 3), write(tmp_path / "b.jsonl", ["a"])
    with pytest.raises(errors.DataError, match=r"mine/1\.0\.0 already exists"):
        tfds_builder.prepare(tfds_builder.RlhfPrompts, "mine", {"train": good}, data_dir=data_dir)
    with pytest.raises(errors.DataError, match=r"b\.jsonl, line 1: the line has type str"):
        tfds_builder.prepare(tfds_builder.RlhfPrompts, "b", {"train": broken}, data_dir=tmp_path)
    with pytest.raises(errors.DataError, match="is not a valid name for a set"):
        tfds_builder.prepare(tfds_builder.RlhfPrompts, "a/b", {"train": good}, data_dir=tmp_path)
    for split in ("tr ain", "train[:10]", "all", "a-b", ""):
        with pytest.raises(errors.DataError, match="is not a valid name for a split"):
            tfds_builder.prepare(tfds_builder.RlhfPrompts, "d", {split: good}, data_dir=tmp_path)
    flawed = write(tmp_path / "c.jsonl", [{"prompt": "a"}, {"prompt": ""}])
    with pytest.raises(errors.DataError, match=r"1 of 2 records was dropped \(empty prompt 1\)"):
        tfds_builder.prepare(tfds_builder.RlhfPrompts, "c", {"train": flawed}, data_dir=tmp_path)
    counts = errors.DropCount(max_dropped=0.5)
    assert tfds_builder.prepare(
        tfds_builder.RlhfPrompts, "c", {"train": flawed}, data_dir=tmp_path, counts=counts
    ).dropped == {"empty prompt": 1}
    assert len(readers.read_prompts(sources.Tfds("rlhf_prompts/c", data_dir=tmp_path))[0]) == 1


def test_a_missing_package_is_named(data_dir, monkeypatch):
    source = sources.Tfds("rlhf_prompts/mine", data_dir=data_dir)
    monkeypatch.setitem(sys.modules, "tensorflow_datasets", None)
    with pytest.raises(errors.DataError, match="reading it needs tensorflow-datasets"):
        readers.read_prompts(source)
