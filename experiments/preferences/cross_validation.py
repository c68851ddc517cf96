"""Cross-validates a reward model and simple baselines on the same folds of human comparisons.

The tokenizer and the base model of a fold are trained only on the training dialogues of that fold. All pairs of a
conversation belong to the same fold, so that no model is tested on conversations that it was trained on.
"""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from launch import run_folder
from recipe import human_comparisons, optimiser_choice, tasks

from preferences import fold_pairs, reward_baselines, reward_stages
from preferences.reward_settings import CrossValidation, Pretraining
from rlhf_jax import lm, parallel, types
from rlhf_jax.data import batching, chat, dialogues, errors, packing, tokenizers
from rlhf_jax.train import loop, reward_model, sft
from rlhf_jax.train import state as state_lib
from rlhf_jax.train.optim import schedules

METHODS = ("reward_model", "tfidf", "shorter")
THREE_PHASE = "three_phase"
"""The reward model after preference-model pretraining; a further method if there is such a stage."""


class Programs:
    """The jitted functions that all folds share."""

    def __init__(self, settings: CrossValidation, pmp: Pretraining) -> None:
        """Builds the functions; each is compiled at its first call."""
        self.settings, self.pmp = settings, pmp
        self.cfg = lm.LMConfig(
            vocab_size=settings.vocab_size,
            n_layers=settings.layers,
            d_model=settings.width,
            n_heads=settings.heads,
            d_mlp=settings.mlp,
            max_length=settings.row_width,
            tie_embeddings=True,
        )
        self.pretrain = parallel.jit_step(sft.make_train_step(partial(lm.token_logprobs, cfg=self.cfg)))
        self.pretrain_tx = optimiser_choice.supervised()
        scores = partial(lm.packed_scores, cfg=self.cfg)
        step = reward_model.make_train_step(partial(lm.score, cfg=self.cfg), packed_scores=scores)
        self.reward = parallel.jit_step(step)
        self.reward_tx = optax.chain(
            optax.scale_by_adam(b2=0.98), optax.add_decayed_weights(settings.weight_decay), optax.scale(-1.0)
        )
        self.scores = jax.jit(scores)
        self.pmp_cfg = self.cfg
        if pmp.prompts and pmp.binary:  # two more tokens, which mark an answer as good or bad
            self.pmp_cfg = dataclasses.replace(self.cfg, vocab_size=settings.vocab_size + 2)
        marked = partial(lm.packed_scores, cfg=self.pmp_cfg)
        step = reward_model.make_train_step(partial(lm.score, cfg=self.pmp_cfg), packed_scores=marked)
        self.pretrain_preferences = parallel.jit_step(step)


