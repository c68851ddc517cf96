import concurrent.futures
import itertools
import threading

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from rlhf_jax import parallel
from rlhf_jax.train import state
from rlhf_jax.train.optim import schedules
from rlhf_jax.train.optim import update as step

ADAM = optax.chain(optax.scale_by_adam(), optax.scale(-1.0))
SGD = optax.scale(-1.0)


def problem(seed=0, rows=64, width=12, dim=5):
    rng = np.random.default_rng(seed)
    batch = {
        "x": rng.normal(size=(rows, width, dim)),
        "y": rng.normal(size=(rows, width)),
        "mask": np.arange(width) < rng.integers(0, width + 1, size=(rows, 1)),
    }
    batch = {name: jnp.asarray(x, bool if name == "mask" else jnp.float32) for name, x in batch.items()}
    return {"w": jnp.arange(dim, dtype=jnp.float32), "b": jnp.ones(())}, batch


def loss_fn(params, batch, total, axis_name=None):
    error = batch["x"] @ params["w"] + params["b"] - batch["y"]
    summed = jnp.sum(error**2, where=batch["mask"])
    if axis_name is not None:
        summed = jax.lax.psum(summed, axis_name)
    return summed / total, {"tokens": batch["mask"].sum(), "squares": summed}


def close(a, b, rtol=2e-5):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=rtol, atol=1e-6), a, b)


def same(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


def test_micro_batches_add_up_to_the_whole_batch():
    params, batch = problem()
    total = batch["mask"].sum()
    whole = jax.jit(lambda p: step.loss_and_grads(loss_fn, p, batch, total))(params)
    parts = jax.jit(lambda p: step.loss_and_grads(loss_fn, p, batch, total, micro_batches=4))(params)
    counts = step.split(batch, 4)["mask"].sum((1, 2))
    assert len(set(counts.tolist())) > 1
    assert int(parts[0][1]["tokens"]) == int(total)
    close(parts, whole)
    # The mean of per-part means differs.
    means = [loss_fn(params, jax.tree.map(lambda x: x[i], step.split(batch, 4)), counts[i])[0] for i in range(4)]  # noqa: B023
    assert abs(float(np.mean(means)) - float(whole[0][0])) > 1e-3


def test_micro_batches_must_divide_the_batch():
    params, batch = problem(rows=6)
    with pytest.raises(ValueError, match="6 rows"):
        step.loss_and_grads(loss_fn, params, batch, 1.0, micro_batches=4)


def test_bfloat16_gradients_are_accumulated_in_float32():
    params, batch = problem()
    params = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params)
    _, grads = jax.jit(lambda p: step.loss_and_grads(loss_fn, p, batch, batch["mask"].sum(), micro_batches=4))(params)
    assert all(g.dtype == jnp.float32 for g in jax.tree.leaves(grads))
    new, _ = step.apply_gradients(state.create(params, ADAM), grads, learning_rate=0.1)
    assert all(p.dtype == jnp.bfloat16 for p in jax.tree.leaves(new.params))


def test_devices_with_different_masks_match_the_whole_batch():
    params, batch = problem()
    total = batch["mask"].sum()

    def update(batch, axis_name=None, micro_batches=1):
        fn = lambda p, b, t: loss_fn(p, b, t, axis_name)  # noqa: E731
        (loss, _), grads = step.loss_and_grads(fn, params, batch, total, micro_batches=micro_batches)
        return step.apply_gradients(
            state.create(params, SGD), grads, learning_rate=0.1, max_grad_norm=1.0, axis_name=axis_name, loss=loss
        )

    one = jax.jit(update)(batch)
    shards = jax.tree.map(lambda x: x.reshape(4, 16, *x.shape[1:]), batch)
    four = jax.jit(jax.vmap(lambda b: update(b, "devices", 2), axis_name="devices"))(shards)
    for i in range(4):
        close(jax.tree.map(lambda x: x[i], four[0].params), one[0].params)  # noqa: B023
    close(four[1]["grad_norm"][0], one[1]["grad_norm"])


@pytest.mark.parametrize("max_norm", [0.5, 3.0, 1e9])
def test_update_matches_optax(max_norm):
    params, _ = problem()
    rate = 0.05
    tx = optax.chain(optax.clip_by_global_norm(max_norm), optax.adam(rate))
    mine, opt_state = state.create(params, ADAM), tx.init(params)
    update = jax.jit(lambda s, g: step.apply_gradients(s, g, learning_rate=rate, max_grad_norm=max_norm))
    for i in range(3):
        grads = jax.tree.map(lambda p: p * (i + 1) + 0.3, mine.params)  # noqa: B023
        updates, opt_state = tx.update(grads, opt_state)
        params = optax.apply_updates(params, updates)
        mine, metrics = update(mine, grads)
        close(mine.params, params)
        assert float(metrics["skipped"]) == 0
    assert int(mine.step) == 3
    close(metrics["grad_norm"], np.sqrt(sum(np.sum(np.square(g)) for g in jax.tree.leaves(grads))))


