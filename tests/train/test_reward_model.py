"""Reward models: losses, heads, domains, frozen parameters, normalisation, and bad data."""

import dataclasses
import functools
import json
from typing import Any

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from rlhf_jax import lm, losses, parallel, types
from rlhf_jax.data import comparison_transforms, errors, packing
from rlhf_jax.train import reward_model
from rlhf_jax.train import state as state_lib
from rlhf_jax.train.optim import partition

CFG = lm.LMConfig(vocab_size=20, n_layers=1, d_model=16, n_heads=2, d_mlp=32, max_length=24)
SGD = optax.scale(-1.0)
B, K, L, H = 6, 4, 10, 3
TABLE: Any = types.ApplyFn(  # hidden states are embeddings, which compile fast
    forward=lambda params, tokens_BL, **_: types.LMOutput(jnp.tanh(params["embed"]["tokens"][tokens_BL])),
    logits=lambda params, hidden_BLD: hidden_BLD,
)
score = functools.partial(lm.score, cfg=TABLE)
packed_scores = functools.partial(lm.packed_scores, cfg=TABLE)
fast_score = jax.jit(score)
lm_score = jax.jit(functools.partial(lm.score, cfg=CFG))


@functools.cache
def params(heads: int | None = None) -> Any:
    whole = jax.jit(lambda key: lm.with_head(key, lm.init(key, CFG), CFG, heads=heads))(jax.random.key(1))
    rng = np.random.default_rng(2)
    shape = whole["head"]["gain"].shape
    whole["head"]["bias"] = jnp.asarray(rng.normal(size=shape), jnp.float32)
    whole["head"]["gain"] = jnp.asarray(1 + rng.random(shape), jnp.float32)
    whole["embed"]["tokens"] = 5 * whole["embed"]["tokens"]
    return whole


def comparisons(**extra: Any) -> Any:
    """Returns comparisons in which prompt 1 has only ties and prompt 4 a single completion."""
    rng = np.random.default_rng(1)
    where = np.arange(K)[None, :] < np.array([4, 3, 2, 4, 1, 3])[:, None]
    ranks = np.array([[1, 2, 3, 3], [2, 2, 2, 0], [2, 1, 0, 0], [4, 3, 2, 1], [1, 0, 0, 0], [1, 1, 2, 0]])
    mask = (np.arange(L)[None, None, :] < rng.integers(4, L + 1, size=(B, K, 1))) & where[:, :, None]
    tokens = rng.integers(1, 20, size=(B, K, L)).astype(np.int32)
    return types.Comparisons(tokens, mask, ranks.astype(np.int32), where, **extra)  # type: ignore[arg-type]


INFORMATIVE = [0, 2, 3, 5]


def run(batch: Any, *, heads: int | None = None, weights: Any = None, micro: int = 1, **options: Any) -> Any:
    hyper: dict[str, Any] = {"learning_rate": np.float32(0.1), "max_grad_norm": np.float32(np.inf)}
    if weights is not None:
        hyper["domain_weights"] = np.asarray(weights, np.float32)
    result = reward_model.make_train_step(score, packed_scores=packed_scores, micro_batches=micro, **options)
    state = state_lib.create(params(heads), SGD)
    return parallel.jit_step(result)(state, None, hyper, jax.tree.map(jnp.asarray, batch), jax.random.key(0))


@functools.cache
def scores_of(heads: int | None = None) -> np.ndarray:
    return np.asarray(reward_model.score_all(fast_score, params(heads), jax.tree.map(jnp.asarray, comparisons())))


def softplus(x: Any) -> Any:
    return np.logaddexp(0, np.float64(x))


def pairs(b: int) -> list[tuple[int, int]]:
    ranks, where = comparisons().ranks_BK[b], comparisons().where_BK[b]
    return [(i, j) for i in range(K) for j in range(K) if where[i] and where[j] and ranks[i] < ranks[j]]


def close(a: Any, b: Any, *, atol: float) -> None:
    jax.tree.map(functools.partial(np.testing.assert_allclose, atol=atol), a, b)


