"""Trains a policy with DPO or a related loss on a user's own comparisons, from a given model; see dpo.py."""

from __future__ import annotations

import pathlib
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from launch import initial_model
from preferences import direct_alignment
from preferences import pairs as pairs_lib
from recipe import engine

from finetune import comparisons, outcome, stage_run, training
from finetune.preference_settings import OwnDPOSettings
from rlhf_jax import diagnostics, lm, parallel
from rlhf_jax.data import errors, packing
from rlhf_jax.report import results as results_lib
from rlhf_jax.train import dpo, objectives
from rlhf_jax.train import reference as reference_lib

STAGE = "dpo"
_SCORED_TOKENS = 8192
"""Number of tokens of pairs whose log-probabilities are computed at once."""


def run(settings: OwnDPOSettings) -> dict[str, Any]:
    """Trains the policy and returns the contents of results.json."""
    return stage_run.run(
        settings,
        counts=errors.DropCount(max_dropped=settings.data.max_dropped, flag="--data.max-dropped"),
        prepare=partial(_prepare, settings),
        train=partial(_train, settings),
        title=f"{results_lib.label(settings.loss)} from {settings.model}",
        rows=table,
    )


def _prepare(settings: OwnDPOSettings, mesh: Any, counts: errors.DropCount) -> stage_run.Prepared:
    """Loads the model and the comparisons, of which it makes pairs or, for kto, single answers."""
    model, data = comparisons.load(settings, mesh, counts)
    pairs, held_out = (
        pairs_lib.from_rankings(part.rows, prompt_width=data.prompt_width, per_prompt=n, seed=settings.seed)
        for part, n in ((data.train, settings.pairs), (data.held_out, 0))
    )
    rows = pairs.rows if settings.paired else pairs_lib.singles(pairs, prompt_width=data.prompt_width)
    trained = training.rows_trained(settings, len(rows.tokens_BKL), mesh)
    # In forward passes of an answer. For kto, a row has one answer and a mismatched one, which has no gradient.
    stages = [
        ("reference", 2.0 * len(rows.tokens_BKL) * settings.has_reference),
        (STAGE, (6.0 if settings.paired else 4.0) * trained),
        ("evaluate", 4.0 * len(held_out)),
    ]
    notes = data.notes
    if data.train.rows.loss_inputs is not None:
        notes += ("the soft labels in the field 'preference' are not used: the chosen answers count as better",)
    return stage_run.Prepared(model, (data, pairs, held_out, rows), data.sizes, stages, notes=notes)


