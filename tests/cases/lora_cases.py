"""Small models and adapters for the tests of `lm.lora` and `lm.peft`."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from rlhf_jax import lm
from rlhf_jax.lm import lora
from rlhf_jax.lm import params as lm_params

SMALL: dict[str, Any] = dict(vocab_size=61, n_layers=2, d_model=32, n_heads=4, d_mlp=48, max_length=24)
GPT2: dict[str, Any] = dict(
    norm="layernorm",
    activation="gelu_tanh",
    gated_mlp=False,
    positions="learned",
    qkv_bias=True,
    out_bias=True,
    mlp_bias=True,
    tie_embeddings=True,
)
NEOX: dict[str, Any] = GPT2 | dict(positions="rope", rope_fraction=0.25, parallel_residual=True, tie_embeddings=False)
CONFIGS = {
    "llama": lm.LMConfig(**SMALL, n_kv_heads=2, d_head=16),
    "gpt2": lm.LMConfig(**SMALL, **GPT2),
    "gpt_neox": lm.LMConfig(**SMALL, **NEOX),
    "phi3": lm.LMConfig(**SMALL, n_kv_heads=2, model_type="phi3"),
}
CFG = CONFIGS["llama"]
ALL = "layers/.*"
SCALE = 0.75
TOKENS = np.random.default_rng(0).integers(1, 61, (3, 11))


def drawn(tree, std, seed=0):
    """Returns Gaussian arrays with the shapes of ``tree``, because zeros and ones could hide errors."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda x: jnp.asarray(std * rng.normal(size=x.shape), jnp.float32), tree)


@functools.cache
def base(name="llama", *, head=False):
    return drawn(lm.abstract(CONFIGS[name], head=head), 0.2)


def fresh(cfg=CFG, *, rank=3, pattern: Any = ALL):
    return lora.init(jax.random.key(0), cfg, rank=rank, pattern=pattern)


def adapters(cfg=CFG, *, rank=3, pattern: Any = ALL, seed=1):
    return drawn(fresh(cfg, rank=rank, pattern=pattern), 0.3, seed)


@functools.partial(jax.jit, static_argnames="cfg")
def logits_of(params, cfg=CFG):
    return lm.logits(params, lm.forward(params, jnp.asarray(TOKENS), cfg=cfg).hidden_BLD, cfg=cfg)


def same(left, right):
    left, right = lm_params.flatten(left), lm_params.flatten(right)
    assert left.keys() == right.keys()
    for name in left:
        np.testing.assert_array_equal(np.asarray(left[name]), np.asarray(right[name]), err_msg=name)


def close(left, right, tolerance):
    """Asserts that each leaf agrees within ``tolerance`` times its largest entry."""
    jax.tree.map(lambda x, y: np.testing.assert_array_less(abs(x - y).max(), tolerance * abs(y).max()), left, right)


def copied(tree):
    return jax.tree.map(np.array, tree)