# ---------------------------------------------------------------------------------------------------------- losses


def by_hand(name: str, s: np.ndarray, b: int) -> float:
    n = int(comparisons().where_BK[b].sum())
    ranks, leads = comparisons().ranks_BK[b][:n], np.array([s[i] - s[j] for i, j in pairs(b)])
    divisor = n * (n - 1) / 2
    if name == "smoothed":
        return (0.9 * softplus(0.5 - leads) + 0.1 * softplus(0.5 + leads)).sum() / divisor
    if name == "centred":
        return (softplus(-leads) + 0.01 * np.array([(s[i] + s[j]) ** 2 for i, j in pairs(b)])).sum() / divisor
    if name == "surviving":
        return softplus(-leads).mean()
    if name == "plackett-luce":
        return sum(np.log(np.exp(s[:n][ranks >= ranks[i]]).sum()) - s[i] for i in range(n))
    best = np.exp(s[:n][ranks == ranks.min()]).sum()
    return np.log(np.exp(s[:n]).sum()) - np.log(best)


LOSSES = {
    "smoothed": functools.partial(losses.ranking, target=0.9, margin=0.5),
    "centred": functools.partial(losses.ranking, centering=0.01),
    "surviving": functools.partial(losses.ranking, ties_in_divisor=False),
    "plackett-luce": losses.plackett_luce,
    "best": losses.best_choice,
}


@pytest.mark.parametrize("name", list(LOSSES))
def test_step_accepts_every_loss(name):
    state, logs = run(comparisons(), loss=LOSSES[name])
    want = np.mean([by_hand(name, scores_of()[b].astype(np.float64), b) for b in INFORMATIVE])
    np.testing.assert_allclose(logs["loss"].value(), want, rtol=1e-5)
    assert float(logs["skipped"]) == 0
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(state.params))


def test_margins_and_targets_reach_the_loss_of_their_prompts():
    margin, target = np.linspace(0, 1, B).astype(np.float32), np.linspace(0.5, 1, B).astype(np.float32)
    batch = comparisons(loss_inputs={"margin": margin, "target": target})
    want = []
    for b in INFORMATIVE:
        n, s = int(batch.where_BK[b].sum()), scores_of()[b].astype(np.float64)
        lead = np.array([s[i] - s[j] for i, j in pairs(b)])
        each = target[b] * softplus(margin[b] - lead) + (1 - target[b]) * softplus(margin[b] + lead)
        want.append(each.sum() / (n * (n - 1) / 2))
    whole, logs = run(batch)
    np.testing.assert_allclose(logs["loss"].value(), np.mean(want), rtol=1e-5)
    packed = packing.pack_comparisons(batch, width=24, pad_id=0)
    others: list[dict[str, Any]] = [dict(batch=batch, micro=2), dict(batch=packed)]
    for options in others:
        other, other_logs = run(**options)
        np.testing.assert_allclose(other_logs["loss"].value(), np.mean(want), rtol=1e-5)
        close(other.params, whole.params, atol=1e-5)


@hypothesis.given(st.integers(0, 10_000))
@hypothesis.settings(max_examples=15)
def test_best_choice_is_softmax_cross_entropy(seed):
    rng = np.random.default_rng(seed)
    s, ranks, where = jnp.asarray(rng.normal(size=K), jnp.float32), rng.integers(1, 4, K), rng.random(K) < 0.8
    s = jnp.where(where, s, jnp.nan)
    value, grad = jax.value_and_grad(lambda s: losses.best_choice(s, jnp.asarray(ranks), where_K=jnp.asarray(where)))(s)
    assert np.isfinite(grad[where]).all() and np.isfinite(value)
    if len(set(ranks[where])) < 2:
        assert value == 0 and not np.asarray(grad)[where].any()
    elif (ranks[where] == ranks[where].min()).sum() == 1:
        choice = int(np.flatnonzero(where & (ranks == ranks[where].min()))[0])
        want = losses.best_of_n_choice(jnp.where(where, s, 0.0), choice, where_K=jnp.asarray(where))
        np.testing.assert_allclose(value, want, rtol=1e-5, atol=1e-6)


