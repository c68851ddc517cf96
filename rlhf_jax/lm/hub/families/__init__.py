"""Supported families of Hugging Face models, keyed by the ``model_type`` in ``config.json``."""

from rlhf_jax.lm.hub.families import gemma, gpt2, gpt_neox, llama, opt, phi3
from rlhf_jax.lm.hub.layouts import Family

FAMILIES: dict[str, Family] = {
    "llama": llama.LLAMA,
    "gpt2": gpt2.GPT2,
    "gpt_neox": gpt_neox.GPT_NEOX,
    "mistral": llama.MISTRAL,
    "qwen2": llama.QWEN2,
    "qwen3": llama.QWEN3,
    "gemma": gemma.GEMMA,
    "gemma2": gemma.GEMMA2,
    "gemma3_text": gemma.GEMMA3,
    "opt": opt.OPT,
    "phi3": phi3.PHI3,
}
"""If ``LMConfig.model_type`` is empty, a model is written as the first of the families that can represent it."""

__all__ = ["FAMILIES"]
