"""Prepares the data of a run, from the built-in world or from a file of human comparisons."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from launch import initial_model
from launch.settings import Settings

from recipe import human_comparisons, world_words
from rlhf_jax import types
from rlhf_jax.data import (
    chat,
    dialogues,
    encoding,
    errors,
    packing,
    padding,
    plain_text,
    readers,
    records,
    tokenizers,
)
from rlhf_jax.simulation import corpus, demonstrators, gold, labelers, lexicon, prompts
from rlhf_jax.simulation import world as world_lib
from rlhf_jax.train import sft

_UNBOUNDED = 1 << 30
"""A width that exceeds the length of any prompt."""
DEMONSTRATIONS, CORPUS, COMPARE, RL, EVALUATE, SKILLS, POOL, HELDOUT_POOL, MORE = range(9)
"""Indices of independent random streams, so that a change in the size of one data set does not affect the others."""


@dataclasses.dataclass(frozen=True)
class PromptSet:
    """Tokenised and left-padded prompts, with their texts and categories."""

    tokens_BP: np.ndarray
    mask_BP: np.ndarray
    texts: list[str]
    categories: list[str]
    asked_B: np.ndarray
    """Index of what each prompt asks (`simulation.prompts.Prompt.asked`) or, for prompts from a file, of its
    conversation. Numbers about prompts with the same index are not independent."""
    words_BP: np.ndarray | None = None
    """The prompts as ids of the built-in world's words, which the gold utility requires."""

    def __len__(self) -> int:
        """Returns the number of prompts."""
        return len(self.texts)

    def take(self, n: int) -> PromptSet:
        """Returns the first n prompts."""
        return self.at(np.arange(min(n, len(self))))

    def at(self, rows: np.ndarray) -> PromptSet:
        """Returns the prompts with the indices ``rows``, which may contain duplicates."""
        texts, categories = ([each[i] for i in rows] for each in (self.texts, self.categories))
        words_BP = None if self.words_BP is None else self.words_BP[rows]
        return PromptSet(self.tokens_BP[rows], self.mask_BP[rows], texts, categories, self.asked_B[rows], words_BP)


def concatenate(sets: Sequence[PromptSet]) -> PromptSet:
    """Returns the prompts of all sets; prompts of different sets have different ``asked_B``."""
    first_S = np.cumsum([0, *(int(each.asked_B.max(initial=-1)) + 1 for each in sets)])
    tokens_BP, mask_BP = (np.concatenate(parts) for parts in zip(*((each.tokens_BP, each.mask_BP) for each in sets)))
    words = [each.words_BP for each in sets]
    return PromptSet(
        tokens_BP,
        mask_BP,
        [text for each in sets for text in each.texts],
        [category for each in sets for category in each.categories],
        np.concatenate([each.asked_B + first for each, first in zip(sets, first_S)]),
        np.concatenate(words) if all(each is not None for each in words) else None,  # type: ignore[arg-type]
    )


@dataclasses.dataclass(frozen=True)
class GoldTask:
    """Data that only the built-in world provides: a gold utility, simulated labelers and skill problems."""

    tables: gold.Tables
    pool: labelers.Pool
    heldout_pool: labelers.Pool
    compare_prompts: PromptSet
    """Prompts of the training comparisons, followed by a tenth as many for validation."""
    n_compare: int
    """Number of training prompts in ``compare_prompts``."""
    skill_rows: types.TokenBatch
    """One skill problem per row. The loss mask selects its answer."""


