"""What a run learns from: the built-in world, or a file of real human comparisons, brought into one form."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from launch import initial_model as start_lib
from launch.settings import Settings

from recipe import human_comparisons, world_words
from rlhf_jax.data import batching, chat, dialogues, encoding, errors, packing, padding, plain_text, records, tokenizers
from rlhf_jax.simulation import corpus, demonstrators, gold, labelers, lexicon, prompts
from rlhf_jax.simulation import world as world_lib
from rlhf_jax.train import sft
from rlhf_jax.types import Comparisons

_ANY = 1 << 30
"""A width that every prompt fits in."""
DEMONSTRATIONS, CORPUS, COMPARE, RL, EVALUATE, SKILLS, POOL, HELDOUT_POOL, MORE = range(9)
"""Streams of random numbers, so that changing the size of one leaves the others as they were."""


@dataclasses.dataclass(frozen=True)
class PromptSet:
    """Prompts, tokenised and left-padded, with what is shown and reported of them."""

    tokens_BP: np.ndarray
    mask_BP: np.ndarray
    texts: list[str]
    categories: list[str]
    words_BP: np.ndarray | None = None
    """The same in the words of the built-in world, as gold reads them."""

    def __len__(self) -> int:
        """How many there are."""
        return len(self.texts)

    def take(self, n: int) -> PromptSet:
        """The first n."""
        return self.at(np.arange(min(n, len(self))))

    def at(self, rows: np.ndarray) -> PromptSet:
        """Those at the places ``rows``, which may repeat."""
        texts, categories = ([each[i] for i in rows] for each in (self.texts, self.categories))
        words_BP = None if self.words_BP is None else self.words_BP[rows]
        return PromptSet(self.tokens_BP[rows], self.mask_BP[rows], texts, categories, words_BP)


@dataclasses.dataclass(frozen=True)
class GoldTask:
    """What only the built-in world has: the truth, labelers to ask, and skills to probe."""

    tables: gold.Tables
    pool: labelers.Pool
    heldout_pool: labelers.Pool
    compare_prompts: PromptSet
    """For training comparisons; then as many as a tenth for validation."""
    n_compare: int
    skill_rows: padding.Rows
    """A skill problem a row, loss on its answer."""


@dataclasses.dataclass(frozen=True)
class Task:
    """Everything a run learns from and is measured on."""

    fmt: chat.ChatFormat
    prompt_width: int
    response_width: int
    text: Callable[[], tuple[np.ndarray, np.ndarray]]
    """Writes the rows of pretraining text and the held-out ones: seconds in which steps can be compiled."""
    demonstrations: padding.Rows
    rl_prompts: PromptSet
    eval_prompts: PromptSet
    dropped: errors.DropCount
    world: GoldTask | None = None
    comparisons: tuple[Comparisons, Comparisons] | None = None
    """Training and held-out comparisons, where they come from a file."""
    speaks_world: bool = False
    """Whether the tokens are the built-in world's words."""

    @property
    def tokenizer(self) -> Any:
        """With the chat template that is trained with."""
        return self.fmt.tokenizer

    @functools.cached_property
    def _text(self) -> tuple[np.ndarray, np.ndarray]:
        return self.text()

    @property
    def pretraining_BL(self) -> np.ndarray:
        """Rows of running text to pretrain on, and to mix in later."""
        return self._text[0]

    @property
    def pretraining_held_out_BL(self) -> np.ndarray:
        """Rows for the pretraining loss."""
        return self._text[1]

    @property
    def row_width(self) -> int:
        """Tokens of a row."""
        return self.prompt_width + self.response_width


def make_task(settings: Settings, start: start_lib.Start | None = None) -> Task:
    """The task that the settings ask for, in the tokens of the model that a run starts from.

    Raises DataError for a file that cannot be used, SettingError where the rows are longer than the model reads.
    """
    return _world_task(settings, start) if settings.data.path is None else _dialogue_task(settings, start)


def more_prompts(settings: Settings, task: Task, n: int) -> PromptSet:
    """Training prompts of the built-in world, in its own words, that no other part of a task has drawn."""
    assert task.speaks_world
    sets = prompts.split_prompts(world_lib.make_world(settings.seed), settings.seed)
    drawn = prompts.draw_prompts(sets.train, n, _stream(settings, MORE))
    return _prompt_sets(task.fmt, [drawn], task.dropped)[1][0]


def _stream(settings: Settings, stream: int) -> np.random.Generator:
    return np.random.default_rng([settings.seed, stream])


def _turns(prompt: prompts.Prompt) -> tuple[dialogues.Turn, ...]:
    return tuple(dialogues.Turn(role, text) for role, text in prompt.turns)


