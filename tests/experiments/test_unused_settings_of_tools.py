"""Settings of the commands that train nothing change what is measured or written, or are refused by name."""

import dataclasses
import functools
import json
import types
import typing
from typing import Any
from unittest import mock

import accelerator
import benchmark
import dry_run
import jax
import numpy as np
import plan
import pytest
import rewardbench
import torture
from benchmarks.accelerator_rows import report_table
from launch import initial_model, setting_checks, settings
from launch.settings import SettingError
from planning import abstract_steps, plan_settings, planner

from rlhf_jax import lm, parallel
from rlhf_jax.data import tokenizers


def is_refused(command: Any, changes: dict[str, Any], name: str) -> bool:
    """Returns whether a command refuses a setting by its name."""
    try:
        dry_run.parse(command, [], changes)
    except SettingError as error:
        assert str(error).replace("--no-", "--").startswith(f"{setting_checks.flag_name(name)} has no effect"), error
        return True
    return False


# ------------------------------------------------------------------------------------------------------------ plan.py

PLAN: dict[str, Any] = {"batch": 8, "length": 32, "completions": 2, "prompt": 16, "response": 8, "minibatches": 2}
PLAN |= {"epochs": 2, "micro_batches": 2, "dtype": "float32", "params": "bfloat16", "moment": "bfloat16"}
PLAN |= {"frozen": "bfloat16", "remat": "full", "attention": "einsum", "model": "gpt2"}
OF_THE_REPORT = {"stage", "topology", "memory", "tries", "json"}
"""Settings that test_plan.py covers, because they change which chips are used and what is printed."""


def program(made: plan_settings.Plan) -> str:
    """Returns a digest of the step that a plan compiles and of the numbers that are computed before that."""
    record = []

    def build(name: str, made: Any, step: Any, args: Any, mesh: Any, **options: Any) -> Any:
        record.append(dry_run.digest(name, step, [str(each) for each in jax.tree.leaves(args)]))
        return original(name, made, step, args, mesh, **options)

    original = abstract_steps._program  # pyright: ignore
    shape = tuple(dataclasses.asdict(made.mesh).values())
    mesh: Any = jax.sharding.AbstractMesh(tuple(max(size, 1) for size in shape), parallel.AXES)
    with mock.patch.object(abstract_steps, "_program", build):
        built = abstract_steps.build(made, planner.load_config(made), mesh)
    return dry_run.digest(record, built.kept, built.tokens, built.model_flops, built.loops)


@pytest.mark.parametrize("stage", typing.get_args(plan_settings.Stage))
def test_settings_of_a_plan_change_the_program_or_are_refused(stage):
    base: dict[str, Any] = {"stage": stage, "model": "tiny"}
    made = dry_run.parse(plan, [], base)
    small = {"batch": 16, "length": 64, "prompt": 32, "response": 32}
    before = program(dataclasses.replace(made, **small))
    names = set(setting_checks.field_names(made)) - OF_THE_REPORT
    assert names == {*PLAN, *(f"mesh.{axis}" for axis in parallel.AXES)}, "a new setting needs another value in PLAN"
    unread = []
    for name in sorted(names):
        changes = {name: PLAN.get(name, 2)}
        if not is_refused(plan, base | changes, name):
            changed = dry_run.with_changes(dataclasses.replace(made, **small), changes)
            unread += [name] if program(changed) == before else []
    assert not unread


# --------------------------------------------------------------------------------------------------------- torture.py

TORTURE = {"kills": 5, "terms": 3, "flips": 7, "truncations": 2, "deletions": 1, "stages": ("sft",), "steps": 30}
TORTURE |= {"save_every": 3, "jobs": 1, "seed": 1, "out": "elsewhere"}


def test_settings_of_the_fault_injection_change_the_runs(tmp_path):
    report = types.SimpleNamespace(failures=[], resumed=0, interruptions=0, asdict=dict)

    def calls(made):
        record: list[Any] = []

        def note(name, result):
            def call(*args, **options):
                record.append((name, repr(args[:1] + args[2:]), options.get("kills"), options.get("terms")))
                return result

            return call

        def folder(out, kind):
            record.append(out)
            return tmp_path

        class Threads(torture.concurrent.futures.ThreadPoolExecutor):
            def __init__(self, jobs):
                record.append(("jobs", jobs))
                super().__init__(1)

        with (
            mock.patch.object(torture.interruptions, "run_reference", note("reference", "reference")),
            mock.patch.object(torture.interruptions, "interrupt", note("interrupt", report)),
            mock.patch.object(torture.corruption, "corrupt", note("corrupt", report)),
            mock.patch.object(torture, "_interruptions_table", lambda *_: ""),
            mock.patch.object(torture, "_corruption_table", lambda *_: ""),
            mock.patch.object(torture.concurrent.futures, "ThreadPoolExecutor", Threads),
            mock.patch.object(torture.run_folder, "free_folder", folder),
            mock.patch.object(torture.run_folder, "write_json", lambda *_: None),
        ):
            torture.run(made)
        return record

    made = torture.parse([])
    before = calls(made)
    assert {field.name for field in dataclasses.fields(made)} == set(TORTURE)
    for name, value in TORTURE.items():
        assert calls(dataclasses.replace(made, **{name: value})) != before, name


# ----------------------------------------------------------------------------------------------------- rewardbench.py


