"""A plan from its settings: checked, compiled, read; and what to change where it does not fit."""

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
from launch.settings import SettingError
from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from planning import abstract_steps, chips, flops, hlo, roofline
from planning.plan_settings import Plan
from rlhf_jax import lm
from rlhf_jax.lm import config

_UNITS = {"K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


def model(plan: Plan) -> lm.LMConfig:
    """The architecture that the plan names, with the plan's changes; raises SettingError for one that cannot be."""
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
    """Raise SettingError for sizes that are impossible or do not divide."""
    for name in ("batch", "length", "completions", "prompt", "response", "minibatches", "epochs", "micro_batches"):
        if getattr(plan, name) < 1:
            raise SettingError(f"--{name.replace('_', '-')} is {getattr(plan, name)}; it must be at least 1")
    answers = plan.stage == "dpo" or plan.stage.startswith("ppo")
    width, said = (plan.prompt + plan.response, "--prompt + --response") if answers else (plan.length, "--length")
    if width > cfg.max_length:
        raise SettingError(f"{said} is {width} tokens, more than the {cfg.max_length} that --model {plan.model} reads")
    minibatches = plan.minibatches if plan.stage in ("ppo", "ppo-update") else 1
    micro = 1 if plan.stage == "ppo-collect" else plan.micro_batches
    rows = mesh.shape["data"] * mesh.shape["fsdp"]
    if plan.batch % (minibatches * micro * rows):
        parts = [(minibatches, "minibatches"), (micro, "micro-batches"), (rows, "chips (data x fsdp)")]
        among = " x ".join(f"{n} {name}" for n, name in parts if n > 1)
        raise SettingError(f"--batch {plan.batch} does not divide over {among}")


def find(plan: Plan, *, cfg: lm.LMConfig | None = None, out: Console | None = None) -> roofline.Found:
    """Compile what the plan asks for and read what came of it; raises SettingError for what cannot be asked.

    ``cfg`` stands in the place of the model that the plan names.
    """
    kind, chip = chips.chip_of(plan)
    devices = chips.devices(plan)
    mesh = chips.make_mesh(plan, devices)
    cfg = model(plan) if cfg is None else cfg
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
    with _telling(f"compiling {program.name} of {plan.model} for {len(devices)} x {kind}", out):
        try:
            compiled = program.lower().compile()
        except jax.errors.JaxRuntimeError as error:
            return _refused(str(error), known, time.perf_counter() - began)
    return _found(compiled, known, program, cfg, chip, time.perf_counter() - began)


def _found(
    compiled: Any, known: dict[str, Any], program: abstract_steps.Program, cfg: lm.LMConfig, chip: Any, took: float
) -> roofline.Found:
    memory = compiled.memory_analysis()
    arguments = sum(n for kind, n in program.kept.items() if kind != "KV cache")
    other = memory.argument_size_in_bytes - arguments + memory.output_size_in_bytes - memory.alias_size_in_bytes
    kept = program.kept | {"batch, results, padding": max(0, other)}
    temporaries = max(0, memory.temp_size_in_bytes - program.kept.get("KV cache", 0))
    code = memory.generated_code_size_in_bytes
    needed = float(sum(kept.values()) + temporaries + code)
    read = hlo.read(compiled.as_text(), open_loops=program.loops, mesh=known["mesh"])
    cost = compiled.cost_analysis() or {}
    return roofline.Found(
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
        compile_seconds=took,
    )


def _refused(text: str, known: dict[str, Any], took: float) -> roofline.Found:
    """What a compiler that found too little memory says; raises SettingError for any other refusal."""
    first = next((line.strip() for line in text.splitlines() if line.strip()), "no reason given")
    used = re.search(r"[Uu]sed ([\d.]+)([KMGT]) of [\d.]+[KMGT] hbm", text)
    kept = 0
    if not used:
        used = re.search(r"temporaries \(([\d.]+)([KMGT])\) exceeds available HBM \([\d.]+[KMGT]\)", text)
        kept = sum(known["kept"].values())
    if "RESOURCE_EXHAUSTED" not in text:
        raise SettingError(f"the compiler refused this program: {first}")
    return roofline.Found(
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
        compile_seconds=took,
        error=used.group(0) if used else first[:300],
    )


def changes(plan: Plan, found: roofline.Found) -> Iterator[tuple[str, Plan]]:
    """What to try where a plan does not fit, the cheapest first: in flags, and as a plan."""
    trains = plan.stage != "ppo-collect"
    rows = found.mesh["data"] * found.mesh["fsdp"]
    minibatches = plan.minibatches if plan.stage in ("ppo", "ppo-update") else 1
    now = plan
    if trains and plan.remat != "full":
        now = dataclasses.replace(now, remat="full")
        yield _flags(now, plan), now
    if found.mesh["data"] > 1:
        wide = dataclasses.replace(now.mesh, data=1, fsdp=found.mesh["data"] * found.mesh["fsdp"])
        now = dataclasses.replace(now, mesh=wide)
        yield _flags(now, plan), now
    most = plan.batch // (minibatches * rows)
    for micro in (2, 4, 8, 16, 32):
        if trains and micro > plan.micro_batches and most % micro == 0:
            now = dataclasses.replace(now, micro_batches=micro)
            yield _flags(now, plan), now
    if now.mesh.fsdp > 1 and now.mesh.fsdp % 2 == 0:
        half = dataclasses.replace(now.mesh, fsdp=now.mesh.fsdp // 2, tensor=now.mesh.tensor * 2)
        now = dataclasses.replace(now, mesh=half)
        yield _flags(now, plan), now
    if plan.frozen == "float32" and (plan.stage == "dpo" or plan.stage.startswith("ppo")):
        now = dataclasses.replace(now, frozen="bfloat16")
        yield _flags(now, plan), now
    if trains and plan.moment == "float32":
        now = dataclasses.replace(now, moment="bfloat16")
        yield _flags(now, plan), now


def suggest(plan: Plan, found: roofline.Found, *, out: Console | None = None) -> list[str]:
    """The nearest change that fits, compiled to see that it does; what was tried, where none of them did."""
    tried = []
    for flags, changed in changes(plan, found):
        if len(tried) >= plan.tries:
            tried.append(f"{flags} (not tried)")
            break
        try:
            made = find(changed, out=out)
        except SettingError:
            continue
        if made.fits:
            needed = "" if made.needed is None else f": {roofline.size(made.needed)} a chip"
            return [f"{flags}, which fits{needed}"]
        tried.append(f"{flags}, which is not enough" + (f" ({roofline.size(made.needed)})" if made.needed else ""))
    return [*tried, "more chips, or a shorter row"]


def _flags(now: Plan, before: Plan) -> str:
    """The flags in which one plan differs from another."""
    parts = []
    for field in dataclasses.fields(Plan):
        new, old = getattr(now, field.name), getattr(before, field.name)
        if field.name == "mesh":
            sizes = [
                (f"mesh.{axis.name}", getattr(new, axis.name), getattr(old, axis.name))
                for axis in dataclasses.fields(new)
            ]
        else:
            sizes = [(field.name, new, old)]
        parts += [f"--{name.replace('_', '-')} {value}" for name, value, was in sizes if value != was]
    return " ".join(parts)


@contextlib.contextmanager
def _telling(text: str, out: Console | None) -> Iterator[None]:
    """A line while something takes minutes, with the time that it has taken."""
    if out is None or not out.is_terminal:
        if out is not None:
            out.print(f"{text} ...", highlight=False, soft_wrap=True)
        yield
        return
    columns = (SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
    with Progress(*columns, console=out, transient=True) as progress:
        progress.add_task(text, total=None)
        yield
