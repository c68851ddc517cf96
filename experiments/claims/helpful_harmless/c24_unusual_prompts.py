"""C24: distances from benign prompts detect harmful ones, and a few examples help more (Bai et al. 2022, Fig. 22).

The SFT model's hidden states of benign training prompts, averaged over the tokens of a prompt, give a mean and a
covariance matrix. Held-out benign and harmful prompts are scored by their Mahalanobis distance (MD) and by the relative
one (SRMD), which need no harmful prompts, and by linear classifiers that have seen 1, 10 or 100 harmful training
prompts (Figure 23). Compared are the areas under the ROC curves at the middle layer; other layers are drawn and not
tested. SRMD and MD are compared by the log-odds of their areas, because differences between areas are small in worlds
in which both are nearly 1.

The SFT model and the average over tokens were chosen with the seeds 100 to 102: the difference between SRMD and MD has
the same sign in all three worlds with the SFT model, but not with the base model or at the last token. After a first
verdict with the seeds 0 to 4, 500 training prompts of each kind replaced 3,000, and log-odds replaced areas. Both were
chosen with the seeds 100 to 103. Before that, the area of SRMD was larger by 0.001 (-0.002 to 0.005).
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from online import domains
from recipe import tasks
from scipy import special

from claims import model_stages as ms
from claims import verdicts
from claims.claim import Claim, Measured
from claims.trial import Trial
from rlhf_jax import lm, types
from rlhf_jax.diagnostics import ood
from rlhf_jax.report import plots

PROMPTS = {"train": 500, "test": 1000}
"""Number of prompts of each kind, those for fitting and those that are held out."""
STREAM = 24
"""Number of the random stream of the prompts."""
EXAMPLES = (1, 10, 100)
RIDGE = 1e-6
"""Regularisation of the covariance matrix, which has five times as many prompts as features."""
DRAWS = 10
"""Number of random choices of the examples, over which areas are averaged."""
NAMES = ("MD", "SRMD", *(f"{n}-shot" for n in EXAMPLES))


def measure(trial: Trial) -> Measured:
    """Returns the area of each detector at each layer; ``middle`` has those of the middle layer."""
    start, layers = ms.Recipe(trial).start, trial.cfg.n_layers  # type: ignore[union-attr]
    by_layer = {str(layer): trial.result(areas, start, layer=layer).value for layer in range(1, layers + 1)}
    return {"middle": by_layer[str((layers + 1) // 2)], **by_layer}


def areas(trial: Trial, start: types.Params, *, layer: int) -> dict[str, float]:
    """Returns the area of each detector at a layer, counted from 1."""
    known, new = (
        [hidden(trial, start, draw(trial, domain, split), layer=layer) for domain in domains.DOMAINS]
        for split in PROMPTS
    )
    return detect(*known, *new, rng=np.random.default_rng(trial.settings.seed))


def draw(trial: Trial, domain: domains.Domain, split: str) -> tasks.PromptSet:
    """Returns benign ("helpful") or harmful ("harmless") prompts."""
    n = 64 if trial.quick else PROMPTS[split]
    return domains.draw_prompts(trial.settings, trial.task, n, domain=domain, split=split, number=STREAM)


def hidden(trial: Trial, start: types.Params, prompts: tasks.PromptSet, *, layer: int) -> np.ndarray:
    """Returns the mean hidden state of each prompt after the first layers, ``[N, D]``."""
    params, cfg = lm.first_layers(start, cfg=trial.cfg, layers=layer)  # type: ignore[arg-type]
    run = jax.jit(partial(_mean_hidden, cfg=cfg))
    step = 256
    parts = [
        np.asarray(run(params, prompts.tokens_BP[i : i + step], prompts.mask_BP[i : i + step]))
        for i in range(0, len(prompts), step)
    ]
    return np.concatenate(parts)


def _mean_hidden(params: types.Params, tokens_BP: jax.Array, mask_BP: jax.Array, *, cfg: lm.LMConfig) -> jax.Array:
    hidden_BPD = lm.forward(params, tokens_BP, cfg=cfg, mask_BL=mask_BP).hidden_BLD
    return jnp.mean(hidden_BPD, axis=1, where=mask_BP[:, :, None])


def detect(
    usual_ND: np.ndarray, harmful_MD: np.ndarray, new_ND: np.ndarray, new_MD: np.ndarray, *, rng: np.random.Generator
) -> dict[str, float]:
    """Returns the area of each detector.

    Args:
        usual_ND: Hidden states of benign training prompts.
        harmful_MD: Those of harmful training prompts, from which examples are drawn.
        new_ND: Those of held-out benign prompts.
        new_MD: Those of held-out harmful prompts.
        rng: Chooses the examples.
    """
    gaussian = ood.fit(usual_ND, ridge=RIDGE)
    scores = {"MD": ood.mahalanobis, "SRMD": ood.relative_mahalanobis}
    found = {name: ood.auroc(each(gaussian, new_ND), each(gaussian, new_MD)).mean for name, each in scores.items()}
    for n in EXAMPLES:
        drawn = []
        for _ in range(DRAWS):
            rows = rng.choice(len(harmful_MD), min(n, len(harmful_MD)), replace=False)
            probe = ood.fit_exposure(usual_ND, harmful_MD[rows])
            drawn.append(ood.auroc(ood.exposure(probe, new_ND), ood.exposure(probe, new_MD)).mean)
        found[f"{n}-shot"] = float(np.mean(drawn))
    return found


def decide(measured_S: Sequence[Measured]) -> list[verdicts.Part]:
    """Compares the areas at the middle layer."""
    middle_S = [each["middle"] for each in measured_S]
    odds = {name: special.logit(np.clip([each[name] for each in middle_S], 1e-6, 1 - 1e-6)) for name in ("SRMD", "MD")}
    return [
        verdicts.above("log-odds of the area of SRMD − of MD", odds["SRMD"] - odds["MD"]),
        verdicts.above("area with 10 examples − of SRMD", [each["10-shot"] - each["SRMD"] for each in middle_S]),
    ]


def plot(measured_S: Sequence[Measured]) -> str:
    """Draws the mean area of each detector at each layer."""
    colors = ("base", "sft", "best_of_n", "ppo", "ppo_ptx")
    layers = [name for name in measured_S[0] if name != "middle"]
    with plots.axes(height=2.8) as (svg, (ax,)):
        for name, color in zip(NAMES, colors, strict=True):
            means = [np.mean([each[layer][name] for each in measured_S]) for layer in layers]
            ax.plot(layers, means, "o-", color=plots.color(color), label=name)
        ax.set_xlabel("layer")
        ax.set_ylabel("area under the ROC curve")
        ax.legend()
    return svg[0]


CLAIM = Claim(
    id="C24",
    paper="Bai et al. 2022 (helpful and harmless), Figures 22, 23 and 39",
    claim="The relative Mahalanobis distance detects harmful prompts without harmful data, better than the Mahalanobis "
    "distance, and a few examples help more.",
    published="areas of about 0.85 without examples, and of 0.94 ± 0.02 (64 layers) and 0.86 ± 0.01 (4 layers) with 10",
    differs="The model has three layers, and harmful requests differ from others by their words.",
    measure=measure,
    decide=decide,
    plot=plot,
)
