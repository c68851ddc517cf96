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
    "dtype": ("float32", "bfloat16"),
    "remat": ("none", "dots", "full"),
    "attention": ("auto", "einsum", "xla", "cudnn"),
}


class LinearScaling(NamedTuple):
    """Divides all rotary frequencies by ``factor`` (position interpolation, Chen et al. 2023)."""

    factor: float


class Llama3Scaling(NamedTuple):
    """Scales rotary frequencies as in Llama 3.1.

    Frequencies that complete fewer than ``low`` turns in ``length`` tokens are divided by ``factor``, and frequencies
    that complete more than ``high`` turns are unchanged. The scaling is interpolated in between.
    """

    factor: float
    low: float
    high: float
    length: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class LMConfig:
    """Architecture of a language model; hashable, so it can be a static argument of ``jax.jit``.

    The default of 0 for ``n_kv_heads``, ``d_head`` and ``d_mlp`` is replaced by ``n_heads``, ``d_model / n_heads`` and
    ``4 * d_model``, respectively. Invalid values raise a ValueError that names the field.

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
    """Fraction of each head's features that are rotated (0.25 in GPT-NeoX, 1 in Llama)."""
    rope_scaling: LinearScaling | Llama3Scaling | None = None
    position_offset: int = 0
    """Row of the learned position table that belongs to position 0 (2 in OPT)."""
    sliding_window: int = 0
    """Maximum number of real tokens that a token attends to, including itself; 0 for no limit."""
    local_layers: tuple[bool, ...] = ()
    """One flag per layer, True if it uses the sliding window (mixed in Gemma 2 and 3). If empty, all layers use it."""
    local_rope_theta: float = 0.0
    """Rotary base of layers with a sliding window, applied without ``rope_scaling`` (Gemma 3). If 0, these layers use
    ``rope_theta`` and ``rope_scaling``."""
    parallel_residual: bool = False
    """Whether attention and MLP both receive the input of the layer (GPT-J, GPT-NeoX)."""
    qkv_bias: bool = False
    out_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    """Whether an RMS norm is applied to each query and key head before rotation (Qwen3, Gemma 3)."""
    post_norms: bool = False
    """Whether the outputs of attention and MLP are normalised before the residual addition (Gemma 2 and 3)."""
    norm_plus_one: bool = False
    """Whether RMS norms multiply by 1 + scale instead of scale (Gemma)."""
    embed_scale: bool = False
    """Whether embeddings are multiplied by sqrt(d_model) (Gemma)."""
    attn_scale: float = 0.0
    """Multiplier of the attention scores; 0 for ``1 / sqrt(d_head)``."""
    attn_softcap: float = 0.0
    """Cap on the attention scores s, which become ``cap * tanh(s / cap)`` (Gemma 2); 0 for no cap."""
    final_softcap: float = 0.0
    """Cap on the logits, applied like ``attn_softcap``; 0 for no cap."""
    tie_embeddings: bool = False
    dtype: str = "float32"
    """Compute dtype of the layers, "float32" or "bfloat16". Parameters may have a different dtype; norm statistics and
    logits are float32. float16 is for files only: without loss scaling, small gradients would become 0 in it."""
    remat: Remat = "none"
    """What the backward pass recomputes. It always recomputes norms, activations, attention scores and weights gathered
    on a mesh. This setting adds nothing ("none"), everything except matmuls without a batch dimension ("dots"), or
    whole layers ("full")."""
    attention: Attention = "auto"
    """Implementation of attention:

    * "einsum": the code in :mod:`rlhf_jax.lm.attention`.
    * "xla" or "cudnn": ``jax.nn.dot_product_attention`` with this ``implementation``.
    * "auto": splash attention on a TPU and cuDNN on a GPU, if ``dtype`` has 16 bits, the forward pass has no cache,
      and the kernel supports the architecture and the row length; otherwise "einsum".
    """
    model_type: str = ""
    """Hugging Face model type that `lm.save` writes; if empty, the first supported type that fits the architecture."""

    def __post_init__(self) -> None:
        """Sets fields whose defaults depend on other fields and checks all fields."""
        for name in ("vocab_size", "n_layers", "d_model", "n_heads", "max_length"):
            _require(getattr(self, name) >= 1, name, getattr(self, name), "at least 1")
        for name in ("n_kv_heads", "d_head", "d_mlp"):
            _require(getattr(self, name) >= 0, name, getattr(self, name), "at least 0")
        if self.d_head == 0:
            divides = self.d_model % self.n_heads == 0
            _require(divides, "n_heads", self.n_heads, f"a divisor of d_model ({self.d_model}) unless d_head is set")
            object.__setattr__(self, "d_head", self.d_model // self.n_heads)
        if self.n_kv_heads == 0:
            object.__setattr__(self, "n_kv_heads", self.n_heads)
        if self.d_mlp == 0:
            object.__setattr__(self, "d_mlp", 4 * self.d_model)
        if self.attn_scale == 0:
            object.__setattr__(self, "attn_scale", self.d_head**-0.5)
        not_half = 'float32 or bfloat16; float16 is for files only (lm.save with dtype="float16")'
        _require(self.dtype != "float16", "dtype", self.dtype, not_half)
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
                f"a fraction that rotates an even, positive number of the d_head = {self.d_head} features",
            )

    def _check_combinations(self) -> None:
        n_local = len(self.local_layers)
        fits = n_local in (0, self.n_layers)
        _require(fits, "local_layers", self.local_layers, f"empty or have length {self.n_layers}")
        windowed = self.sliding_window > 0
        _require(windowed or not n_local, "local_layers", self.local_layers, "empty if sliding_window is 0")
        _require(
            windowed or self.local_rope_theta == 0,
            "local_rope_theta",
            self.local_rope_theta,
            "0 if sliding_window is 0",
        )
        plain = self.attention in ("auto", "einsum") or self.attn_softcap == 0
        _require(plain, "attention", self.attention, "'auto' or 'einsum' if attn_softcap is not 0")
        only_rms = self.norm == "rmsnorm" or not self.norm_plus_one
        _require(only_rms, "norm_plus_one", self.norm_plus_one, "False if norm is 'layernorm'")

    @property
    def mixed_layers(self) -> bool:
        """Whether only some layers use the sliding window."""
        return len(set(self.local_layers)) > 1

    @property
    def windowed(self) -> bool:
        """Whether any layer uses the sliding window."""
        return self.sliding_window > 0 and (not self.local_layers or any(self.local_layers))

    def is_local(self, layer: int) -> bool:
        """Returns whether the layer with this index uses the sliding window."""
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
        """Returns the preset ``name`` with the fields in ``overrides`` replaced.

        >>> from rlhf_jax import lm
        >>> lm.LMConfig.preset("gpt2", n_layers=2).vocab_size
        50257

        Raises:
            ValueError: ``name`` is not a preset.
        """
        if name not in PRESETS:
            raise ValueError(f"unknown preset {name!r}; known presets: {', '.join(sorted(PRESETS))}")
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
