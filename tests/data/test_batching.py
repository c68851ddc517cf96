"""Shuffled batches, random splits, and fingerprints of data."""

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax.data import batching

KEY = jax.random.key(3)
GOLDEN = [416, 966, 420, 681, 829, 539]


@pytest.mark.parametrize(("n", "batch_size"), [(12, 4), (10, 4), (7, 1), (3, 8), (1, 2)])
def test_every_epoch_contains_every_example_once(n, batch_size):
    steps = 3 * n  # a whole number of epochs for each size
    batches = batching.epoch_batches(0, n=n, batch_size=batch_size, key=KEY, steps=steps)
    epochs = batches.reshape(-1, n)
    np.testing.assert_array_equal(np.sort(epochs, axis=1), np.broadcast_to(np.arange(n), epochs.shape))
    if n > 3:
        assert len({tuple(epoch) for epoch in epochs}) > 1  # each epoch is shuffled anew


@pytest.mark.parametrize("drop_last", [False, True])
def test_a_batch_does_not_depend_on_how_its_step_is_reached(drop_last):
    options = {"n": 10, "batch_size": 4, "key": KEY, "drop_last": drop_last}
    whole = batching.epoch_batches(0, steps=20, **options)
    np.testing.assert_array_equal(batching.epoch_batches(7, steps=13, **options), whole[7:])
    for step in range(20):
        alone = batching.epoch_batches(step, **options)
        assert alone.shape == (4,) and alone.dtype == np.int32
        np.testing.assert_array_equal(alone, whole[step])


def test_drop_last_keeps_a_batch_within_its_epoch():
    batches = batching.epoch_batches(0, n=10, batch_size=4, key=KEY, steps=60, drop_last=True).reshape(30, 8)
    stream = batching.epoch_batches(0, n=10, batch_size=10, key=KEY, steps=30)
    np.testing.assert_array_equal(batches, stream[:, :8])  # the same shuffles, without their remainders
    left_out = {i for epoch in batches for i in set(range(10)) - set(epoch.tolist())}
    assert left_out == set(range(10))  # the remainder differs between epochs
    with pytest.raises(ValueError, match="batch_size = 4 must not exceed n = 3"):
        batching.epoch_batches(0, n=3, batch_size=4, key=KEY, drop_last=True)


def test_the_epoch_of_a_step_depends_on_drop_last():
    assert [batching.epoch_of(s, n=10, batch_size=4) for s in range(6)] == [0, 0, 0, 1, 1, 2]
    assert [batching.epoch_of(s, n=10, batch_size=4, drop_last=True) for s in range(6)] == [0, 0, 1, 1, 2, 2]


def test_batches_depend_only_on_the_key_and_are_stable_across_versions():
    batch = batching.epoch_batches(5, n=1000, batch_size=6, key=jax.random.key(0))
    np.testing.assert_array_equal(batch, GOLDEN)
    np.testing.assert_array_equal(batch, batching.epoch_batches(5, n=1000, batch_size=6, key=jax.random.PRNGKey(0)))
    assert (batch != batching.epoch_batches(5, n=1000, batch_size=6, key=jax.random.key(1))).any()


def test_a_large_step_does_not_overflow():
    step = np.int32(2**31 - 1)
    batch = batching.epoch_batches(step, n=1000, batch_size=512, key=KEY)  # pyright: ignore[reportArgumentType]
    assert ((batch >= 0) & (batch < 1000)).all()


def test_numbers_out_of_range_are_errors():
    for wrong in ({"step": -1}, {"n": 0}, {"batch_size": 0}, {"steps": 0}):
        options = {"step": 0, "n": 4, "batch_size": 2, "key": KEY, **wrong}
        with pytest.raises(ValueError, match="must be at least 0"):
            batching.epoch_batches(options.pop("step"), **options)


def test_a_split_is_disjoint_complete_and_repeatable():
    train, held_out = batching.split(101, fraction=0.2, key=KEY)
    assert (len(train), len(held_out)) == (81, 20)
    np.testing.assert_array_equal(np.sort(np.concatenate([train, held_out])), np.arange(101))
    np.testing.assert_array_equal(batching.split(101, fraction=0.2, key=KEY)[1], held_out)
    assert held_out.tolist() != list(range(20))
    for fraction in (0.0, 1.0, 0.001, -1.0):
        with pytest.raises(ValueError, match="leaves one part empty"):
            batching.split(101, fraction=fraction, key=KEY)


@hypothesis.given(
    st.lists(st.integers(1, 60), min_size=2, max_size=40), st.floats(0.01, 0.99), st.integers(0, 2**31), st.randoms()
)
def test_a_split_holds_out_the_share_asked_for_in_whole_groups(sizes, fraction, seed, random):
    group_N = [7 * group - 3 for group, size in enumerate(sizes) for _ in range(size)]
    random.shuffle(group_N)
    n, wanted = len(group_N), round(len(group_N) * fraction)
    hypothesis.assume(0 < wanted < n)
    train, held_out = batching.split(n, fraction=fraction, key=jax.random.key(seed), group_N=np.array(group_N))
    assert sorted([*train.tolist(), *held_out.tolist()]) == list(range(n)) and len(train) and len(held_out)
    kept, held = ({group_N[i] for i in part} for part in (train, held_out))
    assert not kept & held
    assert abs(len(held_out) - wanted) < max(sizes)
    if min(sizes) <= wanted and len(kept) > 1:
        assert abs(len(held_out) - wanted) <= max(sizes) / 2
    if sizes.count(1) >= wanted:
        assert len(held_out) == wanted
    again = batching.split(n, fraction=fraction, key=jax.random.key(seed), group_N=np.array(group_N))
    np.testing.assert_array_equal(again[1], held_out)


def test_every_group_can_be_held_out_and_one_group_cannot_be_divided():
    group_N = np.repeat(np.arange(10), 2)
    held = [batching.split(20, fraction=0.1, key=jax.random.key(s), group_N=group_N)[1].tolist() for s in range(60)]
    assert {tuple(each) for each in held} == {(2 * g, 2 * g + 1) for g in range(10)}
    large = np.repeat([0, 1, 2], [10, 8, 82])
    assert batching.split(100, fraction=0.04, key=KEY, group_N=large)[1].tolist() == list(range(10, 18))
    with pytest.raises(ValueError, match="of 4 examples in 1 groups leaves one part empty"):
        batching.split(4, fraction=0.5, key=KEY, group_N=np.zeros(4, int))


def test_a_fingerprint_depends_on_values_order_shape_dtype_and_names():
    data = {"a": np.arange(6, dtype=np.int32), "b": np.ones((2, 3), np.float32)}
    digest = batching.fingerprint(data)
    assert digest == batching.fingerprint({name: jnp.asarray(array) for name, array in data.items()})
    assert digest == batching.fingerprint({"b": data["b"], "a": data["a"].astype(">i4")})
    changed = [
        {**data, "a": data["a"][::-1]},
        {**data, "a": data["a"].astype(np.int64)},
        {**data, "b": data["b"].T},
        {"c": data["a"], "b": data["b"]},
        {**data, "b": np.nextafter(data["b"], np.float32(2))},
    ]
    assert len({digest, *map(batching.fingerprint, changed)}) == 6
    columns = np.arange(6).reshape(2, 3)
    assert batching.fingerprint(columns.T) == batching.fingerprint(columns.T.copy())
    assert len(batching.fingerprint(jnp.ones(3, jnp.bfloat16))) == 64
    with pytest.raises(ValueError, match="array of Python objects"):
        batching.fingerprint({"a": np.array([{}, None], dtype=object)})
