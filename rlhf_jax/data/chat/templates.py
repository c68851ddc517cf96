"""Chat templates for tokenizers that have none, one for each model family.

They write the text of the templates that the families publish with their chat models. Base models are published without
a template; a base model that is trained with one of these templates has the format of its family.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable


@dataclasses.dataclass(frozen=True)
class Family:
    """A model family and its chat template."""

    name: str
    model_types: tuple[str, ...]
    tokens: tuple[str, ...]
    """Control tokens that the template uses."""
    template: str
    unambiguous: bool = True
    """Whether the control tokens identify the family; if not, other families have the same control tokens."""


def _turns(*, before: str = "", user: str, assistant: str, system: str, prompt: str = "") -> str:
    """Returns a template that writes the turns in order.

    ``user``, ``assistant`` and ``system`` are the template code for turns of these roles. ``before`` precedes the
    turns, and ``prompt`` writes the generation prompt.
    """
    return (
        f"{before}{{%- for message in messages -%}}"
        "{%- set content = message['content'] -%}"
        f"{{%- if message['role'] == 'user' -%}}{user}"
        f"{{%- elif message['role'] == 'assistant' -%}}{assistant}"
        f"{{%- elif message['role'] == 'system' -%}}{system}"
        "{%- else -%}{{ raise_exception('the role is system, user or assistant, not ' + message['role']) }}"
        "{%- endif -%}{%- endfor -%}" + (f"{{%- if add_generation_prompt -%}}{prompt}{{%- endif -%}}" if prompt else "")
    )


def _write(*parts: str) -> str:
    return "{{ " + " + ".join(parts) + " }}"


def _headed(opening: str, ending: str, *, bos: bool, trim: bool = False) -> str:
    """Returns a template that writes each turn as ``opening``, in which ROLE is replaced, the text and ``ending``."""
    content = "(content | trim)" if trim else "content"
    written = {
        role: _write(repr(opening.replace("ROLE", role)), content, repr(ending))
        for role in ("user", "assistant", "system")
    }
    return _turns(
        before="{{- bos_token -}}" if bos else "", prompt=_write(repr(opening.replace("ROLE", "assistant"))), **written
    )


def _gemma() -> str:
    """Returns a template that writes the system text before the first question, as in Gemma 3."""
    question = _write(repr("<start_of_turn>user\n"), "system.text", "(content | trim)", repr("<end_of_turn>\n"))
    return _turns(
        before="{{- bos_token -}}{%- set system = namespace(text='') -%}",
        user=question + "{%- set system.text = '' -%}",
        assistant=_write(repr("<start_of_turn>model\n"), "(content | trim)", repr("<end_of_turn>\n")),
        system="{%- set system.text = content + " + repr("\n\n") + " -%}",
        prompt=_write(repr("<start_of_turn>model\n")),
    )


def _bracketed(*, answer_end: str, system: tuple[str, str], each: bool, trim: bool) -> str:
    """Returns a template that writes questions in brackets, and the system text before the first question.

    ``answer_end`` precedes the end token, and ``system`` contains the strings around the system text. With ``each``,
    the beginning-of-sequence token precedes every question instead of only the first.
    """
    question = "((system.text + content) | trim)" if trim else "(system.text + content)"
    answer = "(content | trim)" if trim else "content"
    return _turns(
        before="{%- set system = namespace(text='') -%}" + ("" if each else "{{- bos_token -}}"),
        user=_write(*(["bos_token"] if each else []), repr("[INST] "), question, repr(" [/INST]"))
        + "{%- set system.text = '' -%}",
        assistant=_write(repr(" "), answer, repr(answer_end), "eos_token"),
        system="{%- set system.text = " + f"{system[0]!r} + content + {system[1]!r}" + " -%}",
    )


def plain(*, bos: bool) -> str:
    """Returns a template for base models without a chat format: turns start with ``User:`` or ``Assistant:``.

    These names are ordinary text, so a user can type text that looks like the next turn. With ``bos``, the
    beginning-of-sequence token comes first.
    """
    return _turns(
        before="{{- bos_token -}}" if bos else "",
        user=_write(repr("User:\n"), "content", repr("\n\n")),
        assistant=_write(repr("Assistant:\n"), "content", "eos_token"),
        system=_write("content", repr("\n\n")),
        prompt=_write(repr("Assistant:\n")),
    )


_LLAMA3 = _headed("<|start_header_id|>ROLE<|end_header_id|>\n\n", "<|eot_id|>", bos=True, trim=True)
_LLAMA2 = _bracketed(answer_end=" ", system=("<<SYS>>\n", "\n<</SYS>>\n\n"), each=True, trim=True)
_MISTRAL = _bracketed(answer_end="", system=("", "\n\n"), each=False, trim=False)
_QWEN = _headed("<|im_start|>ROLE\n", "<|im_end|>\n", bos=False)
_PHI3 = _headed("<|ROLE|>\n", "<|end|>\n", bos=False)

FAMILIES: tuple[Family, ...] = (
    Family("Llama 3", ("llama",), ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"), _LLAMA3),
    Family("Qwen", ("qwen2", "qwen2_moe", "qwen3", "qwen3_moe"), ("<|im_start|>", "<|im_end|>"), _QWEN),
    Family("Gemma", ("gemma", "gemma2", "gemma3", "gemma3_text"), ("<start_of_turn>", "<end_of_turn>"), _gemma()),
    Family("Phi-3", ("phi3",), ("<|user|>", "<|assistant|>", "<|end|>"), _PHI3),
    Family("Mistral", ("mistral", "mixtral"), ("[INST]", "[/INST]"), _MISTRAL),
    Family("Mistral", ("mistral", "mixtral"), ("<s>", "</s>"), _MISTRAL, unambiguous=False),
    Family("Llama 2", ("llama",), ("<s>", "</s>"), _LLAMA2, unambiguous=False),
)
"""The supported families; those with ``unambiguous`` set come first."""


def likely(has_token: Callable[[str], bool], model_type: str | None) -> Family | None:
    """Returns the first family with this ``model_type`` whose control tokens are all in the vocabulary.

    If there is none, returns the first family that these tokens identify, or None.
    """
    present = [family for family in FAMILIES if all(map(has_token, family.tokens))]
    by_type = [family for family in present if model_type in family.model_types]
    return next(iter([*by_type, *(family for family in present if family.unambiguous)]), None)