def test_domains_are_averaged_separately_and_weighted():
    domain = np.array([0, 0, 1, 1, 1, 0], np.int32)
    each = np.array([by_hand("surviving", scores_of()[b].astype(np.float64), b) if pairs(b) else 0.0 for b in range(B)])
    want = np.mean(each[[0, 5]]) + 3 * np.mean(each[[2, 3]])
    options: Any = dict(weights=[1.0, 3.0], loss=LOSSES["surviving"])
    whole, logs = run(comparisons(domain_B=domain), **options)
    np.testing.assert_allclose(logs["loss"].value(), want, rtol=1e-5)
    parts, part_logs = run(comparisons(domain_B=domain), micro=3, **options)
    np.testing.assert_allclose(part_logs["loss"].value(), want, rtol=1e-5)
    close(parts.params, whole.params, atol=1e-6)
    # A domain without informative prompts adds 0, without dividing by zero.
    alone, logs = run(comparisons(domain_B=np.zeros(B, np.int32)), **options)
    np.testing.assert_allclose(logs["loss"].value(), each[INFORMATIVE].mean(), rtol=1e-5)
    assert np.isfinite(alone.params["head"]["kernel_D"]).all()
    with pytest.raises(ValueError, match=r"set Comparisons\.domain_B"):
        run(comparisons(), **options)


# ----------------------------------------------------------------------------------------------------- several heads


def test_each_head_of_an_ensemble_learns_independently():
    assert scores_of(H).shape == (B, K, H)
    state, logs = run(comparisons(), heads=H, loss=LOSSES["surviving"])
    each = [[by_hand("surviving", scores_of(H)[b, :, h].astype(np.float64), b) for b in INFORMATIVE] for h in range(H)]
    np.testing.assert_allclose(logs["loss"].value(), np.mean(each), rtol=1e-5)

    def alone(head: Any, h: int) -> jax.Array:
        batch = jax.tree.map(jnp.asarray, comparisons())
        result = reward_model.score_all(score, {**params(H), "head": head}, batch)[:, :, h]
        losses_B = jax.vmap(lambda s, r, w: LOSSES["surviving"](s, r, where_K=w))(
            result, batch.ranks_BK, batch.where_BK
        )
        return losses_B[jnp.array(INFORMATIVE)].mean()

    for h in range(H):
        gradient = jax.grad(alone)(params(H)["head"], h)["kernel_HD"][h]
        moved = (params(H)["head"]["kernel_HD"] - state.params["head"]["kernel_HD"])[h]
        np.testing.assert_allclose(moved, 0.1 * gradient / H, atol=1e-6)


def test_head_of_a_domain_learns_from_its_prompts():
    domain = np.array([0, 0, 1, 1, 1, 0], np.int32)
    state, logs = run(comparisons(domain_B=domain), heads=2, head_of_domain=True)
    assert float(logs["accuracy"].weight) == sum(len(pairs(b)) for b in INFORMATIVE)
    one_sided, _ = run(comparisons(domain_B=np.zeros(B, np.int32)), heads=2, head_of_domain=True)
    before = params(2)["head"]["kernel_HD"]
    np.testing.assert_array_equal(one_sided.params["head"]["kernel_HD"][1], before[1])
    assert abs(np.asarray(state.params["head"]["kernel_HD"] - before)).min(axis=1).max() > 0
    assert abs(np.asarray(one_sided.params["head"]["kernel_HD"][0] - before[0])).max() > 1e-4
    _, unknown = run(comparisons(domain_B=np.full(B, 2, np.int32)), heads=2, head_of_domain=True)
    assert float(unknown["skipped"]) == 1, "these domains have no head"


