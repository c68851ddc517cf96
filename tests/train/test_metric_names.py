"""docs/metrics.md lists every logged metric and no other."""

import inspect
import json
import pathlib
import re
from collections import Counter

from sweeps import run_grid

from rlhf_jax.train import dpo, ppo, reward_model, sft
from rlhf_jax.train.optim import nonfinite

ROOT = pathlib.Path(__file__).parents[2]


def documented(step):
    """Returns the metrics in the docstring of a function that makes a train step, which names them before a colon."""
    text = inspect.getdoc(step).partition("Metrics")[2].partition("Example:")[0]  # pyright: ignore[reportOptionalMemberAccess]
    lists = re.findall(r"(?<!and )((?:``\w+``,\s+)*``\w+``):", text)
    return {name for names in lists for name in re.findall(r"\w+", names)}


def test_the_glossary_lists_all_metrics_and_no_other():
    rows = map(json.loads, (ROOT / "tests/cases/smoke_run/metrics.jsonl").read_text(encoding="utf-8").splitlines())
    logged = {name for row in rows for name in row} - {"stage", "step"}
    logged |= {name for module in (sft, reward_model, dpo, ppo) for name in documented(module.make_train_step)}
    logged |= {*nonfinite.DETAILS, *run_grid.MEASURED.values()}
    assert len(logged) > 40
    listed = Counter(
        re.findall(r"^\| `(\w+)` \|", (ROOT / "docs/metrics.md").read_text(encoding="utf-8"), re.MULTILINE)
    )
    assert set(listed) == logged and set(listed.values()) == {1}
