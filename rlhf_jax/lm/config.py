"""The architecture of a decoder-only language model as a frozen dataclass."""

from __future__ import annotations

import dataclasses
from typing import Any, Literal, NamedTuple

import jax.numpy as jnp

Norm = Literal["layernorm", "rmsnorm"]
Activation = Literal["gelu", "gelu_tanh", "silu", "relu"]
Positions = Literal["learned", "rope"]
Remat = Literal["none", "dots", "full"]
Attention = Literal["auto", "einsum", "xla", "cudnn"]

_CHOICES: dict[str, tuple[str, ...]] = {
    "norm": ("layernorm", "rmsnorm"),
    "activation": ("gelu", "gelu_tanh", "silu", "relu"),
    "positions": ("learned", "rope"),
    "dtype": ("float32", "bfloat16", "float16"),
    "remat": ("none", "dots", "full"),
    "attention": ("auto", "einsum", "xla", "cudnn"),
}


class LinearScaling(NamedTuple):
    """Rotary frequencies divided by ``factor`` (position interpolation, Chen et al. 2023)."""

    factor: float


class Llama3Scaling(NamedTuple):
    """Llama 3.1's rule: low frequencies are divided by ``factor``, high ones kept, those between interpolated.

    A frequency is low if it completes fewer than ``low`` turns in ``length`` tokens, high if more than ``high``.
    """

    factor: float
    low: float
    high: float
    length: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class LMConfig:
    """Architecture of a language model, one field per choice; hashable, so it can be a static argument.

    If ``n_kv_heads``, ``d_head`` or ``d_mlp`` is 0, it becomes ``n_heads``, ``d_model / n_heads`` or ``4 d_model``. An
    impossible value raises a ValueError that names the field.

    >>> from rlhf_jax import lm
    >>> lm.LMConfig(vocab_size=100, n_layers=2, d_model=32, n_heads=4).d_head
    8
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
    rope_scaling: LinearScaling | Llama3Scaling | None = None
    position_offset: int = 0
    """Row of the learned position table for the first token (2 in OPT)."""
    sliding_window: int = 0
    """Number of real tokens that a token attends to, itself included; 0 for all."""
    local_layers: tuple[bool, ...] = ()
    """Whether each layer uses the window (Gemma 2 and 3 alternate); empty for all layers."""
    local_rope_theta: float = 0.0
    """Rotary base of the layers with a window, without scaling (Gemma 3); 0 for ``rope_theta``."""
    parallel_residual: bool = False
    """Attention and MLP read the same residual stream (GPT-J, GPT-NeoX)."""
    qkv_bias: bool = False
    out_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    """RMS norm of each query and key head before rotation (Qwen3, Gemma 3)."""
    post_norms: bool = False
    """Norms of the outputs of attention and MLP before the residual addition (Gemma 2 and 3)."""
    norm_plus_one: bool = False
    """RMS norms multiply by 1 + scale (Gemma)."""
    embed_scale: bool = False
    """Embeddings are multiplied by sqrt(d_model) (Gemma)."""
    attn_scale: float = 0.0
    """Factor of the attention scores; 0 for ``1 / sqrt(d_head)``."""
    attn_softcap: float = 0.0
    """Soft cap of the attention scores, ``cap * tanh(s / cap)`` (Gemma 2); 0 for none."""
    final_softcap: float = 0.0
    """Soft cap of the logits; 0 for none."""
    tie_embeddings: bool = False
    dtype: str = "float32"
    """Compute dtype of the layers; parameters, norm statistics and log-probabilities stay float32."""
    remat: Remat = "none"
    """What the backward pass recomputes: nothing, all but matmuls without a batch dimension, or whole layers."""
    attention: Attention = "auto"
    """Implementation of attention over whole rows. "auto" uses a kernel for 16-bit dtypes if it supports the mask
    (splash attention on a TPU, cuDNN on a GPU) and "einsum" otherwise, which is written out in
    :mod:`rlhf_jax.lm.attention`. "xla" and "cudnn" call ``jax.nn.dot_product_attention``, in decoding too."""
    model_type: str = ""
    """Hugging Face model type to read and write; empty for the first that can represent the architecture."""

    def __post_init__(self) -> None:
        """Fills in fields that are 0 and checks all of them."""
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
        if self.attn_scale == 0:
            object.__setattr__(self, "attn_scale", self.d_head**-0.5)
        for name, choices in _CHOICES.items():
            _require(getattr(self, name) in choices, name, getattr(self, name), "one of " + ", ".join(choices))
        divides = self.n_heads % self.n_kv_heads == 0
        _require(divides, "n_kv_heads", self.n_kv_heads, f"a divisor of n_heads ({self.n_heads})")
        _require(self.norm_eps > 0, "norm_eps", self.norm_eps, "positive")
        _require(self.rope_theta > 0, "rope_theta", self.rope_theta, "positive")
        _require(0 < self.rope_fraction <= 1, "rope_fraction", self.rope_fraction, "in (0, 1]")
        for name in ("position_offset", "sliding_window", "local_rope_theta", "attn_softcap", "final_softcap"):
            _require(getattr(self, name) >= 0, name, getattr(self, name), "at least 0")
        _require(self.attn_scale > 0, "attn_scale", self.attn_scale, "positive")
        self._check_combinations()
        if self.positions == "rope":
            even = self.rope_width >= 2 and self.rope_width % 2 == 0
            _require(
                even,
                "rope_fraction",
                self.rope_fraction,
                f"chosen so that an even number of d_head = {self.d_head} features is rotated",
            )

    def _check_combinations(self) -> None:
        n_local = len(self.local_layers)
        _require(n_local in (0, self.n_layers), "local_layers", self.local_layers, f"empty or {self.n_layers} long")
        windowed = self.sliding_window > 0
        _require(windowed or not n_local, "local_layers", self.local_layers, "empty without a sliding_window")
        _require(
            windowed or self.local_rope_theta == 0,
            "local_rope_theta",
            self.local_rope_theta,
            "0 without sliding_window",
        )
        plain = self.attention in ("auto", "einsum") or self.attn_softcap == 0
        _require(plain, "attention", self.attention, "'auto' or 'einsum' if attn_softcap is not 0")
        only_rms = self.norm == "rmsnorm" or not self.norm_plus_one
        _require(only_rms, "norm_plus_one", self.norm_plus_one, "False with layernorm")

    @property
    def mixed_layers(self) -> bool:
        """Whether only some layers use the sliding window."""
        return len(set(self.local_layers)) > 1

    @property
    def windowed(self) -> bool:
        """Whether any layer uses the sliding window."""
        return self.sliding_window > 0 and (not self.local_layers or any(self.local_layers))

    def is_local(self, layer: int) -> bool:
        """Returns whether a layer, counted from 0, uses the sliding window."""
        return self.sliding_window > 0 and (not self.local_layers or self.local_layers[layer])

    @property
    def rope_width(self) -> int:
        """Number of rotated features of each head."""
        return int(self.d_head * self.rope_fraction)

    @property
    def compute_dtype(self) -> jnp.dtype:
        """``dtype`` as a `jax.numpy.dtype`."""
        return jnp.dtype(self.dtype)

    @classmethod
    def preset(cls, name: str, **overrides: Any) -> LMConfig:
        """Returns a named architecture, with fields overridden by keyword.

        >>> from rlhf_jax import lm
        >>> lm.LMConfig.preset("gpt2", n_layers=2).vocab_size
        50257

        Raises:
            ValueError: The name is unknown.
        """
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
