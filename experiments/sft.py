"""Fine-tunes a model on demonstrations (supervised fine-tuning, Ouyang et al. 2022, section 3.5).

    python experiments/sft.py --model path/to/Qwen2.5-0.5B --data.path demonstrations.jsonl
    python experiments/sft.py --model MODEL --data.path FILE --lora.rank 16     low-rank adapters, merged at the end
    python experiments/sft.py --model tiny --data.path FILE                     a small model with random weights
    python experiments/sft.py --resume runs/NAME                                resume an interrupted run

The file has prompts with answers in any of the forms of docs/data.md: prompt and response, messages, ShareGPT or Alpaca
records. Of comparisons, the preferred answers are used. Conversations are rendered with the model's own chat template.
The loss is on the last answer of each conversation and its stop token (--data.train-on).

The run folder contains model/, in Hugging Face format with its tokenizer, results.json, report.html, config.json,
metrics.jsonl, tensorboard/ and checkpoints/. Other commands accept the run folder as their --model.
"""

from __future__ import annotations

import dataclasses
from typing import ClassVar, Literal

from launch import command_line, process_setup
from launch.run_settings import StageSettings


@dataclasses.dataclass(frozen=True)
class Demonstrations:
    """Demonstrations."""

    path: str
    """JSONL, JSON (also compressed) or Parquet file in any of the forms in docs/data.md. A pattern with * selects
    several files."""
    max_dropped: float = 0.01
    """Maximum share of unusable records. A file with a larger share is refused."""
    held_out: float = 0.05
    """Share of the conversations held out to measure the loss before and after training. 0 holds out none."""
    width: int | None = None
    """Maximum number of tokens in a conversation. Longer ones lose their oldest turns, then the end of their answer.
    None uses the width that holds 99 % of them, at most the model's maximum length."""
    train_on: Literal["last", "all", "everything"] = "last"
    """Tokens on which the model is trained: the last answer of a conversation, all answers, or everything, prompts
    too."""
    vocab_size: int = 8192
    """Vocabulary size of the tokenizer that is trained on the file if --model has random weights."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class SFTSettings(StageSettings):
    """Settings of sft.py."""

    command: ClassVar[str] = "sft"

    data: Demonstrations
    packing: bool = True
    """Put several conversations into a row. They do not see each other. --batch then counts rows of full width."""


def parse(arguments: list[str]) -> SFTSettings:
    """Parses the command line; raises SettingError for invalid settings."""
    return command_line.parse_stage(SFTSettings, arguments, doc=__doc__)


if __name__ == "__main__":
    command_line.answer_help(parse)
    process_setup.use_huge_pages()

import pathlib
from functools import partial
from typing import Any

import jax
import numpy as np
from finetune import demonstrations, outcome, stage_run, training
from launch import entry_point, initial_model, run_folder
from recipe import engine, human_comparisons

from rlhf_jax import diagnostics, lm, parallel, types
from rlhf_jax.data import errors
from rlhf_jax.train import sft


def run(settings: SFTSettings) -> dict[str, Any]:
    """Trains the model and returns the contents of results.json."""
    return stage_run.run(
        settings,
        counts=errors.DropCount(max_dropped=settings.data.max_dropped, flag="--data.max-dropped"),
        prepare=partial(_prepare, settings),
        train=partial(_train, settings),
        title="Supervised fine-tuning",
        rows=_table,
    )


def _prepare(settings: SFTSettings, mesh: Any, counts: errors.DropCount) -> stage_run.Prepared:
    """Loads the model, or creates it with a tokenizer trained on the file, and encodes the conversations."""
    key, data = jax.random.key(settings.seed), settings.data
    if not initial_model.is_architecture(settings.model):
        initial_model.check(settings.model)
    found, preferred = demonstrations.read(data.path, counts)
    if initial_model.is_architecture(settings.model):
        fmt = demonstrations.train_chat_format(found, data.vocab_size)
        model = initial_model.create(settings.model, fmt, key, mesh=mesh)
    else:
        initial_model.refuse_vocab_size(data)
        model = initial_model.load(settings.model, mesh=mesh, template=settings.template)
    limit = model.cfg.max_length
    if data.width is not None and data.width > limit:
        raise run_folder.SettingError(
            f"--data.width is {data.width}; it must be at most {limit}, the maximum length of --model"
        )
    encoded, width = demonstrations.encode(
        model.fmt, found, width=data.width, max_width=limit, train_on=data.train_on, counts=counts
    )
    train, held_out = demonstrations.split(
        encoded,
        data.held_out,
        jax.random.fold_in(engine.stage_key(settings.seed, "sft"), 1),
        flag="--data.held-out",
    )
    rows = demonstrations.rows(train, width=width, pad_id=model.fmt.pad_id, packed=settings.packing)
    trained = training.rows_trained(settings, len(rows.tokens_BL), mesh)
    return stage_run.Prepared(
        model,
        inputs=(train, held_out, rows),
        sizes={
            "training conversations": len(train.ids),
            "held-out conversations": len(held_out.ids),
            "tokens per row": width,
        },
        stages=[("sft", 3.0 * trained), ("evaluate", 2.0 * len(held_out.ids))],  # in forward passes of a row
        remark="the file has comparisons; their preferred answers are the demonstrations" if preferred else "",
    )


def _train(
    settings: SFTSettings, job: engine.Engine, folder: pathlib.Path, prepared: stage_run.Prepared
) -> stage_run.Trained:
    """Trains the model and measures its loss on held-out conversations."""
    del folder
    train, held_out, rows = prepared.inputs
    width, initial = rows.tokens_BL.shape[1], prepared.model.params
    start = training.trainable(settings.lora, job.cfg, initial, jax.random.fold_in(job.key("sft"), 2))
    token_logprobs = partial(lm.token_logprobs, cfg=job.cfg)
    trained = training.fit(job, "sft", partial(sft.make_train_step, token_logprobs), start, rows, settings)
    params = start.merge(start.frozen, trained.params)
    job.progress.start("evaluate", 2)
    measure = _make_held_out_loss(job, token_logprobs, held_out, width=width, pad_id=prepared.model.fmt.pad_id)
    losses = {}
    for number, (name, each) in enumerate((("before", initial), ("after", params))):
        losses[name] = measure(each)
        job.progress.update("evaluate", number + 1, 2)
    job.progress.finish("evaluate")
    per_step = rows.mask_BL.mean() * width * min(settings.batch, len(rows.mask_BL))
    results = {
        "conversations": {"training": len(train.ids), "held_out": len(held_out.ids)},
        "rows": len(rows.tokens_BL),
        "width": width,
        "steps": len(job.log.rows("sft")),
        "tokens_per_second": trained.tokens_per_second(per_step),
        "held_out_loss": losses,
        "clusters": {"held-out loss": len(np.unique(human_comparisons.conversation_ids(held_out.records)))},
    }
    return stage_run.Trained(params, results)


def _make_held_out_loss(
    job: engine.Engine, token_logprobs: Any, held_out: demonstrations.Encoded, *, width: int, pad_id: int
) -> Any:
    """Returns ``params -> [mean, low, high]``, the loss per token; None without held-out conversations."""

    def sums(params: types.Params, batch: sft.TokenBatch) -> tuple[jax.Array, jax.Array]:
        logprobs_BL = sft.batch_logprobs(token_logprobs, params, batch)
        learnt_BL = batch.loss_mask_BL.at[:, 0].set(False)
        return -(logprobs_BL * learnt_BL).sum(axis=1), learnt_BL.sum(axis=1)

    step = parallel.JitStep(sums, donate_argnums=(), mesh=job.mesh, batch_args=(1,), replicated_args=())

    def measure(params: types.Params) -> list[float] | None:
        if not held_out.ids:
            return None
        rows = demonstrations.rows(held_out, width=width, pad_id=pad_id, packed=False)
        nll_B, tokens_B = outcome.in_chunks(partial(step, params), rows, size=min(8, len(held_out.ids)), mesh=job.mesh)
        group_B = human_comparisons.conversation_ids(held_out.records)
        parts = (np.bincount(group_B, weights=np.float64(each)) for each in (nll_B, tokens_B))
        return list(diagnostics.ratio_interval(*parts, rate=False))

    return measure


def _table(results: dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    losses = results["held_out_loss"]
    return [
        ("held-out loss before, nats per token", losses["before"]),
        ("held-out loss after", losses["after"]),
        ("steps", results["steps"]),
        ("tokens per second", results["tokens_per_second"]),
    ]


def main(arguments: list[str] | None = None) -> None:
    """Runs the command."""
    entry_point.execute(run, parse, arguments)


if __name__ == "__main__":
    main()
