"""Grain pipelines: order of batches, shares of hosts, resuming, and errors."""

import json
import subprocess
import sys
from collections import Counter
from typing import Any

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rlhf_jax.data import dialogues, errors, pipeline, records

ROWS = {"x": np.arange(10), "y": np.arange(20).reshape(10, 2)}


def make(arrays=ROWS, **options):
    kwargs: dict[str, Any] = {"batch_size": 4, "seed": 0, "prefetch": 0} | options
    return pipeline.from_arrays(arrays, **kwargs)


def first(batches, n):
    return [next(batches)["x"].tolist() for _ in range(n)]


@settings(max_examples=12, deadline=None)
@given(
    n=st.integers(1, 30),
    share=st.integers(1, 5),
    hosts=st.integers(1, 3),
    epochs=st.integers(1, 3),
    seed=st.integers(-3, 2**70),
    drop_last=st.booleans(),
)
def test_the_shares_of_hosts_partition_every_batch(n, share, hosts, epochs, seed, drop_last):
    batch_size = share * hosts
    options = dict(batch_size=batch_size, seed=seed, epochs=epochs, drop_last=drop_last)
    used = n - n % batch_size if drop_last else n
    if used * epochs < batch_size:
        with pytest.raises(errors.DataError, match="do not fill one batch"):
            make({"x": np.arange(n)}, **options)
        return
    whole = [batch["x"] for batch in make({"x": np.arange(n)}, **options)]
    assert len(whole) == used * epochs // batch_size
    parts = [[b["x"] for b in make({"x": np.arange(n)}, host=h, hosts=hosts, **options)] for h in range(hosts)]
    for step, batch in enumerate(whole):
        np.testing.assert_array_equal(np.concatenate([part[step] for part in parts]), batch)
    assert all(len(part) == len(whole) for part in parts)
    stream = np.concatenate(whole)
    for epoch in range(len(stream) // used):
        seen = stream[epoch * used : (epoch + 1) * used]
        assert len(set(seen.tolist())) == used  # no record occurs twice in an epoch


def test_the_order_differs_between_epochs_and_seeds():
    orders = {seed: np.concatenate([b["x"] for b in make(batch_size=10, seed=seed, epochs=4)]) for seed in (0, 1)}
    epochs = [tuple(order[i * 10 : i * 10 + 10]) for order in orders.values() for i in range(4)]
    # Grain alone would order epoch 1 of seed 0 like epoch 0 of seed 1.
    assert len(set(epochs)) == 8
    plain = np.concatenate([b["x"] for b in make(batch_size=5, shuffle=False, epochs=2)])
    np.testing.assert_array_equal(plain, np.tile(np.arange(10), 2))


@pytest.mark.parametrize("prefetch", [0, 3])
@pytest.mark.parametrize("stopped", [0, 7])
def test_a_restored_iterator_continues_exactly(prefetch, stopped):
    expected = first(make(), 11)
    batches = make(prefetch=prefetch)
    first(batches, stopped)
    state = json.loads(json.dumps(batches.get_state()))
    batches.close()
    again = make(prefetch=prefetch)
    first(again, 3)  # set_state overrides the position
    again.set_state(state)
    assert first(again, 11 - stopped) == expected[stopped:]
    assert [again.batch_at(step)["x"].tolist() for step in range(11)] == expected
    again.close()


def test_a_killed_process_resumes_with_the_same_batches(tmp_path):
    program = """
import json, os, pathlib, signal, sys
import numpy as np
from rlhf_jax.data import pipeline
batches = pipeline.from_arrays(np.arange(10), batch_size=4, seed=5)
state = pathlib.Path(sys.argv[1])
if state.exists():
    batches.set_state(json.loads(state.read_text()))
for n in range(3):
    print(next(batches).tolist(), flush=True)
state.write_text(json.dumps(batches.get_state()))
print(next(batches).tolist(), flush=True)  # lost, because it comes after the checkpoint
os.kill(os.getpid(), signal.SIGKILL)
"""
    lines = []
    for _ in range(2):
        out = subprocess.run([sys.executable, "-c", program, str(tmp_path / "s")], capture_output=True, text=True)
        assert out.returncode == -9
        lines.append(out.stdout.splitlines())
    straight = pipeline.from_arrays(np.arange(10), batch_size=4, seed=5, prefetch=0)
    expected = [str(next(straight).tolist()) for _ in range(7)]
    assert lines == [expected[:4], expected[3:]]


def test_the_number_of_hosts_may_change_on_resume():
    expected = first(make(), 6)
    half = make(host=1, hosts=2)
    first(half, 2)
    whole = make()
    whole.set_state(half.get_state())
    assert first(whole, 4) == expected[2:]


OTHERS = {
    "data": {"arrays": {"x": np.arange(10) + 1, "y": ROWS["y"]}},
    "records": {"arrays": {"x": np.arange(11)}},
    "seed": {"seed": 1},
    "batch_size": {"batch_size": 2},
    "epochs": {"epochs": 7},
    "shuffle": {"shuffle": False},
    "drop_last": {"drop_last": True},
}


@pytest.mark.parametrize("name", OTHERS)
def test_resuming_with_different_settings_is_refused(name):
    state = make().get_state()
    named = "data" if name == "records" else name  # a different number of records also changes the data
    with pytest.raises(errors.DataError, match=f"cannot resume these batches: the state was saved with {named} = "):
        make(**OTHERS[name]).set_state(state)
    for broken in ({}, {"fingerprint": {}}, {"grain": {"next_index": 3}}):
        with pytest.raises(errors.DataError, match="not a state returned by get_state"):
            make().set_state(broken)
    for place in ({}, {"next_index": "x"}, {"next_index": -1}, {"next_index": 1.5}, {"next_index": 10**9}):
        with pytest.raises(errors.DataError, match="not a state returned by get_state"):
            make(epochs=2).set_state(make(epochs=2).get_state() | {"grain": place})


def test_resuming_with_a_different_shuffle_order_is_refused():
    state = make().get_state()
    state["fingerprint"]["order"] = "0123456789abcdef"
    with pytest.raises(errors.DataError, match="saved with order = '0123456789abcdef'"):
        make().set_state(state)


def test_batches_are_finite_or_endless():
    assert make(epochs=2).steps == 5
    assert make(epochs=2, drop_last=True).steps == 4
    assert make().steps is None
    with pytest.raises(IndexError, match="there is no step 5"):
        make(epochs=2).batch_at(5)
    with pytest.raises(IndexError, match="there is no step -1"):
        make().batch_at(-1)
    assert make(batch_size=25).batch_at(0)["x"].shape == (25,)
    jax.tree.map(np.testing.assert_array_equal, make().batch_at(1)["y"], ROWS["y"][make().batch_at(1)["x"]])


def test_numbers_out_of_range_are_errors():
    for options in ({"batch_size": 0}, {"hosts": 3}, {"hosts": 0}, {"epochs": 0}, {"prefetch": -1}):
        with pytest.raises(ValueError, match="must be a multiple of hosts"):
            make(**options)
    with pytest.raises(ValueError, match="host = 2 must be at least 0 and less than hosts = 2"):
        make(host=2, hosts=2)
    with pytest.raises(errors.DataError, match="there are no records"):
        make({"x": np.zeros(0)})
    with pytest.raises(errors.DataError, match="differ in their number of rows: 2, 3"):
        make({"x": np.zeros(2), "y": np.zeros(3)})


def test_records_are_batched_and_fingerprinted():
    def record(i, location=""):
        turn = dialogues.Turn("user", f"q{i}")
        return records.Demonstration(prompt=(turn,), response=f"a{i}", metadata={"n": i}, location=location)

    demonstrations = [record(i) for i in range(5)]
    options: dict[str, Any] = dict(batch_size=2, seed=0, prefetch=0)
    options["collate"] = lambda part: [record.response for record in part]
    batches = pipeline.from_source(demonstrations, **options)
    seen = [answer for _ in range(5) for answer in next(batches)]
    assert Counter(seen) == Counter([f"a{i}" for i in range(5)] * 2)
    # The fingerprint covers everything except the location of a record.
    moved = pipeline.from_source([record(i, "file, line 3") for i in range(5)], **options)
    moved.set_state(batches.get_state())
    others = (demonstrations[::-1], [*demonstrations[:4], record(5)], demonstrations[:4])
    assert len({pipeline.fingerprint(each) for each in (demonstrations, *others)}) == 4
    with pytest.raises(TypeError, match="cannot fingerprint a set; use dataclasses"):
        pipeline.fingerprint([{1, 2}])
    assert pipeline.from_source(demonstrations, data="mine", **options).fingerprint["data"] == "mine"
    # A function cannot be fingerprinted, so its identity is passed separately.
    wide, narrow = ({"data": "mine", "identity": {"width": width}} | options for width in (8, 4))
    state = pipeline.from_source(demonstrations, **wide).get_state()
    pipeline.from_source(demonstrations, **wide).set_state(state)
    for other in [narrow, {**options, "data": "mine"}]:
        with pytest.raises(errors.DataError, match="saved with identity = "):
            pipeline.from_source(demonstrations, **other).set_state(state)


def test_values_of_different_types_have_different_fingerprints():
    pair = np.arange(2, dtype=np.int32)
    values: list[Any] = ["a", b"a", {"bytes": "61"}, ["bytes", "61"], [], (), {}, ["list"], [1], (1,), [1.0], [True], 1]
    values += [
        ["dict", {}],
        pair,
        pair.astype(np.int64),
        pair.tolist(),
        pair[None],
        np.asarray(["a"]),
        np.asarray([b"a"]),
    ]
    values += [{"array": [0, 1], "dtype": "int32", "shape": [2]}, np.asarray([b"a"], object), None, "None"]
    assert len({pipeline.fingerprint([value]) for value in values}) == len(values)
    assert pipeline.fingerprint([pair]) == pipeline.fingerprint([pair.astype(">i4")])
    with pytest.raises(TypeError, match="the key 1; keys must be strings"):
        pipeline.fingerprint([{1: "a"}])
