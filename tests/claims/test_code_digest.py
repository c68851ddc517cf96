"""Digests of code change with the code that a function can use, and with nothing else."""

import importlib
import sys
import textwrap

import pytest
from claims import code_digest, model_stages, trial

FILES = {
    "__init__": "from toy.inner import exported\nimport toy.outer as outer_alias",
    "inner": """
        LIMIT = 3
        UNUSED = 4

        def exported(x):
            return min(x, LIMIT)

        def unused(x):
            return UNUSED * x
    """,
    "base": """
        class Base:
            size = 1

            def shared(self):
                return self.size

            def other(self):
                return 2
    """,
    "outer": """
        import functools
        from toy import exported, base

        class Thing(base.Base):
            def __init__(self):
                self.kept = 1

            def used(self):
                return self.shared()

            def never(self):
                return 0

        @functools.cache
        def run(x: int, y: float = 1.0) -> int:
            \"\"\"Runs.\"\"\"
            from toy import lazy

            return exported(x) + Thing().used() + lazy.late()

        if __name__ == "__main__":
            run(1)
    """,
    "lazy": "def late():\n    return helper()\n\ndef helper():\n    return 5\n",
}


@pytest.fixture
def toy(tmp_path, monkeypatch):
    """Writes the package ``toy``; returns a function that replaces text in a file and computes the new digest."""
    folder = tmp_path / "toy"
    folder.mkdir()
    for name, text in FILES.items():
        (folder / f"{name}.py").write_text(textwrap.dedent(text))
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(code_digest, "_PROJECT", {"toy"})
    importlib.invalidate_caches()

    def digest(name="outer", old="", new=""):
        path = folder / f"{name}.py"
        before = path.read_text()
        assert old in before
        path.write_text(before.replace(old, new, 1) if old else before)
        code_digest._read.cache_clear()
        found = code_digest.digest(sys.modules["toy.outer"].run)
        path.write_text(before)
        return found

    importlib.import_module("toy.outer")
    yield digest
    code_digest._read.cache_clear()
    for name in [each for each in sys.modules if each.partition(".")[0] == "toy"]:
        del sys.modules[name]


@pytest.mark.parametrize(
    ("name", "old", "new"),
    [
        ("inner", "LIMIT = 3", "LIMIT = 4"),
        ("inner", "min(x, LIMIT)", "max(x, LIMIT)"),
        ("base", "return self.size", "return self.size + 1"),
        ("base", "size = 1", "size = 2"),
        ("outer", "self.kept = 1", "self.kept = 2"),
        ("outer", "y: float = 1.0", "y: float = 2.0"),
        ("outer", "@functools.cache", "@functools.lru_cache(2)"),
        ("lazy", "return 5", "return 6"),
        ("__init__", "from toy.inner import exported", "from toy.inner import unused as exported"),
    ],
)
def test_a_change_of_code_that_is_used_changes_the_digest(toy, name, old, new):
    assert toy(name, old, new) != toy()


@pytest.mark.parametrize(
    ("name", "old", "new"),
    [
        ("inner", "UNUSED = 4", "UNUSED = 5"),
        ("inner", "return UNUSED * x", "return -x"),
        ("base", "return 2", "return 3"),
        ("outer", "return 0", "return 1"),
        ("outer", '"""Runs."""', '"""Does it.  """  # now'),
        ("outer", "x: int", "x: object"),
        ("outer", "    run(1)", "    run(2)"),
        ("lazy", "    return helper()", "\n    # calls it\n    return helper()"),
    ],
)
def test_other_changes_do_not(toy, name, old, new):
    assert toy(name, old, new) == toy()


STAGES = ("pretrain", "fine_tune", "compare", "train_reward_model", "train_policy", "answer")


def digests_with(monkeypatch, module, old, new):
    """Returns the digest of each stage if ``old`` were ``new`` in a module of the library."""
    path, read = importlib.import_module(module).__file__, code_digest._text
    assert path is not None
    assert old in read(path)
    monkeypatch.setattr(code_digest, "_text", lambda file: read(file).replace(old, new) if file == path else read(file))
    code_digest._read.cache_clear()
    found = {stage: code_digest.digest(getattr(model_stages, stage), trial.make_trial) for stage in STAGES}
    monkeypatch.undo()
    code_digest._read.cache_clear()
    return found


@pytest.mark.parametrize(
    ("module", "old", "new", "rebuilt"),
    [
        ("rlhf_jax.losses.comparison", "jax.nn.softplus", "jax.nn.relu", {"train_reward_model"}),
        ("rlhf_jax.losses.policy", "jnp.maximum(unclipped, clipped)", "unclipped", {"train_policy"}),
        ("rlhf_jax.simulation.labelers", ">= pool.lapse", "> pool.lapse", {"compare"}),
        ("rlhf_jax.simulation.labelers", "temperature=", "temperature =", set()),
        ("rlhf_jax.train.sft", "losses.next_token(batch", "-losses.next_token(batch", {"pretrain", "fine_tune"}),
    ],
)
def test_a_change_of_a_loss_rebuilds_the_stages_that_use_it(monkeypatch, module, old, new, rebuilt):
    before = digests_with(monkeypatch, module, "import", "import")
    after = digests_with(monkeypatch, module, old, new)
    assert {stage for stage in STAGES if before[stage] != after[stage]} == rebuilt


def executed(function):
    """Returns the functions of this project that ``function`` calls, and its result."""
    called = set()

    def note(frame, event, argument):
        code, module = frame.f_code, frame.f_globals.get("__name__", "")
        if event == "call" and module.partition(".")[0] in code_digest._PROJECT:
            called.add((module, code.co_qualname.partition(".<locals>")[0]))

    sys.setprofile(note)
    try:
        result = function()
    finally:
        sys.setprofile(None)
    return called, result


def unknown(called, reached):
    """Returns the functions that were called and are not in a digest, except those that only store results."""
    storing = ("claims.result_store", "claims.code_digest")
    return {
        each
        for each in called - set(reached)
        if each[0] not in storing and "<" not in each[1] and each[1] != "__create_fn__"
    }


@pytest.mark.parametrize("stages", [(), pytest.param(STAGES, marks=pytest.mark.slow)], ids=["data", "all stages"])
def test_all_code_that_a_stage_runs_is_in_its_digest(tmp_path, stages):
    called, tried = executed(lambda: trial.make_trial(0, folder=tmp_path, quick=True))
    assert not unknown(called, code_digest.closure([trial.make_trial]))
    made = {}
    for stage in stages:
        inputs = {
            "pretrain": (),
            "fine_tune": ("pretrain",),
            "compare": ("fine_tune", "fine_tune"),
            "train_reward_model": ("fine_tune", "compare"),
            "train_policy": ("fine_tune", "train_reward_model"),
            "answer": ("train_policy", "fine_tune", "train_reward_model"),
        }[stage]
        options = {"epochs": 1, "mix": 0.1} if stage == "fine_tune" else {}

        def run(stage=stage, inputs=inputs, options=options):
            trial._programs.cache_clear()  # so that steps are traced again
            own = trial.make_trial(0, folder=tmp_path, quick=True)
            return own.result(getattr(model_stages, stage), *[made[name] for name in inputs], **options).value, own

        called, (value, tried) = executed(run)
        made[stage] = tried.result(getattr(model_stages, stage), *[made[name] for name in inputs], **options)
        assert value is not None
        reached = code_digest.closure([getattr(model_stages, stage), trial.make_trial])
        assert unknown(called, reached) <= {("claims.trial", "Trial.result")}
