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

from preferences import reward_baselines
from preferences.reward_settings import CrossValidation
from rlhf_jax import lm, parallel, types
from rlhf_jax.data import batching, chat, dialogues, errors, packing, tokenizers
from rlhf_jax.train import loop, reward_model, sft
from rlhf_jax.train import state as state_lib
from rlhf_jax.train.optim import schedules

METHODS = ("reward_model", "tfidf", "shorter")


@dataclasses.dataclass(frozen=True)
class Encoded:
    """Pairs as token ids: N prompts, N chosen answers and N rejected answers."""

    prompts: list[list[int]]
    answers: tuple[list[list[int]], list[list[int]]]

    def __len__(self) -> int:
        """Returns the number of pairs."""
        return len(self.prompts)


def encode(fmt: chat.ChatFormat, pairs: Sequence[human_comparisons.Pair], settings: CrossValidation) -> Encoded:
    """Tokenises pairs. A long prompt keeps its last tokens; a long answer keeps its first tokens and its end-of-turn
    token."""
    counts = errors.DropCount(max_dropped=1.0)
    turns = [pair.prompt for pair in pairs]
    prompts, kept = chat.encode_prompts(fmt, turns, width=1 << 30, counts=counts)
    assert len(kept) == len(pairs)
    T = settings.response_width

    def truncate(ids: list[int]) -> list[int]:
        return ids if len(ids) <= T else [*ids[: T - 1], ids[-1]]

    chosen, rejected = (
        list(map(truncate, chat.encode_answers(fmt, turns, [getattr(pair, side) for pair in pairs])))
        for side in ("chosen", "rejected")
    )
    return Encoded([ids[-settings.prompt_width :] for ids in prompts], (chosen, rejected))


def pack_pairs(
    pairs: Encoded,
    rows: np.ndarray,
    *,
    width: int,
    pad_id: int,
    n_rows: int | None = None,
    dropped: float = 0.0,
    rng: np.random.Generator | None = None,
) -> types.PackedComparisons:
    """Packs the pairs with indices ``rows`` into ``n_rows`` rows (None: as many as needed) of ``width`` tokens.

    With ``rng``, each token of a sequence except the last is dropped with probability ``dropped``.
    """
    sequences = []
    for i in rows:
        for answers in pairs.answers:
            ids = np.array(pairs.prompts[i] + answers[i], np.int32)
            if rng is not None:
                ids = ids[np.append(rng.random(len(ids) - 1) >= dropped, True)]
            sequences.append(ids)
    batch = packing.pack(sequences, width=width, pad_id=pad_id, counts=errors.DropCount(), rows=n_rows)  # type: ignore[arg-type]
    n = len(rows)
    return types.PackedComparisons(
        batch.tokens_BL,  # type: ignore[arg-type]
        batch.segments_BL,  # type: ignore[arg-type]
        jax.tree.map(lambda x: x.reshape(n, 2), batch.places),
        np.tile(np.array([1, 2], np.int32), (n, 1)),  # type: ignore[arg-type]
        np.ones((n, 2), bool),  # type: ignore[arg-type]
    )


