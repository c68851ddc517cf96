"""Chat formats: a tokenizer with its chat template, and what training needs to know about them."""

from __future__ import annotations

import copy
import dataclasses
import datetime
import json
import re
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from rlhf_jax.data import dialogues, errors
from rlhf_jax.data.chat import rendering, templates

if TYPE_CHECKING:
    import transformers


_CLOCK = re.compile(r"""strftime_now\(\s*("[^"]*"|'[^']*')""")
"""Matches a call of the clock of chat templates, with its format."""


@dataclasses.dataclass(frozen=True, eq=False)
class ChatFormat:
    """The chat format of a tokenizer; created and checked by `chat_format`."""

    tokenizer: transformers.PreTrainedTokenizerFast
    """A copy of the tokenizer with ``template`` as its chat template, to be saved with a model trained in this format.
    `rlhf_jax.lm.save` also saves its attribute ``stop_ids``, which equals that of the format."""
    template: str
    origin: str
    """Where the template comes from, as a phrase for messages."""
    renderer: rendering.Renderer = dataclasses.field(repr=False)
    """The template with the values of its variables. The current date is fixed, so that all prompts have the same."""
    stop_ids: tuple[int, ...]
    """Ids that end an answer: the token with which answers end in training, the EOS token, and any further ids, without
    duplicates."""
    pad_id: int
    """Token id used for padding: the pad token or the unknown token, whichever first exists and does not end an answer;
    otherwise the first of ``stop_ids``."""
    date: datetime.date | None
    """The current date that the template writes; None if it writes none."""
    stop: str
    """Spelling of the token with which answers end in training."""
    special_tokens: tuple[str, ...] = dataclasses.field(repr=False)
    """Spellings of the tokenizer's special tokens."""


def chat_format(
    tokenizer: transformers.PreTrainedTokenizerFast,
    *,
    model_type: str | None = None,
    template: str | None = None,
    options: Mapping[str, Any] | None = None,
    date: datetime.date | None = None,
    stop_ids: Iterable[int] | None = None,
) -> ChatFormat:
    """Returns the chat format of a tokenizer, checked on sample dialogues.

    The tokenizer's own template is used as it is. If it has none, the format is that of the model family or, for an
    unknown family, plain text with ``User:`` and ``Assistant:``.

    >>> from rlhf_jax.data import chat, dialogues, tokenizers
    >>> fmt = chat.chat_format(tokenizers.word_level(["the", "cat", "sat"]))
    >>> prompt = [dialogues.Turn("user", "the cat")]
    >>> chat.encode_prompt(fmt, prompt)  # <|user|> the cat <|end|> <|assistant|>
    [2, 4, 5, 1, 3]
    >>> chat.encode_answer(fmt, prompt, "sat")  # sat <|end|>
    [6, 1]

    Args:
        tokenizer: The tokenizer; it is not modified.
        model_type: ``model_type`` from the model's ``config.json``; it distinguishes model families with the same
            control tokens if the tokenizer has no template.
        template: Chat template to use instead of the tokenizer's own template or the template of a family.
        options: Values of the template's variables, such as ``{"enable_thinking": False}`` or a ``date_string``. They
            are JSON values and are written at the start of the template, so that they are saved with the tokenizer.
        date: The date for templates that write the current date, such as Llama 3.1's. By default, today.
        stop_ids: Further ids that end an answer. By default, those that `tokenizers.load` found in the model's files.

    Returns:
        The format.

    Raises:
        DataError: If the template cannot be used for training, because its rendering does not show where an answer
            starts or ends, or because the loss would exclude the token that ends an answer. The message explains what
            to change.
    """
    chosen, origin = (template, "given") if template is not None else _choose(tokenizer, model_type)
    options = dict(options or {})
    _check_options(chosen, options)
    chosen = "".join(_assignment(name, value) for name, value in options.items()) + chosen
    date = datetime.date.today() if date is None else date
    if options:
        origin += f", with {', '.join(f'{name} = {value!r}' for name, value in options.items())}"
    if _CLOCK.search(chosen):
        origin += f", with the date {date:%d %b %Y}"
    tokenizer = copy.copy(tokenizer)
    tokenizer.chat_template = chosen
    renderer = rendering.Renderer(_fixed_date(date, chosen) + chosen, dict(tokenizer.special_tokens_map))
    stop = _checked_stop(tokenizer, renderer)
    end, eos, pad, unknown = (
        _id(tokenizer, token) for token in (stop, tokenizer.eos_token, tokenizer.pad_token, tokenizer.unk_token)
    )
    stop_ids = list(getattr(tokenizer, "stop_ids", ()) if stop_ids is None else stop_ids)
    vocab_size = 1 + max(tokenizer.get_vocab().values())
    if wrong := [i for i in stop_ids if not isinstance(i, int) or not 0 <= i < vocab_size]:
        raise errors.DataError(f"stop_ids contains {wrong[0]!r}; ids must be integers in [0, {vocab_size - 1}]")
    ends = tuple(dict.fromkeys(i for i in (end, eos, *stop_ids) if i is not None))
    tokenizer.stop_ids = ends  # type: ignore[attr-defined]  # read by lm.save
    return ChatFormat(
        tokenizer=tokenizer,
        template=chosen,
        origin=origin,
        renderer=renderer,
        date=date if _CLOCK.search(chosen) else None,
        stop_ids=ends,
        pad_id=next((i for i in (pad, unknown) if i is not None and i not in ends), ends[0]),
        stop=stop,
        special_tokens=tuple(token.content for token in _added_tokens(tokenizer) if token.special),
    )


