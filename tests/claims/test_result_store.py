"""Stored results are computed once and never reused for other inputs."""

import numpy as np
import pytest
from claims import code_digest, result_store

calls = []


def double(x):
    calls.append("double")
    return {"twice": np.asarray(x) * 2}


def add(offset, first, second, *, times=1):
    calls.append("add")
    return offset + (first["twice"] + second["twice"]) * times


@pytest.fixture(autouse=True)
def _no_calls():
    calls.clear()


def store(folder, context=0):
    return result_store.Store(folder, context=context)


def test_a_result_is_computed_when_it_is_read_and_only_once(tmp_path):
    first = store(tmp_path)
    a, b = first.result(double, inputs=(1.0,)), first.result(double, inputs=(2.0,))
    total = first.result(add, 10.0, inputs=(a, b), times=3)
    assert calls == []
    assert total.value == 28.0 and total.value == 28.0
    assert calls == ["double", "double", "add"]
    again = store(tmp_path)
    total = again.result(add, 10.0, inputs=tuple(again.result(double, inputs=(x,)) for x in (1.0, 2.0)), times=3)
    assert total.value == 28.0
    assert calls == ["double", "double", "add"] and again.made == []  # the inputs were not even loaded


@pytest.mark.parametrize("change", ["option", "input", "context", "code"])
def test_what_depends_on_a_change_is_computed_again(tmp_path, monkeypatch, change):
    def total(x=1.0, times=1, context=0):
        own = store(tmp_path, context)
        return own.result(
            add, 0.0, inputs=(own.result(double, inputs=(x,)), own.result(double, inputs=(2.0,))), times=times
        )

    assert total().value == 6.0
    calls.clear()
    if change == "code":
        digest = code_digest.digest
        monkeypatch.setattr(code_digest, "digest", lambda *roots: digest(*roots) + "x" * (add in roots))
    changed = {"option": {"times": 2}, "input": {"x": 3.0}, "context": {"context": 1}, "code": {}}[change]
    assert total(**changed).value == {"option": 12.0, "input": 10.0, "context": 6.0, "code": 6.0}[change]
    expected = {"option": ["add"], "input": ["double", "add"], "context": ["double", "double", "add"], "code": ["add"]}
    assert calls == expected[change]


def arms():
    return {"16 epochs": {"b": 1.0, "a": 2.0}, "2 epochs": np.ones(2)}


def test_dictionaries_keep_their_order(tmp_path):
    for _ in range(2):
        found = store(tmp_path).result(arms, inputs=()).value
        assert list(found) == ["16 epochs", "2 epochs"] and list(found["16 epochs"]) == ["b", "a"]


def test_an_interrupted_computation_leaves_nothing(tmp_path):
    def fails():
        raise KeyboardInterrupt

    own = store(tmp_path)
    with pytest.raises(ValueError, match="not a function of a module"):
        own.result(fails, inputs=())
    broken = own.result(add, 0.0, inputs=({}, {}))
    with pytest.raises(KeyError):
        _ = broken.value
    assert not list(tmp_path.rglob("*.pickle"))
