"""Loads the model, tokenizer and chat format that --model specifies, from a folder in Hugging Face format."""

from __future__ import annotations

import dataclasses
import datetime
import hashlib
import pathlib
import re
from functools import partial
from typing import Any, TypeVar

import jax

from launch import config_file, device_mesh, setting_checks
from launch.run_settings import ARCHITECTURES, SettingError, Template, TrainCompute, is_architecture
from rlhf_jax import lm, parallel, types
from rlhf_jax.data import chat, errors, tokenizers

LANGUAGE_MODEL, REWARD_MODEL = "language model", "reward model"
_SAVED_AS = {
    LANGUAGE_MODEL: ("model", "policy", "ppo", "sft_mix", "sft", "base"),
    REWARD_MODEL: ("model", "reward_model"),
}
"""Names under which commands save models in their run folders."""
_FILES = ("*.json", "*.jinja", "*.safetensors", "tokenizer.model")

ROTARY_LENGTH = 4096
"""Least maximum length of a new model with rotary positions, which is not limited to the widths of its training."""
_AS_IT_IS = Template()
S = TypeVar("S", bound=Any)


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


def load(
    path: str,
    *,
    kind: str = LANGUAGE_MODEL,
    flag: str = "--model",
    mesh: jax.sharding.Mesh | None = None,
    template: Template = _AS_IT_IS,
) -> InitialModel:
    """Loads a model from a folder in Hugging Face format, or from the run folder of a command that saved one.

    Many models pad their vocabulary to a round number. The ids after the tokenizer's last one are removed, so that they
    cannot be sampled.

    Args:
        path: The folder.
        kind: ``LANGUAGE_MODEL`` or ``REWARD_MODEL``.
        flag: The flag that error messages name.
        mesh: The mesh over which parameters are sharded; None for one device.
        template: Settings of the chat template.

    Raises:
        SettingError: The folder has no usable model of this kind.
    """
    check(path, kind=kind, flag=flag)
    return _load(saved_in_run(path, kind, flag), flag, mesh, template)


def check(path: str, *, kind: str = LANGUAGE_MODEL, flag: str = "--model") -> lm.LMConfig:
    """Returns the configuration of a model, without reading any weights.

    Raises:
        SettingError: The folder has no model of this kind.
    """
    folder = saved_in_run(path, kind, flag)
    names = {each.name for each in pathlib.Path(folder).glob("*")}
    if "config.json" not in names and any(name.startswith("tokenizer") for name in names):
        raise SettingError(
            f"cannot use {flag} {path}: it has a tokenizer but no model, which needs config.json and safetensors files"
        )
    try:
        cfg = lm.load_config(folder)
        found = REWARD_MODEL if lm.has_head(folder) else LANGUAGE_MODEL
    except (OSError, ValueError) as error:
        raise SettingError(f"cannot use {flag} {path}: {error}") from error
    if found != kind:
        raise SettingError(f"cannot use {flag} {path}: it is a {found}, not a {kind}")
    return cfg


def new_config(architecture: str, vocab_size: int) -> lm.LMConfig:
    """Returns the configuration of a model with random weights, for which `is_architecture` is true."""
    cfg = lm.LMConfig.preset(architecture, vocab_size=vocab_size)
    if cfg.positions == "rope":  # not limited by a table of positions
        cfg = dataclasses.replace(cfg, max_length=max(cfg.max_length, ROTARY_LENGTH))
    return cfg


def refuse_vocab_size(data: Any) -> None:
    """Raises SettingError if --data.vocab-size is given although a model has its own tokenizer."""
    if data.vocab_size != type(data).vocab_size:
        raise SettingError("--data.vocab-size has no effect with a --model that has a tokenizer; leave it out")


def create(
    architecture: str, fmt: chat.ChatFormat, key: jax.Array, *, mesh: jax.sharding.Mesh | None = None
) -> InitialModel:
    """Returns a model with random weights and the vocabulary of ``fmt``, for which `is_architecture` is true."""
    cfg = new_config(architecture, len(fmt.tokenizer))
    make = partial(lm.init, cfg=cfg)
    if mesh is None:
        params = jax.jit(make)(key)
    else:
        shardings = parallel.shardings(jax.eval_shape(make, key), mesh, lm.logical_axes(cfg))
        params = jax.jit(make, out_shardings=shardings)(key)
    return InitialModel(architecture, cfg, params, fmt)


