"""The script of the documentation that takes a model through all stages, on a small random or a published model."""

import gzip
import json
import os
import pathlib
import subprocess
import sys

import numpy as np
import pytest

from rlhf_jax import lm

ROOT = pathlib.Path(__file__).parents[2]
MODELS = ("sft", "reward_model", "judge", "ppo", "dpo")


def run_script(model, comparisons, out, **variables):
    """Runs docs/own_model.sh and returns its output."""
    python = str(pathlib.Path(sys.executable).parent)
    environment = os.environ | {"PATH": f"{python}:{os.environ['PATH']}", "PYTHONPATH": str(ROOT)} | variables
    done = subprocess.run(
        ["bash", "docs/own_model.sh", str(model), str(comparisons), str(out)],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout + done.stderr


def check(out):
    """Checks that every command has left a model or a result that can be read."""
    for name in MODELS:
        cfg, params = lm.load(out / name / "model")
        assert ("head" in params) == (name in ("reward_model", "judge")) and cfg.vocab_size > 100
        assert json.loads((out / name / "results.json").read_text())["seconds"] > 0
    questions = {
        name: {json.dumps(json.loads(line)).split("Human: ")[1] for line in (out / f"{name}.jsonl").open()}
        for name in ("train", "judge", "test")
    }
    assert not questions["train"] & questions["test"] and not questions["train"] & questions["judge"]
    policies = json.loads((out / "evaluation" / "results.json").read_text())["policies"]
    assert len(policies) == 3 and all(each["length"][1] <= each["length"][0] for each in policies.values())
    assert len((out / "samples.jsonl").read_text().splitlines()) > 4


def test_the_script_takes_a_small_model_through_all_stages(tmp_path):
    path = tmp_path / "comparisons.jsonl"
    words = ("tea", "milk", "bread", "salt", "rice", "fish", "corn", "plum", "oats", "jam")
    with path.open("w") as file:
        for a in words:
            for b in words:
                start = f"\n\nHuman: Do you like {a} or {b}?\n\nAssistant: "
                file.write(json.dumps({"chosen": f"{start}I like {b}.", "rejected": f"{start}No."}) + "\n")
    run_script("tiny", path, tmp_path / "run", QUICK="1")
    check(tmp_path / "run")
    again = run_script("tiny", path, tmp_path / "run", QUICK="1")
    assert "wins over" in again and "step" not in again, "finished commands are skipped"


@pytest.mark.slow
@pytest.mark.skipif(
    not {"RLHF_JAX_REAL_MODEL", "RLHF_JAX_REAL_COMPARISONS"} <= set(os.environ), reason="no model and comparisons given"
)
def test_the_script_takes_a_published_model_through_all_stages(tmp_path):
    transformers = pytest.importorskip("transformers")
    torch = pytest.importorskip("torch")
    comparisons = tmp_path / "comparisons.jsonl"
    given = os.environ["RLHF_JAX_REAL_COMPARISONS"]
    with (gzip.open if given.endswith(".gz") else open)(given, "rt") as file:
        comparisons.write_text("".join(next(file) for _ in range(200)))
    out = tmp_path / "run"
    run_script(os.environ["RLHF_JAX_REAL_MODEL"], comparisons, out, QUICK="1")
    check(out)
    ids = np.arange(40, 60)[None]
    for name in MODELS:
        cfg, params = lm.load(out / name / "model")
        kind = transformers.AutoModelForCausalLM
        if "head" in params:
            kind = transformers.AutoModelForSequenceClassification
        model = kind.from_pretrained(out / name / "model", dtype=torch.float32).eval()
        with torch.no_grad():
            theirs = model(torch.tensor(ids)).logits.numpy()
        if "head" in params:
            ours = lm.score(params, ids, cfg=cfg, mask_BL=np.ones(ids.shape, bool))[:, None]  # pyright: ignore[reportArgumentType]
            ours -= params["head"]["bias"]  # which transformers has not
        else:
            ours = lm.logits(params, lm.forward(params, ids, cfg=cfg).hidden_BLD, cfg=cfg)  # pyright: ignore[reportArgumentType]
        np.testing.assert_allclose(ours, theirs, atol=2e-3 * np.abs(theirs).max(), err_msg=name)
        assert transformers.AutoTokenizer.from_pretrained(out / name / "model").chat_template
