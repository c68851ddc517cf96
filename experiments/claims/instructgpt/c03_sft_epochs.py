"""C03: SFT overfits after one epoch, but more epochs improve the answers (Ouyang et al. 2022, section 3.5).

The base model is fine-tuned on few demonstrations for 16 epochs. After some of them, the loss on held-out
demonstrations, the score of the reward model and the gold utility are measured. The epoch with the lowest loss is
chosen on the other seeds; after it, the loss should rise, and the score and the gold utility should rise too.

With a reward model that had seen 1,000 ranked prompts, the claim was not shown with the seeds 0 to 4, neither with one
answer per prompt nor with four: the interval of the score contained 0.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import numpy as np
from recipe import stages, tasks

from claims import likelihood, verdicts
from claims import model_stages as ms
from claims.claim import Claim, Measured
from claims.trial import MANY_COMPARISONS, Trial
from rlhf_jax import types
from rlhf_jax.data import batching
from rlhf_jax.report import plots
from rlhf_jax.train import state as state_lib
from rlhf_jax.train.optim import schedules

EPOCHS = (1, 2, 4, 8, 16)
DEMONSTRATIONS = 320
HELD_OUT = 768
SAMPLES = 4
"""Answers per prompt, over which the score and the gold utility are averaged."""


def measure(trial: Trial) -> Measured:
    """Fine-tunes for 16 epochs; returns what the model after each of `EPOCHS` is worth."""
    recipe = ms.Recipe(trial)
    n = 64 if trial.quick else DEMONSTRATIONS
    snapshots = trial.result(fine_tune, recipe.base, demonstrations=n)
    return trial.result(test, snapshots, recipe.start, recipe.reward, demonstrations=n).value


def fine_tune(trial: Trial, base: types.Params, *, demonstrations: int) -> dict[str, types.Params]:
    """Returns the parameters after each of `EPOCHS` on the first demonstrations."""
    rows, batch, key = trial.task.demonstrations, trial.settings.pretrain.batch, trial.key("sft")
    every = demonstrations // batch
    steps, snapshots = EPOCHS[-1] * every, {}
    order = batching.epoch_batches(0, n=demonstrations, batch_size=batch, key=key, steps=steps)

    def keep(done: int, state: Any, metrics: Any) -> None:
        if done % every == 0 and done // every in EPOCHS:
            snapshots[str(done // every)] = jax.device_get(state.params)

    trial.fit(
        "sft",
        trial.supervised_step,
        trial.create_on_mesh(partial(state_lib.create, tx=trial.supervised_tx), base),
        steps,
        batch_at=lambda i: tasks.token_batch(rows, order[i]),
        hyper_at=lambda i: stages.hyper(trial.settings.sft.learning_rate * schedules.cosine(i, steps)),
        callbacks=[keep],
    )
    return snapshots


def test(
    trial: Trial, snapshots: dict[str, types.Params], start: types.Params, reward: types.Params, *, demonstrations: int
) -> dict[str, dict[str, float]]:
    """Returns the loss on held-out demonstrations, the score and the gold utility of each snapshot.

    Args:
        trial: The trial.
        snapshots: Parameters of the SFT models.
        start: Parameters of the KL reference.
        reward: Parameters of the reward model.
        demonstrations: Number of training demonstrations, whose prompts are not used.
    """
    prompts_BP = np.asarray(trial.task.demonstrations.tokens_BL)[:, : trial.task.prompt_width]
    rows = tasks.token_batch(trial.task.demonstrations, new_rows(prompts_BP, demonstrations)[-HELD_OUT:])
    found = {}
    for name, params in snapshots.items():
        answers = [ms.answer(trial, params, start, reward, seed=number) for number in range(SAMPLES)]
        found[name] = {"loss": likelihood.mean_loss(trial, params, rows)}
        found[name] |= {axis: float(np.mean([each[axis] for each in answers])) for axis in ("score", "gold")}
    return found


def new_rows(prompts_BP: np.ndarray, n: int) -> np.ndarray:
    """Returns the rows that differ from each of the first n."""
    row_B = np.unique(prompts_BP, axis=0, return_inverse=True)[1].reshape(-1)
    return np.flatnonzero(~np.isin(row_B, row_B[:n]))


def decide(measured_S: Sequence[Measured]) -> list[verdicts.Part]:
    """Compares the model after the last epoch with the one with the lowest loss."""
    numbers = {
        name: np.array([[measured[str(epoch)][name] for epoch in EPOCHS] for measured in measured_S])
        for name in ("loss", "score", "gold")
    }
    S = len(measured_S)
    changes_S = {name: np.zeros(S) for name in numbers}
    for s in range(S):
        others = [o for o in range(S) if o != s] or [s]
        best = numbers["loss"][others].mean(axis=0)[:-1].argmin()
        for name, values_SE in numbers.items():
            changes_S[name][s] = values_SE[s, -1] - values_SE[s, best]
    return [
        verdicts.above("held-out loss after 16 epochs − at its lowest", changes_S["loss"]),
        verdicts.above("gold utility after 16 epochs − at the lowest loss", changes_S["gold"]),
        verdicts.above("score of the reward model after 16 epochs − at the lowest loss", changes_S["score"]),
    ]


def plot(measured_S: Sequence[Measured]) -> str:
    """Draws the loss and the gold utility against the epochs."""
    with plots.axes(height=3.4, rows=(1, 1)) as (svg, axes):
        for ax, name, label in zip(axes, ("loss", "gold"), ("held-out loss", "gold utility")):
            values_SE = np.array([[measured[str(epoch)][name] for epoch in EPOCHS] for measured in measured_S])
            ax.plot(range(len(EPOCHS)), values_SE.T, ".", color=plots.color("sft"), alpha=0.4)
            ax.plot(range(len(EPOCHS)), values_SE.mean(axis=0), color=plots.color("sft"))
            ax.set_ylabel(label)
        axes[-1].set_xticks(range(len(EPOCHS)), list(map(str, EPOCHS)))
        axes[-1].set_xlabel("epochs")
    return svg[0]


CLAIM = Claim(
    id="C03",
    paper="Ouyang et al. 2022, section 3.5",
    claim="SFT overfits in validation loss after one epoch, yet more epochs improve the score and the preference.",
    published="no numbers; 16 epochs are kept, chosen by the score of the reward model",
    differs="320 demonstrations instead of 13,000, so the loss is lowest after about four epochs. All are of "
    "one run. The gold utility replaces human preferences.",
    measure=measure,
    decide=decide,
    plot=plot,
    changes=MANY_COMPARISONS,
)
