"""Checks the --mesh flags without initialising devices; `device_mesh` creates the mesh."""

from __future__ import annotations

from launch.settings import Mesh, SettingError, Settings

AXES = ("data", "fsdp", "tensor", "sequence")


def is_sharded(settings: Settings) -> bool:
    """Returns whether the size of any mesh axis differs from 1."""
    return any(getattr(settings.mesh, axis) != 1 for axis in AXES)


def check(settings: Settings) -> None:
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
    ppo, pretrain = settings.ppo, settings.pretrain
    answers = ppo.batch // ppo.minibatches
    minibatch = f"--ppo.batch {ppo.batch} divided by --ppo.minibatches {ppo.minibatches}"
    parts = f" and --ppo.micro-batches {ppo.micro_batches}" if ppo.micro_batches > 1 else ""
    samples = f" divided by --ppo.samples {ppo.samples}" if ppo.samples > 1 else ""
    check_divides(mesh, "--pretrain.batch", pretrain.batch)
    check_divides(mesh, "--reward-model.batch", settings.reward_model.batch)
    check_divides(mesh, f"--ppo.batch{f' {ppo.batch}' if samples else ''}{samples}", ppo.batch // ppo.samples)
    check_divides(mesh, minibatch + parts, answers // ppo.micro_batches)
    check_divides(mesh, f"--ppo.ptx-ratio {ppo.ptx_ratio:g} times {minibatch}", round(answers * ppo.ptx_ratio))


def check_divides(mesh: Mesh, name: str, rows: int) -> None:
    """Raises SettingError if ``rows``, which the message calls ``name``, is not a multiple of data x fsdp."""
    parts = mesh.data * mesh.fsdp
    if mesh.data != -1 and rows % parts:
        raise SettingError(
            f"{name} is {rows}; it must be a multiple of {parts}, the number of devices of --mesh.data {mesh.data} x "
            f"--mesh.fsdp {mesh.fsdp}"
        )
