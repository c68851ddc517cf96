"""The results and metrics of a real run, for tests of what is done with results.

The files are results.json and metrics.jsonl of ``instructgpt.py --preset smoke --seed 0``. If the results of a run
change their shape, test_instructgpt.py fails; then run the command again and copy both files here.
"""

import json
import pathlib

_FOLDER = pathlib.Path(__file__).parent / "smoke_run"
OF_HUMAN_DATA = {"reward", "kl", "length", "stopped", "pretraining_loss", "kl_bound", "n", "prompts"} | {
    *("diversity", "self_bleu", "entropy", "entropy_ratio", "matched_temperature")
}
"""The fields of a policy in a run on human comparisons, which have no gold utility."""


def results():
    return json.loads((_FOLDER / "results.json").read_text())


def metrics():
    return [json.loads(line) for line in (_FOLDER / "metrics.jsonl").read_text().splitlines()]


def human_results():
    """Returns the results without everything that only the built-in world has."""
    found = results()
    for name in ("null_check", "best_possible_gold", "goodhart"):
        del found[name]
    del found["clusters"]["gold utility by category"]
    for name, policy in found["policies"].items():
        found["policies"][name] = {key: value for key, value in policy.items() if key in OF_HUMAN_DATA}
    for point in found["best_of_n_curve"]:
        del point["gold"]
    for transcript in found["transcripts"]:
        del transcript["gold"], transcript["category"]
    for name in [name for name in found["reward_model"] if name.startswith(("label", "pairs"))]:
        del found["reward_model"][name]
    return found


def shape(value):
    """Returns the names and kinds of all values; a list of dicts has the shape of its first one."""
    if isinstance(value, dict):
        return {name: shape(each) for name, each in value.items()}
    if isinstance(value, list):
        return [shape(value[0])] if value and isinstance(value[0], dict) else "list"
    return "text" if isinstance(value, str) else "number, truth value or none"


def text(value, *, percent=False, digits=1):
    """Formats a number or an interval as the report does."""
    scale, digits = (100, 1) if percent else (1, digits)
    shown = [f"{scale * x:.{digits}f}".replace("-", "−") for x in (value if isinstance(value, list) else [value])]
    shown = [x.lstrip("−") if not x.strip("−0.") else x for x in shown]
    if len(shown) == 1:
        return shown[0]
    return f"{shown[0]} {shown[1]} to {shown[2]}" if "−" in "".join(shown[1:]) else f"{shown[0]} {shown[1]}–{shown[2]}"
