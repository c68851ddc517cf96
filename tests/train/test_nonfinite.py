"""Non-finite steps are skipped, and the warning names the non-finite loss or gradient, and the row."""
# pyright: reportArgumentType=false, reportAttributeAccessIssue=false

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from fault_injection import tiny_runs

from rlhf_jax import checkpoint, metrics, parallel
from rlhf_jax.train import loop, ppo, sft
from rlhf_jax.train.optim import nonfinite, update


@functools.cache
def stage(name):
    return tiny_runs.build(name, 8)


def run_once(run, *, hyper=None, frozen=None, state=None, compiled=None):
    """Runs one iteration of `loop.fit`; returns its warnings and its row."""
    warnings, rows = [], []
    loop.fit(
        compiled or run.step,
        jax.tree.map(jnp.array, state or run.state),
        steps=1,
        batch_at=run.batch_at,
        hyper_at=lambda i: hyper or run.hyper_at(i),
        rng=jax.random.key(0),
        frozen=frozen or run.frozen,
        stage="ppo",
        log=lambda done, row: rows.append(row),
        warn=warnings.append,
    )
    return warnings, rows[0]


def ppo_hyper(**changes):
    return dataclasses.replace(stage("ppo").hyper_at(0), **{k: np.float32(v) for k, v in changes.items()})


def test_a_finite_step_raises_no_warning():
    warnings, row = run_once(stage("ppo"))
    assert warnings == [] and row["skipped"] == 0 and not set(nonfinite.DETAILS) & set(row)


@pytest.mark.parametrize(
    ("change", "named", "not_named"),
    [
        ({"value_clip": np.nan}, "value_loss and the critic's gradient are not finite", "policy_loss"),
        ({"clip": np.nan}, "policy_loss is not finite", "value_loss"),
        ({"ptx_coef": np.inf}, "the policy's gradient, ptx_coef_per_sequence and ptx_coef", "_loss"),
        ({"learning_rate": np.nan}, "learning_rate is not finite", "loss"),
    ],
)
def test_warning_names_the_non_finite_loss_or_gradient(change, named, not_named):
    warnings, row = run_once(stage("ppo"), hyper=ppo_hyper(**change))
    assert (
        len(warnings) == 1 and "skipped step 1" in warnings[0] and named in warnings[0] and not_named not in warnings[0]
    )
    assert "first in update 1" in warnings[0] and row["skipped"] == 4 and row["bad_rows"] == 0


def test_warning_names_the_pretraining_loss():
    run = stage("ppo")
    models = ppo.Models(
        tiny_runs._generate,
        tiny_runs._logprobs_and_entropy,
        tiny_runs._values,
        tiny_runs._score_rollout,
        lambda params, tokens_BL, mask_BL: jnp.nan * tiny_runs._token_logprobs(params, tokens_BL),
    )
    compiled = parallel.jit_step(ppo.make_train_step(models, minibatches=1))
    warnings, _ = run_once(run, compiled=compiled)
    assert "ptx_loss and the policy's gradient are not finite" in warnings[0] and "policy_loss" not in warnings[0]


def test_warning_names_the_row_with_a_non_finite_score():
    run = stage("ppo")
    prompts_BP = run.batch_at(0).prompts_BP
    word = next(w for w in range(4, 24) if (prompts_BP == w).any(axis=1).sum() == 1)
    row = int((prompts_BP == word).any(axis=1).argmax())
    # Every response consists only of the stop token, so only the prompt contains the word.
    words = run.frozen.reward["words"].at[word].set(jnp.nan)
    table = run.state.params["policy"]["table"].at[:, 1].set(50.0)
    params = {**run.state.params, "policy": {"table": table}}
    frozen = ppo.Frozen({"table": table}, {**run.frozen.reward, "words": words})
    warnings, logged = run_once(
        run, frozen=frozen, state=run.state.replace(params=params, reference={"table": jnp.array(table)})
    )
    assert f"row {row} of the batch" in warnings[0] and "reward" in warnings[0]
    assert (logged["bad_rows"], logged["bad_row"]) == (1, row)


