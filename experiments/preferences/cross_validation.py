"""Cross-validation of a reward model on human comparisons, beside simple baselines on the same folds.

Each fold starts from nothing: its tokenizer and its base model are trained on its own training dialogues, and pairs of
one conversation are in one fold, so that no test pair is seen before it is scored.
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
from recipe import human_comparisons, muon, tasks

from preferences import baselines
from preferences.reward_settings import CrossValidation
from rlhf_jax import lm, parallel, types
from rlhf_jax.data import batching, chat, dialogues, errors, packing, tokenizers
from rlhf_jax.train import loop, reward_model, sft
from rlhf_jax.train import state as state_lib
from rlhf_jax.train.optim import schedules

METHODS = ("reward_model", "tfidf", "shorter")


@dataclasses.dataclass(frozen=True)
class Encoded:
    """Pairs as token ids: N prompts, the chosen and the rejected answer of each."""

    prompts: list[list[int]]
    answers: tuple[list[list[int]], list[list[int]]]

    def __len__(self) -> int:
        """How many pairs there are."""
        return len(self.prompts)


def parts(group_N: np.ndarray, folds: int, *, seed: int) -> list[np.ndarray]:
    """Which pairs each fold tests: whole groups, shuffled, in ``folds`` parts that are as equal as groups allow."""
    groups = np.random.default_rng([seed, 17]).permutation(int(group_N.max()) + 1)
    sizes = np.bincount(group_N)[groups]
    fold_G = np.empty(len(groups), int)
    fold_G[groups] = (np.cumsum(sizes) - sizes) * folds // len(group_N)
    return [np.flatnonzero(fold_G[group_N] == fold) for fold in range(folds)]


def encode(fmt: chat.ChatFormat, pairs: Sequence[human_comparisons.Pair], how: CrossValidation) -> Encoded:
    """The end of each prompt, and each answer; the middle of what is too long is left out, never its end mark."""
    counts = errors.DropCount(max_dropped=1.0)
    prompts, kept = chat.encode_prompts(fmt, [pair.prompt for pair in pairs], width=1 << 30, counts=counts)
    assert len(kept) == len(pairs)
    T = how.response_width

    def cut(ids: list[int]) -> list[int]:
        return ids if len(ids) <= T else [*ids[: T - 1], ids[-1]]

    chosen, rejected = (
        [cut(ids) for ids in chat.encode_answers(fmt, [getattr(pair, side) for pair in pairs])]
        for side in ("chosen", "rejected")
    )
    return Encoded([ids[-how.prompt_width :] for ids in prompts], (chosen, rejected))


def packed(
    pairs: Encoded,
    rows: np.ndarray,
    *,
    width: int,
    pad_id: int,
    n_rows: int | None = None,
    dropped: float = 0.0,
    rng: np.random.Generator | None = None,
) -> types.PackedComparisons:
    """Some pairs, packed into rows; a share ``dropped`` of their tokens is left out at random, never an end mark."""
    sequences = []
    for i in rows:
        for answers in pairs.answers:
            ids = np.array(pairs.prompts[i] + answers[i], np.int32)
            if rng is not None:
                ids = ids[np.append(rng.random(len(ids) - 1) >= dropped, True)]
            sequences.append(ids)
    made = packing.pack(sequences, width=width, pad_id=pad_id, counts=errors.DropCount(), rows=n_rows)  # type: ignore[arg-type]
    n = len(rows)
    return types.PackedComparisons(
        made.tokens_BL,  # type: ignore[arg-type]
        made.segments_BL,  # type: ignore[arg-type]
        jax.tree.map(lambda x: x.reshape(n, 2), made.places),
        np.tile(np.array([1, 2], np.int32), (n, 1)),  # type: ignore[arg-type]
        np.ones((n, 2), bool),  # type: ignore[arg-type]
    )


class Programs:
    """The compiled steps that all folds share."""

    def __init__(self, how: CrossValidation) -> None:
        """Build; nothing is compiled yet."""
        self.how = how
        self.cfg = lm.LMConfig(
            vocab_size=how.vocab_size,
            n_layers=how.layers,
            d_model=how.width,
            n_heads=how.heads,
            d_mlp=how.mlp,
            max_length=how.row_width,
            tie_embeddings=True,
        )
        self.pretrain = parallel.jit_step(sft.make_train_step(partial(lm.token_logprobs, cfg=self.cfg)))
        self.pretrain_tx = muon.muon()
        scores = partial(lm.packed_scores, cfg=self.cfg)
        step = reward_model.make_train_step(partial(lm.score, cfg=self.cfg), packed_scores=scores)
        self.reward = parallel.jit_step(step)
        self.reward_tx = optax.chain(
            optax.scale_by_adam(b2=0.98), optax.add_decayed_weights(how.weight_decay), optax.scale(-1.0)
        )
        self.scores = jax.jit(scores)


class Fold:
    """One fold: its data, and what is trained on it."""

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
        """Split, and train the tokenizer."""
        self.name, self.folder, self.programs, self.progress = f"fold-{number}", folder, programs, progress
        self.how = programs.how
        self.seed = seed
        chosen = np.ones(len(pairs), bool)
        chosen[test] = False
        self.test, self.train = ([pairs[int(i)] for i in np.flatnonzero(side)] for side in (~chosen, chosen))
        self.key = jax.random.fold_in(jax.random.key(seed), 1000 + number)
        texts = [
            dialogues.format_dialogue((*pair.prompt, dialogues.Turn(dialogues.ASSISTANT, answer)))
            for pair in self.train
            for answer in (pair.chosen, pair.rejected)
        ]
        self.fmt = chat.chat_format(tokenizers.train_bpe(texts, vocab_size=self.how.vocab_size))
        if len(self.fmt.tokenizer) != self.how.vocab_size:
            n = len(self.fmt.tokenizer)
            raise errors.DataError(f"the training dialogues of a fold give {n} tokens, not {self.how.vocab_size}")
        self.train_ids, self.test_ids = (encode(self.fmt, each, self.how) for each in (self.train, self.test))
        self.steps = max(1, self.how.epochs * len(self.train) // self.how.batch)
        self.done = 0

    @property
    def total(self) -> int:
        """Steps of all that is trained."""
        return self.how.pretrain_steps + self.how.members * self.steps

    def fit(self, stage: str, steps: int, **how: Any) -> Any:
        """One loop, with checkpoints, its progress counted as a part of the fold's."""
        begun = self.done

        def tell(_: str, done: int, __: int, numbers: dict[str, float]) -> None:
            self.progress.update(self.name, begun + done, self.total, numbers)

        with self.folder.checkpoints(f"{self.name}-{stage}") as checkpoints:
            state = loop.fit(
                steps=steps,
                stage=f"{self.name}-{stage}",
                log=self.folder.log,
                checkpoints=checkpoints,
                progress=tell,
                tell=partial(self.folder.note, f"{self.name}-{stage}"),
                rng=self.key,
                **how,
            )
        self.done += steps
        return state

    def base(self) -> types.Params:
        """A language model of the training dialogues: preferred ones, and rejected answers after their questions."""
        how, end = self.how, self.fmt.stop_ids[-1]
        documents = []
        for pair in self.train:
            for turns, answer in ((pair.prompt, pair.chosen), (pair.prompt[-1:], pair.rejected)):
                ids, _ = chat.encode_dialogue(self.fmt, (*turns, dialogues.Turn(dialogues.ASSISTANT, answer)))
                documents.append(ids[:-1] if ids[-1] == end else ids)
        rows_BL, _ = packing.pack_documents(documents, width=how.row_width, eos_id=end)
        order = batching.epoch_batches(
            0, n=len(rows_BL), batch_size=how.pretrain_batch, key=self.key, steps=how.pretrain_steps
        )

        def rate(i: int) -> Any:
            warm = schedules.constant_with_warmup(i, how.pretrain_steps, warmup=20)
            return how.pretrain_learning_rate * warm * schedules.cosine(i, how.pretrain_steps)

        state = self.fit(
            "pretrain",
            how.pretrain_steps,
            train_step=self.programs.pretrain,
            state=state_lib.create(
                jax.jit(partial(lm.init, cfg=self.programs.cfg))(self.key), self.programs.pretrain_tx
            ),
            batch_at=lambda i: tasks.text_batch(rows_BL[order[i]]),
            hyper_at=lambda i: _hyper(rate(i)),
        )
        return state.params

    def _order(self, number: int) -> np.ndarray:
        """Which pairs stand in each batch of a member."""
        key = jax.random.fold_in(self.key, 1 + number)
        return batching.epoch_batches(0, n=len(self.train), batch_size=self.how.batch, key=key, steps=self.steps)

    @functools.cached_property
    def _rows(self) -> int:
        """Packed rows that hold any batch; a multiple of 8, so that folds share compiled programs."""
        asked = [(self.train_ids, rows) for number in range(self.how.members) for rows in self._order(number)]
        for pairs in (self.train_ids, self.test_ids):
            asked += [(pairs, rows) for rows in _chunks(len(pairs), self.how.batch)]
        most = 0
        for pairs, rows in asked:
            lengths = [len(pairs.prompts[i]) + len(side[i]) for i in rows for side in pairs.answers]
            most = max(most, 1 + max(row for row, _ in packing.best_fit(lengths, width=self.how.row_width)))
        # One to spare: with tokens left out, best fit may need a row more.
        return -(-(most + 1) // 8) * 8

    def member(self, number: int, base: types.Params) -> types.Params:
        """A reward model from the base; members differ in their heads, their batches and the tokens left out."""
        how = self.how
        key = jax.random.fold_in(self.key, 1 + number)
        order = self._order(number)
        seeds = np.asarray(jax.random.key_data(key)).tolist()

        def batch_at(i: int) -> types.PackedComparisons:
            return packed(
                self.train_ids,
                order[i],
                width=how.row_width,
                pad_id=self.fmt.pad_id,
                n_rows=self._rows,
                dropped=how.word_dropout,
                rng=np.random.default_rng([*seeds, i]),
            )

        def rate(i: int) -> Any:
            warm = schedules.constant_with_warmup(i, self.steps, warmup=min(20, self.steps // 4))
            return how.learning_rate * warm * schedules.linear(i, self.steps)

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

    def leads(self, params: types.Params, pairs: Encoded) -> np.ndarray:
        """By how much each chosen answer scores above the rejected one."""
        n, found = len(pairs), []
        for rows in _chunks(n, self.how.batch):
            batch = packed(pairs, rows, width=self.how.row_width, pad_id=self.fmt.pad_id, n_rows=self._rows)
            scores_BK = self.programs.scores(params, batch.tokens_RL, batch.segments_RL, batch.places_BK)
            found.append(np.asarray(scores_BK[:, 0] - scores_BK[:, 1], np.float64))
        leads = np.concatenate(found)[:n]
        if not np.isfinite(leads).all():
            raise loop.DivergedError(f"{self.name}: {(~np.isfinite(leads)).sum()} of {n} scores are not finite")
        return leads

    def run(self) -> dict[str, Any]:
        """Train and score: each method's lead on every test pair, and the reward model's own training accuracy."""
        base = self.base()
        test, train = [], []
        for number in range(self.how.members):
            params = self.member(number, base)
            test.append(self.leads(params, self.test_ids))
            train.append(self.leads(params, self.train_ids))
        tfidf = baselines.TfidfChoice(self.train, seed=self.seed)
        return {
            "reward_model": np.mean(test, axis=0).tolist(),
            "members": [leads.tolist() for leads in test],
            "tfidf": tfidf(self.test).tolist(),
            "shorter": baselines.shorter_wins(self.test).tolist(),
            "train_accuracy": float(np.mean(np.mean(train, axis=0) > 0)),
            "tfidf_strength": tfidf.strength,
            "tfidf_train_accuracy": float(np.mean(tfidf(self.train) > 0)),
        }


def _chunks(n: int, size: int) -> list[np.ndarray]:
    """All of n in parts of one size; the last one repeats the last."""
    return [np.minimum(np.arange(start, start + size), n - 1) for start in range(0, n, size)]


def _hyper(rate: Any) -> dict[str, Any]:
    return {"learning_rate": jnp.float32(rate), "max_grad_norm": jnp.float32(1.0)}


def cross_validate(
    pairs: Sequence[human_comparisons.Pair],
    how: CrossValidation,
    *,
    folds: int,
    seed: int,
    folder: run_folder.RunFolder,
    progress: Any,
) -> list[dict[str, Any]]:
    """What each fold found, restored where it is finished; the leads are in the order of ``parts(...)``."""
    programs = Programs(how)
    found = []
    for number, test in enumerate(parts(human_comparisons.conversations(pairs), folds, seed=seed), start=1):
        path = folder.path / f"fold-{number}.json"
        if path.exists():
            progress.skip(f"fold-{number}")
            found.append(json.loads(path.read_text(encoding="utf-8")))
            continue
        fold = Fold(number, pairs, test, programs=programs, folder=folder, seed=seed, progress=progress)
        progress.start(fold.name, fold.total)
        found.append(fold.run())
        run_folder.write_json(path, found[-1])
        progress.finish(fold.name)
    return found
