"""Loads the model, tokenizer and chat format that --model specifies, from a folder in Hugging Face format."""

from __future__ import annotations

import dataclasses
import datetime
import hashlib
import json
import pathlib
from typing import Any

import jax

from launch import device_mesh
from launch.settings import SettingError, Settings, Template
from rlhf_jax import lm, types
from rlhf_jax.data import chat, errors, tokenizers

_FILES = ("*.json", "*.jinja", "*.safetensors", "tokenizer.model")

_AS_IT_IS = Template()


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


def load(path: str, *, mesh: jax.sharding.Mesh | None = None, template: Template = _AS_IT_IS) -> InitialModel:
    """Loads a language model from a folder and shards it over ``mesh``, if given; raises SettingError if that fails.

    Many models pad their vocabulary to a round number. The ids after the tokenizer's last one are removed, so that they
    cannot be sampled.
    """
    model = _load(path, mesh, template)
    if "head" in model.params:
        raise SettingError(f"cannot use --model {path}: it is a reward model, not a language model")
    return model


def load_reward_model(path: str) -> InitialModel:
    """Loads a reward model, as saved by instructgpt.py, from a folder; raises SettingError if that fails."""
    model = _load(path)
    if "head" not in model.params:
        raise SettingError(f"cannot use --model {path}: it is a language model, not a reward model")
    return model


def with_date(settings: Settings, model: InitialModel | None) -> Settings:
    """Returns the settings with the date that the chat template writes, so that a resumed run has the same prompts.

    Raises:
        SettingError: A date is given, but the template writes none.
    """
    if model is None or str(model.fmt.date or "") == (settings.template.date or ""):
        return settings
    if model.fmt.date is None:
        raise SettingError("--template.date has no effect: the chat template of --model writes no date; leave it out")
    return dataclasses.replace(settings, template=dataclasses.replace(settings.template, date=str(model.fmt.date)))


def _options(template: Template) -> dict[str, Any]:
    """Returns the arguments of `chat.chat_format` for the settings of the template."""
    try:
        options = json.loads(template.options or "{}")
    except ValueError:
        options = None
    if not isinstance(options, dict):
        raise SettingError(
            f"--template.options is {template.options!r}; it must be a JSON object, such as "
            """'{"enable_thinking": false}'"""
        )
    try:
        date = None if template.date is None else datetime.date.fromisoformat(template.date)
    except ValueError as error:
        raise SettingError(f"--template.date is {template.date!r}; it must be a date, such as 2025-01-31") from error
    return {"options": options, "date": date}


def _load(path: str, mesh: jax.sharding.Mesh | None = None, template: Template = _AS_IT_IS) -> InitialModel:
    given = _options(template)
    try:
        shard = None if mesh is None else device_mesh.make_sharder(lm.load_config(path), mesh)
        cfg, params = lm.load(path, shard=shard)
        tokenizer = tokenizers.load(path)
        n = 1 + max(tokenizer.get_vocab().values())
        if n > cfg.vocab_size:
            raise errors.DataError(
                f"its tokenizer has {n} ids, more than the {cfg.vocab_size} of the model; add rows for the new tokens "
                f"with lm.resize(params, cfg, {n}) and save the model"
            )
        fmt = chat.chat_format(tokenizer, model_type=cfg.model_type, **given)
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
