"""The layout of packed rows, and training on packed rows compared with padded rows."""

import dataclasses
import functools
from typing import Any

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import objective_cases
import optax
import pytest

from rlhf_jax import lm, parallel, types
from rlhf_jax.data import errors, packing, padding
from rlhf_jax.train import dpo, objectives, reward_model, sft
from rlhf_jax.train import state as state_lib

PAD = 0
lengths_and_width = st.integers(1, 30).flatmap(
    lambda width: st.tuples(st.lists(st.integers(0, width), max_size=40), st.just(width))
)


def pack(sequences, **options):
    return packing.pack(sequences, pad_id=PAD, **{"counts": errors.DropCount(), **options})


@hypothesis.given(lengths_and_width, st.randoms(use_true_random=False))
def test_every_token_is_packed_once_at_its_recorded_position(case, random):
    lengths, width = case
    # Every token id occurs once, which identifies its place; one of them is the pad id.
    ids = iter(range(sum(lengths)))
    sequences = [[next(ids) for _ in range(n)] for n in lengths]
    learnt = [[random.random() < 0.5 for _ in range(n)] for n in lengths]
    packed = pack(sequences, loss_masks=learnt, width=width)
    assert sorted(packed.tokens_BL[packed.mask_BL]) == list(range(sum(lengths)))
    for i, (ids_i, learnt_i) in enumerate(zip(sequences, learnt)):
        row, segment, end = (int(x[i]) for x in (packed.places.row, packed.places.segment, packed.places.end))
        if not ids_i:
            assert segment == 0
            continue
        own = packed.segments_BL[row] == segment
        assert list(packed.tokens_BL[row, own]) == ids_i and list(packed.loss_mask_BL[row, own]) == learnt_i
        assert np.flatnonzero(own)[-1] == end and own[end + 1 - len(ids_i) : end + 1].all()
    # Segments are numbered from the left, and padding is at the end of a row.
    steps = np.diff(np.concatenate([packed.segments_BL, np.zeros((len(packed.segments_BL), 1), np.int32)], axis=1))
    assert np.all((steps >= 0) & (steps <= 1) | (packed.segments_BL + steps == 0))
    np.testing.assert_array_equal(packed.mask_BL, packed.segments_BL > 0)
    assert not packed.loss_mask_BL[~packed.mask_BL].any()
    # With best fit, no two rows fit into one.
    used = np.sort(packed.mask_BL.sum(axis=1))
    assert len(used) < 2 or used[0] + used[1] > width
    again = pack(sequences, loss_masks=learnt, width=width)
    jax.tree.map(np.testing.assert_array_equal, tuple(again), tuple(packed))


def test_rows_are_filled_by_best_fit_longest_first():
    packed = pack([[1, 1], [2, 2, 2], [3], [4, 4, 4, 4], [5, 5]], width=6)
    np.testing.assert_array_equal(packed.tokens_BL, [[4, 4, 4, 4, 1, 1], [2, 2, 2, 5, 5, 3]])
    np.testing.assert_array_equal(packed.segments_BL, [[1, 1, 1, 1, 2, 2], [1, 1, 1, 2, 2, 3]])
    assert packed.fill == 1.0
    np.testing.assert_array_equal(packed.places.row, [0, 1, 1, 0, 1])
    np.testing.assert_array_equal(packed.places.segment, [2, 1, 3, 1, 2])
    np.testing.assert_array_equal(packed.places.end, [5, 2, 5, 3, 4])
    more = pack([[1, 1], [2]], width=4, rows=3)
    np.testing.assert_array_equal(more.tokens_BL, [[1, 1, 2, PAD], [PAD] * 4, [PAD] * 4])
    assert more.fill == 0.25 and pack([], width=4).tokens_BL.shape == (0, 4)