def test_heads_are_combined_and_a_critic_needs_a_single_head():
    weights = jnp.array([0.5, 0.3, 0.2])
    batch = jax.tree.map(jnp.asarray, comparisons())
    one = reward_model.score_all(fast_score, lm.heads.combine(params(H), weights), batch)
    np.testing.assert_allclose(one, scores_of(H) @ np.asarray(weights), atol=1e-5)
    with pytest.raises(ValueError, match="3 heads"):
        lm.heads.combine(params(H), weights[:2])
    with pytest.raises(ValueError, match="it must be 2 or more"):
        lm.with_head(jax.random.key(0), params(), CFG, heads=1)
    with pytest.raises(ValueError, match=r"params have 3: combine them with lm\.heads\.combine"):
        lm.values(params(H), jnp.zeros((1, 4), jnp.int32), cfg=CFG)


@pytest.mark.parametrize("heads", [None, H])
def test_score_depends_only_on_the_completion(heads, tmp_path):
    """The score depends on the last token, but not on batch, width, padding side, packing, or saving and loading."""
    rng = np.random.default_rng(5)
    answers = [rng.integers(1, 20, size=n).astype(np.int32) for n in (3, 7, 10, 5)]
    alone = np.stack(
        [np.asarray(lm_score(params(heads), a[None], mask_BL=np.ones((1, len(a)), bool)))[0] for a in answers]
    )
    assert alone.shape == ((4,) if heads is None else (4, H))

    def rows(side: str, fill: int) -> tuple[np.ndarray, np.ndarray]:
        tokens, mask = np.full((4, 14), fill, np.int32), np.zeros((4, 14), bool)
        for b, a in enumerate(answers):
            at = slice(0, len(a)) if side == "right" else slice(14 - len(a), 14)
            tokens[b, at], mask[b, at] = a, True
        return tokens, mask

    for side in ("left", "right"):
        for fill in (0, 7):
            tokens, mask = rows(side, fill)
            np.testing.assert_allclose(lm_score(params(heads), tokens, mask_BL=mask), alone, atol=1e-5)
            turned = lm_score(params(heads), tokens[::-1], mask_BL=mask[::-1])
            np.testing.assert_allclose(turned, alone[::-1], atol=1e-5)
    result = packing.pack(answers, width=14, pad_id=0, counts=errors.DropCount())  # type: ignore[arg-type]
    got = lm.packed_scores(params(heads), result.tokens_BL, result.segments_BL, result.places, cfg=CFG)  # type: ignore[arg-type]
    assert len(result.tokens_BL) < 4
    np.testing.assert_allclose(got, alone, atol=1e-5)

    kept = lm.heads.normalisation(params(heads), "held-out")
    lm.save(tmp_path / "m", CFG, params(heads), normalisation=kept)
    cfg, loaded = lm.load(tmp_path / "m")
    assert cfg == dataclasses.replace(CFG, model_type=cfg.model_type)
    tokens, mask = rows("right", 0)
    np.testing.assert_allclose(lm_score(loaded, tokens, mask_BL=mask), alone, atol=1e-5)
    assert lm.load_normalisation(tmp_path / "m") == kept
    assert json.loads((tmp_path / "m" / "config.json").read_text())["num_labels"] == (heads or 1)

    last = answers[1].copy()
    last[-1] = last[-1] % 19 + 1
    moved = lm_score(params(heads), last[None], mask_BL=np.ones((1, 7), bool))[0]
    assert np.abs(np.asarray(moved) - alone[1]).max() > 1e-3


def test_saved_head_of_the_wrong_shape_is_refused(tmp_path):
    lm.save(tmp_path / "m", CFG, params(H))
    assert lm.load_normalisation(tmp_path / "m") is None
    file = tmp_path / "m" / "config.json"
    text = json.loads(file.read_text())
    for broken in ([0.0, 1.0], "much", [0.0, 1.0, None]):
        file.write_text(json.dumps(text | {"reward_bias": broken}))
        with pytest.raises(ValueError, match=r"one finite number per head \(3 in total\)"):
            lm.load(tmp_path / "m")
    file.write_text(json.dumps(text | {"reward_normalisation": {"rule": "held-out", "gain": 0.0, "bias": 1.0}}))
    with pytest.raises(ValueError, match="a gain of 0"):
        lm.load_normalisation(tmp_path / "m")


