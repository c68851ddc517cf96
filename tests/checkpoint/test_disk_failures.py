"""A full, read-only or missing disk leads to a one-line error and exit status 2; the last checkpoint is kept."""

import contextlib
import io
import json
import pathlib
import shutil
import subprocess
import sys
import time

import pytest

NAMESPACE = ["unshare", "--user", "--map-root-user", "--mount"]
CASES = ("full", "read-only", "vanished")


def mount(*arguments):
    subprocess.run(["mount", *arguments], check=True)


def trial(case, disk):
    """Trains while the disk fails; returns the exit status, the messages and the surviving checkpoints."""
    import jax
    import jax.numpy as jnp
    import numpy as np
    import optax
    from launch import entry_point

    from rlhf_jax import checkpoint, metrics, parallel
    from rlhf_jax.train import loop, state
    from rlhf_jax.train.optim import update

    size, saved = 60_000, disk / "run" / "saved"
    if case == "read-only":  # a file system with open files, such as the log, cannot be remounted read-only
        saved.mkdir(parents=True)
        mount("-t", "tmpfs", "none", str(saved))

    def train_step(state, frozen, hyper, batch, rng):
        noise = jax.random.normal(jax.random.fold_in(rng, state.step), (size,))  # does not compress
        return update.apply_gradients(state, {"w": noise}, learning_rate=hyper)

    def fail_after_step_5(done, state, logs):
        while done == 5 and not (saved / "step_000000004").exists():
            time.sleep(0.01)
        if done == 5 and case == "full":
            (disk / "ballast").write_bytes(bytes(shutil.disk_usage(disk).free - 100_000))
        if done == 5 and case == "read-only":
            mount("-o", "remount,ro", str(saved))
        if done == 5 and case == "vanished":
            shutil.rmtree(saved)

    def run(callback=fail_after_step_5):
        start = state.create({"w": jnp.zeros(size)}, optax.scale(-1.0))
        log = metrics.MetricLog(disk / "run")
        with checkpoint.Checkpoints(saved) as checkpoints, log:
            return loop.fit(
                parallel.jit_step(train_step),
                start,
                steps=8,
                batch_at=lambda i: None,
                hyper_at=lambda i: np.float32(1),
                rng=jax.random.key(0),
                stage="toy",
                log=log,
                checkpoints=checkpoints,
                save_every=2,
                callbacks=[callback],
            )

    errors, status = io.StringIO(), 0
    with contextlib.redirect_stderr(errors):
        try:
            entry_point.execute(lambda options: run(), lambda arguments: None, [])
        except SystemExit as exit:
            status = exit.code
    if case == "read-only":
        mount("-o", "remount,rw", str(saved))
    (disk / "ballast").unlink(missing_ok=True)
    steps = checkpoint.Checkpoints(saved).steps()
    final = run(lambda *_: None)
    rows = [row["step"] for row in metrics.read(disk / "run")]
    end = float(jnp.sum(final.params["w"]))
    return {"status": status, "errors": errors.getvalue(), "saved": steps, "end": end, "rows": rows}


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """Returns the results of all cases, from a process that mounts a small disk for each case."""
    if (
        shutil.which("unshare") is None
        or subprocess.run([*NAMESPACE, "true"], check=False, capture_output=True).returncode
    ):
        pytest.skip("cannot mount a disk here")
    folder = tmp_path_factory.mktemp("disks")
    done = subprocess.run(
        [*NAMESPACE, sys.executable, __file__, str(folder)], capture_output=True, text=True, timeout=600, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("case", CASES)
def test_a_disk_failure_is_a_one_line_error_and_the_last_checkpoint_is_kept(results, case):
    failed, normal = results[case], results["no failure"]
    assert normal["status"] == 0 and normal["errors"] == "" and normal["saved"] == [6, 8]
    assert failed["status"] == 2
    lines = failed["errors"].splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: "), failed["errors"]
    reason = {"full": "No space left", "read-only": "Read-only file system", "vanished": "no longer exists"}[case]
    assert reason in lines[0] and f"/{CASES.index(case)}/run" in lines[0]
    assert failed["saved"] == ([] if case == "vanished" else [2, 4])
    assert failed["end"] == normal["end"] and failed["rows"] == list(range(1, 9)), "it resumes on a working disk"


def main(folder):
    """Runs all cases and prints their results as JSON."""
    import os

    os.environ["JAX_PLATFORMS"] = "cpu"
    sys.path[:0] = [str(pathlib.Path(__file__).parents[2] / "experiments")]
    results = {}
    for i, case in enumerate((*CASES, "no failure")):
        disk = pathlib.Path(folder) / str(i)
        disk.mkdir()
        mount("-t", "tmpfs", "-o", "size=3m", "none", str(disk))
        results[case] = trial(case, disk)
    print(json.dumps(results), flush=True)
    os._exit(0)  # threads of failed saves may never end


if __name__ == "__main__":
    main(sys.argv[1])