def _control_pattern(tokenizer: Any) -> re.Pattern[str]:
    """Returns a pattern that matches the spelling of any added token of a tokenizer, except white space."""
    longest_first = sorted(filter(str.strip, (t.content for t in _added_tokens(tokenizer))), key=len, reverse=True)
    return re.compile("|".join(map(re.escape, longest_first)) or r"(?!)")


def _check_options(template: str, options: Mapping[str, Any]) -> None:
    """Raises DataError for an option that the template does not use."""
    import jinja2.meta

    for name in ("messages", "add_generation_prompt"):
        if name in options:
            raise errors.DataError(f"{name!r} is not an option: the encoders set it")
    if unknown := [name for name in options if not re.search(rf"\b{re.escape(name)}\b", template)]:
        # Generation marks are an extension of transformers, which Jinja cannot parse.
        code = re.sub(r"\{%[-+]?\s*(end)?generation\s*[-+]?%\}", "", template)
        environment = jinja2.Environment(extensions=["jinja2.ext.loopcontrols"])
        names = jinja2.meta.find_undeclared_variables(environment.parse(code))
        names = names - {"messages", "raise_exception", "add_generation_prompt", "strftime_now"}
        raise errors.DataError(
            f"the chat template has no variable {unknown[0]!r}; it has {', '.join(sorted(names)) or 'none'}"
        )


def _assignment(name: str, value: Any) -> str:
    """Returns template code that gives a variable a value, unless the caller of the template does."""
    if not name.isidentifier():
        raise errors.DataError(f"the name of a template option must be an identifier, got {name!r}")
    return f"{{%- set {name} = {_literal(value)} if {name} is not defined or {name} is none else {name} -%}}"


def _literal(value: Any) -> str:
    """Returns a JSON value as Jinja code."""
    if value is None:
        return "none"
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{json.dumps(key)}: {_literal(item)}" for key, item in value.items()) + "}"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(map(_literal, value)) + "]"
    return json.dumps(value)


def _fixed_date(date: datetime.date, template: str) -> str:
    """Returns template code that replaces the clock ``strftime_now`` by one that has stopped at a date."""
    if not _CLOCK.search(template):
        return ""
    times = {literal[1:-1]: date.strftime(literal[1:-1]) for literal in _CLOCK.findall(template)}
    return "{%- macro strftime_now(format) -%}{{ " + _literal(times) + "[format] }}{%- endmacro -%}"


def _added_tokens(tokenizer: Any) -> Iterable[Any]:
    return tokenizer.backend_tokenizer.get_added_tokens_decoder().values()


def _id(tokenizer: Any, token: Any) -> int | None:
    return None if token is None else tokenizer.backend_tokenizer.token_to_id(str(token))


def _choose(tokenizer: Any, model_type: str | None) -> tuple[str, str]:
    """Returns a template and a description of its origin."""
    if tokenizer.chat_template is not None:
        try:
            return tokenizer.get_chat_template(), "the tokenizer's own"
        except ValueError as error:  # several named templates, none of them "default"
            names = ", ".join(sorted(tokenizer.chat_template))
            raise errors.DataError(f"the tokenizer has several chat templates ({names}): pass one of them") from error
    family = templates.likely(lambda token: _id(tokenizer, token) is not None, model_type)
    if family is not None:
        return family.template, f"{family.name}'s, because the tokenizer has none"
    if tokenizer.eos_token_id is None:
        raise errors.DataError("the tokenizer has neither a chat template nor an EOS token to end an answer with")
    # If the tokenizer adds a BOS token to plain text, as OPT's does, the template must add it, because texts are
    # encoded without it.
    begins = tokenizer("a")["input_ids"][:1] == [tokenizer.bos_token_id]
    return templates.plain(bos=begins), "plain text with User: and Assistant:, because the tokenizer has none"


def _checked_stop(tokenizer: Any, renderer: rendering.Renderer) -> str:
    """Returns the spelling of the token that ends answers; raises DataError if the template is unusable."""
    question, answer = {"role": dialogues.USER, "content": "one"}, {"role": dialogues.ASSISTANT, "content": "two"}
    probe = {**answer, "content": rendering.PROBE}
    token, stops = _control_pattern(tokenizer), set()
    for messages in ([question, probe], [question, probe, question], [question, answer, question, probe]):
        found = rendering.find_stop(renderer, token, messages=messages)
        if found is None:
            eos = "a stop token" if tokenizer.eos_token is None else f"the token {str(tokenizer.eos_token)!r}"
            raise errors.DataError(f"the chat template does not end an answer: put {eos} after the assistant's text")
        stops.add(found)
    if len(stops) > 1:
        names = " and ".join(sorted(map(repr, stops)))
        raise errors.DataError(
            f"the chat template ends answers with different tokens ({names}): end all answers with the same token"
        )
    dialogue = [question, answer, question, answer]
    (stop,) = stops
    text, spans = rendering.answer_spans(renderer, dialogue, (1, 3), stop=stop)
    for i, (start, end) in zip((1, 3), spans):
        if answer["content"] not in text[start:end] or text[start:end].count(stop) != 1:
            raise errors.DataError(
                f"the chat template does not show the text of an answer and its stop token once: {text[start:end]!r}"
            )
        if i == 3 and start < len(prompt := renderer.render(dialogue[:i], prompt=True)):
            raise errors.DataError(
                f"the chat template starts an answer before the end of its generation prompt, {prompt[start:]!r}: put "
                "{% generation %} directly after the text that add_generation_prompt adds"
            )
    return stop