# ------------------------------------------------------------------------------------------------------ normalisation


@pytest.mark.parametrize("heads", [None, H])
def test_published_normalisation_rules(heads):
    batch = jax.tree.map(jnp.asarray, comparisons())

    def scored(p: Any) -> Any:
        return reward_model.score_all(fast_score, p, batch)

    where = batch.where_BK
    plain = lm.heads.reset(params(heads))
    axes = (0, 1)
    mask = where if heads is None else where[..., None]
    centred = lm.heads.centre(plain, scored(plain), where=where)
    np.testing.assert_allclose(jnp.mean(scored(centred), axis=axes, where=mask), 0, atol=1e-5)
    standard = lm.heads.standardise(plain, scored(plain), where=where)
    np.testing.assert_allclose(jnp.mean(scored(standard), axis=axes, where=mask), 0, atol=1e-5)
    np.testing.assert_allclose(jnp.std(scored(standard), axis=axes, where=mask), 1, atol=1e-4)
    # The raw score can be recovered: raw = (score - bias) / gain.
    kept = lm.heads.normalisation(standard, "policy samples")
    raw = (np.asarray(scored(standard)) - np.asarray(kept.bias)) / np.asarray(kept.gain)
    there = np.asarray(where)
    np.testing.assert_allclose(raw[there], np.asarray(scored(plain))[there], atol=1e-4)
    with pytest.raises(ValueError, match="policy samples contains inf"):
        lm.heads.Normalisation("policy samples", float("inf"), 0.0)


# -------------------------------------------------------------------------------------------- trainable parameters


def test_pattern_trains_only_the_head():
    trained, frozen = partition.split(params(), "^head/")
    assert set(trained) == {"head"} and "head" not in frozen
    close(partition.join(frozen, trained), params(), atol=0)
    adam = optax.chain(optax.scale_by_adam(), optax.scale(-1.0))
    state = state_lib.create(trained, adam)
    moments = [x.shape for x in jax.tree.leaves(state.opt_state) if x.ndim]
    assert moments == [(CFG.d_model,)] * 2, "the optimiser has moments for the head's kernel only"
    step = parallel.jit_step(reward_model.make_train_step(score, join=partition.join))
    hyper = {"learning_rate": np.float32(0.1), "max_grad_norm": np.float32(np.inf)}
    state, logs = step(state, frozen, hyper, jax.tree.map(jnp.asarray, comparisons()), jax.random.key(0))
    assert set(state.params) == {"head"} and float(logs["grad_norm"]) > 0
    assert abs(np.asarray(state.params["head"]["kernel_D"] - params()["head"]["kernel_D"])).max() > 1e-3


def test_patterns_and_predicates():
    by_pattern, _ = partition.split(params(), r"q/kernel|^head/gain")
    by_predicate, _ = partition.split(params(), lambda path: path in ("layers/q/kernel", "head/gain"))
    assert jax.tree.structure(by_pattern) == jax.tree.structure(by_predicate)
    assert partition.split(params(), ".")[1] == {}
    with pytest.raises(ValueError, match="'tail' matches none of the parameters, which are embed/tokens"):
        partition.split(params(), "tail")
    with pytest.raises(ValueError, match="is not a regular expression"):
        partition.split(params(), "(")


# ---------------------------------------------------------------------------------------------- transforms of batches


def test_shuffled_pairs_equal_grouped_pairs():
    batch = comparisons(domain_B=np.arange(B), loss_inputs={"margin": np.arange(B) / 10.0})
    rows = comparison_transforms.split_into_pairs(batch)
    want = [(b, i, j) for b in range(B) for i, j in pairs(b)]
    assert len(rows.ranks_BK) == len(want)
    for row, (b, i, j) in enumerate(want):
        np.testing.assert_array_equal(rows.tokens_BKL[row], batch.tokens_BKL[b, [i, j]])
        np.testing.assert_array_equal(rows.mask_BKL[row], batch.mask_BKL[b, [i, j]])
        assert rows.domain_B[row] == b and rows.loss_inputs["margin"][row] == b / 10
    np.testing.assert_array_equal(rows.ranks_BK, [[1, 2]] * len(want))
    _, logs = run(rows.replace(domain_B=None, loss_inputs=None))  # type: ignore[attr-defined]
    leads = np.concatenate([[scores_of()[b, i] - scores_of()[b, j]] for b, i, j in want])
    np.testing.assert_allclose(logs["loss"].value(), softplus(-leads).mean(), rtol=1e-5)


