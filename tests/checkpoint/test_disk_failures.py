"""A disk that is full, read-only or gone: one sentence, exit status 2, and the last good checkpoint left alone."""

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
    """Run in the middle of which something happens to the disk; what a user sees of it."""
    import jax
    import jax.numpy as jnp
    import numpy as np
    import optax
    from launch import entry_point

    from rlhf_jax import checkpoint, metrics, parallel
    from rlhf_jax.train import loop, state
    from rlhf_jax.train.optim import update

    size, saved = 60_000, disk / "run" / "saved"
    if case == "read-only":  # the log's files are open, and a file system with such files stays writable
        saved.mkdir(parents=True)
        mount("-t", "tmpfs", "none", str(saved))

    def train_step(state, frozen, hyper, batch, rng):
        noise = jax.random.normal(jax.random.fold_in(rng, state.step), (size,))  # which no disk compresses
        return update.apply_gradients(state, {"w": noise}, learning_rate=hyper)

    def happens(done, state, logs):
        while done == 5 and not (saved / "step_000000004").exists():
            time.sleep(0.01)
        if done == 5 and case == "full":
            (disk / "ballast").write_bytes(bytes(shutil.disk_usage(disk).free - 100_000))
        if done == 5 and case == "read-only":
            mount("-o", "remount,ro", str(saved))
        if done == 5 and case == "vanished":
            shutil.rmtree(saved)

    def run(happens=happens):
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
                callbacks=[happens],
            )

    told, status = io.StringIO(), 0
    with contextlib.redirect_stderr(told):
        try:
            entry_point.execute(lambda asked: run(), lambda arguments: None, [])
        except SystemExit as left:
            status = left.code
    if case == "read-only":
        mount("-o", "remount,rw", str(saved))
    (disk / "ballast").unlink(missing_ok=True)
    steps = checkpoint.Checkpoints(saved).steps()
    final = run(lambda *_: None)
    rows = [row["step"] for row in metrics.read(disk / "run")]
    end = float(jnp.sum(final.params["w"]))
    return {"status": status, "told": told.getvalue(), "saved": steps, "end": end, "rows": rows}


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """Of every case, in a process that has a small disk of its own for each."""
    if (
        shutil.which("unshare") is None
        or subprocess.run([*NAMESPACE, "true"], check=False, capture_output=True).returncode
    ):
        pytest.skip("no disk of its own can be mounted here")
    folder = tmp_path_factory.mktemp("disks")
    done = subprocess.run(
        [*NAMESPACE, sys.executable, __file__, str(folder)], capture_output=True, text=True, timeout=600, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("case", CASES)
def test_one_sentence_and_the_last_good_checkpoint_stays(found, case):
    seen, whole = found[case], found["nothing"]
    assert whole["status"] == 0 and whole["told"] == "" and whole["saved"] == [6, 8]
    assert seen["status"] == 2
    lines = seen["told"].splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: "), seen["told"]
    reason = {"full": "No space left", "read-only": "Read-only file system", "vanished": "vanished"}[case]
    assert reason in lines[0] and f"/{CASES.index(case)}/run" in lines[0]
    assert seen["saved"] == ([] if case == "vanished" else [2, 4])
    assert seen["end"] == whole["end"] and seen["rows"] == list(range(1, 9)), "it goes on once there is room again"


def main(folder):
    """All cases, as JSON on stdout."""
    import os

    os.environ["JAX_PLATFORMS"] = "cpu"
    sys.path[:0] = [str(pathlib.Path(__file__).parents[2] / "experiments")]
    results = {}
    for i, case in enumerate((*CASES, "nothing")):
        disk = pathlib.Path(folder) / str(i)
        disk.mkdir()
        mount("-t", "tmpfs", "-o", "size=3m", "none", str(disk))
        results[case] = trial(case, disk)
    print(json.dumps(results), flush=True)
    os._exit(0)  # threads of the saves that failed may never end


if __name__ == "__main__":
    main(sys.argv[1])
