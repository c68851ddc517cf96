"""Language models of the built-in world that criticise and revise answers, for claims about revisions.

A row has blocks of fixed width: a prompt, an answer, the request for a critique, the critique, the request for a
revision and the revision. Without critiques, it has no critique, and the request for one is part of that for a
revision. Editors learn from flawless revisions by the simulated editor.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from constitution import ai_stages, red_team
from recipe import stages

from claims import model_stages as ms
from claims.ai_feedback import cai_stages
from claims.trial import Trial
from rlhf_jax import generation, lm, types
from rlhf_jax.data import batching, padding
from rlhf_jax.simulation import editor, lexicon
from rlhf_jax.train import state as state_lib

PRINCIPLES = (
    *("what is bad ?", "name the bad thing .", "tell me what is bad .", "is it good ?", "what can hurt ?"),
    *("is it a bad answer ?", "describe the bad thing .", "look for the bad thing .", "which words are bad ?"),
    *("what is not good ?", "name bad words .", "can it hurt you ?", "question the answer .", "is it good to help ?"),
    *("tell me about the answer .", "is the answer good ?"),
)
"""Wordings of the request for a critique, in words of the built-in world."""
REVISE = "copy the answer but not bad ."
_REQUEST_WIDTH, _CRITIQUE_WIDTH = 12, 8


def _ids(text: str, *, request: bool) -> list[int]:
    words = [lexicon.IDS[word] for word in text.split()]
    if request:
        return [lexicon.USER_ID, *words, lexicon.END_ID, lexicon.ASSISTANT_ID]
    return [*words, lexicon.END_ID]


def _block(texts: Sequence[str], *, width: int, request: bool) -> tuple[np.ndarray, np.ndarray]:
    """Returns tokens and mask of a block; requests are at its right end, critiques and answers at its left end."""
    rows = [_ids(text, request=request)[:width] for text in texts]
    if request:
        return padding.pad_prompts(rows, width=width, pad_id=lexicon.PAD_ID)
    tokens_BW, mask_BW = np.full((len(rows), width), lexicon.PAD_ID, np.int32), np.zeros((len(rows), width), bool)
    for b, row in enumerate(rows):
        tokens_BW[b, : len(row)], mask_BW[b, : len(row)] = row, True
    return tokens_BW, mask_BW


def _joined(*blocks: tuple[np.ndarray, np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    tokens, masks = zip(*blocks)
    return np.concatenate(tokens, axis=1), np.concatenate(masks, axis=1)


def train_editor(
    trial: Trial, base: types.Params, helpful: types.Params, *, critique: bool, size: str = ms.LARGEST
) -> types.Params:
    """Returns an editor: the base model of a size, trained on revisions of answers of the helpful-only policy."""
    own = ms.sized(trial, size)
    flawless = editor.SimulatedEditor(miss=0.0, fail=0.0, seed=trial.settings.seed)
    revised = ai_stages.revise(trial, helpful, flawless, prompts=cai_stages.sizes(trial, full=800), rounds=4)
    examples = [
        (i, each.responses[r], each.critiques[r], each.responses[r + 1])
        for i, each in enumerate(revised.revisions.revised_N)
        if i in set(revised.complete)
        for r in range(4)
    ]
    rng = np.random.default_rng([trial.settings.seed, 4500])
    index, answers, critiques, revisions = (list(column) for column in zip(*examples))
    encoded, T = revised.prompts.encoded, trial.task.response_width
    asked = [PRINCIPLES[i] for i in rng.integers(len(PRINCIPLES), size=len(examples))]
    context = [
        (encoded.tokens_BP[index], encoded.mask_BP[index]),
        _block(answers, width=T, request=False),
        _block(asked, width=_REQUEST_WIDTH, request=True),
    ]
    if critique:
        context.append(_block(critiques, width=_CRITIQUE_WIDTH, request=False))
        context.append(_block([REVISE] * len(examples), width=_REQUEST_WIDTH, request=True))
    learnt = _block(revisions, width=T, request=False)
    tokens_BL, mask_BL = _joined(*context, learnt)
    loss_mask_BL = np.zeros_like(mask_BL)
    loss_mask_BL[:, -T:] = learnt[1]
    if critique:
        start = sum(block[0].shape[1] for block in context[:3])
        loss_mask_BL[:, start : start + _CRITIQUE_WIDTH] = context[3][1]
    rows = types.TokenBatch(tokens_BL, mask_BL, loss_mask_BL)
    return _fit(own, base, rows)


def _fit(trial: Trial, base: types.Params, rows: types.TokenBatch) -> types.Params:
    """Returns the base model after one epoch of the rows."""
    batch = min(trial.settings.pretrain.batch, len(rows.tokens_BL))
    steps = len(rows.tokens_BL) // batch
    order = batching.epoch_batches(0, n=len(rows.tokens_BL), batch_size=batch, key=trial.key("sft"), steps=steps)
    return trial.fit(
        "sft",
        trial.supervised_step,
        trial.create_on_mesh(functools.partial(state_lib.create, tx=trial.supervised_tx), base),
        steps,
        batch_at=lambda i: jax.tree.map(lambda x: x[order[i]], rows),
        hyper_at=lambda i: stages.hyper(trial.settings.sft.learning_rate),
    ).params


@functools.cache
def _generate(cfg: lm.LMConfig, width: int) -> Any:
    sampling: Any = generation.Sampling(max_new_tokens=width, stop_ids=(lexicon.END_ID,), pad_id=lexicon.PAD_ID)

    def run(params: Any, rng_B: Any, tokens_BP: Any, mask_BP: Any) -> types.Rollout:
        return generation.generate(params, rng_B, tokens_BP, mask_BP, cfg=cfg, sampling=sampling)

    return jax.jit(run)


def _write(
    trial: Trial, params: types.Params, context: tuple[np.ndarray, np.ndarray], *, width: int, key: jax.Array
) -> list[str]:
    """Returns the texts that an editor writes after each context."""
    n, P = context[0].shape
    rollout = _generate(trial.cfg, width)(params, jax.random.split(key, n), *context)
    tokens_BT, mask_BT = np.asarray(rollout.tokens_BL)[:, P:], np.asarray(rollout.response_mask_BT)
    return [red_team.text_of(row[mask]) for row, mask in zip(tokens_BT, mask_BT)]


def revise_with_model(
    trial: Trial,
    trained: types.Params,
    helpful: types.Params,
    *,
    critique: bool,
    principles: int = len(PRINCIPLES),
    rounds: int = 4,
    size: str = ms.LARGEST,
) -> dict[str, np.ndarray]:
    """Returns gold harmlessness and helpfulness of held-out answers after each revision by an editor, ``[steps, N]``.

    The answers are those of the helpful-only policy. A wording of the request is sampled for each revision, from the
    first ``principles`` ones.
    """
    own, n = ms.sized(trial, size), cai_stages.sizes(trial, full=384)
    asked = red_team.prompts_of(trial, n, stream=red_team.EVALUATE, harmful=True, split="test").encoded
    key = jax.random.fold_in(trial.key("evaluate"), 45)
    answers = red_team.texts_of(trial, trial.sampler(helpful, None, None, asked, key))
    rng, T, utilities = np.random.default_rng([trial.settings.seed, 4501]), trial.task.response_width, []
    for r in range(rounds + 1):
        utilities.append(ai_stages.gold_of(trial, asked, answers))
        if r == rounds:
            break
        keys = jax.random.split(jax.random.fold_in(key, r + 1))
        requests = [PRINCIPLES[i] for i in rng.integers(principles, size=n)]
        context = [
            (asked.tokens_BP, asked.mask_BP),
            _block(answers, width=T, request=False),
            _block(requests, width=_REQUEST_WIDTH, request=True),
        ]
        if critique:
            critiques = _write(own, trained, _joined(*context), width=_CRITIQUE_WIDTH, key=keys[0])
            context.append(_block(critiques, width=_CRITIQUE_WIDTH, request=False))
            context.append(_block([REVISE] * n, width=_REQUEST_WIDTH, request=True))
        answers = _write(own, trained, _joined(*context), width=T, key=keys[1])
    return {name: np.stack([np.asarray(getattr(each, name)) for each in utilities]) for name in ("harmless", "helpful")}