@dataclasses.dataclass(frozen=True)
class Task:
    """The data of a run, for training and evaluation."""

    fmt: chat.ChatFormat
    prompt_width: int
    response_width: int
    text: Callable[[], tuple[np.ndarray, np.ndarray]]
    """Creates the training and held-out rows of pretraining text. This takes seconds and is deferred until the
    rows are used."""
    demonstrations: types.TokenBatch
    rl_prompts: PromptSet
    eval_prompts: PromptSet
    dropped: errors.DropCount
    world: GoldTask | None = None
    comparisons: tuple[types.Comparisons, types.Comparisons] | None = None
    """Training and held-out comparisons from a file; None for the built-in world."""
    compared: tuple[PromptSet, ...] = ()
    """Prompts of the comparisons; prompts in different sets do not ask the same."""
    notes: tuple[str, ...] = ()
    """Warnings about the data, which `run_setup` prints and saves as incidents."""
    in_world_words: bool = False
    """Whether the model has the built-in world's tokenizer, whose ids are the world's words."""

    @property
    def tokenizer(self) -> Any:
        """The tokenizer, with the chat template used in training."""
        return self.fmt.tokenizer

    @functools.cached_property
    def _text(self) -> tuple[np.ndarray, np.ndarray]:
        return self.text()

    @property
    def pretraining_BL(self) -> np.ndarray:
        """Rows of pretraining text, used in pretraining, SFT and PPO-ptx."""
        return self._text[0]

    @property
    def pretraining_held_out_BL(self) -> np.ndarray:
        """Held-out rows of pretraining text."""
        return self._text[1]

    @functools.cached_property
    def _asked_by_prompt(self) -> dict[bytes, int]:
        found: dict[bytes, int] = {}
        for each in self.compared:
            first = max(found.values(), default=-1) + 1
            found |= {row.tobytes(): first + int(asked) for row, asked in zip(each.tokens_BP, each.asked_B)}
        return found

    def asked(self, batch: Any) -> np.ndarray:
        """Returns the index of what each prompt asks, for `Comparisons` or preferences made from them.

        If all prompts of a file are equal, each row of the batch has its own index.
        """
        prompts_BP = np.asarray(batch.tokens_BKL)[:, 0, : self.prompt_width].astype(np.int32)
        if len(self._asked_by_prompt) == 1:
            return np.arange(len(prompts_BP))
        return np.array([self._asked_by_prompt[row.tobytes()] for row in prompts_BP])

    @property
    def row_width(self) -> int:
        """Number of tokens in a row, which consists of a prompt and its answer."""
        return self.prompt_width + self.response_width


def make_task(settings: Settings, model: initial_model.InitialModel | None = None) -> Task:
    """Prepares the data of a run, with the tokenizer of ``model`` if it is given.

    Raises DataError for an unusable file, and SettingError if rows exceed the model's maximum length.
    """
    return _world_task(settings, model) if settings.data.path is None else _dialogue_task(settings, model)


def more_prompts(settings: Settings, task: Task, n: int) -> PromptSet:
    """Draws n training prompts of the built-in world from a separate random stream."""
    sets = prompts.split_prompts(world_lib.make_world(settings.seed), settings.seed)
    return prompt_set(task, prompts.draw_prompts(sets.train, n, _stream(settings, MORE)))


def prompt_set(task: Task, drawn: list[prompts.Prompt]) -> PromptSet:
    """Returns prompts of the built-in world in the form of the task, whose model must have the world's tokenizer."""
    assert task.in_world_words
    return _prompt_sets(task.fmt, [drawn], task.dropped)[1][0]


def _stream(settings: Settings, stream: int) -> np.random.Generator:
    return np.random.default_rng([settings.seed, stream])


def _turns(prompt: prompts.Prompt) -> tuple[dialogues.Turn, ...]:
    return tuple(dialogues.Turn(role, text) for role, text in prompt.turns)


def _prompt_sets(
    fmt: chat.ChatFormat, lists: list[list[prompts.Prompt]], counts: errors.DropCount
) -> tuple[int, list[PromptSet]]:
    """Returns a width that fits all prompts, and the lists of prompts, padded to this width."""
    dialogue_lists = [[_turns(prompt) for prompt in each] for each in lists]
    encoded = [chat.encode_prompts(fmt, each, width=_UNBOUNDED, counts=counts)[0] for each in dialogue_lists]
    in_world_words = world_words.is_world_tokenizer(fmt)
    P = prompts.PROMPT_WIDTH if in_world_words else max(len(ids) for each in encoded for ids in each)
    sets = []
    for task_prompts, turns, ids in zip(lists, dialogue_lists, encoded):
        assert len(ids) == len(turns)
        tokens_BP, mask_BP = padding.pad_prompts(ids, width=P, pad_id=fmt.pad_id)
        texts = ["\n".join(f"{turn.role}: {turn.text}" for turn in each) for each in turns]
        words_BP = tokens_BP
        if not in_world_words:
            word_ids = [prompts.prompt_tokens(prompt.turns) for prompt in task_prompts]
            words_BP, _ = padding.pad_prompts(word_ids, width=prompts.PROMPT_WIDTH, pad_id=lexicon.PAD_ID)
        index = {asked: i for i, asked in enumerate(dict.fromkeys(prompt.asked for prompt in task_prompts))}
        asked_B = np.array([index[prompt.asked] for prompt in task_prompts])
        sets.append(PromptSet(tokens_BP, mask_BP, texts, [p.category for p in task_prompts], asked_B, words_BP))
    return P, sets


