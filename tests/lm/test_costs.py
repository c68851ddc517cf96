"""FLOPs and bytes against values computed by hand."""

import jax
import pytest

from rlhf_jax import lm

CFG = lm.LMConfig(vocab_size=10, n_layers=2, d_model=8, n_heads=2, n_kv_heads=1, d_head=4, d_mlp=16)
# Per layer: q 8x8, k 8x4, v 8x4, out 8x8; up, gate and down 8x16.
KERNELS = 2 * (64 + 32 + 32 + 64 + 3 * 128)


def test_flops_of_a_forward_pass():
    assert lm.costs.layer_kernels(CFG) == KERNELS == 1152
    # Attention: 2 layers, 2 heads of width 4; scores and values take 2 * 4 FLOPs each for half of 5 keys.
    attention = 2 * 2 * (2 * 4 + 2 * 4) * 5 // 2
    assert (
        lm.costs.forward_flops(CFG, rows=3, length=5) == 3 * (5 * (2 * KERNELS + attention) + 2 * 5 * 8 * 10) == 39360
    )
    assert lm.costs.forward_flops(CFG, rows=3, length=5, logits=0) == 3 * 5 * (2 * KERNELS + attention)


def test_bytes_of_a_decoding_step():
    # Keys and values of 2 layers, 3 rows and 5 columns, one head of width 4.
    cache = 2 * 2 * 3 * 5 * 4
    assert lm.costs.decode_bytes(CFG, batch=3, columns=5, itemsize=2) == 2 * (KERNELS + 8 * 10 + cache) == 2944


@pytest.mark.parametrize("name", ["gpt2", "pythia-1b", "llama-3-8b"])
def test_kernels_and_embeddings_are_most_of_the_parameters(name):
    cfg = lm.LMConfig.preset(name)
    embeddings = cfg.vocab_size * cfg.d_model * (1 if cfg.tie_embeddings else 2)
    assert 0.99 < (lm.costs.layer_kernels(cfg) + embeddings) / lm.count(cfg) <= 1


def test_bytes_of_the_cache_match_its_arrays():
    cache = jax.eval_shape(lambda: lm.create_cache(CFG, batch=3, slots=5))
    arrays = sum(x.size * x.dtype.itemsize for x in (*cache.keys, *cache.values))
    without = lm.costs.decode_bytes(CFG, batch=0, columns=5, itemsize=4)
    assert lm.costs.decode_bytes(CFG, batch=3, columns=5, itemsize=4) - without == arrays