def test_learning_rate_may_be_a_prefix_of_the_parameters():
    params = {"policy": {"a": jnp.ones(3), "b": jnp.ones(())}, "critic": {"c": jnp.ones(2)}}
    new, _ = step.apply_gradients(state.create(params, SGD), params, learning_rate={"policy": 0.5, "critic": 0.25})
    same(new.params, {"policy": {"a": np.full(3, 0.5), "b": np.array(0.5)}, "critic": {"c": np.full(2, 0.75)}})


@pytest.mark.parametrize("bad", ["nan", "inf", "loss"])
def test_non_finite_step_changes_only_the_counter(bad):
    params, _ = problem()
    start = state.create(params, ADAM)
    start, _ = step.apply_gradients(start, params, learning_rate=0.1)
    grads, loss = params, jnp.zeros(())
    if bad == "loss":
        loss = jnp.nan * loss
    else:
        grads = {**params, "w": params["w"].at[1].set(float(bad))}
    new, metrics = jax.jit(lambda s: step.apply_gradients(s, grads, learning_rate=0.1, max_grad_norm=1.0, loss=loss))(
        start
    )
    assert int(new.step) == 2 and float(metrics["skipped"]) == 1
    same(new.params, start.params)
    same(new.opt_state, start.opt_state)


def test_step_compiled_ahead_is_the_same_and_compiles_once():
    params, batch = problem()

    def train_step(state, frozen, hyper, batch, rng):
        (loss, metrics), grads = step.loss_and_grads(loss_fn, state.params, batch, batch["mask"].sum())
        state, update = step.apply_gradients(state, grads, loss=loss, **hyper)
        return state, metrics | update

    hyper = {"learning_rate": np.float32(0.1), "max_grad_norm": np.float32(1.0)}
    plain, ahead, dropped = (parallel.jit_step(train_step) for _ in range(3))
    args = (state.create(params, ADAM), None, hyper, batch, jax.random.key(0))
    expected, _ = plain(*jax.tree.map(jnp.copy, args[:1]), *args[1:])
    with concurrent.futures.ThreadPoolExecutor(1) as executor:
        shapes = jax.eval_shape(lambda *same: same, *args[:1])
        ahead.compile_ahead(executor, *shapes, *args[1:])
        done, _ = ahead(*jax.tree.map(jnp.copy, args[:1]), *args[1:])
        # The call compiles a program that is still queued.
        hold = threading.Event()
        executor.submit(hold.wait)
        dropped.compile_ahead(executor, *args)
        late, _ = dropped(*jax.tree.map(jnp.copy, args[:1]), *args[1:])
        hold.set()
    same(done.params, expected.params)
    same(late.params, expected.params)
    assert (plain.traces, ahead.traces, dropped.traces) == (1, 1, 1)


def test_call_waits_for_compilation_ahead():
    under_way, release, compiled_by = threading.Event(), threading.Event(), []

    class Slow(concurrent.futures.ThreadPoolExecutor):
        """A thread that waits for ``release`` before it compiles."""

        def submit(self, fn, /, *args, **kwargs):
            return super().submit(lambda: (under_way.set(), release.wait(60), fn(*args, **kwargs)))

    def note(event, duration_secs, **kwargs):
        if event.endswith("backend_compile_duration"):
            compiled_by.append(threading.current_thread().name)

    once = parallel.jit_step(lambda state, frozen, hyper, batch, rng: (state + batch, {"twice": 2 * batch}))
    state, args = jnp.ones(3), (None, None, jnp.arange(3.0), None)
    jax.monitoring.register_event_duration_secs_listener(note)
    try:
        with Slow(1, thread_name_prefix="ahead") as executor:
            once.compile_ahead(executor, state, *args)
            assert under_way.wait(60)
            threading.Timer(0.5, release.set).start()  # without waiting, the call would compile in the meantime
            state, logs = once(state, *args)
            state, _ = once(state, *args)
    finally:
        jax.monitoring.unregister_event_duration_listener(note)
    np.testing.assert_array_equal(state, [1, 3, 5])
    np.testing.assert_array_equal(logs["twice"], [0, 2, 4])
    assert once.traces == 1 and compiled_by == ["ahead_0"]


