"""PPO settings of papers, selected by ``--published``.

`PAPERS` separates what a paper or its code reports from what we choose because the paper is silent and the default of
the experiments would be unlike it. All other settings keep the values of the preset. docs/published.md shows the result
of `table`.

Coefficients are relative to the scale of each paper's reward, so their effect differs between rewards; compare runs by
the KL that they reach. Learning rates suit models of at least 100 million parameters and are used only with --model.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple


class Paper(NamedTuple):
    """The settings of a paper; keys are fields of `launch.settings.PPO`."""

    source: str
    reported: dict[str, Any]
    chosen: dict[str, Any]
    """Our choices where the paper is silent."""
    learning_rates: dict[str, Any] = {}  # noqa: RUF012
    """Learning rates of policy and critic."""
    unreported: tuple[str, ...] = ()
    """Learning rates that the paper does not report."""

    def settings(self, *, learning_rates: bool) -> dict[str, Any]:
        """Returns all settings, with learning rates if requested."""
        return self.reported | self.chosen | (self.learning_rates if learning_rates else {})


# No paper reports gradient clipping, an average of the weights or a warmup, unless it is listed below.
_PLAIN: dict[str, Any] = {"max_grad_norm": None, "ema": 0.0, "warmup": 0}

PAPERS: dict[str, Paper] = {
    "instructgpt": Paper(
        "Ouyang et al. 2022, appendix C",
        reported={"kl_coef": 0.02, "batch": 512, "minibatches": 8, "epochs": 1, "clip": 0.2, "discount": 1.0}
        | {"temperature": 1.0, "warmup": 10, "schedule": "constant", "ema": 0.992, "critic": "reward"}
        | {"ptx_coef": 27.8, "ptx_ratio": 8.0, "adam_b2": 0.95},
        chosen={"max_grad_norm": None},
        # The policy's rate was searched between 2.55e-6 and 2.55e-5; the one that was chosen is not reported.
        learning_rates={"learning_rate": 9.65e-6, "critic_learning_rate": 9e-6},
        unreported=("learning_rate",),
    ),
    "stiennon": Paper(
        "Stiennon et al. 2020, appendix B.1",
        reported={"kl_coef": 0.05, "batch": 512, "epochs": 4, "discount": 1.0, "lambda_": 0.95}
        | {"schedule": "linear", "critic": "reward"},
        chosen=_PLAIN,
        learning_rates={"learning_rate": 1.5e-5, "critic_learning_rate": 1.5e-5},
    ),
    "ziegler": Paper(
        "Ziegler et al. 2019, released code for the style tasks",
        reported={"kl_coef": 0.15, "kl_target": 6.0, "kl_gain": 0.0512, "batch": 512, "minibatches": 1, "epochs": 4}
        | {"clip": 0.2, "value_clip": 0.2, "discount": 1.0, "lambda_": 0.95, "temperature": 0.7, "value_coef": 0.1}
        | {"whiten_rewards": True, "missing_stop_score": -1.0, "schedule": "linear", "critic": "zero-head"}
        | {"adam_eps": 1e-5, "adam_tf1": True, "adam_b2": 0.999},
        chosen=_PLAIN,
        learning_rates={"learning_rate": 1e-5, "critic_learning_rate": 1e-5},
    ),
    "n-plus": Paper(
        "Huang et al. 2024, The N+ implementation details, released code",
        reported={"kl_coef": 0.05, "batch": 512, "minibatches": 1, "epochs": 4, "clip": 0.2, "value_clip": 0.2}
        | {"discount": 1.0, "lambda_": 0.95, "temperature": 0.7, "value_coef": 0.1, "missing_stop_score": -1.0}
        | {"schedule": "linear", "critic": "reward", "adam_eps": 1e-5},
        # AdamW with the other defaults of PyTorch.
        chosen=_PLAIN | {"adam_b2": 0.999, "weight_decay": 0.01},
        learning_rates={"learning_rate": 3e-6, "critic_learning_rate": 3e-6},
    ),
    "hh": Paper(
        "Bai et al. 2022, Training a helpful and harmless assistant, appendix B.1",
        reported={"kl_coef": 0.001, "epochs": 1, "clip": 0.2, "discount": 1.0, "entropy_coef": 0.0},
        chosen={"max_grad_norm": None, "ema": 0.0},
    ),
    "xu": Paper(
        "Xu et al. 2024, appendix A, without its top-k of 200, which requires --ppo.correct-sampler",
        reported={"kl_coef": 0.1, "batch": 512, "minibatches": 4, "discount": 1.0, "lambda_": 1.0, "temperature": 1.0}
        | {"reward_clip": 20.0, "normalise_values": True, "critic": "policy"},
        chosen=_PLAIN,
        learning_rates={"learning_rate": 1e-5, "critic_learning_rate": 5e-6},
    ),
    "tutorial": Paper(
        "a widely copied tutorial; no paper has its entropy bonus or its gradient clipping",
        reported={"kl_coef": 0.2, "epochs": 4, "clip": 0.2, "discount": 1.0, "lambda_": 0.95, "temperature": 0.7}
        | {"entropy_coef": 0.01, "value_coef": 0.1, "max_grad_norm": 1.0},
        chosen={"ema": 0.0, "warmup": 0, "adam_b2": 0.999},
    ),
}


def table(defaults: Mapping[str, Any]) -> str:
    """Returns all settings that a paper changes as a Markdown table; what a paper does not report is in parentheses.

    Args:
        defaults: The PPO settings of the default preset, by name.
    """
    names = [name for name in defaults if any(name in paper.settings(learning_rates=True) for paper in PAPERS.values())]
    rows = [["setting", "default", *PAPERS], ["---"] * (2 + len(PAPERS))]
    for name in names:
        cells = []
        for paper in PAPERS.values():
            value = paper.settings(learning_rates=True).get(name, defaults[name])
            known = name in paper.reported or (name in paper.learning_rates and name not in paper.unreported)
            cells.append(_cell(value) if known else f"({_cell(value)})")
        flag = "--ppo." + name.rstrip("_").replace("_", "-") + "_" * name.endswith("_")
        rows.append([f"`{flag}`", _cell(defaults[name]), *cells])
    return "\n".join("| " + " | ".join(row) + " |" for row in rows) + "\n"


def _cell(value: Any) -> str:
    if isinstance(value, bool | None):
        return {None: "none", True: "yes", False: "no"}[value]
    return value if isinstance(value, str) else f"{value:g}"