class Fold:
    """One fold: its training and test pairs, its tokenizer, and the models trained on its training pairs."""

    def __init__(
        self,
        number: int,
        pairs: Sequence[human_comparisons.Pair],
        test: np.ndarray,
        *,
        programs: Programs,
        folder: run_folder.RunFolder,
        seed: int,
        progress: Any,
    ) -> None:
        """Splits the pairs and trains the tokenizer."""
        self.name, self.folder, self.programs, self.progress = f"fold-{number}", folder, programs, progress
        self.settings = programs.settings
        self.seed = seed
        training = np.ones(len(pairs), bool)
        training[test] = False
        self.test, self.train = ([pairs[int(i)] for i in np.flatnonzero(part)] for part in (~training, training))
        self.key = jax.random.fold_in(jax.random.key(seed), 1000 + number)
        texts = [
            dialogues.format_dialogue((*pair.prompt, dialogues.Turn(dialogues.ASSISTANT, answer)))
            for pair in self.train
            for answer in (pair.chosen, pair.rejected)
        ]
        self.fmt = chat.chat_format(tokenizers.train_bpe(texts, vocab_size=self.settings.vocab_size))
        if (n := len(self.fmt.tokenizer)) != self.settings.vocab_size:
            raise errors.DataError(
                f"{self.name}: the training dialogues yield a vocabulary of {n} tokens instead of "
                f"{self.settings.vocab_size}; set --cv.vocab-size to at most {n}"
            )
        self.train_ids, self.test_ids = (
            fold_pairs.encode(self.fmt, part, self.settings) for part in (self.train, self.test)
        )
        self.steps = max(1, self.settings.epochs * len(self.train) // self.settings.batch)
        self.pmp_batch = self.settings.batch * (2 if programs.pmp.binary else 1)
        self.pmp_steps = 0
        if programs.pmp.prompts:
            self.pmp_steps = max(1, programs.pmp.prompts // self.settings.batch)
        self.steps_done = 0

    @property
    def total(self) -> int:
        """The number of training steps of the fold."""
        arms = 2 if self.pmp_steps else 1
        return self.settings.pretrain_steps + self.pmp_steps + arms * self.settings.members * self.steps

    def fit(self, stage: str, steps: int, **options: Any) -> Any:
        """Trains one model with checkpoints, and shows the progress of the fold."""

        def update_progress(_: str, done: int, __: int, numbers: dict[str, float]) -> None:
            self.progress.update(self.name, self.steps_done + done, self.total, numbers)

        with self.folder.checkpoints(f"{self.name}-{stage}") as checkpoints:
            state = loop.fit(
                steps=steps,
                stage=f"{self.name}-{stage}",
                log=self.folder.log,
                checkpoints=checkpoints,
                progress=update_progress,
                warn=partial(self.folder.note, f"{self.name}-{stage}"),
                rng=self.key,
                **options,
            )
        self.steps_done += steps
        return state

    def train_base(self) -> types.Params:
        """Trains a language model on prompts with chosen answers and on their last turns with rejected answers."""
        settings, end = self.settings, self.fmt.stop_ids[-1]
        documents = []
        for pair in self.train:
            for turns, answer in ((pair.prompt, pair.chosen), (pair.prompt[-1:], pair.rejected)):
                ids, _ = chat.encode_dialogue(self.fmt, (*turns, dialogues.Turn(dialogues.ASSISTANT, answer)))
                documents.append(ids[:-1] if ids[-1] == end else ids)
        rows_BL, _ = packing.pack_documents(documents, width=settings.row_width, eos_id=end)
        order = batching.epoch_batches(
            0, n=len(rows_BL), batch_size=settings.pretrain_batch, key=self.key, steps=settings.pretrain_steps
        )

        def rate(i: int) -> Any:
            warmup = schedules.constant_with_warmup(i, settings.pretrain_steps, warmup=20)
            return settings.pretrain_learning_rate * warmup * schedules.cosine(i, settings.pretrain_steps)

        state = self.fit(
            "pretrain",
            settings.pretrain_steps,
            train_step=self.programs.pretrain,
            state=state_lib.create(
                jax.jit(partial(lm.init, cfg=self.programs.cfg))(self.key), self.programs.pretrain_tx
            ),
            batch_at=lambda i: tasks.text_batch(rows_BL[order[i]]),
            hyper_at=lambda i: _hyper(rate(i)),
        )
        return state.params

    def _order(self, number: int) -> np.ndarray:
        """Returns the indices of the pairs in each batch of an ensemble member."""
        key = jax.random.fold_in(self.key, 1 + number)
        return batching.epoch_batches(0, n=len(self.train), batch_size=self.settings.batch, key=key, steps=self.steps)

    @functools.cached_property
    def _rows(self) -> int:
        """Number of packed rows that is enough for any batch of the reward models."""
        batches = [(self.train_ids, rows) for number in range(self.settings.members) for rows in self._order(number)]
        for pairs in (self.train_ids, self.test_ids):
            batches += [(pairs, rows) for rows in fold_pairs.chunks(len(pairs), self.settings.batch)]
        return fold_pairs.rows_for(batches, self.settings.row_width)

    def pretrain_preferences(self, base: types.Params) -> types.Params:
        """Trains a preference model for one epoch on comparisons of training dialogues that need no labels.

        In binarised form, the vocabulary has two more tokens during this stage, and a batch has twice as many pairs, so
        that the number of steps is the same.
        """
        settings, pmp, cfg = self.settings, self.programs.pmp, self.programs.pmp_cfg
        key = jax.random.fold_in(self.key, 1000)
        seeds = np.asarray(jax.random.key_data(key)).tolist()
        made = fold_pairs.compare_turns(self.train, pmp.prompts, np.random.default_rng(seeds))
        pairs, params = fold_pairs.encode(self.fmt, made, settings), base
        if pmp.binary:
            n = settings.vocab_size
            pairs = fold_pairs.mark(pairs, good_id=n, bad_id=n + 1, prompt_width=settings.prompt_width)
            params = reward_stages.extend_embeddings(params, jax.random.fold_in(key, 1), cfg)
        order = batching.epoch_batches(
            0, n=len(pairs), batch_size=min(self.pmp_batch, len(pairs)), key=key, steps=self.pmp_steps
        )
        n_rows = fold_pairs.rows_for([(pairs, rows) for rows in order], settings.row_width)

        def batch_at(i: int) -> types.PackedComparisons:
            return fold_pairs.pack_pairs(
                pairs, order[i], width=settings.row_width, pad_id=self.fmt.pad_id, n_rows=n_rows
            )

        rate = pmp.rate * settings.pretrain_learning_rate
        state = self.fit(
            "pmp",
            self.pmp_steps,
            train_step=self.programs.pretrain_preferences,
            state=state_lib.create(lm.with_head(jax.random.fold_in(key, 2), params, cfg), self.programs.reward_tx),
            batch_at=batch_at,
            hyper_at=lambda i: _hyper(_warm_linear(rate, i, self.pmp_steps)),
        )
        return reward_stages.truncate_embeddings(state.params, self.programs.cfg)

    def train_member(self, number: int, start: types.Params, *, stage: str = "member") -> types.Params:
        """Trains a reward model from the base model or, with its head, from a preference model.

        Members differ in batch order, dropped tokens and, if ``start`` has none, the head.
        """
        settings = self.settings
        key = jax.random.fold_in(self.key, 1 + number)
        order = self._order(number)
        seeds = np.asarray(jax.random.key_data(key)).tolist()

        def batch_at(i: int) -> types.PackedComparisons:
            return fold_pairs.pack_pairs(
                self.train_ids,
                order[i],
                width=settings.row_width,
                pad_id=self.fmt.pad_id,
                n_rows=self._rows,
                dropped=settings.word_dropout,
                rng=np.random.default_rng([*seeds, i]),
            )

        params = start
        if "head" not in start:
            params = lm.with_head(jax.random.fold_in(key, 0), start, self.programs.cfg)
        state = self.fit(
            f"{stage}-{number}",
            self.steps,
            train_step=self.programs.reward,
            state=state_lib.create(params, self.programs.reward_tx),
            batch_at=batch_at,
            hyper_at=lambda i: _hyper(_warm_linear(settings.learning_rate, i, self.steps)),
        )
        return state.params

    def score_margins(self, params: types.Params, pairs: fold_pairs.Encoded) -> np.ndarray:
        """Returns the score of each chosen answer minus the score of the rejected answer."""
        n, chunks = len(pairs), []
        parts, width = fold_pairs.chunks(n, self.settings.batch), self.settings.row_width
        n_rows = max(self._rows, fold_pairs.rows_for([(pairs, rows) for rows in parts], width))
        for rows in parts:
            batch = fold_pairs.pack_pairs(pairs, rows, width=width, pad_id=self.fmt.pad_id, n_rows=n_rows)
            scores_BK = self.programs.scores(params, batch.tokens_RL, batch.segments_RL, batch.places_BK)
            chunks.append(np.asarray(scores_BK[:, 0] - scores_BK[:, 1], np.float64))
        margin_N = np.concatenate(chunks)[:n]
        if not np.isfinite(margin_N).all():
            raise loop.DivergedError(f"{self.name}: {(~np.isfinite(margin_N)).sum()} of {n} scores are not finite")
        return margin_N

    def _train_ensemble(self, start: types.Params, *, stage: str) -> dict[str, Any]:
        """Trains all members; returns their margins on test pairs, each and on average, and the training accuracy."""
        test, train = [], []
        for number in range(self.settings.members):
            params = self.train_member(number, start, stage=stage)
            test.append(self.score_margins(params, self.test_ids))
            train.append(self.score_margins(params, self.train_ids))
        return {
            "margins": np.mean(test, axis=0).tolist(),
            "members": [margin_N.tolist() for margin_N in test],
            "train_accuracy": float(np.mean(np.mean(train, axis=0) > 0)),
        }

    def _run_three_phases(self, base: types.Params) -> dict[str, Any]:
        """Trains the reward models that start from a preference model, and measures that model before.

        ``accuracy`` is that on the test pairs, and ``own_accuracy`` that on comparisons without labels of the test
        dialogues. Both are of answers without control tokens, which a model of marked pairs has not seen.
        """
        start = self.pretrain_preferences(base)
        seeds = np.asarray(jax.random.key_data(jax.random.fold_in(self.key, 1001))).tolist()
        conversations = human_comparisons.conversation_ids(self.test).max() + 1
        before = {"accuracy": float(np.mean(self.score_margins(start, self.test_ids) > 0))}
        if conversations > 1:
            made = fold_pairs.compare_turns(self.test, len(self.test), np.random.default_rng(seeds))
            margin_N = self.score_margins(start, fold_pairs.encode(self.fmt, made, self.settings))
            before["own_accuracy"] = float(np.mean(margin_N > 0))
        found = self._train_ensemble(start, stage="tuned")
        return {
            THREE_PHASE: found.pop("margins"),
            f"{THREE_PHASE}_train_accuracy": found["train_accuracy"],
            "pmp": before,
        }

    def run(self) -> dict[str, Any]:
        """Trains all models; returns each method's margins on test pairs, and the accuracies on training pairs."""
        base = self.train_base()
        found = self._train_ensemble(base, stage="member")
        tfidf = reward_baselines.TfidfChoice(self.train, seed=self.seed)
        return {
            "reward_model": found.pop("margins"),
            **found,
            "tfidf": tfidf(self.test).tolist(),
            "shorter": reward_baselines.shorter_wins(self.test).tolist(),
            "tfidf_strength": tfidf.strength,
            "tfidf_train_accuracy": float(np.mean(tfidf(self.train) > 0)),
            **(self._run_three_phases(base) if self.pmp_steps else {}),
        }


def _warm_linear(peak: float, i: int, steps: int) -> Any:
    """Returns a rate that rises over at most 20 steps to ``peak`` and falls linearly to 0."""
    return peak * schedules.constant_with_warmup(i, steps, warmup=min(20, steps // 4)) * schedules.linear(i, steps)


def _hyper(rate: Any) -> dict[str, Any]:
    return {"learning_rate": jnp.float32(rate), "max_grad_norm": jnp.float32(1.0)}


def cross_validate(
    pairs: Sequence[human_comparisons.Pair],
    settings: CrossValidation,
    *,
    folds: int,
    seed: int,
    folder: run_folder.RunFolder,
    progress: Any,
    pmp: Pretraining,
) -> list[dict[str, Any]]:
    """Returns the results of each fold; finished folds are restored.

    Margins are in the order of `human_comparisons.fold_indices`.

    Args:
        pairs: The pairs.
        settings: Settings of the models.
        folds: Number of folds.
        seed: Seed of the folds and the models.
        folder: The run folder.
        progress: Shows the progress of the folds.
        pmp: Settings of preference-model pretraining, which adds a second ensemble unless ``pmp.prompts`` is 0.
    """
    programs = Programs(settings, pmp)
    results = []
    group_N = human_comparisons.conversation_ids(pairs, warn=partial(folder.note, "data"))
    for number, test in enumerate(human_comparisons.fold_indices(group_N, folds, seed=seed), start=1):
        path = folder.path / f"fold-{number}.json"
        if path.exists():
            progress.skip(f"fold-{number}")
            results.append(json.loads(path.read_text(encoding="utf-8")))
            continue
        fold = Fold(number, pairs, test, programs=programs, folder=folder, seed=seed, progress=progress)
        progress.start(fold.name, fold.total)
        results.append(fold.run())
        run_folder.write_json(path, results[-1])
        progress.finish(fold.name)
    return results
