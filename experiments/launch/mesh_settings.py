"""Checks the --mesh flags without initialising devices; `device_mesh` creates the mesh."""

from __future__ import annotations

from typing import Any

from launch.run_settings import Mesh, SettingError

AXES = ("data", "fsdp", "tensor", "sequence")


def is_sharded(settings: Any) -> bool:
    """Returns whether the size of any mesh axis differs from 1."""
    return any(getattr(settings.mesh, axis) != 1 for axis in AXES)


def check(settings: Any) -> None:
    """Raises SettingError for an invalid mesh size or a batch that is not a multiple of data x fsdp.

    While ``data`` is -1, batches are not checked. `device_mesh.resolve` computes ``data`` and checks them.
    """
    mesh = settings.mesh
    for axis in AXES:
        size = getattr(mesh, axis)
        if size < 1 and not (axis == "data" and size == -1):
            raise SettingError(f"--mesh.{axis} is {size}; it must be at least 1{' or -1' * (axis == 'data')}")
    if mesh.simulate is not None and (mesh.simulate < 2 or not is_sharded(settings)):
        raise SettingError(
            f"--mesh.simulate is {mesh.simulate}; it must be at least 2 and requires mesh sizes, such as --mesh.data"
        )
    if mesh.data == -1 or mesh.data * mesh.fsdp == 1:
        return
    for name, rows in settings.batches().items():
        check_divides(mesh, name, rows)


def check_divides(mesh: Mesh, name: str, rows: int) -> None:
    """Raises SettingError if ``rows``, which the message calls ``name``, is not a multiple of data x fsdp."""
    parts = mesh.data * mesh.fsdp
    if mesh.data != -1 and rows % parts:
        raise SettingError(
            f"{name} is {rows}; it must be a multiple of {parts}, the number of devices of --mesh.data {mesh.data} x "
            f"--mesh.fsdp {mesh.fsdp}"
        )
