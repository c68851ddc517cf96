"""Chat templates with generation marks, for common model families.

Most published templates do not mark the tokens of the assistant, so they cannot be used for training. The templates in
this module write the same text as the published templates of their family, with ``{% generation %}`` marks around every
answer and the token that ends it. Two parts of the text are fixed so that training and generation use the same prompt:
Llama 3.1's system turn always contains the same date, and Qwen3's thinking block is always empty.

The templates of a family can have several forms, for example with or without a default system turn, or with different
spaces. If a tokenizer's own template has no marks, `chat.chat_format` replaces it with the form that writes two sample
prompts in the same way. If no form does, it uses the first form of the family, provided that the control tokens
identify the family. For a tokenizer without a template, it uses this form even if the model type is needed to identify
the family.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import Any

DATE = "26 Jul 2024"
"""The date that Llama's published templates write if the current date is not available."""

OPTIONS: Mapping[str, Any] = {"date_string": DATE, "enable_thinking": False}
"""Variables for rendering all templates, including a tokenizer's own template."""


@dataclasses.dataclass(frozen=True)
class Family:
    """A model family and the forms of its chat template; the first form is the most common."""

    name: str
    model_types: tuple[str, ...]
    tokens: tuple[str, ...]
    """Control tokens that the templates use."""
    forms: tuple[str, ...]
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


def _answer(*parts: str) -> str:
    return "{% generation %}" + _write(*parts) + "{% endgeneration %}"


def _headed(opening: str, ending: str, *, bos: bool, answers: str = "assistant", trim: bool = False) -> str:
    """Returns a template that writes each turn as ``opening``, the text and ``ending``.

    ``ROLE`` in ``opening`` is replaced by the role or, for the assistant, by ``answers``. If ``ending`` contains
    ``|rest|``, the part before it ends an answer, and the model does not generate the part after it.
    """
    stop, rest = ending.split("|rest|") if "|rest|" in ending else (ending, "")
    content = "(content | trim)" if trim else "content"

    def turn(role: str) -> str:
        return _write(repr(opening.replace("ROLE", role)), content, repr(stop + rest))

    answer_opening = repr(opening.replace("ROLE", answers))
    return _turns(
        before="{{- bos_token -}}" if bos else "",
        user=turn("user"),
        assistant=_write(answer_opening) + _answer(content, repr(stop)) + (_write(repr(rest)) if rest else ""),
        system=turn("system"),
        prompt=_write(answer_opening),
    )


def _with_system(template: str, text: str) -> str:
    """Returns a template that adds a default system turn if the messages do not start with one."""
    own = f"{{'role': 'system', 'content': {text!r}}}"
    return (
        "{%- if messages[0]['role'] != 'system' -%}"
        f"{{%- set messages = [{own}] + messages -%}}"
        "{%- endif -%}" + template
    )


def _chatml() -> Iterator[str]:
    plain = _headed("<|im_start|>ROLE\n", "<|im_end|>|rest|\n", bos=False)
    yield plain
    # In Qwen3 without thinking, an empty thinking block precedes only the last answer.
    empty = "<think>\n\n</think>\n\n"
    opening = "<|im_start|>assistant\n"
    last = f"{{{{ {opening!r} }}}}{{%- if loop.last -%}}{{{{ {empty!r} }}}}{{%- endif -%}}"
    thinking = plain.replace(f"{{{{ {opening!r} }}}}{{% generation %}}", last + "{% generation %}")
    yield thinking.replace(f"{{{{ {opening!r} }}}}{{%- endif -%}}", f"{{{{ {opening + empty!r} }}}}{{%- endif -%}}")
    for system in (
        "You are Qwen, created by Alibaba Cloud. You are a helpful assistant.",
        "You are a helpful assistant.",
        "You are a helpful assistant",
    ):
        yield _with_system(plain, system)


def _llama3() -> Iterator[str]:
    plain = _headed("<|start_header_id|>ROLE<|end_header_id|>\n\n", "<|eot_id|>", bos=True, trim=True)
    yield plain
    dated = f"Cutting Knowledge Date: December 2023\nToday Date: {DATE}\n\n"
    # The dates precede the text of the system turn; without a system turn, they form one.
    content = f"({dated!r} + (content | trim))"
    head, tail = plain.split("message['role'] == 'system'")
    with_dates = head + "message['role'] == 'system'" + tail.replace("(content | trim)", content, 1)
    yield _with_system(with_dates, "")


def _gemma() -> Iterator[str]:
    """Yields a template that writes the system text before the first question, as in Gemma 3."""
    opening = "{{- bos_token -}}{%- set system = namespace(text='') -%}"
    question = _write(repr("<start_of_turn>user\n"), "system.text", "(content | trim)", repr("<end_of_turn>\n"))
    answer_opening = _write(repr("<start_of_turn>model\n"))
    yield _turns(
        before=opening,
        user=question + "{%- set system.text = '' -%}",
        assistant=answer_opening + _answer("(content | trim)", repr("<end_of_turn>")) + _write(repr("\n")),
        system="{%- set system.text = content + " + repr("\n\n") + " -%}",
        prompt=answer_opening,
    )