def test_sequences_that_are_too_long_are_counted():
    sequences = [[1] * 3] * 9 + [[2] * 6]
    counts = errors.DropCount(max_dropped=0.1)
    packed = pack(sequences, width=4, counts=counts)
    assert counts.dropped == {"longer than a row": 1} and packed.mask_BL.sum() == 27
    assert packed.places.segment[9] == 0
    counts = errors.DropCount()
    assert pack(sequences, width=4, counts=counts, truncate=True).mask_BL.sum() == 31
    assert counts.truncated == {"truncated to the row width": 1} and not counts.dropped
    with pytest.raises(
        errors.DataError, match=r"packed sequences: 1 of 10 records was dropped \(longer than a row 1\)"
    ):
        pack(sequences, width=4)
    with pytest.raises(errors.DataError, match="2 sequences need 2 rows of 4, more than rows = 1"):
        pack([[1] * 3] * 2, width=4, rows=1)
    with pytest.raises(errors.DataError, match="loss masks differ"):
        pack([[1, 2]], loss_masks=[[True]], width=4)
    with pytest.raises(ValueError, match="a sequence of 5 tokens"):
        packing.best_fit([5], width=4)


def test_packed_documents_end_in_eos_and_the_remainder_is_counted():
    rows, remainder = packing.pack_documents([[5, 6], [], [7, 8, 9, 5]], width=3, eos_id=1)
    np.testing.assert_array_equal(rows, [[5, 6, 1], [1, 7, 8], [9, 5, 1]])
    assert remainder == 0
    rows, remainder = packing.pack_documents([[5, 6], [], [7, 8, 9, 5]], width=4, eos_id=1)
    np.testing.assert_array_equal(rows, [[5, 6, 1, 1], [7, 8, 9, 5]])
    assert remainder == 1
    assert rows.dtype == np.int32
    with pytest.raises(errors.DataError, match="3 tokens do not fill one row of 4"):
        packing.pack_documents([[5, 6]], width=4, eos_id=1)
    with pytest.raises(errors.DataError, match="document 1 already ends with eos_id = 1"):
        packing.pack_documents([[5], [6, 1]], width=2, eos_id=1)


# ------------------------------------------------------------------------------------------ packed equals unpacked

SMALL: dict[str, Any] = dict(vocab_size=20, n_layers=2, d_model=16, n_heads=2, d_mlp=24, max_length=48)
ROPE = lm.LMConfig(**SMALL)
CONFIGS = {
    "rope": ROPE,
    "learned": lm.LMConfig(**SMALL, positions="learned", norm="layernorm", gated_mlp=False, tie_embeddings=True),
}
if any(field.name == "sliding_window" for field in dataclasses.fields(lm.LMConfig)):
    CONFIGS["window"] = dataclasses.replace(ROPE, sliding_window=3)
each_config = pytest.mark.parametrize("cfg", CONFIGS.values(), ids=CONFIGS.keys())
P, T, WIDTH = 5, 7, 24


@functools.cache
def model(cfg, seed=0):
    shapes = lm.abstract(cfg, head=True)
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda x: jnp.asarray(0.5 * rng.normal(size=x.shape), jnp.float32), shapes)


def demonstrations(n=10) -> Any:
    """Returns padded rows of prompts and answers of many lengths."""
    rng = np.random.default_rng(3)
    prompts = [rng.integers(1, 20, size=rng.integers(1, P + 1)).tolist() for _ in range(n)]
    answers = [rng.integers(1, 20, size=rng.integers(1, T + 1)).tolist() for _ in range(n)]
    counts = errors.DropCount()
    return padding.demonstration_rows(prompts, answers, prompt_width=P, response_width=T, pad_id=PAD, counts=counts)


def comparisons(B=6, K=4) -> Any:
    rng = np.random.default_rng(4)
    n_B = rng.integers(2, K + 1, size=B)
    answers = [[rng.integers(1, 20, size=rng.integers(1, T + 1)).tolist() for _ in range(n)] for n in n_B]
    ranks = [rng.integers(1, 4, size=n).tolist() for n in n_B]
    prompts = [rng.integers(1, 20, size=rng.integers(1, P + 1)).tolist() for _ in range(B)]
    counts = errors.DropCount()
    return padding.ranking_rows(prompts, answers, ranks, prompt_width=P, response_width=T, pad_id=PAD, counts=counts)


