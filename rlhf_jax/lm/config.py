"""The architecture of a decoder-only language model, as one frozen value."""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

import jax.numpy as jnp

Norm = Literal["layernorm", "rmsnorm"]
Activation = Literal["gelu", "gelu_tanh", "silu", "relu"]
Positions = Literal["learned", "rope"]
Remat = Literal["none", "dots", "full"]
Attention = Literal["einsum", "xla", "cudnn"]

_CHOICES: dict[str, tuple[str, ...]] = {
    "norm": ("layernorm", "rmsnorm"),
    "activation": ("gelu", "gelu_tanh", "silu", "relu"),
    "positions": ("learned", "rope"),
    "dtype": ("float32", "bfloat16", "float16"),
    "remat": ("none", "dots", "full"),
    "attention": ("einsum", "xla", "cudnn"),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class LMConfig:
    """One field per architectural choice. Hashable, so it can be a static argument of a compiled function.

    ``n_kv_heads``, ``d_head`` and ``d_mlp`` may be left at 0: they then become ``n_heads``, ``d_model / n_heads`` and
    ``4 d_model``. Raises ``ValueError`` naming the field where a value is impossible.
    """

    vocab_size: int
    n_layers: int
    d_model: int
    n_heads: int
    n_kv_heads: int = 0
    d_head: int = 0
    d_mlp: int = 0
    max_length: int = 2048
    norm: Norm = "rmsnorm"
    norm_eps: float = 1e-5
    activation: Activation = "silu"
    gated_mlp: bool = True
    positions: Positions = "rope"
    rope_theta: float = 10_000.0
    rope_fraction: float = 1.0
    """Share of a head's width that is rotated (a quarter in GPT-NeoX, all of it in Llama)."""
    parallel_residual: bool = False
    """Attention and mlp read the same residual stream and are added together (GPT-J, GPT-NeoX)."""
    qkv_bias: bool = False
    out_bias: bool = False
    mlp_bias: bool = False
    tie_embeddings: bool = False
    dtype: str = "float32"
    """What layers compute in; parameters, norms' statistics and log-probabilities stay in float32."""
    remat: Remat = "none"
    """What the backward pass recomputes: nothing, all but the matmuls without a batch dimension, or whole layers."""
    attention: Attention = "einsum"
    """The kernel: written out here, or ``jax.nn.dot_product_attention`` on XLA or on cuDNN (16-bit dtypes on a GPU)."""

    def __post_init__(self) -> None:
        """Fill in what was left at 0, then check every field."""
        for name in ("vocab_size", "n_layers", "d_model", "n_heads", "max_length"):
            _require(getattr(self, name) >= 1, name, getattr(self, name), "at least 1")
        for name in ("n_kv_heads", "d_head", "d_mlp"):
            _require(getattr(self, name) >= 0, name, getattr(self, name), "at least 0")
        if self.d_head == 0:
            divides = self.d_model % self.n_heads == 0
            _require(divides, "n_heads", self.n_heads, f"a divisor of d_model ({self.d_model}), or d_head given")
            object.__setattr__(self, "d_head", self.d_model // self.n_heads)
        if self.n_kv_heads == 0:
            object.__setattr__(self, "n_kv_heads", self.n_heads)
        if self.d_mlp == 0:
            object.__setattr__(self, "d_mlp", 4 * self.d_model)
        for name, choices in _CHOICES.items():
            _require(getattr(self, name) in choices, name, getattr(self, name), "one of " + ", ".join(choices))
        divides = self.n_heads % self.n_kv_heads == 0
        _require(divides, "n_kv_heads", self.n_kv_heads, f"a divisor of n_heads ({self.n_heads})")
        _require(self.norm_eps > 0, "norm_eps", self.norm_eps, "positive")
        _require(self.rope_theta > 0, "rope_theta", self.rope_theta, "positive")
        _require(0 < self.rope_fraction <= 1, "rope_fraction", self.rope_fraction, "in (0, 1]")
        if self.positions == "rope":
            even = self.rope_width >= 2 and self.rope_width % 2 == 0
            _require(even, "rope_fraction", self.rope_fraction, f"such that an even part of d_head {self.d_head} turns")

    @property
    def rope_width(self) -> int:
        """How many of a head's ``d_head`` features are rotated."""
        return int(self.d_head * self.rope_fraction)

    @property
    def compute_dtype(self) -> jnp.dtype:
        """``dtype`` as an array type."""
        return jnp.dtype(self.dtype)

    @classmethod
    def preset(cls, name: str, **overrides: Any) -> LMConfig:
        """Return a known architecture, any field overridden: ``LMConfig.preset("tiny", vocab_size=300)``."""
        if name not in PRESETS:
            raise ValueError(f"unknown preset {name!r}; known: {', '.join(sorted(PRESETS))}")
        return cls(**(PRESETS[name] | overrides))


def _require(ok: bool, field: str, value: Any, wanted: str) -> None:
    if not ok:
        raise ValueError(f"LMConfig.{field} is {value!r}; it must be {wanted}")


_GPT2 = dict(
    norm="layernorm",
    activation="gelu_tanh",
    gated_mlp=False,
    positions="learned",
    qkv_bias=True,
    out_bias=True,
    mlp_bias=True,
    tie_embeddings=True,
)
_NEOX = dict(
    norm="layernorm",
    activation="gelu",
    gated_mlp=False,
    rope_fraction=0.25,
    parallel_residual=True,
    qkv_bias=True,
    out_bias=True,
    mlp_bias=True,
)
_LLAMA3 = dict(vocab_size=128_256, n_kv_heads=8, max_length=8192, rope_theta=500_000.0, dtype="bfloat16", remat="dots")

PRESETS: dict[str, dict[str, Any]] = {
    "tiny": dict(vocab_size=256, n_layers=2, d_model=64, n_heads=4, d_mlp=256, max_length=256),
    "gpt2": dict(vocab_size=50_257, n_layers=12, d_model=768, n_heads=12, max_length=1024, **_GPT2),
    "pythia-1b": dict(vocab_size=50_304, n_layers=16, d_model=2048, n_heads=8, max_length=2048, **_NEOX),
    "llama-3-8b": dict(n_layers=32, d_model=4096, n_heads=32, d_mlp=14_336, **_LLAMA3),
    "llama-3-70b": dict(n_layers=80, d_model=8192, n_heads=64, d_mlp=28_672, **_LLAMA3),
}