class Programs:
    """The jitted functions that all folds share."""

    def __init__(self, settings: CrossValidation) -> None:
        """Builds the functions; each is compiled at its first call."""
        self.settings = settings
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
        self.train_ids, self.test_ids = (encode(self.fmt, part, self.settings) for part in (self.train, self.test))
        self.steps = max(1, self.settings.epochs * len(self.train) // self.settings.batch)
        self.steps_done = 0

    @property
    def total(self) -> int:
        """The number of training steps of the fold."""
        return self.settings.pretrain_steps + self.settings.members * self.steps

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
        """Number of packed rows: enough for any batch, and a multiple of 8, so that folds can share programs."""
        batches = [(self.train_ids, rows) for number in range(self.settings.members) for rows in self._order(number)]
        for pairs in (self.train_ids, self.test_ids):
            batches += [(pairs, rows) for rows in _chunks(len(pairs), self.settings.batch)]
        most = 0
        for pairs, rows in batches:
            lengths = [len(pairs.prompts[i]) + len(side[i]) for i in rows for side in pairs.answers]
            most = max(most, 1 + max(row for row, _ in packing.best_fit(lengths, width=self.settings.row_width)))
        # Best-fit packing may need one more row after tokens are dropped.
        return -(-(most + 1) // 8) * 8

    def train_member(self, number: int, base: types.Params) -> types.Params:
        """Trains a reward model from the base model; members differ in head, batch order and dropped tokens."""
        settings = self.settings
        key = jax.random.fold_in(self.key, 1 + number)
        order = self._order(number)
        seeds = np.asarray(jax.random.key_data(key)).tolist()

        def batch_at(i: int) -> types.PackedComparisons:
            return pack_pairs(
                self.train_ids,
                order[i],
                width=settings.row_width,
                pad_id=self.fmt.pad_id,
                n_rows=self._rows,
                dropped=settings.word_dropout,
                rng=np.random.default_rng([*seeds, i]),
            )

        def rate(i: int) -> Any:
            warmup = schedules.constant_with_warmup(i, self.steps, warmup=min(20, self.steps // 4))
            return settings.learning_rate * warmup * schedules.linear(i, self.steps)

        params = lm.with_head(jax.random.fold_in(key, 0), base, self.programs.cfg)
        state = self.fit(
            f"member-{number}",
            self.steps,
            train_step=self.programs.reward,
            state=state_lib.create(params, self.programs.reward_tx),
            batch_at=batch_at,
            hyper_at=lambda i: _hyper(rate(i)),
        )
        return state.params

    def score_margins(self, params: types.Params, pairs: Encoded) -> np.ndarray:
        """Returns the score of each chosen answer minus the score of the rejected answer."""
        n, chunks = len(pairs), []
        for rows in _chunks(n, self.settings.batch):
            batch = pack_pairs(pairs, rows, width=self.settings.row_width, pad_id=self.fmt.pad_id, n_rows=self._rows)
            scores_BK = self.programs.scores(params, batch.tokens_RL, batch.segments_RL, batch.places_BK)
            chunks.append(np.asarray(scores_BK[:, 0] - scores_BK[:, 1], np.float64))
        margin_N = np.concatenate(chunks)[:n]
        if not np.isfinite(margin_N).all():
            raise loop.DivergedError(f"{self.name}: {(~np.isfinite(margin_N)).sum()} of {n} scores are not finite")
        return margin_N

    def run(self) -> dict[str, Any]:
        """Trains all models; returns each method's margins on test pairs, and the accuracies on training pairs."""
        base = self.train_base()
        test, train = [], []
        for number in range(self.settings.members):
            params = self.train_member(number, base)
            test.append(self.score_margins(params, self.test_ids))
            train.append(self.score_margins(params, self.train_ids))
        tfidf = reward_baselines.TfidfChoice(self.train, seed=self.seed)
        return {
            "reward_model": np.mean(test, axis=0).tolist(),
            "members": [margin_N.tolist() for margin_N in test],
            "tfidf": tfidf(self.test).tolist(),
            "shorter": reward_baselines.shorter_wins(self.test).tolist(),
            "train_accuracy": float(np.mean(np.mean(train, axis=0) > 0)),
            "tfidf_strength": tfidf.strength,
            "tfidf_train_accuracy": float(np.mean(tfidf(self.train) > 0)),
        }


def _chunks(n: int, size: int) -> list[np.ndarray]:
    """Splits ``range(n)`` into chunks of equal size; the last chunk repeats the last index."""
    return [np.minimum(np.arange(start, start + size), n - 1) for start in range(0, n, size)]


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
) -> list[dict[str, Any]]:
    """Returns the results of each fold; finished folds are restored.

    Margins are in the order of `human_comparisons.fold_indices`.
    """
    programs = Programs(settings)
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