@pytest.mark.parametrize("micro_batches", [1, 2, 4])
def test_bad_rows_are_numbered_in_batch_order_for_any_micro_batches(micro_batches):
    run = stage("sft")
    batch = run.batch_at(0)
    seen_BL = np.where(batch.loss_mask_BL, np.roll(batch.tokens_BL, 1, axis=1), 0)
    word = int(seen_BL[5][seen_BL[5] > 0][0])
    rows = (seen_BL == word).any(axis=1)
    state = run.state.replace(params={"table": run.state.params["table"].at[word].set(jnp.nan)})
    train_step = sft.make_train_step(tiny_runs._token_logprobs, micro_batches=micro_batches)
    new, logs = jax.jit(train_step)(state, None, run.hyper_at(0), batch, None)
    assert float(logs["skipped"]) == 1
    assert (float(logs["bad_rows"]), float(logs["bad_row"])) == (rows.sum(), rows.argmax())
    np.testing.assert_array_equal(new.params["table"], state.params["table"])
    assert "loss and the gradient are not finite" in nonfinite.explain(metrics.to_floats(logs))


def test_bad_rows_over_several_devices_match_the_whole_batch():
    bad_B = jnp.array([False, False, False, True, False, True, True, False])
    alone = nonfinite.row_metrics(nonfinite.BadRows(bad_B))
    shared = jax.vmap(lambda bad: nonfinite.row_metrics(nonfinite.BadRows(bad), axis_name="d"), axis_name="d")(
        bad_B.reshape(4, 2)
    )
    for name, value in alone.items():
        np.testing.assert_array_equal(shared[name], np.full(4, value))
    nothing = nonfinite.row_metrics(nonfinite.BadRows(jnp.zeros(3, bool)))
    assert {name: float(value) for name, value in nothing.items()} == {"bad_rows": 0, "bad_row": -1}


def test_dpo_and_reward_models_report_the_bad_row():
    run = stage("dpo")
    batch = run.batch_at(0)
    bad = batch.replace(reference_BK=jnp.zeros((8, 2)).at[6, 1].set(jnp.nan))
    _, logs = run.step(jax.tree.map(jnp.array, run.state), run.frozen, run.hyper_at(0), bad, None)
    assert (float(logs["bad_rows"]), float(logs["bad_row"])) == (1, 6)
    run = stage("reward_model")
    batch = run.batch_at(0)
    at = next(b for b in range(8) if len(set(batch.ranks_BK[b])) == 3)
    words = run.state.params["words"]
    tokens = np.where(batch.tokens_BKL == 23, 22, batch.tokens_BKL)
    tokens[at, 0, 0] = 23
    state = jax.tree.map(jnp.array, run.state)  # the step donates it
    state = state.replace(params={**state.params, "words": words.at[23].set(jnp.nan)})
    _, logs = run.step(state, None, run.hyper_at(0), batch.replace(tokens_BKL=tokens), None)
    assert (float(logs["bad_rows"]), float(logs["bad_row"])) == (1, at)


# -------------------------------------------------------------------------------------------- nothing to learn from


def emptied(name, batch):
    """Returns a batch of a stage without a token or a pair to learn from."""
    if name == "sft":
        return batch.replace(loss_mask_BL=np.zeros_like(batch.loss_mask_BL))
    if name == "dpo":
        return batch.replace(answer_BKC=np.zeros_like(batch.answer_BKC))
    return batch.replace(ranks_BK=np.ones_like(batch.ranks_BK))  # reward_model


def trained_on(run, batches):
    """Returns the state after steps on the batches, and the metrics of the last step."""
    state, logs = jax.tree.map(jnp.array, run.state), None
    for batch in batches:
        state, logs = run.step(state, run.frozen, run.hyper_at(0), batch, jax.random.key(0))
    return state, metrics.to_floats(logs)