def test_control_tokens_turn_one_pair_into_two():
    tokens = np.arange(2 * 2 * 5, dtype=np.int32).reshape(2, 2, 5)
    mask = np.ones((2, 2, 5), bool)
    mask[0, 0, 0] = False
    batch: Any = types.Comparisons(tokens, mask, np.array([[2, 1], [1, 1]]), np.ones((2, 2), bool))  # type: ignore[arg-type]
    result = comparison_transforms.add_control_tokens(batch, good_id=98, bad_id=99, column=2)
    better, worse = tokens[0, 1], tokens[0, 0]

    def marked(answer: np.ndarray, mark: int) -> list[int]:
        return [*answer[:2], mark, *answer[2:]]

    np.testing.assert_array_equal(result.tokens_BKL[0], [marked(better, 98), marked(better, 99)])
    np.testing.assert_array_equal(result.tokens_BKL[1], [marked(worse, 99), marked(worse, 98)])
    assert len(result.ranks_BK) == 2, "a tie gives no rows"
    np.testing.assert_array_equal(result.ranks_BK, [[1, 2]] * 2)
    assert not result.mask_BKL[1, :, 0].any() and result.mask_BKL[:, :, 1:].all()


def test_uninformative_prompts_are_counted_and_dropped():
    batch = comparisons()
    tokens, mask = batch.tokens_BKL.copy(), batch.mask_BKL.copy()
    tokens[3, 2], mask[3, 2] = tokens[3, 0], mask[3, 0]  # ranks 4 and 2 for the same tokens
    tokens[2, 1], mask[2, 1] = tokens[2, 0], mask[2, 0]  # the prompt has only one answer left
    counts = errors.DropCount(max_dropped=0.6)
    batch = batch.replace(tokens_BKL=tokens, mask_BKL=mask)  # type: ignore[attr-defined]
    filtered = comparison_transforms.drop_uninformative(batch, counts)
    assert counts.dropped == {"all answers tied": 1, "fewer than two answers": 2}
    assert counts.truncated == {"answer repeated": 2}
    np.testing.assert_array_equal(filtered.ranks_BK, [[1, 2, 3, 3], [4, 3, 0, 1], [1, 1, 2, 0]])
    np.testing.assert_array_equal(filtered.where_BK[1], [True, True, False, True])
    with pytest.raises(
        errors.DataError, match=r"3 of 6 records were dropped \(all answers tied 1, fewer than two answers 2\)"
    ):
        comparison_transforms.drop_uninformative(batch, errors.DropCount(max_dropped=0.4))
    tied = batch.replace(ranks_BK=np.ones((B, K), np.int32))
    with pytest.raises(errors.DataError, match="none of the 6 prompts has"):
        comparison_transforms.drop_uninformative(tied, errors.DropCount(max_dropped=1.0))


def test_nan_score_skips_the_update():
    broken = {**params(), "head": {**params()["head"], "bias": jnp.float32(np.nan)}}
    step = parallel.jit_step(reward_model.make_train_step(score))
    hyper = dict.fromkeys(("learning_rate", "max_grad_norm"), np.float32(0.1))
    state = state_lib.create(broken, SGD)
    state, logs = step(state, None, hyper, jax.tree.map(jnp.asarray, comparisons()), jax.random.key(0))
    assert float(logs["skipped"]) == 1 and np.isnan(float(logs["loss"].value()))
    np.testing.assert_array_equal(state.params["head"]["kernel_D"], params()["head"]["kernel_D"])