def on_device(tree):
    return jax.tree.map(jnp.asarray, tree)


def assert_close(got, want):
    """Asserts that two pytrees agree within 1e-5 of their largest entry."""
    scale = max(float(jnp.abs(x).max()) for x in jax.tree.leaves(want))
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-5 * scale, rtol=1e-5), got, want)


def packed_demonstrations(rows) -> Any:
    return packing.pack_rows(rows, width=WIDTH, pad_id=PAD, counts=errors.DropCount())


@each_config
def test_packed_and_padded_rows_have_the_same_outputs(cfg):
    rows = demonstrations()
    packed = packed_demonstrations(rows)
    assert len(packed.tokens_BL) < len(rows.tokens_BL) / 1.5 and packed.fill > 0.75

    @jax.jit
    def read(params, tokens, mask, segments):
        options: dict[str, Any] = dict(cfg=cfg, mask_BL=mask, segments_BL=segments)
        return (
            lm.token_logprobs(params, tokens, temperature=0.7, **options),
            lm.values(params, tokens, **options),
            lm.greedy_matches(params, tokens, chunk=5, **options),
        )

    alone = read(model(cfg), rows.tokens_BL, rows.mask_BL, None)
    # Ids at padding are ignored, and the default mask is True for all tokens of segments.
    junk = np.where(packed.mask_BL, packed.tokens_BL, -7)
    for together in (
        read(model(cfg), packed.tokens_BL, packed.mask_BL, packed.segments_BL),
        read(model(cfg), junk, None, packed.segments_BL),
    ):
        for got, want in zip(together, alone):
            assert not np.any(np.asarray(got)[~packed.mask_BL])
            for i in range(len(rows.tokens_BL)):
                own = packed.segments_BL[packed.places.row[i]] == packed.places.segment[i]
                actual = np.asarray(got)[packed.places.row[i]][own]
                np.testing.assert_allclose(actual, np.asarray(want)[i][rows.mask_BL[i]], atol=1e-5)
                assert actual[0] == 0


@each_config
def test_packed_supervised_training_equals_padded_training(cfg):
    rows = demonstrations()
    packed = packed_demonstrations(rows)
    step = parallel.jit_step(sft.make_train_step(functools.partial(lm.token_logprobs, cfg=cfg)))
    hyper = {"learning_rate": np.float32(1.0), "max_grad_norm": np.float32(np.inf)}

    def run(batch):
        state = state_lib.create(model(cfg), optax.scale(-1.0))
        state, logs = step(state, None, hyper, on_device(batch), jax.random.key(0))
        return logs["loss"].value(), jax.tree.map(jnp.subtract, state.params, model(cfg))

    want = run(rows)
    got = run(sft.TokenBatch(packed.tokens_BL, packed.mask_BL, packed.loss_mask_BL, packed.segments_BL))
    assert_close(got[0], want[0])
    assert_close(got[1], want[1])
    assert float(want[0]) > 0.5


@functools.cache
def ranking_step(cfg, micro_batches=1):
    score, packed_scores = (functools.partial(f, cfg=cfg) for f in (lm.score, lm.packed_scores))
    return parallel.jit_step(
        reward_model.make_train_step(score, packed_scores=packed_scores, micro_batches=micro_batches)
    )


def ranking_update(cfg, batch, micro_batches=1):
    hyper = {"learning_rate": np.float32(1.0), "max_grad_norm": np.float32(np.inf)}
    state = state_lib.create(model(cfg), optax.scale(-1.0))
    step = ranking_step(cfg, micro_batches)
    state, logs = step(state, None, hyper, on_device(batch), jax.random.key(0))
    return logs, jax.tree.map(jnp.subtract, state.params, model(cfg))