def _prompt_sets(
    fmt: chat.ChatFormat, lists: list[list[prompts.Prompt]], counts: errors.DropCount
) -> tuple[int, list[PromptSet]]:
    """The width that holds every prompt, and each list of prompts at this width."""
    asked = [[_turns(prompt) for prompt in each] for each in lists]
    encoded = [chat.encode_prompts(fmt, each, width=_ANY, counts=counts)[0] for each in asked]
    speaks = world_words.spoken(fmt)
    P = prompts.PROMPT_WIDTH if speaks else max(len(ids) for each in encoded for ids in each)
    made = []
    for task_prompts, turns, ids in zip(lists, asked, encoded):
        assert len(ids) == len(turns)
        tokens_BP, mask_BP = padding.pad_prompts(ids, width=P, pad_id=fmt.pad_id)
        texts = ["\n".join(f"{turn.role}: {turn.text}" for turn in each) for each in turns]
        words_BP = tokens_BP
        if not speaks:
            told = [prompts.prompt_tokens(prompt.turns) for prompt in task_prompts]
            words_BP, _ = padding.pad_prompts(told, width=prompts.PROMPT_WIDTH, pad_id=lexicon.PAD_ID)
        made.append(PromptSet(tokens_BP, mask_BP, texts, [p.category for p in task_prompts], words_BP))
    return P, made


def _answer_width(answers: list[str], ids: list[list[int]], *, speaks: bool) -> int:
    """Tokens that hold what the world gives an answer room for; who rambles past that breaks off, in any tokens."""
    if speaks:
        return prompts.RESPONSE_WIDTH
    fitting = [len(x) for x, text in zip(ids, answers) if len(text.split()) < prompts.RESPONSE_WIDTH]
    return max(fitting, default=prompts.RESPONSE_WIDTH)


