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

from functools import partial
from typing import Any

import jax
import numpy as np
from finetune import demonstrations, outcome, training
from launch import entry_point, initial_model, run_folder
from recipe import engine, human_comparisons, run_setup
from rich.console import Console

from rlhf_jax import diagnostics, lm, parallel, types
from rlhf_jax.data import errors
from rlhf_jax.train import sft


def run(settings: SFTSettings) -> dict[str, Any]:
    """Trains the model and returns the contents of results.json."""
    out = Console()
    if finished := outcome.show_finished(settings, out, _table):
        return finished
    counts = errors.DropCount(max_dropped=settings.data.max_dropped, flag="--data.max-dropped")

    def prepare(resolved: SFTSettings, mesh: Any) -> tuple[SFTSettings, Any]:
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
        training.rows_per_step(settings, len(rows.tokens_BL), mesh)
        return initial_model.with_date(settings, model), (model, train, held_out, rows, preferred)

    def stages(prepared: Any) -> list[tuple[str, float]]:
        """Returns the stages with the work of each, in forward passes of a row."""
        _, _, held_out, rows, _ = prepared
        batch = min(settings.batch, len(rows.tokens_BL))
        steps = training.count_steps(settings, len(rows.tokens_BL), batch=batch)
        return [("sft", 3.0 * steps * batch), ("evaluate", 2.0 * len(held_out.ids))]

    with run_setup.open_folder(settings, out, stages=stages, prepare=prepare) as opened:
        model, train, held_out, rows, preferred = opened.prepared
        width = rows.tokens_BL.shape[1]
        cfg, fmt = initial_model.with_compute(model.cfg, settings.compute), model.fmt
        job = engine.Engine(cfg=cfg, **opened.engine_fields)
        n = len(train.ids) + len(held_out.ids)
        if preferred:
            run_setup.print_line(out, "the file has comparisons; their preferred answers are the demonstrations")
        outcome.describe_data(out, counts, {"tokens per row": width, "conversations": n})
        outcome.describe_model(opened, out, model, cfg)
        start = training.trainable(settings.lora, cfg, model.params, jax.random.fold_in(job.key("sft"), 2))
        token_logprobs = partial(lm.token_logprobs, cfg=cfg)
        trained = training.fit(job, "sft", partial(sft.make_train_step, token_logprobs), start, rows, settings)
        params = start.merge(start.frozen, trained.params)
        job.progress.start("evaluate", 2)
        measure = _make_held_out_loss(job, token_logprobs, held_out, width=width, pad_id=fmt.pad_id)
        losses = {"before": measure(model.params), "after": measure(params)}
        job.progress.finish("evaluate")
    per_step = rows.mask_BL.mean() * width * min(settings.batch, len(rows.mask_BL))
    results = {
        "conversations": {"training": len(train.ids), "held_out": len(held_out.ids)},
        "rows": len(rows.tokens_BL),
        "width": width,
        "steps": len(opened.folder.log.rows("sft")),
        "tokens_per_second": trained.tokens_per_second(per_step),
        "held_out_loss": losses,
        "clusters": {"held-out loss": len(np.unique(human_comparisons.conversation_ids(held_out.records)))},
        "dropped": counts.dropped | counts.truncated,
    }
    outcome.save_model(opened.folder, cfg, params, fmt)
    return outcome.finish(opened.folder, settings, results, out, title="Supervised fine-tuning", rows=_table)


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
        job.progress.update("evaluate", 1, 2)
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