@pytest.mark.parametrize("name", ["sft", "dpo", "reward_model"])
def test_a_batch_with_nothing_to_learn_from_changes_nothing_but_the_counter(name):
    run = stage(name)
    first, second = run.batch_at(0), run.batch_at(1)
    before, usual = trained_on(run, [first])
    after, logs = trained_on(run, [first, emptied(name, second)])
    jax.tree.map(
        np.testing.assert_array_equal, (before.params, before.opt_state), (after.params, after.opt_state)
    )  # momentum is not 0
    assert int(after.step) == int(before.step) + 1
    assert (usual["skipped"], usual["empty_batch"]) == (0, 0) and (logs["skipped"], logs["empty_batch"]) == (1, 1)
    assert nonfinite.explain(logs).startswith("the batch has nothing to learn from")
    later, _ = trained_on(run, [first, emptied(name, second), second])
    straight, _ = trained_on(run, [first, second])
    jax.tree.map(np.testing.assert_array_equal, later.params, straight.params)


@pytest.mark.parametrize("name", ["sft", "dpo", "reward_model"])
def test_some_rows_with_something_to_learn_from_are_enough(name):
    run = stage(name)
    batch = run.batch_at(1)
    part = jax.tree.map(lambda x, y: np.concatenate([x[:-1], y[-1:]]), emptied(name, batch), batch)
    if name == "reward_model":
        part = part.replace(ranks_BK=np.concatenate([part.ranks_BK[:-1], [[1, 2, 2]]]))
    _, logs = trained_on(run, [part])
    assert logs["skipped"] == 0 and logs["grad_norm"] > 0


def test_domains_of_weight_zero_are_nothing_to_learn_from():
    run = stage("reward_model")
    batch = run.batch_at(0).replace(domain_B=np.array([0, 1] * 4))
    for weights, domains, empty, skipped in (
        ([1.0, 0.0], [0, 1], 0, 0),
        ([0.0, 1.0], [0, 0], 1, 1),
        ([0.0, 1.0], [0, 2], 0, 1),  # a domain without a weight makes the loss NaN
    ):
        hyper = {**run.hyper_at(0), "domain_weights": np.array(weights, np.float32)}
        rows = batch.replace(domain_B=np.array(domains * 4))
        _, logs = run.step(jax.tree.map(jnp.array, run.state), None, hyper, rows, None)
        assert (float(logs["empty_batch"]), float(logs["skipped"])) == (empty, skipped)


@pytest.mark.parametrize(("ptx_coef", "text", "skipped"), [(0.0, True, 4), (0.5, False, 4), (0.5, True, 0)])
def test_minibatches_without_a_token_are_skipped_in_ppo(ptx_coef, text, skipped):
    def silent(*args):
        rollout = tiny_runs._generate(*args)
        return rollout.replace(response_mask_BT=jnp.zeros_like(rollout.response_mask_BT))

    run = stage("ppo")
    models = ppo.Models(
        silent,
        tiny_runs._logprobs_and_entropy,
        tiny_runs._values,
        tiny_runs._score_rollout,
        tiny_runs._token_logprobs,
    )
    step = jax.jit(ppo.make_train_step(models, epochs=2, minibatches=2))
    batch = run.batch_at(0)
    batch = batch._replace(ptx=batch.ptx.replace(loss_mask_BL=batch.ptx.loss_mask_BL & text))
    state = run.state.replace(opt_state=jax.tree.map(lambda x: x + jnp.ones_like(x), run.state.opt_state))
    new, logs = step(state, run.frozen, ppo_hyper(ptx_coef=ptx_coef), batch, jax.random.key(0))
    assert float(logs["skipped"]) == skipped and (float(logs["empty_batch"]) > 0) == (skipped > 0)
    same = [np.array_equal(a, b) for a, b in zip(jax.tree.leaves(new.params), jax.tree.leaves(state.params))]
    assert all(same) == (skipped > 0)
    if skipped:
        assert "nothing to learn from" in nonfinite.explain(metrics.to_floats(logs))