def _phi3() -> Iterator[str]:
    for bos in (False, True):
        yield _headed("<|ROLE|>\n", "<|end|>|rest|\n", bos=bos)


def _bracketed(
    *, question: tuple[str, str], answer: tuple[str, str, str], system: tuple[str, str], each: bool, trim: bool
) -> str:
    """Returns a template that writes questions in brackets, and the system text before the first question.

    ``question``, ``answer`` and ``system`` contain the strings before and after the text. The third string of
    ``answer`` follows the end token. With ``each``, the beginning-of-sequence token precedes every question instead of
    only the first.
    """
    question_text = "((system.text + content) | trim)" if trim else "(system.text + content)"
    answer_text = "(content | trim)" if trim else "content"
    return _turns(
        before="{%- set system = namespace(text='') -%}" + ("" if each else "{{- bos_token -}}"),
        user=_write(*(["bos_token"] if each else []), repr(question[0]), question_text, repr(question[1]))
        + "{%- set system.text = '' -%}",
        assistant=_answer(repr(answer[0]), answer_text, repr(answer[1]), "eos_token") + _write(repr(answer[2])),
        system="{%- set system.text = " + f"{system[0]!r} + content + {system[1]!r}" + " -%}",
    )


def _llama2() -> Iterator[str]:
    yield _bracketed(
        question=("[INST] ", " [/INST]"),
        answer=(" ", " ", ""),
        system=("<<SYS>>\n", "\n<</SYS>>\n\n"),
        each=True,
        trim=True,
    )


def _mistral() -> Iterator[str]:
    for before, after, *answer in (
        ("[INST] ", " [/INST]", " ", "", ""),
        ("[INST] ", " [/INST]", "", "", ""),
        ("[INST] ", " [/INST]", "", "", " "),
        ("[INST] ", "[/INST]", " ", "", ""),
        (" [INST] ", " [/INST]", " ", "", ""),
        ("[INST]", "[/INST]", "", "", ""),
    ):
        first, second, third = answer
        yield _bracketed(
            question=(before, after), answer=(first, second, third), system=("", "\n\n"), each=False, trim=False
        )


def plain(*, bos: bool) -> str:
    """Returns a template for base models without a chat format: turns start with ``User:`` or ``Assistant:``.

    These names are ordinary text, so a user can type text that looks like the next turn. With ``bos``, the
    beginning-of-sequence token comes first.
    """
    return _turns(
        before="{{- bos_token -}}" if bos else "",
        user=_write(repr("User:\n"), "content", repr("\n\n")),
        assistant=_write(repr("Assistant:\n")) + _answer("content", "eos_token"),
        system=_write("content", repr("\n\n")),
        prompt=_write(repr("Assistant:\n")),
    )


FAMILIES: tuple[Family, ...] = (
    Family("Llama 3", ("llama",), ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"), tuple(_llama3())),
    Family(
        "Qwen",
        ("qwen2", "qwen2_moe", "qwen3", "qwen3_moe"),
        ("<|im_start|>", "<|im_end|>"),
        tuple(_chatml()),
    ),
    Family(
        "Gemma",
        ("gemma", "gemma2", "gemma3", "gemma3_text"),
        ("<start_of_turn>", "<end_of_turn>"),
        tuple(_gemma()),
    ),
    Family("Phi-3", ("phi3",), ("<|user|>", "<|assistant|>", "<|end|>"), tuple(_phi3())),
    Family("Mistral", ("mistral", "mixtral"), ("[INST]", "[/INST]"), tuple(_mistral())),
    Family("Mistral", ("mistral", "mixtral"), ("<s>", "</s>"), tuple(_mistral()), unambiguous=False),
    Family("Llama 2", ("llama",), ("<s>", "</s>"), tuple(_llama2()), unambiguous=False),
    Family("Zephyr", (), ("</s>",), (_headed("<|ROLE|>\n", "</s>|rest|\n", bos=False),), unambiguous=False),
)
"""The supported families; those with ``unambiguous`` set come first."""


def candidates(has_token: Callable[[str], bool]) -> list[Family]:
    """Returns the families whose control tokens are all in the tokenizer's vocabulary."""
    return [family for family in FAMILIES if all(map(has_token, family.tokens))]


def likely(has_token: Callable[[str], bool], model_type: str | None) -> Family | None:
    """Returns the first of the `candidates` with this ``model_type``, else the first unambiguous one, else None."""
    present = candidates(has_token)
    by_type = [family for family in present if model_type in family.model_types]
    return next(iter([*by_type, *(family for family in present if family.unambiguous)]), None)