@each_config
def test_packed_reward_model_training_equals_padded_training(cfg):
    batch = comparisons()
    logs, change = ranking_update(cfg, batch)
    packed = packing.pack_comparisons(batch, width=WIDTH, pad_id=PAD)
    packed_logs, packed_change = ranking_update(cfg, packed)
    for name in ("loss", "accuracy", "score"):
        np.testing.assert_allclose(packed_logs[name].value(), logs[name].value(), rtol=1e-5)
    assert_close(packed_change, change)
    B, K = batch.where_BK.shape
    assert packed.tokens_RL.shape[0] * WIDTH < 0.7 * B * K * (P + T)


@pytest.mark.slow
def test_packed_reward_model_training_in_micro_batches_equals_padded_training():
    batch = comparisons()
    want = ranking_update(ROPE, batch)[1]
    packed = packing.pack_comparisons(batch, width=WIDTH, pad_id=PAD, groups=3)
    assert_close(ranking_update(ROPE, packed, micro_batches=3)[1], want)
    with pytest.raises(ValueError, match="packed into 3 groups, but micro_batches is 1"):
        ranking_update(ROPE, packed)
    with pytest.raises(ValueError, match="no packed_scores"):
        step = reward_model.make_train_step(functools.partial(lm.score, cfg=ROPE))
        step(state_lib.create(model(ROPE), optax.scale(-1.0)), None, {}, on_device(packed), None)
    with pytest.raises(ValueError, match="groups = 4 must divide the number of prompts, 6"):
        packing.pack_comparisons(batch, width=WIDTH, pad_id=PAD, groups=4)
    with pytest.raises(errors.DataError, match="longer than a row"):
        packing.pack_comparisons(batch, width=3, pad_id=PAD)
    fixed = packing.pack_comparisons(batch, width=WIDTH, pad_id=PAD, rows=18, groups=3)
    assert fixed.tokens_RL.shape == (18, WIDTH)
    assert_close(ranking_update(ROPE, fixed, micro_batches=3)[1], want)


def preferences(name) -> Any:
    """Returns 6 pairs or, for kto, 12 labelled answers, whose lengths differ."""
    rows = demonstrations(12)
    B, K = (12, 1) if name == "kto" else (6, 2)
    tokens, mask, answer = (x.reshape(B, K, -1) for x in (rows.tokens_BL, rows.mask_BL, rows.loss_mask_BL[:, P:]))
    batch = types.Preferences(tokens, mask, answer)
    if name != "kto":
        return batch
    batch = batch.replace(good_BK=np.arange(B)[:, None] % 3 == 0)  # type: ignore[attr-defined]
    return batch.replace(mismatched=jax.device_get(dpo.mismatched(batch, prompt_width=P)))


@functools.cache
def preference_step(name, cfg, packed=False, micro_batches=1):
    logprobs = functools.partial(lm.token_logprobs, cfg=cfg, **({} if packed else {"prompt_width": P}))
    options: Any = {"reference": None} if name in objective_cases.WITHOUT_REFERENCE else {}
    return dpo.make_train_step(logprobs, objective_cases.FAMILY[name], micro_batches=micro_batches, **options)


def preference_update(name, cfg, batch, micro_batches=1):
    step = preference_step(name, cfg, isinstance(batch, types.PackedPreferences), micro_batches)
    state = state_lib.create(model(cfg), optax.scale(-1.0))
    hyper = dpo.Hyper(learning_rate=np.float32(1.0), beta=np.float32(0.5))
    state, logs = jax.jit(step)(state, model(cfg, seed=1), hyper, on_device(batch), None)
    logs = {key: x.value() if hasattr(x, "value") else x for key, x in logs.items()}
    return logs, jax.tree.map(jnp.subtract, state.params, model(cfg))


