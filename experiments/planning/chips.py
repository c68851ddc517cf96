"""Chips: what is publicly said of them, and the devices of a topology or of this machine."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
from jax.sharding import Mesh
from launch.settings import SettingError

from planning.plan_settings import Plan
from rlhf_jax import parallel


class Chip(NamedTuple):
    """Peaks of one device as jax counts them: a chip, or on tpu7x one of a chip's two."""

    flops: float
    """bfloat16 products a second."""
    hbm: float
    """Bytes of memory."""
    bandwidth: float
    """Of that memory, bytes a second."""
    link: float
    """Bytes a second and direction to one neighbour; a ring along an axis of a torus uses two links."""


CHIPS = {
    "v4": Chip(275e12, 32 * 2**30, 1228e9, 50e9),
    "v5e": Chip(197e12, 16 * 2**30, 819e9, 50e9),
    "v5p": Chip(459e12, 95 * 2**30, 2765e9, 100e9),
    "v6e": Chip(918e12, 32 * 2**30, 1638e9, 100e9),
    "tpu7x": Chip(2307e12 / 2, 96 * 2**30, 7380e9 / 2, 100e9),
}
"""Peak numbers of Google Cloud's pages on each (docs.cloud.google.com/tpu/docs/v4, v5e, v5p, v6e and tpu7x; read in
2026). A link is the interconnect of a chip divided by its links and their two directions."""

HERE = ("cpu", "gpu")
"""What may stand in the place of a topology."""

INSTALL = "planning for TPUs needs their compiler, which needs no TPU: pip install 'rlhf_jax[tpu]' (Linux, 0.2 GB)"


def prepare() -> None:
    """What the TPU's compiler wants to be told where there is no TPU, before jax looks for one."""
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v5litepod-1")  # no matter which: it is not used, and asked for
    os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")  # it locks what is not there


def chip_of(plan: Plan) -> tuple[str, Chip | None]:
    """The kind of chip that the plan is for, and its peaks where they are known.

    Raises:
        SettingError: The topology is of no known kind.
    """
    if plan.topology is None or plan.topology.partition(":")[0] in HERE:
        return devices(plan)[0].device_kind, None
    kind = plan.topology.partition(":")[0]
    if kind not in CHIPS or ":" not in plan.topology:
        raise SettingError(
            f"--topology is {plan.topology!r}; it must be one of {', '.join(f'{name}:AxB' for name in CHIPS)} "
            "(v4, v5p and tpu7x have three sizes), cpu, cpu:N for N of them, or gpu"
        )
    return kind, CHIPS[kind]


def devices(plan: Plan) -> list[Any]:
    """The devices of the plan's topology, which need not be there.

    Raises:
        SettingError: There is no such topology, or no compiler for it.
    """
    if plan.topology is None:
        return jax.devices()
    here, _, number = plan.topology.partition(":")
    if here in HERE:
        try:
            if here == "cpu" and number:
                jax.config.update("jax_num_cpu_devices", int(number))
            return jax.devices(here)
        except (RuntimeError, ValueError) as error:
            raise SettingError(f"--topology {plan.topology}: there is no such device here ({error})") from None
    if importlib.util.find_spec("libtpu") is None and "TPU_LIBRARY_PATH" not in os.environ:
        raise SettingError(INSTALL)
    from jax.experimental import topologies

    try:
        return list(topologies.get_topology_desc(plan.topology, platform="tpu").devices)
    except Exception as error:  # bare RuntimeErrors and errors of the plugin, by version
        text = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise SettingError(f"--topology {plan.topology} does not exist: {text}") from None


def make_mesh(plan: Plan, found: list[Any]) -> Mesh:
    """The plan's mesh on these devices.

    Raises:
        SettingError: It does not fit them.
    """
    sizes = plan.mesh
    try:
        return parallel.make_mesh(
            data=sizes.data, fsdp=sizes.fsdp, tensor=sizes.tensor, sequence=sizes.sequence, devices=found
        )
    except parallel.MeshError as error:
        name = plan.topology or "this machine"
        raise SettingError(f"--mesh: {error} of {name}") from None


def memory(chip: Chip | None, found: list[Any]) -> float | None:
    """Bytes of memory of one device; None where that is not known."""
    if chip is not None:
        return chip.hbm
    try:
        stats: Mapping[str, Any] = found[0].memory_stats() or {}
    except Exception:  # devices that keep no statistics raise, each in its way
        return None
    return stats.get("bytes_limit")