def _train(
    settings: OwnDPOSettings, job: engine.Engine, folder: pathlib.Path, prepared: stage_run.Prepared
) -> stage_run.Trained:
    """Trains the policy and measures it on held-out pairs."""
    model, (data, pairs, held_out, rows) = prepared.model, prepared.inputs
    P = data.prompt_width
    token_logprobs = partial(lm.token_logprobs, cfg=job.cfg)
    logprobs = partial(token_logprobs, prompt_width=P)
    score = parallel.JitStep(
        partial(dpo.answer_logprobs, logprobs),
        donate_argnums=(),
        mesh=job.mesh,
        batch_args=(1,),
        replicated_args=(),
    )
    chunk = outcome.chunk_rows(max(1, _SCORED_TOKENS // (2 * data.row_width)), job.mesh)
    if settings.has_reference:
        job.progress.start("reference", 1)
        rows = reference_lib.attach_logprobs(
            score,
            model.params,
            rows,
            path=folder / "reference" / f"{STAGE}.npz",
            settings={"model": repr(job.cfg)},
            rows=chunk,
            warn=partial(job.progress.message, "reference"),
        )
        job.progress.finish("reference")
    else:
        job.progress.skip("reference")
    start = training.trainable(settings.lora, job.cfg, model.params, jax.random.fold_in(job.key(STAGE), 1))
    planned = training.schedule(job, STAGE, len(rows.tokens_BKL), settings)
    masks = [np.asarray(each.mask_BKL) for each in (rows, rows.mismatched) if each is not None]
    batch_at, saving = comparisons.packed_batches(
        settings,
        job.mesh,
        rows,
        planned,
        pack=packing.pack_preferences,
        masks=masks,
        pad_id=model.fmt.pad_id,
        cost=_packed_cost(model, data),
    )
    hyper: Any = direct_alignment.hyperparameters(settings, learning_rate=0.0)

    def make_train_step(**options: Any) -> Any:
        objective = direct_alignment.LOSSES[settings.loss].objective
        in_step = logprobs if batch_at is None else token_logprobs
        step = dpo.make_train_step(in_step, objective, reference=None, **options)
        return lambda state, frozen, values, batch, rng: step(state, frozen, hyper.replace(**values), batch, rng)

    trained = training.fit(job, STAGE, make_train_step, start, rows, settings, planned=planned, batch_at=batch_at)
    params = start.merge(start.frozen, trained.params)
    job.progress.start("evaluate", 2)
    before_BK, after_BK = (
        reference_lib.answer_logprobs(score, each, held_out.rows, rows=chunk) for each in (model.params, params)
    )
    job.progress.finish("evaluate")
    results = {
        "loss": settings.loss,
        "comparisons": {"training": len(data.train), "held_out": len(data.held_out)},
        "pairs": {"training": len(pairs), "held_out": len(held_out)},
        "widths": {"prompt": P, "response": data.response_width},
        "steps": planned.steps,
        "clusters": {"held-out pairs": len(np.unique(data.held_out.conversation_B[held_out.prompt_B]))},
        "packing": saving,
        "training_seconds": trained.seconds,
        "tokens_per_second": trained.tokens_per_second(masks[0].sum() / len(masks[0]) * planned.batch),
        **_measure(settings, hyper, held_out, before_BK, after_BK, data.held_out.conversation_B),
    }
    return stage_run.Trained(params, results)


def _packed_cost(model: initial_model.InitialModel, data: comparisons.Data) -> float:
    """Returns the computation of a packed token relative to that of an unpacked one, by numbers of parameters.

    Packed rows need the logits of all tokens, and other rows only those of their answers.
    """
    layers = sum(x.size for x in jax.tree.leaves(model.params["layers"]))
    head = model.cfg.vocab_size * model.cfg.d_model
    return (layers + head) / (layers + head * data.response_width / data.row_width)


def _measure(
    settings: OwnDPOSettings,
    hyper: dpo.Hyper,
    pairs: pairs_lib.Pairs,
    before_BK: np.ndarray,
    after_BK: np.ndarray,
    conversation_B: np.ndarray,
) -> dict[str, Any]:
    """Returns accuracies and mean log-probabilities of held-out pairs, before and after training, with intervals.

    The implicit reward is that of the loss; of DPO for kto. The intervals are clustered by conversation.
    """
    groups = conversation_B[pairs.prompt_B].tolist()
    lengths_BK = np.maximum(np.asarray(pairs.rows.answer_BKC).sum(axis=-1), 1).astype(np.float32)
    objective = direct_alignment.LOSSES[settings.loss].objective if settings.paired else objectives.dpo

    def rewards(policy_BK: np.ndarray) -> np.ndarray:
        scored = objectives.Scored(*map(jnp.asarray, (policy_BK, before_BK, lengths_BK)))
        return np.asarray(objective(scored, hyper)[1])

    def accuracy(values_BK: np.ndarray) -> list[float]:
        outcome_B = diagnostics.win_outcomes(values_BK[:, 0], values_BK[:, 1])
        return list(diagnostics.clustered_mean(outcome_B, groups, rate=True))

    parts = {"before": before_BK, "after": after_BK}
    margin_B = np.float64(np.subtract(*rewards(after_BK).T))
    return {
        "implicit_accuracy": accuracy(rewards(after_BK)),
        "implicit_accuracy_before": accuracy(rewards(before_BK)),
        "likelihood_accuracy": {name: accuracy(each / lengths_BK) for name, each in parts.items()},
        "margin": list(diagnostics.clustered_mean(margin_B, groups)),
        "logprobs": {
            answer: {
                name: list(diagnostics.clustered_mean(np.float64(each[:, k]), groups)) for name, each in parts.items()
            }
            for k, answer in enumerate(("chosen", "rejected"))
        },
    }


def table(results: dict[str, Any]) -> list[tuple[str, Any]]:
    """Returns the rows of the table that the command prints."""
    n = results["pairs"]["held_out"]
    rows = [
        (f"implicit accuracy before, {errors.counted(n, 'held-out pairs')}", results["implicit_accuracy_before"]),
        ("implicit accuracy after", results["implicit_accuracy"]),
        ("margin of the implicit rewards after", results["margin"]),
    ]
    for when in ("before", "after"):
        name = f"chosen answer more likely per token {when}"
        rows.append((name, results["likelihood_accuracy"][when]))
    for answer, numbers in results["logprobs"].items():
        rows += [(f"log-probability of {answer} answers {when}", numbers[when]) for when in ("before", "after")]
    return [*rows, ("steps", results["steps"]), ("tokens per second", results["tokens_per_second"])]