def assert_same_update(got, want):
    assert got[0].keys() == want[0].keys()
    for key, value in want[0].items():
        np.testing.assert_allclose(got[0][key], value, rtol=1e-4, atol=1e-5, err_msg=key)
    assert_close(got[1], want[1])
    assert want[0]["skipped"] == 0 and max(float(jnp.abs(x).max()) for x in jax.tree.leaves(want[1])) > 1e-3


QUICK = {("dpo", "learned"), ("simpo", "window"), ("kto", "rope")}
each_objective = [
    pytest.param(name, CONFIGS[kind], id=f"{name}-{kind}", marks=() if (name, kind) in QUICK else pytest.mark.slow)
    for name in ("dpo", "ipo", "simpo", "orpo", "kto")
    for kind in CONFIGS
]


@pytest.mark.parametrize(("name", "cfg"), each_objective)
def test_packed_preference_training_equals_padded_training(name, cfg):
    """The chosen and the rejected answer to a prompt may be in different rows."""
    batch = preferences(name)
    packed = packing.pack_preferences(batch, width=WIDTH, pad_id=PAD)
    assert packed.tokens_RL.size < 0.8 * batch.tokens_BKL.size
    assert_same_update(preference_update(name, cfg, packed), preference_update(name, cfg, batch))


@pytest.mark.parametrize("name", ["dpo", pytest.param("kto", marks=pytest.mark.slow)])
def test_packed_preference_training_in_parts_equals_padded_training(name):
    """The parts are micro-batches, or the shares of devices, which are packed separately."""
    batch = preferences(name)
    want = preference_update(name, ROPE, batch)
    packed = packing.pack_preferences(batch, width=WIDTH, pad_id=PAD, groups=3)
    assert_same_update(preference_update(name, ROPE, packed, micro_batches=3), want)
    with pytest.raises(ValueError, match="packed into 3 groups, but micro_batches is 1"):
        preference_update(name, ROPE, packed)

    shares = [jax.tree.map(lambda x, i=i: np.split(x, 2)[i], batch) for i in range(2)]
    packed_shares = [packing.pack_preferences(each, width=WIDTH, pad_id=PAD, rows=4) for each in shares]
    stacked = jax.tree.map(lambda *x: np.stack(x), *packed_shares)
    logprobs = functools.partial(lm.token_logprobs, cfg=ROPE)
    step = dpo.make_train_step(logprobs, objective_cases.FAMILY[name], axis_name="d")
    state = state_lib.create(model(ROPE), optax.scale(-1.0))
    hyper = dpo.Hyper(learning_rate=np.float32(1.0), beta=np.float32(0.5))
    sharded = jax.jit(jax.vmap(step, in_axes=(None, None, None, 0, None), axis_name="d"))
    states, logs = sharded(state, model(ROPE, seed=1), hyper, on_device(stacked), None)
    np.testing.assert_allclose(logs["loss"].value(), [want[0]["loss"]] * 2, rtol=1e-5)
    assert_close(jax.tree.map(lambda x, y: x[0] - y, states.params, model(ROPE)), want[1])


@pytest.mark.slow
def test_packed_preference_training_with_adapters_and_soft_labels_equals_padded_training():
    batch = preferences("dpo").replace(targets_B=np.linspace(0.1, 0.9, 6, dtype=np.float32))
    join = functools.partial(lm.lora.attach, scale=2.0)
    shapes = lm.lora.init(jax.random.key(0), ROPE, rank=2, pattern="layers/.*")
    adapters = jax.tree.map(lambda x: jnp.asarray(0.1 * np.random.default_rng(5).normal(size=x.shape), x.dtype), shapes)
    found = []
    for each in (batch, packing.pack_preferences(batch, width=WIDTH, pad_id=PAD)):
        options = {} if each is not batch else {"prompt_width": P}
        logprobs = functools.partial(lm.token_logprobs, cfg=ROPE, **options)
        step = dpo.make_train_step(logprobs, objectives.soft(objectives.dpo), join=join)
        hyper = dpo.Hyper(learning_rate=np.float32(1.0), beta=np.float32(0.5))
        state = state_lib.create(adapters, optax.scale(-1.0))
        state, logs = jax.jit(step)(state, model(ROPE), hyper, on_device(each), None)
        found.append((logs["loss"].value(), jax.tree.map(jnp.subtract, state.params, adapters)))
    np.testing.assert_allclose(found[1][0], found[0][0], rtol=1e-5)
    assert_close(found[1][1], found[0][1])


