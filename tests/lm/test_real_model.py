"""Tests with a published model and published tokenizers, with torch and transformers as the reference.

The environment variables name what to test; without them, the tests are skipped::

    RLHF_JAX_REAL_MODEL=FOLDER pytest -n 0 -m slow tests/lm/test_real_model.py
    RLHF_JAX_REAL_TOKENIZERS=FOLDER pytest -n 0 -m slow tests/lm/test_real_model.py

The first is the folder of a small instruct model, such as the one that tests/cases/make_smollm2.py writes. The second
contains one folder for each tokenizer, with ``tokenizer.json`` and ``tokenizer_config.json``.
"""
# pyright: reportArgumentType=false, reportCallIssue=false

import dataclasses
import functools
import os
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from chat_cases import A, Turn, U, hf, learnt_texts, random_dialogues

from rlhf_jax import generation, lm, parallel
from rlhf_jax.data import chat, errors, padding, tokenizers
from rlhf_jax.train import ppo, reward_model, sft
from rlhf_jax.train import state as state_lib

pytestmark = pytest.mark.slow
MODEL, TOKENIZERS = (os.environ.get(f"RLHF_JAX_REAL_{name}", "") for name in ("MODEL", "TOKENIZERS"))
needs_model = pytest.mark.skipif(not MODEL, reason="RLHF_JAX_REAL_MODEL names no folder")
FOLDERS = sorted(file.parent for file in pathlib.Path(TOKENIZERS).glob("*/tokenizer.json")) if TOKENIZERS else []

QUESTIONS = (
    *("What is the capital of France?", "Write a haiku about rain.", "What is 2 + 2?", "Name three birds."),
    *("Why is the sky blue?", "Translate 'good morning' to Spanish.", "Who wrote Hamlet?", "List the primary colours."),
    *("How do I boil an egg?", "Write a Python function that adds two numbers.", "What is photosynthesis?", "Hi!"),
    *("Tell me a joke.", "Which is larger, the Sun or the Moon?", "Give me a recipe for pancakes.", "¿Qué hora es?"),
    *(
        "Summarise: the cat sat on the mat.",
        "What do bees eat?",
        "Explain gravity to a child.",
        "Say only the word yes.",
    ),
)
PROMPT, ANSWER = 64, 8
ADAM = optax.chain(optax.scale_by_adam(), optax.scale(-1.0))


@pytest.fixture(scope="module")
def ours():
    """Returns the architecture, the parameters and the chat format."""
    cfg, params = lm.load(MODEL)
    fmt = chat.chat_format(
        tokenizers.load(MODEL), model_type=cfg.model_type, stop_ids=lm.load_stop_ids(MODEL), options={}
    )
    return cfg, params, fmt


def in_torch(folder, kind="CausalLM"):
    torch: Any = pytest.importorskip("torch")
    import transformers

    auto: Any = getattr(transformers, f"AutoModelFor{kind}")
    return auto.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()


def auto_tokenizer(folder):
    import transformers

    auto: Any = transformers.AutoTokenizer
    return auto.from_pretrained(folder)


@pytest.fixture(scope="module")
def theirs():
    return in_torch(MODEL)


def questions(fmt, n):
    return [chat.encode_prompt(fmt, [Turn(U, text)]) for text in QUESTIONS[:n]]


def assert_same_logits(cfg, params, fmt, model):
    import torch

    rows = [chat.encode_dialogue(fmt, turns)[0] for turns in random_dialogues(3)]
    tokens, mask = padding.pad_prompts(rows, width=max(map(len, rows)), pad_id=fmt.pad_id)
    hidden_BLD = jax.jit(functools.partial(lm.forward, cfg=cfg))(params, tokens, mask_BL=mask).hidden_BLD
    found_BLV = np.asarray(lm.logits(params, hidden_BLD, cfg=cfg))
    for ids, found in zip(rows, found_BLV):
        with torch.no_grad():
            expected = model(torch.tensor([ids])).logits[0].numpy()
        np.testing.assert_allclose(found[-len(ids) :], expected, rtol=0, atol=1e-4 * np.abs(expected).max())