def _world_task(settings: Settings, start: start_lib.Start | None) -> Task:
    world = world_lib.make_world(settings.seed)
    fmt = chat.chat_format(tokenizers.word_level(lexicon.WORDS)) if start is None else start.fmt
    speaks = world_words.spoken(fmt)
    dropped = errors.DropCount(max_dropped=settings.data.max_dropped)
    sets = prompts.split_prompts(world, settings.seed)

    rng = _stream(settings, DEMONSTRATIONS)
    asked = prompts.draw_prompts(sets.train, settings.sft.demonstrations, rng)
    answers = demonstrators.demonstrate_all(world, asked, rng, slips=demonstrators.Slips().scaled(settings.world.slips))
    n_compare = settings.comparisons.prompts
    compare = prompts.draw_prompts(sets.train, n_compare + max(n_compare // 10, 1), _stream(settings, COMPARE))
    rl = prompts.draw_prompts(sets.train, settings.ppo.iterations * settings.ppo.batch, _stream(settings, RL))
    split = sets.test if settings.evaluation.split == "test" else sets.validation
    evaluated = prompts.draw_prompts(split, settings.evaluation.prompts, _stream(settings, EVALUATE))

    P, (asked_set, rl_set, eval_set, compare_set) = _prompt_sets(fmt, [asked, rl, evaluated, compare], dropped)
    answer_ids = chat.encode_answers(fmt, answers)
    T = _answer_width(answers, answer_ids, speaks=speaks)
    skill_rows = _skill_rows(settings, fmt, P + T)
    if start is not None:
        start.make_room(P, skill_rows.tokens_BL.shape[1] - P, where="the built-in world's prompts and answers")
    demonstrations = _demonstration_rows(asked_set, answer_ids, T, fmt.pad_id, dropped)

    def text() -> tuple[np.ndarray, np.ndarray]:
        rng = _stream(settings, CORPUS)
        texts = corpus.documents(world, sets.train, settings.pretrain.documents, rng)
        n_held_out = settings.evaluation.pretraining_rows
        held_out = corpus.documents(world, sets.train, n_held_out * (P + T) // 8, rng)
        return _packed(fmt, texts, width=P + T), _packed(fmt, held_out, width=P + T)[:n_held_out]

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
        fmt=fmt,
        prompt_width=P,
        response_width=T,
        text=text,
        demonstrations=demonstrations,
        rl_prompts=rl_set,
        eval_prompts=eval_set,
        dropped=dropped,
        world=GoldTask(
            tables=gold.make_tables(world),
            pool=pool,
            heldout_pool=heldout_pool,
            compare_prompts=compare_set,
            n_compare=n_compare,
            skill_rows=skill_rows,
        ),
        speaks_world=speaks,
    )


def _demonstration_rows(
    asked: PromptSet, answers: list[list[int]], width: int, pad_id: int, counts: errors.DropCount
) -> padding.Rows:
    """Rows of prompt and answer; demonstrators who ramble past the width break off without an end, and are counted."""
    tokens_BT, mask_BT = padding.pad_answers(answers, width=width, pad_id=pad_id, counts=counts)
    return padding.Rows(
        tokens_BL=np.concatenate([asked.tokens_BP, tokens_BT], axis=1),
        mask_BL=np.concatenate([asked.mask_BP, mask_BT], axis=1),
        loss_mask_BL=np.concatenate([np.zeros_like(asked.mask_BP), mask_BT], axis=1),
    )


def _document_end(fmt: chat.ChatFormat) -> int:
    """What stands between documents: the EOS, which is the last of the stop tokens."""
    return fmt.stop_ids[-1]


def _packed(fmt: chat.ChatFormat, texts: list[str], *, width: int) -> np.ndarray:
    ids = plain_text.encode_texts(fmt.tokenizer, texts)
    return packing.pack_documents(ids, width=width, eos_id=_document_end(fmt))[0]


def _skill_rows(settings: Settings, fmt: chat.ChatFormat, width: int) -> padding.Rows:
    """Problems with their answers, as they stand in the corpus; wider than ``width`` where one needs it."""
    problems = corpus.skill_problems(settings.evaluation.skills, _stream(settings, SKILLS))
    asked = plain_text.encode_texts(fmt.tokenizer, [problem.text for problem in problems])
    whole = plain_text.encode_texts(fmt.tokenizer, [f"{problem.text} {problem.answer}" for problem in problems])
    width = max(width, 1 + max(map(len, whole)))
    tokens_BL = np.full((len(problems), width), fmt.pad_id, np.int32)
    mask_BL, loss_mask_BL = np.zeros(tokens_BL.shape, bool), np.zeros(tokens_BL.shape, bool)
    for row, (text, ids) in enumerate(zip(asked, whole)):
        ids = [_document_end(fmt), *ids]  # a document follows the end of another
        tokens_BL[row, : len(ids)], mask_BL[row, : len(ids)] = ids, True
        loss_mask_BL[row, 1 + len(text) : len(ids)] = True
    return padding.Rows(tokens_BL, mask_BL, loss_mask_BL)


def _dialogue_task(settings: Settings, start: start_lib.Start | None) -> Task:
    data = settings.data
    P, T = data.prompt_width, data.response_width
    if start is not None:
        start.make_room(P, T, where="--data.prompt-width and --data.response-width")
    dropped = errors.DropCount(max_dropped=data.max_dropped)
    found = human_comparisons.read(data, dropped)
    key = jax.random.key(settings.seed)
    group_N = human_comparisons.conversations(found)
    kept, _ = batching.split(int(group_N.max()) + 1, fraction=data.held_out, key=key)
    mine_N = np.isin(group_N, kept)
    train, held_out = ([found[i] for i in np.flatnonzero(on_N)] for on_N in (mine_N, ~mine_N))
    fmt = human_comparisons.trained_format(train, data.vocab_size) if start is None else start.fmt
    # What the widths cost is counted beside the file's flaws; only the flaws are held against the file.
    widths = errors.DropCount(max_dropped=1.0)
    room: Any = {"prompt_width": P, "response_width": T, "max_answers": max(len(each.responses) for each in found)}
    sets = []
    for part in (train, held_out):
        ids, places = chat.encode_prompts(fmt, [each.prompt for each in part], width=P, counts=widths)
        asked = [part[i] for i in places]
        rows, _ = encoding.ranking_rows(fmt, ids, asked, counts=widths, **room)
        if part and not len(rows.ranks_BK):
            raise errors.DataError(f"{data.path}: none of {len(part)} comparisons can be used ({widths.report()})")
        sets.append((ids, asked, rows))
    (train_ids, train_asked, train_rows), (held_ids, held_asked, held_rows) = sets
    demonstrations = padding.demonstration_rows(
        train_ids,
        chat.encode_answers(fmt, [each.responses[0] for each in train_asked]),
        prompt_width=P,
        response_width=T,
        pad_id=fmt.pad_id,
        counts=errors.DropCount(max_dropped=1.0),
    )
    end = _document_end(fmt)
    packed_BL, held_BL = (
        packing.pack_documents(human_comparisons.whole_dialogues(fmt, asked, end=end), width=P + T, eos_id=end)[0]
        for asked in (train_asked, held_asked)
    )
    dropped.dropped |= widths.dropped
    dropped.truncated |= widths.truncated
    return Task(
        fmt=fmt,
        prompt_width=P,
        response_width=T,
        text=lambda: (packed_BL, held_BL[: settings.evaluation.pretraining_rows]),
        demonstrations=demonstrations,
        rl_prompts=_dialogue_prompts(train_ids, train_asked, P, fmt.pad_id),
        eval_prompts=_dialogue_prompts(held_ids, held_asked, P, fmt.pad_id).take(settings.evaluation.prompts),
        dropped=dropped,
        comparisons=(train_rows, held_rows),
    )


def _dialogue_prompts(ids: list[list[int]], asked: Sequence[records.Prompt], width: int, pad_id: int) -> PromptSet:
    tokens_BP, mask_BP = padding.pad_prompts(ids, width=width, pad_id=pad_id)
    texts = ["\n".join(f"{turn.role}: {turn.text}" for turn in each.prompt) for each in asked]
    return PromptSet(tokens_BP, mask_BP, texts, [""] * len(asked))


def token_batch(rows: padding.Rows, indices: np.ndarray) -> sft.TokenBatch:
    """Rows by their indices."""
    return sft.TokenBatch(*(x[indices] for x in rows))  # type: ignore[arg-type]


def text_batch(rows_BL: np.ndarray) -> sft.TokenBatch:
    """Rows of running text: every token is real, and every one but the first is trained on."""
    everywhere = np.ones(rows_BL.shape, bool)
    learnt = everywhere.copy()
    learnt[:, 0] = False
    return sft.TokenBatch(rows_BL, everywhere, learnt)  # type: ignore[arg-type]
