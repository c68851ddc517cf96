"""constitutional.py resumes bit-identically after a kill in any stage."""

import killed_run
import pytest

SCRIPT = "constitutional.py"
TINY = {
    "net.layers": 1, "net.width": 16, "net.heads": 2, "net.mlp": 16,
    "pretrain.documents": 200, "pretrain.steps": 4, "pretrain.batch": 8,
    "sft.demonstrations": 32, "sft.epochs": 1, "comparisons.prompts": 16, "reward_model.batch": 8,
    "ppo.iterations": 4, "ppo.batch": 16, "ppo.minibatches": 2, "ppo.warmup": 1, "evaluation.prompts": 64,
    "revision.prompts": 24, "revision.helpful-prompts": 16, "revision.rounds": 2, "judge.pairs": 24,
}  # fmt: skip
ARGUMENTS = ["--preset", "smoke", *(text for name, value in TINY.items() for text in (f"--{name}", str(value)))]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole") / "run"
    killed_run.run(SCRIPT, "--out", folder, *ARGUMENTS)
    return folder


def has_lines(name):
    """Returns whether a file has a line."""
    return lambda folder: (folder / name).exists() and b"\n" in (folder / name).read_bytes()


KILLS = {
    "revisions": has_lines("revisions.jsonl"),
    "labels": has_lines("labels.jsonl"),
    **{each: killed_run.in_stage(each) for each in ("sft-helpful", "sft-cai", "comparisons", "reward_model", "ppo")},
}


@pytest.mark.parametrize(
    "point", ["revisions", *(pytest.param(each, marks=pytest.mark.slow) for each in KILLS if each != "revisions")]
)
def test_a_run_killed_anywhere_resumes_bit_identically(finished, tmp_path, point):
    killed = tmp_path / "run"
    killed_run.run_and_kill(SCRIPT, *ARGUMENTS, folder=killed, when=KILLS[point])
    killed_run.run(SCRIPT, "--resume", killed)
    assert killed_run.results_of(killed) == killed_run.results_of(finished)
    for name in ("metrics.jsonl", "revisions.jsonl", "labels.jsonl", "rl_cai/model.safetensors"):
        assert (killed / name).read_bytes() == (finished / name).read_bytes(), name