def _answer_width(answers: list[str], ids: list[list[int]], *, in_world_words: bool) -> int:
    """Returns the world's word limit or, with another tokenizer, the token count of the longest answer within it."""
    if in_world_words:
        return prompts.RESPONSE_WIDTH
    fitting = [len(x) for x, text in zip(ids, answers) if len(text.split()) < prompts.RESPONSE_WIDTH]
    return max(fitting, default=prompts.RESPONSE_WIDTH)


def _world_task(settings: Settings, model: initial_model.InitialModel | None) -> Task:
    world = world_lib.make_world(settings.seed)
    fmt = chat.chat_format(tokenizers.word_level(lexicon.WORDS)) if model is None else model.fmt
    in_world_words = world_words.is_world_tokenizer(fmt)
    dropped = errors.DropCount(max_dropped=settings.data.max_dropped, flag="--data.max-dropped")
    sets = prompts.split_prompts(world, settings.seed)

    rng = _stream(settings, DEMONSTRATIONS)
    demonstrated = prompts.draw_prompts(sets.train, settings.sft.demonstrations, rng)
    answers = demonstrators.demonstrate_all(
        world, demonstrated, rng, slips=demonstrators.Slips().scaled(settings.world.slips)
    )
    n_compare = settings.comparisons.prompts
    rng = _stream(settings, COMPARE)
    compare = prompts.draw_prompts(sets.train, n_compare, rng)
    compare += prompts.draw_prompts(sets.validation, max(n_compare // 10, 1), rng)
    rl = prompts.draw_prompts(sets.train, settings.ppo.iterations * settings.ppo.batch, _stream(settings, RL))
    split = sets.test if settings.evaluation.split == "test" else sets.validation
    evaluated = prompts.draw_prompts(split, settings.evaluation.prompts, _stream(settings, EVALUATE))

    P, (demonstrated_set, rl_set, eval_set, compare_set) = _prompt_sets(
        fmt, [demonstrated, rl, evaluated, compare], dropped
    )
    answer_ids = chat.encode_answers(fmt, list(map(_turns, demonstrated)), answers)
    T = _answer_width(answers, answer_ids, in_world_words=in_world_words)
    skill_rows = _skill_rows(settings, fmt, P + T)
    if model is not None:
        model.check_widths(P, skill_rows.tokens_BL.shape[1] - P, source="the built-in world's prompts and answers")
    demonstrations = _demonstration_rows(demonstrated_set, answer_ids, T, fmt.pad_id, dropped)

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
        compared=(compare_set,),
        in_world_words=in_world_words,
    )


def _demonstration_rows(
    prompt_set: PromptSet, answers: list[list[int]], width: int, pad_id: int, counts: errors.DropCount
) -> types.TokenBatch:
    """Returns rows of prompts and answers. Answers longer than ``width`` are truncated and end without a stop token."""
    tokens_BT, mask_BT = padding.pad_answers(answers, width=width, pad_id=pad_id, counts=counts)
    return types.TokenBatch(
        tokens_BL=np.concatenate([prompt_set.tokens_BP, tokens_BT], axis=1),
        mask_BL=np.concatenate([prompt_set.mask_BP, mask_BT], axis=1),
        loss_mask_BL=np.concatenate([np.zeros_like(prompt_set.mask_BP), mask_BT], axis=1),
    )


def document_end(fmt: chat.ChatFormat) -> int:
    """Returns the token between documents: the EOS token or, without one, the token that ends answers in training."""
    eos: Any = fmt.tokenizer.eos_token_id
    return fmt.stop_ids[0] if eos is None else eos


def _packed(fmt: chat.ChatFormat, texts: list[str], *, width: int) -> np.ndarray:
    ids = plain_text.encode_texts(fmt.tokenizer, texts)
    return packing.pack_documents(ids, width=width, eos_id=document_end(fmt))[0]


def _skill_rows(settings: Settings, fmt: chat.ChatFormat, width: int) -> types.TokenBatch:
    """Formats skill problems and answers as in the corpus, in rows of at least ``width`` tokens."""
    problems = corpus.skill_problems(settings.evaluation.skills, _stream(settings, SKILLS))
    questions = plain_text.encode_texts(fmt.tokenizer, [problem.text for problem in problems])
    whole = plain_text.encode_texts(fmt.tokenizer, [f"{problem.text} {problem.answer}" for problem in problems])
    width = max(width, 1 + max(map(len, whole)))
    tokens_BL = np.full((len(problems), width), fmt.pad_id, np.int32)
    mask_BL, loss_mask_BL = np.zeros(tokens_BL.shape, bool), np.zeros(tokens_BL.shape, bool)
    for row, (question, ids) in enumerate(zip(questions, whole)):
        ids = [document_end(fmt), *ids]  # in packed text, each document follows the end token of the previous one
        tokens_BL[row, : len(ids)], mask_BL[row, : len(ids)] = ids, True
        loss_mask_BL[row, 1 + len(question) : len(ids)] = True
    return types.TokenBatch(tokens_BL, mask_BL, loss_mask_BL)


def _dialogue_task(settings: Settings, model: initial_model.InitialModel | None) -> Task:
    data = settings.data
    P, T = data.prompt_width, data.response_width
    if model is not None:
        model.check_widths(P, T, source="--data.prompt-width and --data.response-width")
    dropped = errors.DropCount(max_dropped=data.max_dropped, flag="--data.max-dropped")
    rankings = human_comparisons.read(data, dropped)
    notes: list[str] = []
    train, held_out = human_comparisons.split(data, rankings, jax.random.key(settings.seed), warn=notes.append)
    fmt = human_comparisons.train_chat_format(train, data.vocab_size) if model is None else model.fmt
    # Records that exceed the widths do not count towards --data.max-dropped, which is for defects of the file.
    width_counts = errors.DropCount(max_dropped=1.0)
    # Counted over both parts, because a part with a single conversation would be divided by its prompts.
    conversation_N = human_comparisons.conversation_ids([*train, *held_out])
    widths: Any = {"prompt_width": P, "response_width": T, "max_answers": max(len(each.responses) for each in rankings)}
    sets = []
    for part, conversation_B in ((train, conversation_N[: len(train)]), (held_out, conversation_N[len(train) :])):
        tools = [each.tools for each in part]
        ids, indices = chat.encode_prompts(
            fmt, [each.prompt for each in part], width=P, counts=width_counts, tools=tools
        )
        fitting = [part[i] for i in indices]
        rows, _ = encoding.ranking_rows(fmt, ids, fitting, counts=width_counts, **widths)
        if part and not len(rows.ranks_BK):
            raise errors.DataError(
                f"{data.path}: none of {errors.counted(len(part), 'comparisons')} is usable ({width_counts.report()})"
            )
        sets.append((ids, fitting, rows, _dialogue_prompts(ids, fitting, P, fmt.pad_id, conversation_B[indices])))
    (train_ids, train, train_rows, train_prompts), (_, held_out, held_rows, held_prompts) = sets
    key = jax.random.key(settings.seed)
    rl_prompts, eval_prompts = train_prompts, held_prompts
    if data.prompts is not None:
        asked = human_comparisons.read_prompts(data, dropped, key, warn=notes.append)
        rl_prompts, eval_prompts = (_encoded_prompts(fmt, part, P, width_counts) for part in asked)
    best = chat.try_answers(
        fmt,
        [each.prompt for each in train],
        [each.responses[0] for each in train],
        tools=[each.tools for each in train],
    )
    demonstrated = [(ids, answer) for ids, answer in zip(train_ids, best) if not isinstance(answer, errors.DataError)]
    demonstrations = padding.demonstration_rows(
        [ids for ids, _ in demonstrated],
        [answer for _, answer in demonstrated],
        prompt_width=P,
        response_width=T,
        pad_id=fmt.pad_id,
        counts=errors.DropCount(max_dropped=1.0),
    )
    if data.demonstrations is not None:
        answered, _ = readers.read_demonstrations(data.demonstrations, counts=dropped)
        demonstrations, _ = encoding.encode_demonstrations(
            fmt, answered, prompt_width=P, response_width=T, counts=width_counts
        )
        if not len(demonstrations.tokens_BL):
            raise errors.DataError(f"{data.demonstrations} has no usable demonstration ({width_counts.report()})")
    end = document_end(fmt)
    texts = [human_comparisons.encode_dialogues(fmt, part, end=end) for part in (train, held_out)]
    text_path, noun = data.path, "dialogues"
    if data.pretraining is not None:
        text_path, noun = data.pretraining, "documents"
        documents = human_comparisons.read_texts(data, key)
        texts = [plain_text.encode_texts(fmt.tokenizer, part) for part in documents]
    for name, ids in zip(("training", "held-out"), texts):
        if (size := sum(len(each) + 1 for each in ids)) < P + T:
            raise errors.DataError(
                f"{text_path}: the {name} {noun} have {size} tokens, but a row has {P + T}, --data.prompt-width "
                "plus --data.response-width; add records or lower these widths"
            )
    packed_BL, held_BL = (packing.pack_documents(ids, width=P + T, eos_id=end)[0] for ids in texts)
    dropped.dropped |= width_counts.dropped
    dropped.truncated |= width_counts.truncated
    dropped.noted |= width_counts.noted
    dropped.unused |= width_counts.unused
    return Task(
        fmt=fmt,
        prompt_width=P,
        response_width=T,
        text=lambda: (packed_BL, held_BL[: settings.evaluation.pretraining_rows]),
        demonstrations=demonstrations,
        rl_prompts=rl_prompts,
        eval_prompts=eval_prompts.take(settings.evaluation.prompts),
        dropped=dropped,
        comparisons=(train_rows, held_rows),
        compared=(train_prompts, held_prompts),
        notes=tuple(notes),
    )


def _encoded_prompts(
    fmt: chat.ChatFormat, asked: Sequence[records.Prompt], width: int, counts: errors.DropCount
) -> PromptSet:
    turns, tools = [each.prompt for each in asked], [each.tools for each in asked]
    ids, kept = chat.encode_prompts(fmt, turns, width=width, counts=counts, tools=tools)
    if not ids:
        raise errors.DataError(
            f"none of {errors.counted(len(asked), 'prompts')} in --data.prompts is usable ({counts.report()})"
        )
    conversation_B = human_comparisons.conversation_ids(asked)[kept]
    return _dialogue_prompts(ids, [asked[i] for i in kept], width, fmt.pad_id, conversation_B)


def _dialogue_prompts(
    ids: list[list[int]], prompts: Sequence[records.Prompt], width: int, pad_id: int, conversation_B: np.ndarray
) -> PromptSet:
    tokens_BP, mask_BP = padding.pad_prompts(ids, width=width, pad_id=pad_id)
    texts = ["\n".join(f"{turn.role}: {turn.text}" for turn in each.prompt) for each in prompts]
    return PromptSet(tokens_BP, mask_BP, texts, [""] * len(prompts), conversation_B)


def token_batch(rows: types.TokenBatch, indices: np.ndarray) -> sft.TokenBatch:
    """Returns the batch of the rows at ``indices``."""
    return jax.tree.map(lambda x: x[indices], rows)


def text_batch(rows_BL: np.ndarray) -> sft.TokenBatch:
    """Returns a batch of packed text, which has no padding. The loss is on all tokens except the first of each row."""
    mask_BL = np.ones(rows_BL.shape, bool)
    loss_mask_BL = mask_BL.copy()
    loss_mask_BL[:, 0] = False
    return sft.TokenBatch(rows_BL, mask_BL, loss_mask_BL)