def saved_in_run(path: str, kind: str, flag: str) -> str:
    """Returns ``path`` or, if it is the folder of a run, the folder of the model of this kind that the run saved."""
    config_file.check_local(flag, path)
    folder = pathlib.Path(path)
    if not folder.exists():
        if is_architecture(path):
            raise SettingError(f"cannot use {flag} {path}: random weights cannot be used here; give a folder")
        if re.fullmatch(r"[\w.-]+/[\w.-]+", path):
            name = path.split("/")[1]
            raise SettingError(
                f"{flag} {path} does not exist; if it is a model on the Hugging Face Hub, download it with "
                f"`hf download {path} --local-dir {name}` and use {flag} {name}"
            )
        named = flag == "--model" and "/" not in path
        names = f" or, for random weights, one of {', '.join(ARCHITECTURES)}" if named else ""
        raise SettingError(f"{flag} {path} does not exist; give a folder{names}")
    if folder.is_file():
        raise SettingError(f"{flag} {path} is a file; give the folder of a model or of a run")
    if command := config_file.tool(folder):
        raise SettingError(f"cannot use {flag} {path}: it is a run of {command}.py, which has no model")
    if not (folder / config_file.NAME).is_file() or not config_file.is_run(folder):
        return path
    for name in _SAVED_AS[kind]:
        if (folder / name / "config.json").is_file():
            return str(folder / name)
    raise SettingError(
        f"cannot use {flag} {path}: it is the folder of a run that has saved no {kind} "
        f"({' or '.join(f'{name}/' for name in _SAVED_AS[kind][:2])}); is the run finished?"
    )


def with_compute(cfg: lm.LMConfig, compute: TrainCompute) -> lm.LMConfig:
    """Returns the architecture with the number format and the rematerialisation of the settings."""
    return dataclasses.replace(cfg, dtype=compute.dtype or cfg.dtype, remat=compute.remat)


def with_date(settings: S, model: InitialModel | None) -> S:
    """Returns the settings with the date that the chat template writes, so that a resumed run has the same prompts.

    Raises:
        SettingError: A date is given, but the template writes none.
    """
    template = settings.template  # type: ignore[attr-defined]
    if model is None or str(model.fmt.date or "") == (template.date or ""):
        return settings
    if model.fmt.date is None:
        raise SettingError("--template.date has no effect: the chat template of --model writes no date; leave it out")
    return dataclasses.replace(settings, template=dataclasses.replace(template, date=str(model.fmt.date)))  # type: ignore[call-arg]


def _options(template: Template) -> dict[str, Any]:
    """Returns the arguments of `chat.chat_format` for the settings of the template."""
    options = setting_checks.template_options(template.options)
    try:
        date = None if template.date is None else datetime.date.fromisoformat(template.date)
    except ValueError as error:
        raise SettingError(f"--template.date is {template.date!r}; it must be a date, such as 2025-01-31") from error
    return {"options": options, "date": date}


def _load(path: str, flag: str, mesh: jax.sharding.Mesh | None, template: Template) -> InitialModel:
    given = _options(template)
    try:
        tokenizer = tokenizers.load(path)  # first, because it takes less time than the weights
        shard = None if mesh is None else device_mesh.make_sharder(lm.load_config(path), mesh)
        cfg, params = lm.load(path, shard=shard)
        n = 1 + max(tokenizer.get_vocab().values())
        if n > cfg.vocab_size:
            raise errors.DataError(
                f"its tokenizer has {n} ids, more than the {cfg.vocab_size} of the model; add rows for the new tokens "
                f"with lm.resize(params, cfg, {n}) and save the model"
            )
        fmt = chat.chat_format(tokenizer, model_type=cfg.model_type, **given)
    except (OSError, ValueError) as error:
        raise SettingError(f"cannot use {flag} {path}: {error}") from error
    except Exception as error:  # safetensors and tokenizers raise bare exceptions for damaged files
        raise SettingError(f"cannot read {flag} {path}: {error}") from error
    params, cfg = lm.resize(params, cfg, n)
    return InitialModel(path, cfg, params, fmt)


def fingerprint(path: str) -> str:
    """Returns a SHA-256 of the names and contents of the files that `load` reads from a folder."""
    digest = hashlib.sha256()
    for file in sorted({file for pattern in _FILES for file in pathlib.Path(path).glob(pattern)}):
        with open(file, "rb") as stream:
            digest.update(f"{file.name}\0{hashlib.file_digest(stream, 'sha256').hexdigest()}\n".encode())
    return digest.hexdigest()
