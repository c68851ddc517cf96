"""The model that a run starts from: a directory of Hugging Face form, with its tokenizer and its chat format."""

from __future__ import annotations

import dataclasses
import hashlib
import pathlib

import jax

from launch import mesh_settings
from launch.settings import SettingError
from rlhf_jax import lm, types
from rlhf_jax.data import chat, tokenizers

_FILES = ("*.json", "*.jinja", "*.safetensors", "tokenizer.model")


@dataclasses.dataclass(frozen=True)
class Start:
    """A model to go on from, with as many ids as its tokenizer has."""

    path: str
    cfg: lm.LMConfig
    params: types.Params
    fmt: chat.ChatFormat

    def make_room(self, prompt_width: int, response_width: int, *, where: str) -> None:
        """Raise SettingError if prompts and answers of these widths are longer than the model reads."""
        if prompt_width + response_width > self.cfg.max_length:
            raise SettingError(
                f"{where}: {prompt_width} + {response_width} tokens are more than the {self.cfg.max_length} that "
                f"--model {self.path} reads"
            )


def load(path: str, *, mesh: jax.sharding.Mesh | None = None) -> Start:
    """Read a model directory, onto a mesh where there is one; raises SettingError for one that cannot be used.

    Vocabularies are often padded to a round number. Ids that no token has are taken off the model, so that none is ever
    drawn and no probability is anywhere lost to one.
    """
    start = _read(path, mesh)
    if "head" in start.params:
        raise SettingError(f"--model {path} cannot be used: it holds a reward model, not a language model")
    return start


def load_reward_model(path: str) -> Start:
    """Read the directory of a reward model, as the main job writes one; raises SettingError as `load` does."""
    start = _read(path)
    if "head" not in start.params:
        raise SettingError(f"--model {path} cannot be used: it holds a language model, not a reward model")
    return start


def _read(path: str, mesh: jax.sharding.Mesh | None = None) -> Start:
    try:
        shard = None if mesh is None else mesh_settings.shard_of(lm.load_config(path), mesh)
        cfg, params = lm.load(path, shard=shard)
        tokenizer = tokenizers.load(path)
        fmt = chat.chat_format(tokenizer, model_type=cfg.model_type)
    except (OSError, ValueError) as error:
        raise SettingError(f"--model {path} cannot be used: {error}") from error
    except Exception as error:  # the safetensors and tokenizers libraries raise bare exceptions for damaged files
        raise SettingError(f"--model {path} cannot be read: {error}") from error
    n = 1 + max(tokenizer.get_vocab().values())
    if n > cfg.vocab_size:
        raise SettingError(
            f"--model {path} cannot be used: its tokenizer has {n} ids, more than its model's {cfg.vocab_size}"
        )
    return Start(path, *_cut(cfg, params, n), fmt)


def _cut(cfg: lm.LMConfig, params: types.Params, n: int) -> tuple[lm.LMConfig, types.Params]:
    if n == cfg.vocab_size:
        return cfg, params
    cut = {**params, "embed": {**params["embed"], "tokens": params["embed"]["tokens"][:n]}}
    if "unembed" in params:
        cut["unembed"] = {"kernel": params["unembed"]["kernel"][:, :n]}
    return dataclasses.replace(cfg, vocab_size=n), cut


def fingerprint(path: str) -> str:
    """SHA-256 of what a model directory holds: names and contents of the files that are read from it."""
    digest = hashlib.sha256()
    for file in sorted({file for pattern in _FILES for file in pathlib.Path(path).glob(pattern)}):
        with open(file, "rb") as stream:
            digest.update(f"{file.name}\0{hashlib.file_digest(stream, 'sha256').hexdigest()}\n".encode())
    return digest.hexdigest()
