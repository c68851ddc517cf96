"""Compiles and measures a plan, and suggests settings that fit if the plan does not."""

from __future__ import annotations

import contextlib
import dataclasses
import pathlib
import re
import time
from collections.abc import Iterator
from typing import Any

import jax
from jax.sharding import Mesh
from launch.setting_checks import require
from launch.settings import SettingError
from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from planning import abstract_steps, chips, flops, hlo, roofline
from planning.plan_settings import Plan
from rlhf_jax import lm
from rlhf_jax.lm import config

_UNITS = {"K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


def load_config(plan: Plan) -> lm.LMConfig:
    """Returns the configuration of the plan's model; raises SettingError if the model does not exist."""
    path = pathlib.Path(plan.model)
    try:
        if plan.model in config.PRESETS:
            cfg = lm.LMConfig.preset(plan.model)
        elif path.exists():
            cfg = lm.load_config(path.parent if path.is_file() else path)
        else:
            known = ", ".join(config.PRESETS)
            raise SettingError(f"--model is {plan.model!r}; it must be one of {known}, or a folder with a config.json")
        changes = {name: getattr(plan, name) for name in ("remat", "attention") if getattr(plan, name) is not None}
        return dataclasses.replace(cfg, dtype=plan.dtype, **changes)
    except (ValueError, OSError) as error:
        if isinstance(error, SettingError):
            raise
        raise SettingError(f"--model {plan.model} cannot be used: {error}") from error


def check(plan: Plan, cfg: lm.LMConfig, mesh: Mesh) -> None:
    """Raises SettingError for sizes below 1, rows that are too long, and batches that cannot be split evenly."""
    for name in ("batch", "length", "completions", "prompt", "response", "minibatches", "epochs", "micro_batches"):
        require(getattr(plan, name) >= 1, plan, name, "at least 1")
    answers = plan.stage == "dpo" or plan.stage.startswith("ppo")
    width, flags = (plan.prompt + plan.response, "--prompt + --response") if answers else (plan.length, "--length")
    if width > cfg.max_length:
        raise SettingError(
            f"{flags} is {width} tokens; it must be at most {cfg.max_length}, the limit of --model {plan.model}"
        )
    minibatches = plan.minibatches if plan.stage in ("ppo", "ppo-update") else 1
    micro = 1 if plan.stage == "ppo-collect" else plan.micro_batches
    rows = mesh.shape["data"] * mesh.shape["fsdp"]
    if plan.batch % (divisor := minibatches * micro * rows):
        parts = [(minibatches, "minibatches"), (micro, "micro-batches"), (rows, "chips (data x fsdp)")]
        product = " x ".join(f"{n} {name}" for n, name in parts if n > 1)
        raise SettingError(f"--batch is {plan.batch}; it must be a multiple of {divisor} ({product})")


def measure(plan: Plan, *, cfg: lm.LMConfig | None = None, out: Console | None = None) -> roofline.Estimate:
    """Compiles the plan's program and returns its memory, FLOPs, collectives and times.

    Args:
        plan: The plan.
        cfg: The model's configuration; loaded from ``plan.model`` by default.
        out: A console on which to show which program is being compiled; None for no output.

    Raises:
        SettingError: The plan is invalid, or the compiler rejects the program for a reason other than memory.
    """
    kind, chip = chips.chip_of(plan)
    devices = chips.devices(plan)
    mesh = chips.make_mesh(plan, devices)
    cfg = load_config(plan) if cfg is None else cfg
    check(plan, cfg, mesh)
    program = abstract_steps.build(plan, cfg, mesh)
    capacity = chips.memory(chip, devices) if plan.memory is None else plan.memory * 2**30
    jaxpr = program.traced()
    platform = "tpu" if chip is not None else devices[0].platform.replace("gpu", "cuda")
    known: dict[str, Any] = {
        "program": program.name,
        "model": plan.model,
        "parameters": lm.count(cfg),
        "chip": kind,
        "chips": len(devices),
        "mesh": dict(mesh.shape),
        "capacity": capacity,
        "kept": program.kept,
        "flops": flops.count(jaxpr, platform=platform, open_loops=program.loops) / len(devices),
        "model_flops": program.model_flops / len(devices),
        "six_nt": 6.0 * lm.count(cfg) * program.tokens / len(devices),
    }
    began = time.perf_counter()
    with _progress(f"compiling {program.name} of {plan.model} for {len(devices)} x {kind}", out):
        try:
            compiled = program.lower().compile()
        except jax.errors.JaxRuntimeError as error:
            return _out_of_memory(str(error), known, time.perf_counter() - began)
    return _estimate(compiled, known, program, cfg, chip, time.perf_counter() - began)


def _estimate(
    compiled: Any, known: dict[str, Any], program: abstract_steps.Program, cfg: lm.LMConfig, chip: Any, seconds: float
) -> roofline.Estimate:
    memory = compiled.memory_analysis()
    arguments = sum(n for kind, n in program.kept.items() if kind != "KV cache")
    other = memory.argument_size_in_bytes - arguments + memory.output_size_in_bytes - memory.alias_size_in_bytes
    kept = program.kept | {"batch, results, padding": max(0, other)}
    temporaries = max(0, memory.temp_size_in_bytes - program.kept.get("KV cache", 0))
    code = memory.generated_code_size_in_bytes
    needed = float(sum(kept.values()) + temporaries + code)
    read = hlo.read(compiled.as_text(), open_loops=program.loops, mesh=known["mesh"])
    cost = compiled.cost_analysis() or {}
    return roofline.Estimate(
        **{**known, "kept": kept},
        temporaries=temporaries,
        code=code,
        needed=needed,
        fits=known["capacity"] is None or needed <= known["capacity"],
        compiler_flops=cost.get("flops"),
        bytes_moved=read.bytes_moved,
        collectives=read.collectives,
        warnings=roofline.unneeded(read.collectives, cfg, known["mesh"]),
        seconds=roofline.roofline(chip, known["flops"], read.bytes_moved, read.collectives),
        compile_seconds=seconds,
    )


def _out_of_memory(text: str, known: dict[str, Any], seconds: float) -> roofline.Estimate:
    """Returns the estimate of a program that the compiler rejects for lack of memory; raises SettingError for other
    errors."""
    first = next((line.strip() for line in text.splitlines() if line.strip()), "no reason given")
    used = re.search(r"[Uu]sed ([\d.]+)([KMGT]) of [\d.]+[KMGT] hbm", text)
    kept = 0
    if not used:
        used = re.search(r"temporaries \(([\d.]+)([KMGT])\) exceeds available HBM \([\d.]+[KMGT]\)", text)
        kept = sum(known["kept"].values())
    if "RESOURCE_EXHAUSTED" not in text:
        raise SettingError(f"the compiler rejected the program: {first}")
    return roofline.Estimate(
        **known,
        temporaries=None,
        code=None,
        needed=kept + float(used.group(1)) * _UNITS[used.group(2)] if used else None,
        fits=False,
        compiler_flops=None,
        bytes_moved=None,
        collectives=[],
        warnings=[],
        seconds={},
        compile_seconds=seconds,
        error=used.group(0) if used else first[:300],
    )


def _changes(plan: Plan, estimate: roofline.Estimate) -> Iterator[Plan]:
    """Yields plans that should need less memory; each adds a change to the previous plan, the cheapest change first."""
    trains = plan.stage != "ppo-collect"
    rows = estimate.mesh["data"] * estimate.mesh["fsdp"]
    minibatches = plan.minibatches if plan.stage in ("ppo", "ppo-update") else 1
    if trains and plan.remat != "full":
        yield (plan := dataclasses.replace(plan, remat="full"))
    if estimate.mesh["data"] > 1:
        yield (plan := dataclasses.replace(plan, mesh=dataclasses.replace(plan.mesh, data=1, fsdp=rows)))
    most = plan.batch // (minibatches * rows)
    for micro in (2, 4, 8, 16, 32):
        if trains and micro > plan.micro_batches and most % micro == 0:
            yield (plan := dataclasses.replace(plan, micro_batches=micro))
    if plan.mesh.fsdp > 1 and plan.mesh.fsdp % 2 == 0:
        half = dataclasses.replace(plan.mesh, fsdp=plan.mesh.fsdp // 2, tensor=plan.mesh.tensor * 2)
        yield (plan := dataclasses.replace(plan, mesh=half))
    if plan.frozen == "float32" and (plan.stage == "dpo" or plan.stage.startswith("ppo")):
        yield (plan := dataclasses.replace(plan, frozen="bfloat16"))
    if trains and plan.moment == "float32":
        yield dataclasses.replace(plan, moment="bfloat16")


def suggest(plan: Plan, estimate: roofline.Estimate, *, out: Console | None = None) -> list[str]:
    """Compiles up to ``plan.tries`` similar plans until one fits.

    Returns a line with the changed flags of the plan that fits or, if none fits, one line per attempt and other advice.
    """
    tried = []
    for changed in _changes(plan, estimate):
        flags = _flags(changed, plan)
        if len(tried) >= plan.tries:
            tried.append(f"{flags} (not compiled)")
            break
        try:
            attempt = measure(changed, out=out)
        except SettingError:
            continue
        needed = "" if attempt.needed is None else f": {roofline.size(attempt.needed)} per chip"
        if attempt.fits:
            return [f"{flags}, which fits{needed}"]
        tried.append(f"{flags}, which does not fit either{needed}")
    return [*tried, "more chips, or shorter rows"]


def _flags(changed: Plan, plan: Plan) -> str:
    """Returns the flags that turn ``plan`` into ``changed``."""

    def flags(settings: Plan) -> dict[str, Any]:
        values = dataclasses.asdict(settings)
        return values | {f"mesh.{axis}": size for axis, size in values.pop("mesh").items()}

    before = flags(plan)
    return " ".join(
        f"--{name.replace('_', '-')} {value}" for name, value in flags(changed).items() if value != before[name]
    )


@contextlib.contextmanager
def _progress(text: str, out: Console | None) -> Iterator[None]:
    """Shows ``text`` on a terminal with the elapsed time; prints it to any other console."""
    if out is None or not out.is_terminal:
        if out is not None:
            out.print(f"{text} ...", highlight=False, soft_wrap=True)
        yield
        return
    columns = (SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
    with Progress(*columns, console=out, transient=True) as progress:
        progress.add_task(text, total=None)
        yield
