"""Loads the model, tokenizer and chat format that --model specifies, from a folder in Hugging Face format."""

from __future__ import annotations

import dataclasses
import hashlib
import pathlib

import jax

from launch import device_mesh
from launch.settings import SettingError
from rlhf_jax import lm, types
from rlhf_jax.data import chat, tokenizers

_FILES = ("*.json", "*.jinja", "*.safetensors", "tokenizer.model")


@dataclasses.dataclass(frozen=True)
class InitialModel:
    """A loaded model. Its vocabulary has the same size as its tokenizer's."""

    path: str
    cfg: lm.LMConfig
    params: types.Params
    fmt: chat.ChatFormat

    def check_widths(self, prompt_width: int, response_width: int, *, source: str) -> None:
        """Raises SettingError if prompts and answers of these widths exceed the model's maximum length."""
        if prompt_width + response_width > self.cfg.max_length:
            raise SettingError(
                f"{source}: {prompt_width} + {response_width} tokens exceed the maximum length of "
                f"--model {self.path} ({self.cfg.max_length} tokens)"
            )


def load(path: str, *, mesh: jax.sharding.Mesh | None = None) -> InitialModel:
    """Loads a language model from a folder and shards it over ``mesh``, if given; raises SettingError if that fails.

    Many models pad their vocabulary to a round number. The ids after the tokenizer's last one are removed, so that they
    cannot be sampled.
    """
    model = _load(path, mesh)
    if "head" in model.params:
        raise SettingError(f"cannot use --model {path}: it is a reward model, not a language model")
    return model


def load_reward_model(path: str) -> InitialModel:
    """Loads a reward model, as saved by instructgpt.py, from a folder; raises SettingError if that fails."""
    model = _load(path)
    if "head" not in model.params:
        raise SettingError(f"cannot use --model {path}: it is a language model, not a reward model")
    return model


def _load(path: str, mesh: jax.sharding.Mesh | None = None) -> InitialModel:
    try:
        shard = None if mesh is None else device_mesh.make_sharder(lm.load_config(path), mesh)
        cfg, params = lm.load(path, shard=shard)
        tokenizer = tokenizers.load(path)
        n = 1 + max(tokenizer.get_vocab().values())
        if n > cfg.vocab_size:
            raise ValueError(
                f"its tokenizer has {n} ids, more than the {cfg.vocab_size} of the model; add rows for the new tokens "
                f"with lm.resize(params, cfg, {n}) and save the model"
            )
        # Ids that the tokenizer lacks are removed from the vocabulary below, so they cannot end an answer.
        stop_ids = [i for i in lm.load_stop_ids(path) if i < n]
        fmt = chat.chat_format(tokenizer, model_type=cfg.model_type, stop_ids=stop_ids)
    except (OSError, ValueError) as error:
        raise SettingError(f"cannot use --model {path}: {error}") from error
    except Exception as error:  # safetensors and tokenizers raise bare exceptions for damaged files
        raise SettingError(f"cannot read --model {path}: {error}") from error
    params, cfg = lm.resize(params, cfg, n)
    return InitialModel(path, cfg, params, fmt)


def fingerprint(path: str) -> str:
    """Returns a SHA-256 of the names and contents of the files that `load` reads from a folder."""
    digest = hashlib.sha256()
    for file in sorted({file for pattern in _FILES for file in pathlib.Path(path).glob(pattern)}):
        with open(file, "rb") as stream:
            digest.update(f"{file.name}\0{hashlib.file_digest(stream, 'sha256').hexdigest()}\n".encode())
    return digest.hexdigest()