def cannot_be_traced(state, frozen, hyper, batch, rng):
    raise ValueError("no such thing")


def cannot_be_compiled(state, frozen, hyper, batch, rng):
    return jax.ffi.ffi_call("no_such_thing", jax.ShapeDtypeStruct(state.shape, state.dtype))(state), {}


@pytest.mark.parametrize(
    ("train_step", "message"), [(cannot_be_traced, "no such thing"), (cannot_be_compiled, "no_such_thing")]
)
def test_error_of_compilation_ahead_is_raised_by_the_call(train_step, message):
    broken = parallel.jit_step(train_step)
    with concurrent.futures.ThreadPoolExecutor(1) as executor:
        broken.compile_ahead(executor, jnp.ones(3), None, None, None, None)
        for _ in range(2):
            with pytest.raises((ValueError, jax.errors.JaxRuntimeError), match=message):
                broken(jnp.ones(3), None, None, None, None)


def test_one_compilation_serves_every_rate_and_clip():
    params, batch = problem()
    total = batch["mask"].sum()

    def train_step(state, frozen, hyper, batch, rng):
        (loss, metrics), grads = step.loss_and_grads(loss_fn, state.params, batch, total)
        state, update = step.apply_gradients(state, grads, loss=loss, **hyper)
        return state, metrics | update

    compiled = parallel.jit_step(train_step)
    now = state.create(params, ADAM)
    for i in range(4):
        hyper = {"learning_rate": 0.1 * schedules.cosine(i, 4), "max_grad_norm": np.float32(1 + i)}
        now, _ = compiled(now, None, hyper, batch, jax.random.key(0))
    assert compiled.traces == 1
    short = jax.tree.map(lambda x: x[:8], batch)
    compiled(now, None, hyper, short, jax.random.key(0))
    assert compiled.traces == 2

    rates = jnp.array([0.1, 0.01])

    def one_rate(rate):
        hyper = {"learning_rate": rate, "max_grad_norm": 1.0}
        return train_step(state.create(params, ADAM), None, hyper, batch, jax.random.key(0))[0]

    swept = jax.jit(jax.vmap(one_rate))(rates)
    for i, rate in enumerate(rates):
        alone = jax.jit(one_rate)(rate)
        close(jax.tree.map(lambda x: x[i], swept.params), alone.params)  # noqa: B023


def test_states_do_not_share_parameter_buffers():
    params, _ = problem()
    one, two = state.create(params, ADAM), state.create(params, ADAM)
    bump = parallel.jit_step(lambda s, *_: (s.replace(params=jax.tree.map(lambda x: x + 1, s.params)), {}))
    bump(one, None, None, None, None)
    same(two.params, jax.tree.map(np.asarray, params))
    assert all(x.is_deleted() for x in jax.tree.leaves(one.params))
    assert jnp.asarray(two.step).dtype == jnp.int32
    with pytest.raises(TypeError, match="apply_fn"):
        two.apply_fn({})


def test_schedule_values():
    steps = [0, 5, 10, 50, 100, 150]
    assert [float(schedules.constant(i, 100)) for i in steps] == [1.0] * 6
    warm = [schedules.constant_with_warmup(i, 100) for i in steps]
    np.testing.assert_allclose(warm, [0.1, 0.55, 1, 1, 1, 1], rtol=1e-6)
    np.testing.assert_allclose(
        [schedules.constant_with_warmup(i, 100, warmup=0, initial=0.0) for i in steps], np.ones(6)
    )
    cosine = [schedules.cosine(i, 100) for i in steps]
    np.testing.assert_allclose(cosine[3:], [0.55, 0.1, 0.1], rtol=1e-6)
    assert cosine[0] == 1 and all(a >= b for a, b in itertools.pairwise(cosine))
    total = 8
    np.testing.assert_allclose(
        [schedules.linear(u - 1, total) for u in range(1, 9)], [1 - (u - 1) / total for u in range(1, 9)]
    )
    for schedule in (schedules.constant, schedules.constant_with_warmup, schedules.cosine, schedules.linear):
        host = [schedule(i, 100) for i in steps]
        assert all(type(h) in (np.float32, np.ndarray) and h.dtype == np.float32 for h in host)
        traced = jax.jit(jax.vmap(lambda i: schedule(i, 100)))(jnp.array(steps))  # noqa: B023
        assert traced.dtype == jnp.float32
        np.testing.assert_allclose(traced, host, rtol=1e-6)
