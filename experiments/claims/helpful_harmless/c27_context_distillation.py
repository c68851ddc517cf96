"""C27: a context-distilled model behaves without the prompt as it does with it (Bai et al. 2022, Figure 30).

A model is fine-tuned so that it answers without flaws after a prompt, and as the demonstrators do without it. It then
learns to predict, without the prompt, the 50 most likely tokens that it predicts with the prompt, and the total
probability of all others. Half of the rows are dialogues and half are pretraining text after a user token. The KL from
the prompted model is exact over the vocabulary, on answers of the prompted model to held-out questions.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from distillation import distill_rows, distill_settings, distilled_world, prompted_world, teacher_stage

from claims import model_stages as ms
from claims import verdicts
from claims.claim import Claim, Measured
from claims.trial import Trial
from rlhf_jax import lm, types
from rlhf_jax.report import plots

ARMS = ("prompted", "unprompted", "distilled")
DEMONSTRATIONS = 2000
K, MIX, BATCH, RATE = 50, 0.5, 32, 0.05
"""Settings of Bai et al. 2022 (A.1); the learning rate is relative to that of pretraining."""
_READ = 64


def measure(trial: Trial) -> Measured:
    """Trains and distils the model; returns the gold utility of each arm, and its KL from the prompted model."""
    n = 64 if trial.quick else DEMONSTRATIONS
    teacher = trial.result(teach, ms.Recipe(trial).base, demonstrations=n)
    student = trial.result(distil, teacher, demonstrations=n)
    return trial.result(test, teacher, student).value


def teach(trial: Trial, base: types.Params, *, demonstrations: int) -> types.Params:
    """Returns the model whose answers depend on the prompt."""
    dialogues = prompted_world.draw_dialogues(trial, demonstrations)
    return prompted_world.train_teacher(trial, base, dialogues, _prompt(trial), epochs=trial.settings.sft.epochs)


def distil(trial: Trial, teacher: types.Params, *, demonstrations: int) -> types.Params:
    """Returns the model that has learnt to behave without the prompt as ``teacher`` does with it."""
    dialogues = prompted_world.draw_dialogues(trial, demonstrations)
    ids = prompted_world.distillation_rows(trial, dialogues, n=demonstrations, mix=MIX)
    rows = distill_rows.padded(ids, width=trial.task.row_width, pad_id=trial.task.fmt.pad_id)
    top_k = _top_k(trial.cfg, tuple(_prompt(trial)))  # type: ignore[arg-type]  # frozen, thus hashable
    read_at = [np.minimum(np.arange(start, start + _READ), len(ids) - 1) for start in range(0, len(ids), _READ)]
    parts = [jax.device_get(top_k(teacher, jax.tree.map(lambda x, at=at: x[at], rows))) for at in read_at]
    top: Any = jax.tree.map(lambda *x: np.concatenate(x)[: len(ids)], *parts)
    data = types.DistillationBatch(
        rows.tokens_BL, rows.mask_BL, rows.loss_mask_BL, ids_BLK=top.ids, logprobs_BLK=top.logprobs
    )
    student, _ = distilled_world.train_student(
        trial,
        teacher,
        lambda at: jax.tree.map(lambda x: x[at], data),
        n=len(ids),
        batch=BATCH,
        epochs=1,
        rate=RATE * trial.settings.pretrain.learning_rate,
        tx=trial.supervised_tx,
    )
    return student


@functools.cache
def _top_k(cfg: lm.LMConfig, prompt: tuple[int, ...]) -> Callable[..., lm.TopK]:
    """Returns the compiled function of `teacher_stage.make_top_k`, which all seeds share."""
    return jax.jit(teacher_stage.make_top_k(cfg, prompt, k=K, keep_first=False))


def test(trial: Trial, teacher: types.Params, student: types.Params) -> dict[str, dict[str, float]]:
    """Returns the gold utility of each of `ARMS`, and its KL from the prompted model per token."""
    made, key = prompted_world.make_evaluator(trial, _prompt(trial)), trial.key("evaluate")
    prompted = prompted_world.prompted_answers(made, teacher, key)
    found = {"prompted": {"gold": float(np.mean(prompted.gold.total)), "kl": 0.0}}
    for number, (name, params) in enumerate((("unprompted", teacher), ("distilled", student))):
        answers = trial.sampler(params, None, None, trial.task.eval_prompts, jax.random.fold_in(key, number + 1))
        kl_B, tokens_B = prompted_world.token_kls(made, teacher, params, prompted)
        found[name] = {"gold": float(np.mean(answers.gold.total)), "kl": float(kl_B.sum() / tokens_B.sum())}
    return found


def _prompt(trial: Trial) -> list[int]:
    return prompted_world.prompt_ids(trial.task, distill_settings.WORLD_PROMPT)


def decide(measured_S: Sequence[Measured]) -> list[verdicts.Part]:
    """Computes the share of the KL that distillation removes, and the relative difference in gold utility."""
    kl_SA, gold_SA = (np.array([[each[arm][name] for arm in ARMS] for each in measured_S]) for name in ("kl", "gold"))
    return [
        verdicts.above("share of the KL(prompted || model) removed", 1 - kl_SA[:, 2] / kl_SA[:, 1], 0.8),
        verdicts.between(
            "gold utility of the distilled model relative to the prompted model − 1",
            gold_SA[:, 2] / gold_SA[:, 0] - 1,
            -0.05,
            0.05,
        ),
    ]


def plot(measured_S: Sequence[Measured]) -> str:
    """Draws the KL and the gold utility of each arm."""
    with plots.axes(height=3.4, rows=(1, 1)) as (svg, axes):
        for ax, name, label in zip(axes, ("kl", "gold"), ("KL, nats per token", "gold utility")):
            for measured in measured_S:
                ax.plot(range(len(ARMS)), [measured[arm][name] for arm in ARMS], "o-", color=plots.color("sft"))
            ax.set_ylabel(label)
        axes[-1].set_xticks(range(len(ARMS)), ["with the prompt", "without it", "distilled, without it"])
        axes[-1].set_xlim(-0.5, len(ARMS) - 0.5)
    return svg[0]


CLAIM = Claim(
    id="C27",
    paper="Bai et al. 2022, Figure 30; Askell et al. 2021",
    claim="A context-distilled model behaves like the prompted model and needs no prompt.",
    published='no number in the text; the models are "comparable"',
    differs="The prompt is a sentence to which the model was fine-tuned to react, not example dialogues. The dialogues "
    "have flawless answers of demonstrators instead of the best answers of a website. The gold utility replaces human "
    "evaluation.",
    measure=measure,
    decide=decide,
    plot=plot,
)
