"""What a run learns from: the built-in world, or a file of real human comparisons, brought into one form."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from rlhf_jax.data import batching, dialogues, errors, tokenising, tokenizers
from rlhf_jax.simulation import corpus, demonstrators, gold, labelers, lexicon, prompts
from rlhf_jax.simulation import world as world_lib
from rlhf_jax.train import sft
from rlhf_jax.types import Comparisons

from .settings import Settings

DEMONSTRATIONS, CORPUS, COMPARE, RL, EVALUATE, SKILLS, POOL, HELDOUT_POOL = range(8)
"""Streams of random numbers, so that changing the size of one leaves the others as they were."""

PAD_ID, END_ID = (tokenizers.SPECIAL_TOKENS.index(token) for token in (tokenizers.PAD, tokenizers.END))


@dataclasses.dataclass(frozen=True)
class PromptSet:
    """Prompts, tokenised and left-padded, with what is shown and reported of them."""

    tokens_BP: np.ndarray
    mask_BP: np.ndarray
    texts: list[str]
    categories: list[str]

    def __len__(self) -> int:
        """How many there are."""
        return len(self.texts)

    def take(self, n: int) -> PromptSet:
        """The first n."""
        return PromptSet(self.tokens_BP[:n], self.mask_BP[:n], self.texts[:n], self.categories[:n])


@dataclasses.dataclass(frozen=True)
class GoldTask:
    """What only the built-in world has: the truth, labelers to ask, and skills to probe."""

    tables: gold.Tables
    pool: labelers.Pool
    heldout_pool: labelers.Pool
    compare_prompts: PromptSet
    """For training comparisons; then as many as a tenth for validation."""
    n_compare: int
    skill_rows: tokenising.Rows
    """A skill problem a row, loss on its answer."""


@dataclasses.dataclass(frozen=True)
class Task:
    """Everything a run learns from and is measured on."""

    tokenizer: Any
    prompt_width: int
    response_width: int
    pretraining_BL: np.ndarray
    pretraining_held_out_BL: np.ndarray
    demonstrations: tokenising.Rows
    rl_prompts: PromptSet
    eval_prompts: PromptSet
    dropped: errors.DropCount
    world: GoldTask | None = None
    comparisons: tuple[Comparisons, Comparisons] | None = None
    """Training and held-out comparisons, where they come from a file."""

    @property
    def row_width(self) -> int:
        """Tokens of a row."""
        return self.prompt_width + self.response_width


def make_task(settings: Settings) -> Task:
    """The task that the settings ask for; raises DataError for a file that cannot be used."""
    return _world_task(settings) if settings.data.path is None else _dialogue_task(settings)


def _stream(settings: Settings, stream: int) -> np.random.Generator:
    return np.random.default_rng([settings.seed, stream])


def _prompt_set(task_prompts: list[prompts.Prompt], tokenizer: Any, counts: errors.DropCount) -> PromptSet:
    turns = [tuple(dialogues.Turn(role, text) for role, text in prompt.turns) for prompt in task_prompts]
    ids, kept = tokenising.encode_prompts(tokenizer, turns, width=prompts.PROMPT_WIDTH, counts=counts)
    assert len(kept) == len(task_prompts)
    tokens_BP, mask_BP = tokenising.pad_prompts(ids, width=prompts.PROMPT_WIDTH, pad_id=PAD_ID)
    texts = ["\n".join(f"{turn.role}: {turn.text}" for turn in each) for each in turns]
    return PromptSet(tokens_BP, mask_BP, texts, [prompt.category for prompt in task_prompts])


def _world_task(settings: Settings) -> Task:
    world = world_lib.make_world(settings.seed)
    tokenizer = tokenizers.word_level(lexicon.WORDS)
    dropped = errors.DropCount(max_dropped=settings.data.max_dropped)
    sets = prompts.split_prompts(world, settings.seed)
    P, T = prompts.PROMPT_WIDTH, prompts.RESPONSE_WIDTH

    rng = _stream(settings, CORPUS)
    texts = corpus.documents(world, sets.train, settings.pretrain.documents, rng)
    pretraining_BL = _packed(tokenizer, texts, width=P + T)
    n_held_out = settings.evaluation.pretraining_rows
    held_out_texts = corpus.documents(world, sets.train, n_held_out * (P + T) // 8, rng)
    held_out_BL = _packed(tokenizer, held_out_texts, width=P + T)[:n_held_out]

    rng = _stream(settings, DEMONSTRATIONS)
    asked = prompts.draw_prompts(sets.train, settings.sft.demonstrations, rng)
    answers = demonstrators.demonstrate_all(world, asked, rng, slips=demonstrators.Slips().scaled(settings.world.slips))
    asked_set = _prompt_set(asked, tokenizer, dropped)
    demonstrations = _demonstration_rows(asked_set, tokenising.encode_answers(tokenizer, answers), T, dropped)

    n_compare = settings.comparisons.prompts
    compare = prompts.draw_prompts(sets.train, n_compare + max(n_compare // 10, 1), _stream(settings, COMPARE))
    rl = prompts.draw_prompts(sets.train, settings.ppo.iterations * settings.ppo.batch, _stream(settings, RL))
    split = sets.test if settings.evaluation.split == "test" else sets.validation
    evaluated = prompts.draw_prompts(split, settings.evaluation.prompts, _stream(settings, EVALUATE))

    key = jax.random.key(settings.seed)
    pool, heldout_pool = (
        labelers.make_pool(
            jax.random.fold_in(key, stream),
            settings.world.labelers,
            spread=settings.world.spread,
            polite_taste=settings.world.polite_taste,
            tie_width=settings.world.tie_width,
            lapse=settings.world.lapse,
        )
        for stream in (POOL, HELDOUT_POOL)
    )
    return Task(
        tokenizer=tokenizer,
        prompt_width=P,
        response_width=T,
        pretraining_BL=pretraining_BL,
        pretraining_held_out_BL=held_out_BL,
        demonstrations=demonstrations,
        rl_prompts=_prompt_set(rl, tokenizer, dropped),
        eval_prompts=_prompt_set(evaluated, tokenizer, dropped),
        dropped=dropped,
        world=GoldTask(
            tables=gold.make_tables(world),
            pool=pool,
            heldout_pool=heldout_pool,
            compare_prompts=_prompt_set(compare, tokenizer, dropped),
            n_compare=n_compare,
            skill_rows=_skill_rows(settings, tokenizer, P + T),
        ),
    )


def _demonstration_rows(
    asked: PromptSet, answers: list[list[int]], width: int, counts: errors.DropCount
) -> tokenising.Rows:
    """Rows of prompt and answer; demonstrators who ramble past the width break off without an end, and are counted."""
    tokens_BT, mask_BT = tokenising.pad_answers(answers, width=width, pad_id=PAD_ID, counts=counts)
    return tokenising.Rows(
        tokens_BL=np.concatenate([asked.tokens_BP, tokens_BT], axis=1),
        mask_BL=np.concatenate([asked.mask_BP, mask_BT], axis=1),
        loss_mask_BL=np.concatenate([np.zeros_like(asked.mask_BP), mask_BT], axis=1),
    )


def _packed(tokenizer: Any, texts: list[str], *, width: int) -> np.ndarray:
    ids = tokenising.encode_texts(tokenizer, texts)
    return tokenising.pack_text(ids, width=width, eos_id=END_ID)[0]


def _skill_rows(settings: Settings, tokenizer: Any, width: int) -> tokenising.Rows:
    problems = corpus.skill_problems(settings.evaluation.skills, _stream(settings, SKILLS))
    asked = tokenising.encode_texts(tokenizer, [problem.text for problem in problems])
    answers = tokenising.encode_texts(tokenizer, [problem.answer for problem in problems])
    tokens_BL = np.zeros((len(problems), width), np.int32)
    mask_BL, loss_mask_BL = np.zeros(tokens_BL.shape, bool), np.zeros(tokens_BL.shape, bool)
    for row, (text, answer) in enumerate(zip(asked, answers)):
        ids = [END_ID, *text, *answer]  # a document follows the end of another
        tokens_BL[row, : len(ids)], mask_BL[row, : len(ids)] = ids, True
        loss_mask_BL[row, len(ids) - len(answer) : len(ids)] = True
    return tokenising.Rows(tokens_BL, mask_BL, loss_mask_BL)


def _dialogue_task(settings: Settings) -> Task:
    data = settings.data
    assert data.path is not None
    dropped = errors.DropCount(max_dropped=data.max_dropped)
    comparisons, _ = dialogues.read_comparisons(data.path, counts=dropped)
    key = jax.random.key(settings.seed)
    train, held_out = batching.split(len(comparisons), fraction=data.held_out, key=key)
    texts = [
        dialogues.format_dialogue((*each.prompt, dialogues.Turn(dialogues.ASSISTANT, answer)))
        for each in (comparisons[i] for i in train)
        for answer in (each.chosen, each.rejected)
    ]
    tokenizer = tokenizers.train_bpe(texts, vocab_size=data.vocab_size)
    P, T = data.prompt_width, data.response_width

    def encoded(indices: np.ndarray) -> tuple[list[list[int]], list[dialogues.Comparison]]:
        chosen = [comparisons[i] for i in indices]
        ids, kept = tokenising.encode_prompts(tokenizer, [c.prompt for c in chosen], width=P, counts=widths)
        return ids, [chosen[i] for i in kept]

    # What the widths cost is counted beside the file's flaws; only the flaws are held against the file.
    widths = errors.DropCount(max_dropped=1.0)
    sets = []
    for indices in (train, held_out):
        ids, records = encoded(np.asarray(indices))
        chosen, rejected = (
            tokenising.encode_answers(tokenizer, [getattr(record, side) for record in records])
            for side in ("chosen", "rejected")
        )
        rows = tokenising.comparison_rows(
            ids, chosen, rejected, prompt_width=P, response_width=T, pad_id=PAD_ID, counts=widths
        )
        sets.append((ids, records, chosen, rows))
    (train_ids, train_records, train_chosen, train_rows), (held_ids, held_records, _, held_rows) = sets
    demonstrations = tokenising.demonstration_rows(
        train_ids,
        train_chosen,
        prompt_width=P,
        response_width=T,
        pad_id=PAD_ID,
        counts=errors.DropCount(max_dropped=1.0),
    )
    whole = [_whole_dialogue(tokenizer, record) for record in train_records]
    packed_BL, _ = tokenising.pack_text(whole, width=P + T, eos_id=END_ID)
    held_BL, _ = tokenising.pack_text(
        [_whole_dialogue(tokenizer, record) for record in held_records], width=P + T, eos_id=END_ID
    )
    dropped.dropped |= widths.dropped
    dropped.truncated |= widths.truncated
    return Task(
        tokenizer=tokenizer,
        prompt_width=P,
        response_width=T,
        pretraining_BL=packed_BL,
        pretraining_held_out_BL=held_BL[: settings.evaluation.pretraining_rows],
        demonstrations=demonstrations,
        rl_prompts=_dialogue_prompts(train_ids, train_records, P),
        eval_prompts=_dialogue_prompts(held_ids, held_records, P).take(settings.evaluation.prompts),
        dropped=dropped,
        comparisons=(train_rows, held_rows),
    )


def _whole_dialogue(tokenizer: Any, record: dialogues.Comparison) -> list[int]:
    ids = tokenising.encode_prompt(tokenizer, record.prompt)
    return [*ids, *tokenising.encode_answer(tokenizer, record.chosen)[:-1]]  # the packing ends it


def _dialogue_prompts(ids: list[list[int]], records: list[dialogues.Comparison], width: int) -> PromptSet:
    tokens_BP, mask_BP = tokenising.pad_prompts(ids, width=width, pad_id=PAD_ID)
    texts = ["\n".join(f"{turn.role}: {turn.text}" for turn in record.prompt) for record in records]
    return PromptSet(tokens_BP, mask_BP, texts, [""] * len(records))


def token_batch(rows: tokenising.Rows, indices: np.ndarray) -> sft.TokenBatch:
    """Rows by their indices."""
    return sft.TokenBatch(*(jnp.asarray(x[indices]) for x in rows))


def text_batch(rows_BL: np.ndarray) -> sft.TokenBatch:
    """Rows of running text: every token is real, and every one but the first is trained on."""
    everywhere = np.ones(rows_BL.shape, bool)
    learnt = everywhere.copy()
    learnt[:, 0] = False
    return sft.TokenBatch(jnp.asarray(rows_BL), jnp.asarray(everywhere), jnp.asarray(learnt))