def test_settings_of_rewardbench_change_the_scoring(tmp_path):
    tokenizer = tokenizers.word_level(["a", "b", "c"])
    cfg = lm.LMConfig(vocab_size=len(tokenizer), n_layers=1, d_model=8, n_heads=2, d_mlp=8, max_length=64)
    params = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), lm.abstract(cfg, head=True))
    lm.save(tmp_path / "model", cfg, params, tokenizer)
    rows = [{"prompt": "a b " * (1 + i % 5), "chosen": "a " * (1 + i % 9), "rejected": "c"} for i in range(20)]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    model = initial_model.load(str(tmp_path / "model"), kind=initial_model.REWARD_MODEL)

    def observe(**changes):
        record = []

        def read(path, *, counts):
            record.append(counts.max_dropped)
            return original(path, counts=counts)

        def call(function, params, tokens_BL, mask_BL):
            record.append((np.shape(tokens_BL), function.keywords["cfg"].dtype))
            return np.asarray(mask_BL).sum(axis=1) * np.float32(0.1) + tokens_BL[:, -1]

        original = rewardbench.read
        made = rewardbench.RewardBenchSettings(
            model="model",
            data=rewardbench.Data(str(tmp_path / "pairs.jsonl"), changes.pop("max_dropped", 0.5)),
            compute=settings.Compute(changes.pop("dtype", None)),
            **{"out": str(tmp_path / "out")} | changes,  # type: ignore
        )
        with (
            mock.patch.object(rewardbench, "read", read),
            mock.patch.object(rewardbench.initial_model, "load", lambda *_, **__: model),
            mock.patch.object(rewardbench.parallel, "JitStep", lambda function, **_: functools.partial(call, function)),
            mock.patch.object(rewardbench.run_folder, "create_folder", lambda path, made: record.append(path)),
            mock.patch.object(rewardbench, "_write", lambda *_: None),
            mock.patch.object(rewardbench, "measure", lambda scored, bins: record.append((bins, len(scored.records)))),
            mock.patch.object(rewardbench, "accuracy_table", lambda _: ""),
        ):
            rewardbench.run(made)
        return record

    changes: dict[str, Any] = {"out": str(tmp_path / "new"), "batch": 5, "max_length": 16, "bins": 3}
    changes |= {"max_dropped": 0.9, "dtype": "bfloat16"}
    groups = {"model", "data", "compute"}
    fields = {field.name for field in dataclasses.fields(rewardbench.RewardBenchSettings)} - groups
    assert fields | {"max_dropped", "dtype"} == set(changes)
    before = observe()
    assert [name for name, value in changes.items() if observe(**{name: value}) == before] == []


# ---------------------------------------------------------------------------------- benchmark.py and accelerator.py

BENCHMARK = {"only": "sft-s", "repeats": 2, "quick": True, "out": "new", "peers": "more", "ours_only": True}
BENCHMARK |= {"together": False, "cpu": True, "tunix_python": "p", "torch_index": "i", "tunix_extra": "e"}


@pytest.mark.parametrize("install", [None, "folder"])
def test_settings_of_the_benchmark_change_the_measurement_or_are_refused(install, tmp_path):
    def calls(changes):
        record: list[Any] = []
        paths = {name: tmp_path / changes[name] for name in ("out", "peers", "install") if changes.get(name)}
        made = dataclasses.replace(benchmark.Settings(), **changes | paths)

        def measure(*args, options, **_):
            record.append((args, options))
            return {}

        with (
            mock.patch.object(benchmark, "parse", lambda _: made),
            mock.patch.object(benchmark.interleaved_runs, "has_accelerator", lambda: True),
            mock.patch.object(benchmark.interleaved_runs, "measure", measure),
            mock.patch.object(benchmark.speed_ratios, "compare", lambda *_: []),
            mock.patch.object(benchmark.speed_ratios, "programs", lambda *_: []),
            mock.patch.object(benchmark, "_write", lambda out, results: record.append(out)),
            mock.patch.object(
                benchmark.peer_environments, "install", lambda *a, **o: record.append((a, {**o, "say": None}))
            ),
        ):
            benchmark.main([])
        return repr(record)

    base: dict[str, Any] = {} if install is None else {"install": install}
    assert {field.name for field in dataclasses.fields(benchmark.Settings)} == {*BENCHMARK, "install"}
    before = calls(base)
    for name, value in BENCHMARK.items():
        assert is_refused(benchmark, base | {name: value}, name) or calls(base | {name: value}) != before, name


@pytest.mark.parametrize("show", [False, True])
def test_settings_of_the_accelerator_change_the_measurement_or_are_refused(show, tmp_path, capsys):
    for name in ("old.jsonl", "new.jsonl"):
        (tmp_path / name).write_text(json.dumps({"run": name, "row": "sft", "row_seconds": 0.0}) + "\n")

    def calls(*arguments):
        record: list[Any] = []

        def measure(names, path, **options):
            record.append((names, path, {k: v for k, v in options.items() if k not in ("run", "on_row")}))

        with (
            mock.patch.object(accelerator.row_runner, "measure", measure),
            mock.patch.object(report_table, "markdown", lambda records: record.append(records) or ""),
        ):
            accelerator.main([*["--show"] * show, "--out", str(tmp_path / "old.jsonl"), *arguments])
        return record

    for arguments in (("--rows", "dpo"), ("--quick",), ("--minutes", "2")):
        if show:
            with pytest.raises(SystemExit):
                calls(*arguments)
            assert f"{arguments[0]} has no effect with --show" in capsys.readouterr().err
        else:
            assert calls(*arguments) != calls()
    assert calls("--out", str(tmp_path / "new.jsonl")) != calls()