def assert_same_answers(cfg, params, fmt, model, *, n, length=60):
    """Checks that greedy decoding of ``n`` prompts gives the same tokens as ``transformers`` and ends at the same."""
    import torch

    prompts = questions(fmt, n)
    sampling = generation.Sampling(greedy=True, max_new_tokens=length, stop_ids=fmt.stop_ids, pad_id=fmt.pad_id)
    sampler = generation.RaggedSampler(cfg, sampling, widths=(PROMPT,), slots=n)
    answers = sampler(params, jax.random.key(0), prompts)
    tokens, mask = padding.pad_prompts(prompts, width=PROMPT, pad_id=fmt.pad_id)
    rows = model.generate(
        torch.tensor(tokens), attention_mask=torch.tensor(mask).long(), do_sample=False, max_new_tokens=length
    )
    for answer, row in zip(answers, rows[:, PROMPT:].tolist(), strict=True):
        stop = next((i for i, token in enumerate(row) if token in fmt.stop_ids), None)
        assert answer.stopped == (stop is not None)
        assert answer.ids == (row if stop is None else row[: stop + 1])
    assert any(answer.stopped for answer in answers)


@needs_model
def test_logits_are_those_of_torch(ours, theirs):
    assert_same_logits(*ours, theirs)


@needs_model
@pytest.mark.parametrize("n, length", [(3, 20), (20, 60)], ids=["short", "long"])
def test_greedy_answers_are_those_of_transformers(ours, theirs, n, length):
    assert_same_answers(*ours, theirs, n=n, length=length)


def assert_same_ids(folder, fmt):
    """Checks the ids of dialogues, and that the loss is on the answers; returns how many the template accepts."""
    reference = auto_tokenizer(folder)
    accepted = 0
    for turns in random_dialogues():
        try:
            expected = hf(reference, turns, None, prompt=False)
        except Exception:  # the template rejects the turns
            with pytest.raises(errors.DataError, match="rejects the turns"):
                chat.encode_dialogue(fmt, turns)
            continue
        ids, learnt = chat.encode_dialogue(fmt, turns)
        assert ids == expected
        assert chat.encode_prompt(fmt, turns[:-1]) == hf(reference, turns[:-1], None)
        answers = [turn.text for turn in turns if turn.role == A]
        texts = learnt_texts(fmt, ids, learnt)
        assert len(texts) == len(answers)
        for text, answer in zip(texts, answers):
            assert text.endswith(fmt.stop)
            # Templates may remove a thought and the white space at the edges, and decoders write "▁" as a space.
            assert answer.rpartition("</think>")[2].strip().replace("▁", " ") in text.replace("▁", " ")
        accepted += 1
    return accepted


@needs_model
def test_ids_are_those_of_apply_chat_template(ours):
    assert assert_same_ids(MODEL, ours[2]) >= 26


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
def test_ids_of_published_tokenizers_are_those_of_apply_chat_template(folder):
    assert assert_same_ids(folder, chat.chat_format(tokenizers.load(folder))) >= 26


def trained(step, state, frozen, hyper, batch):
    """Returns the parameters after two steps, which must change them and have finite metrics."""
    step = parallel.jit_step(step)
    before = np.asarray(jax.tree.leaves(state.params)[0])
    for _ in range(2):
        state, logs = step(state, frozen, hyper, batch, jax.random.key(0))
        numbers = {name: float(x.value()) if hasattr(x, "value") else float(x) for name, x in logs.items()}
        assert numbers["skipped"] == 0 and np.isfinite(numbers["grad_norm"])
    assert int(state.step) == 2 and np.abs(np.asarray(jax.tree.leaves(state.params)[0]) - before).max() > 0
    return state.params