def test_fit_reports_an_empty_batch_and_stops_after_too_many(tmp_path):
    run, warnings, rows = stage("sft"), [], []

    def start(bad):
        return loop.fit(
            run.step,
            jax.tree.map(jnp.array, run.state),
            steps=5,
            batch_at=lambda i: emptied("sft", run.batch_at(i)) if i in bad else run.batch_at(i),
            hyper_at=run.hyper_at,
            rng=jax.random.key(0),
            stage="sft",
            log=lambda done, row: rows.append(row),
            warn=warnings.append,
            max_skipped=3,
        )

    start({1, 3})
    assert [row["skipped"] for row in rows] == [0, 1, 0, 1, 0] and "empty_batch" not in rows[0]
    assert len(warnings) == 1 and "sft: skipped step 2: the batch has nothing to learn from" in warnings[0]
    with pytest.raises(loop.DivergedError, match=r"skipped 3 steps in a row.*nothing to learn from"):
        start({1, 2, 3, 4})


# ---------------------------------------------------------------------------------------------------------- the loop


def toy(state, frozen, hyper, batch, rng):
    del frozen, rng
    grads = {"w": batch}
    return update.apply_gradients(state, grads, learning_rate=hyper, loss=jnp.sum(batch))


def fit(folder, bad, *, steps=12, max_skipped=3, warnings=None, **options):
    import optax

    from rlhf_jax.train import state

    with checkpoint.Checkpoints(folder / "saved") as checkpoints, metrics.MetricLog(folder) as log:
        return loop.fit(
            parallel.jit_step(toy),
            state.create({"w": jnp.zeros(3)}, optax.scale(-1.0)),
            steps=steps,
            batch_at=lambda i: jnp.full(3, jnp.nan if i in bad else 1.0),
            hyper_at=lambda i: np.float32(1),
            rng=jax.random.key(0),
            stage="toy",
            log=log,
            checkpoints=checkpoints,
            max_skipped=max_skipped,
            warn=(warnings if warnings is not None else []).append,
            **options,
        )


def test_diverged_run_keeps_the_last_finite_state_and_can_resume(tmp_path):
    warnings = []
    with pytest.raises(
        loop.DivergedError, match=r"toy skipped 3 steps in a row.*step 7 of 12.*last finite step.*on disk"
    ):
        fit(tmp_path, {4, 5, 6}, warnings=warnings)
    assert len(warnings) == 1 and "toy: skipped step 5: the gradient is not finite" in warnings[0]
    saved = checkpoint.Checkpoints(tmp_path / "saved")
    assert saved.latest() == 8  # the row of step 7 is read while step 8 is computed
    final = fit(tmp_path, {4, 5, 6})
    np.testing.assert_array_equal(final.params["w"], -9.0 * np.ones(3))
    rows = metrics.read(tmp_path)
    assert [row["step"] for row in rows] == list(range(1, 13))
    assert [row["step"] for row in rows if row["skipped"]] == [5, 6, 7]
    assert all(("grad_norm" in row and row["grad_norm"] is None) == bool(row["skipped"]) for row in rows)


def test_consecutive_skipped_steps_are_counted_across_a_resume(tmp_path):
    def kill(done, state, logs):
        if done == 6:
            raise KeyboardInterrupt

    for resumed in (False, True):
        with pytest.raises((loop.DivergedError, KeyboardInterrupt)) as ended:
            callbacks = [] if resumed else [kill]
            fit(tmp_path, set(range(4, 12)), max_skipped=3, save_every=1, callbacks=callbacks)
    # Of steps 5, 6 and 7, one or two were skipped before the kill.
    assert "step 7 of 12" in str(ended.value)
