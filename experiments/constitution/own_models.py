"""Models that criticise, revise and judge for constitutional.py: those of a folder, or behind an address."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

from launch import initial_model
from launch.run_settings import SettingError

from constitution import judge_settings
from rlhf_jax import feedback, generation, lm
from rlhf_jax.data import chat, dialogues, errors, plain_text

_ENDING = "Answer: ("
"""How questions of `feedback.question` end."""
_CHOICES = (("Answer: (", "A", "B"), ("Answer:", " A", " B"), ("Answer:\n", "A", "B"))
"""Endings of a question with the texts that answer it, of which the first is used whose answers are single tokens."""


class Writer(NamedTuple):
    """A model that writes, and what its texts depend on."""

    generate: Any
    name: str


def uses_chat(settings: Any, model: initial_model.InitialModel) -> bool:
    """Returns whether requests are user turns of a chat."""
    if settings.style is not None:
        return settings.style == "chat"
    return not model.fmt.origin.startswith("plain")


def _encoder(settings: Any, model: initial_model.InitialModel) -> Callable[[str], list[int]]:
    """Returns a function that tokenises a request, up to where the model's text begins."""
    tokenizer: Any = model.fmt.tokenizer
    if uses_chat(settings, model):
        return lambda text: chat.encode_prompt(model.fmt, [dialogues.Turn("user", text)])
    start = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    return lambda text: [*start, *plain_text.encode_texts(tokenizer, [text])[0]]


def _fitting(encode: Callable[[str], list[int]], most: int, flag: str, settings: Any) -> Callable[[str], list[int]]:
    shorter = ", --prompt-width or a smaller --max-new-tokens" if hasattr(settings, "max_new_tokens") else ""

    def checked(text: str) -> list[int]:
        ids = encode(text)
        if len(ids) > most:
            raise errors.DataError(
                f"a request has {len(ids)} tokens, more than the {most} that {flag} can read; set "
                f"--no-few-shot{shorter}"
            )
        return ids

    return checked


def _endpoint(settings: Any, url: str, **options: Any) -> Any:
    try:
        from rlhf_jax.feedback import endpoint
    except ImportError as error:
        raise SettingError(
            f"{url} needs the package {error.name}; install it with pip install -e '.[feedback]'"
        ) from None
    return endpoint.Endpoint(url, model=settings.judge_model, key=judge_settings.server_key(settings), **options)


def load(settings: Any, path: str, flag: str) -> initial_model.InitialModel:
    """Loads the model of a folder."""
    return initial_model.load(path, flag=flag, template=settings.template)


def writer(settings: Any, model: initial_model.InitialModel | None) -> Writer:
    """Returns the editor: ``model``, or the model behind the address of --editor if it is None."""
    if model is None:
        server = _endpoint(settings, settings.editor)
        options = {"max_tokens": settings.max_new_tokens, "temperature": settings.temperature}
        return Writer(partial(server.generate, **options), f"{server.name} {settings.spec_name}")
    spec: Any = generation.Sampling(
        temperature=settings.temperature or 1.0,
        greedy=settings.temperature == 0,
        top_k=settings.top_k,
        top_p=settings.top_p,
        max_new_tokens=settings.max_new_tokens,
        stop_ids=model.fmt.stop_ids,
        pad_id=model.fmt.pad_id,
    )
    flag = "--editor" if settings.editor else "--model"
    made = feedback.ModelWriter(
        model.params,
        cfg=model.cfg,
        sampling=spec,
        encode=_fitting(_encoder(settings, model), model.cfg.max_length - settings.max_new_tokens, flag, settings),
        decode=lambda ids: str(model.fmt.tokenizer.decode(list(ids), skip_special_tokens=True)),
        seed=settings.seed,
        batch=settings.batch,
    )
    return Writer(made, f"{initial_model.fingerprint(model.path)} {model.cfg.dtype} {settings.spec_name}")


def judge(settings: Any, model: initial_model.InitialModel | None, *, batch: int) -> feedback.Judge:
    """Returns the judge: ``model``, or the model behind the address of --judge if it is None.

    Args:
        settings: The settings, of which those of `judge_settings.JudgeSettings` are used.
        model: The model; None for an address.
        batch: Number of questions that the model reads at a time.
    """
    if model is None:
        return _endpoint(settings, settings.judge, think_tokens=settings.think_tokens)
    tokenizer, encode = model.fmt.tokenizer, _encoder(settings, model)
    for ending, *answers in _CHOICES:
        ids = [plain_text.encode_texts(tokenizer, [ending + each])[0] for each in ("", *answers)]
        if all(each[:-1] == ids[0] for each in ids[1:]):
            break
    else:
        raise SettingError(f"--judge {settings.judge}: its tokenizer has no single tokens for the answers A and B")
    before: list[int] = ids[0]

    def encode_question(text: str) -> list[int]:
        return encode(text.removesuffix(_ENDING)) + before

    return feedback.ModelJudge(
        model.params,
        cfg=model.cfg,
        encode=_fitting(encode_question, model.cfg.max_length - 1, "--judge", settings),
        choices=(ids[1][-1], ids[2][-1]),
        name=f"{initial_model.fingerprint(model.path)} {model.cfg.dtype} {settings.style}",
        batch=batch,
    )


def with_dtype(settings: Any, model: initial_model.InitialModel) -> initial_model.InitialModel:
    """Returns the model with the number format of the settings."""
    cfg: lm.LMConfig = dataclasses.replace(model.cfg, dtype=settings.compute.dtype or model.cfg.dtype)
    return dataclasses.replace(model, cfg=cfg)
