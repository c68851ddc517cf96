"""An error in the code changes the verdict on the statistic that should notice it."""

import json
import os
import pathlib
import shutil
import subprocess
import sys

import pytest

REPOSITORY = pathlib.Path(__file__).parents[2]
ERRORS = {  # the claim, the number of its statistic, and a change of a file
    "sign of the KL penalty": (
        "C38",
        3,
        "rlhf_jax/rewards.py",
        "return as_token_scores(scores, mask_BT) - kl_coef * kl_BT",
        "return as_token_scores(scores, mask_BT) + kl_coef * kl_BT",
    ),
    "pairs of a prompt in different batches": (
        "C02",
        0,
        "experiments/claims/reward_fits.py",
        "    if shuffled:\n        rows, batch",
        "    if True:\n        rows, batch",
    ),
    "no gradient of the pretraining loss": (
        "C07",
        1,
        "rlhf_jax/train/ppo.py",
        "g + hyper.ptx_coef * h",
        "g + 0 * h",
    ),
}


@pytest.mark.parametrize("error", ERRORS)
def test_the_error_is_one_change_of_the_code(error):
    _, _, file, old, _ = ERRORS[error]
    assert (REPOSITORY / file).read_text().count(old) == 1


@pytest.mark.slow  # 10 to 25 minutes each; the stages that the error does not reach are taken from the store
@pytest.mark.parametrize("error", ERRORS)
def test_an_error_changes_the_verdict_on_the_statistic_that_should_notice_it(error, tmp_path):
    claim, part, file, old, new = ERRORS[error]
    for folder in ("rlhf_jax", "experiments"):
        shutil.copytree(REPOSITORY / folder, tmp_path / folder, ignore=shutil.ignore_patterns("__pycache__"))
    store = pathlib.Path(os.environ.get("CLAIMS_STORE", REPOSITORY / "runs/claims/store"))
    wrong = tmp_path / file
    verdicts = []
    for text in (wrong.read_text(), wrong.read_text().replace(old, new)):
        wrong.write_text(text)
        command = [
            sys.executable,
            "experiments/claims.py",
            claim,
            "--store",
            str(store),
            "--out",
            str(tmp_path / "out"),
        ]
        subprocess.run(command, cwd=tmp_path, check=True, env=os.environ | {"PYTHONPATH": str(tmp_path)})
        verdicts.append(json.loads((tmp_path / f"out/{claim}.json").read_text())["parts"][part]["verdict"])
    assert verdicts[0] == "shown" and verdicts[1] != "shown"