@needs_model
def test_trained_models_behave_the_same_in_transformers(ours, tmp_path):
    """Two steps of SFT, two of a reward model and two iterations of PPO."""
    cfg, params, fmt = ours
    hyper = {"learning_rate": 1e-5, "max_grad_norm": 1.0}
    counts = errors.DropCount(max_dropped=1.0, max_truncated=1.0)
    prompts = questions(fmt, 2)
    width = max(map(len, prompts))
    widths: Any = dict(prompt_width=width, response_width=ANSWER, pad_id=fmt.pad_id, counts=counts)
    turns = [[Turn(U, text)] for text in QUESTIONS[:2]]
    good = chat.encode_answers(fmt, turns, ["It is Paris.", "Rain falls."])
    bad = chat.encode_answers(fmt, turns, ["", "I do not know."])

    batch = jax.tree.map(jnp.asarray, padding.demonstration_rows(prompts, good, **widths))
    step = sft.make_train_step(
        lambda params, tokens, mask_BL: lm.token_logprobs(params, tokens, cfg=cfg, mask_BL=mask_BL)
    )
    policy = trained(step, state_lib.create(params, ADAM), None, hyper, batch)

    def score(params, tokens_BL, mask_BL):
        return lm.score(params, tokens_BL, cfg=cfg, mask_BL=mask_BL)

    pairs = padding.ranking_rows(prompts, list(zip(good, bad)), [(1, 2)] * 2, **widths)
    start = state_lib.create(lm.with_head(jax.random.key(0), policy, cfg), ADAM)
    reward = trained(reward_model.make_train_step(score), start, None, hyper, jax.tree.map(jnp.asarray, pairs))
    lm.save(tmp_path / "reward", cfg, reward, fmt.tokenizer, stop_ids=fmt.stop_ids)
    check_scores(tmp_path / "reward", cfg, reward, [p + a for p, a in [*zip(prompts, good), *zip(prompts, bad)]])

    spec = generation.Sampling(max_new_tokens=ANSWER, stop_ids=fmt.stop_ids, pad_id=fmt.pad_id)
    models = ppo.Models(
        lambda params, rng_B, tokens, mask, temperature: generation.generate(
            params, rng_B, tokens, mask, cfg=cfg, sampling=dataclasses.replace(spec, temperature=temperature)
        ),
        lambda params, tokens, mask, temperature: lm.token_stats(
            params, tokens, cfg=cfg, prompt_width=width, mask_BL=mask, temperature=temperature
        ),
        lambda params, tokens, mask: lm.values(params, tokens, cfg=cfg, prompt_width=width, mask_BL=mask),
        lambda params, rollout: score(params, rollout.tokens_BL, rollout.mask_BL),
        join=ppo.shared_trunk,
    )
    batch = ppo.Batch(*map(jnp.asarray, padding.pad_prompts(prompts, width=width, pad_id=fmt.pad_id)))
    critic = {"head": lm.with_head(jax.random.key(0), policy, cfg, zero=True)["head"]}
    step = ppo.make_train_step(models, minibatches=1)
    frozen = ppo.Frozen(reference=policy, reward=reward)
    policy = trained(step, ppo.create(policy, critic, ADAM), frozen, ppo.Hyper(max_grad_norm=1.0), batch)["policy"]
    lm.save(tmp_path / "policy", cfg, policy, fmt.tokenizer, stop_ids=fmt.stop_ids)
    model = in_torch(tmp_path / "policy")
    assert_same_logits(cfg, policy, fmt, model)
    assert_same_answers(cfg, policy, fmt, model, n=3, length=20)
    assert assert_same_ids(tmp_path / "policy", fmt) >= 26


def check_scores(folder, cfg, params, rows):
    """Checks that ``transformers`` computes the same scores of rows padded on either side."""
    import torch

    score = jax.jit(lambda params, tokens, mask: lm.score(params, tokens, cfg=cfg, mask_BL=mask))
    scores = score(params, *map(jnp.asarray, padding.pad_prompts(rows, width=PROMPT + ANSWER, pad_id=0)))
    assert np.std(scores) > 1e-3
    model, tokenizer = in_torch(folder, "SequenceClassification"), auto_tokenizer(folder)
    for side in ("left", "right"):
        inputs = tokenizer.pad({"input_ids": rows}, padding_side=side, return_tensors="pt")
        with torch.no_grad():
            found = model(**inputs).logits[:, 0].numpy() + model.config.reward_bias
        np.testing.assert_allclose(found, scores, rtol=0, atol=1e-4 * np.abs(scores).max())
