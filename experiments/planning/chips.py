"""Published specifications of TPU chips, and the devices that a plan is compiled for."""

from __future__ import annotations

import dataclasses
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
    """Specifications of one JAX device: a chip or, for tpu7x, one of a chip's two cores."""

    flops: float
    """Peak bfloat16 FLOPs per second."""
    hbm: float
    """Bytes of memory."""
    bandwidth: float
    """Memory bandwidth in bytes per second."""
    link: float
    """Bytes per second in one direction to one neighbour; a ring along an axis of a torus uses two links."""


CHIPS = {
    "v4": Chip(275e12, 32 * 2**30, 1228e9, 50e9),
    "v5e": Chip(197e12, 16 * 2**30, 819e9, 50e9),
    "v5p": Chip(459e12, 95 * 2**30, 2765e9, 100e9),
    "v6e": Chip(918e12, 32 * 2**30, 1638e9, 100e9),
    "tpu7x": Chip(2307e12 / 2, 96 * 2**30, 7380e9 / 2, 100e9),
}
"""Specifications from Google Cloud's page on each chip (docs.cloud.google.com/tpu/docs/v4, v5e, v5p, v6e and tpu7x;
accessed in 2026). A link's bandwidth is the chip's bidirectional interconnect bandwidth, divided by the number of
links and by two."""

LOCAL = ("cpu", "gpu")
"""Values of --topology that select devices of this machine."""


def prepare() -> None:
    """Sets the environment variables that let the TPU compiler run without a TPU. Call this before JAX is used."""
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v5litepod-1")  # required, but any value works
    os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")  # do not lock the TPU, which is absent


def chip_of(plan: Plan) -> tuple[str, Chip | None]:
    """Returns the name of the plan's chip and its specifications, which are None for devices of this machine.

    Raises:
        SettingError: The topology names an unknown kind of chip or has no shape.
    """
    if plan.topology is None or plan.topology.partition(":")[0] in LOCAL:
        return devices(plan)[0].device_kind, None
    kind = plan.topology.partition(":")[0]
    if kind not in CHIPS or ":" not in plan.topology:
        raise SettingError(
            f"--topology is {plan.topology!r}; it must be one of {', '.join(f'{name}:AxB' for name in CHIPS)} "
            "(AxBxC for v4, v5p and tpu7x), cpu, cpu:N for N CPU devices, or gpu"
        )
    return kind, CHIPS[kind]


def devices(plan: Plan) -> list[Any]:
    """Returns the devices of the plan's topology. TPU devices are only descriptions, so no TPU needs to be present.

    Raises:
        SettingError: The topology does not exist or is not available here, or its compiler is not installed.
    """
    if plan.topology is None:
        return jax.devices()
    platform, _, number = plan.topology.partition(":")
    if platform in LOCAL:
        try:
            if platform == "cpu" and number:
                jax.config.update("jax_num_cpu_devices", int(number))
            return jax.devices(platform)
        except (RuntimeError, ValueError) as error:
            raise SettingError(f"--topology {plan.topology} is not available on this machine: {error}") from None
    if importlib.util.find_spec("libtpu") is None and "TPU_LIBRARY_PATH" not in os.environ:
        raise SettingError(
            f"--topology {plan.topology} needs the TPU compiler, which runs without a TPU; install it with: "
            "pip install -e '.[tpu]' (Linux, 0.2 GB)"
        )
    from jax.experimental import topologies

    try:
        return list(topologies.get_topology_desc(plan.topology, platform="tpu").devices)
    except Exception as error:  # its type depends on the version of the plugin
        text = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise SettingError(f"--topology {plan.topology} does not exist: {text}") from None


def make_mesh(plan: Plan, devices: list[Any]) -> Mesh:
    """Returns the plan's mesh on these devices.

    Raises:
        SettingError: The mesh does not fit the devices.
    """
    try:
        return parallel.make_mesh(**dataclasses.asdict(plan.mesh), devices=devices)
    except parallel.MeshError as error:
        raise SettingError(f"--mesh on {plan.topology or 'this machine'}: {error}") from None


def memory(chip: Chip | None, devices: list[Any]) -> float | None:
    """Returns the memory of one device in bytes, or None if it is unknown."""
    if chip is not None:
        return chip.hbm
    try:
        stats: Mapping[str, Any] = devices[0].memory_stats() or {}
    except Exception:  # devices without statistics raise errors of various types
        return None
    return stats.get("bytes_limit")
