import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax import generation, lm
from rlhf_jax.generation import stops

SMALL: dict[str, Any] = dict(vocab_size=23, n_layers=1, d_model=16, n_heads=2, d_mlp=24, max_length=64)
CFG = lm.LMConfig(**SMALL)
SAMPLING = generation.Sampling(max_new_tokens=6, stop_ids=(3, 4))
SAMPLER = generation.RaggedSampler(CFG, SAMPLING, widths=(16, 6), slots=4)


@functools.cache
def params():
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda x: jnp.asarray(0.5 * rng.normal(size=x.shape), jnp.float32), lm.abstract(CFG))


def some_prompts(n, longest, seed=0):
    rng = np.random.default_rng(seed)
    return [rng.integers(1, 23, rng.integers(1, longest + 1)).tolist() for _ in range(n)]


def test_each_prompt_gets_the_same_answer_as_when_sampled_alone():
    rng = jax.random.key(5)
    prompts = some_prompts(11, 16)
    answers = SAMPLER(params(), rng, prompts)
    run = jax.jit(functools.partial(generation.generate, cfg=CFG, sampling=SAMPLING))
    for i, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
        tokens = jnp.asarray([[0] * (16 - len(prompt)) + prompt])
        mask = jnp.arange(16)[None, :] >= 16 - len(prompt)
        alone = run(params(), jax.random.fold_in(rng, i)[None], tokens, mask)
        n = int(alone.lengths_B[0])
        assert answer.ids == alone.tokens_BL[0, 16 : 16 + n].tolist()
        assert answer.stopped == bool(alone.finish_B[0]) == (answer.ids[-1] in (3, 4))
        np.testing.assert_allclose(answer.logprobs, alone.logprobs_BT[0, :n], atol=1e-5)


def test_number_of_compiled_programs_is_bounded():
    SAMPLER(params(), jax.random.key(0), some_prompts(20, 16))
    before = SAMPLER.programs
    for seed in range(5):
        SAMPLER(params(), jax.random.key(seed), some_prompts(20 - seed, 16, seed))
    assert SAMPLER.programs - before <= 2 and SAMPLER.programs <= 6
    assert SAMPLER(params(), jax.random.key(0), []) == []


def test_prompts_of_invalid_length_are_refused():
    with pytest.raises(ValueError, match="prompt 1 has 17 tokens; it must have between 1 and 16"):
        SAMPLER(params(), jax.random.key(0), [[1], [1] * 17])
    with pytest.raises(ValueError, match="prompt 0 has 0 tokens"):
        SAMPLER(params(), jax.random.key(0), [[]])
    with pytest.raises(ValueError, match="widths is"):
        generation.RaggedSampler(CFG, SAMPLING, widths=())


def test_stop_strings_are_encoded_and_trimmed():
    def encode(text):
        return [ord(c) for c in text]

    assert stops.sequences(encode, ["ab", "c"]) == ((97, 98), (32, 97, 98), (99,), (32, 99))
    assert stops.trim("to be or not", ["or", "not"]) == ("to be ", "or")
    assert stops.trim("to be", ["or"]) == ("to be", None)
    assert stops.trim("one\n\nHuman: two", ["\n", "\n\nHuman:"]) == ("one", "\n\nHuman:")
    with pytest.raises(ValueError, match="a stop string is empty"):
        stops.sequences(encode, [""])