def test_answers_keep_their_places_in_packed_preferences():
    """The log-probability of a response is that of its own tokens, whichever columns the mask of answers covers."""
    tokens = np.array([[[0, 1, 2, 3], [0, 1, 4, 0]], [[5, 6, 7, 0], [5, 6, 0, 0]]], np.int32)
    mask = np.array([[[0, 1, 1, 1], [0, 1, 1, 0]], [[1, 1, 1, 0], [1, 1, 0, 0]]], bool)
    batch: Any = types.Preferences(tokens, mask, mask[..., 2:], reference_BK=np.zeros((2, 2), np.float32))  # type: ignore[arg-type]
    packed: Any = packing.pack_preferences(batch, width=5, pad_id=9)
    np.testing.assert_array_equal(packed.tokens_RL, [[1, 2, 3, 1, 4], [5, 6, 7, 5, 6]])
    np.testing.assert_array_equal(packed.answer_RL, [[0, 1, 1, 0, 1], [0, 0, 1, 0, 0]])
    by_token = lambda params, tokens_BL, segments_BL: tokens_BL * params  # noqa: E731
    sums = dpo.answer_logprobs(by_token, jnp.float32(10.0), on_device(packed))
    np.testing.assert_array_equal(sums, [[50, 40], [70, 0]])
    np.testing.assert_array_equal(dpo.answer_lengths(on_device(packed)), [[2, 1], [1, 1]])
    np.testing.assert_array_equal(dpo.answer_lengths(on_device(batch)), [[2, 1], [1, 1]])
    same = packing.pack_preferences(
        batch.replace(mask_BKL=None, answer_BKC=np.ones((2, 2, 4), bool)), width=4, pad_id=9
    )
    np.testing.assert_array_equal(same.tokens_RL, tokens.reshape(4, 4))
    assert same.answer_RL.all()
    with pytest.raises(ValueError, match="for packed rows of shape"):
        dpo.answer_logprobs(lambda params, tokens_BL, segments_BL: tokens_BL[:, 1:], None, on_device(packed))
    with pytest.raises(ValueError, match="groups = 3 must divide the number of prompts, 2, and rows = 4"):
        packing.pack_preferences(batch, width=5, pad_id=9, rows=4, groups=3)


def test_packed_sums_and_means_equal_those_of_each_sequence():
    x = jnp.array([[1.0, 2.0, 3.0, np.nan], [4.0, 5.0, 6.0, 7.0]])
    segments = jnp.array([[1, 1, 2, 0], [1, 2, 2, 2]])
    where = jnp.array([[True, True, True, False], [True, False, True, True]])
    places = types.Places(*(jnp.array(n) for n in ([[0, 0], [1, 1], [0, 0]], [[1, 2], [1, 2], [0, 0]], [[0] * 2] * 3)))
    sums = lm.packed_sums(x, segments, places, where_BL=where)
    np.testing.assert_array_equal(sums, [[3.0, 3.0], [4.0, 13.0], [0.0, 0.0]])
    np.testing.assert_array_equal(lm.packed_sums(x, segments, places)[1], [4.0, 18.0])
    means = lm.packed_means(x, segments, places, where_BL=where)
    np.testing.assert_array_equal(means, [[1.5, 3.0], [4.0, 6.5], [0.0, 0.0]])
    gradient = jax.grad(
        lambda x: (lm.packed_sums(x, segments, places, where_BL=where) * jnp.arange(6.0).reshape(3, 2)).sum()
    )(x)
    np.testing.assert_array_equal(gradient, [[0, 0, 1, 0], [2, 0, 3, 3]])
