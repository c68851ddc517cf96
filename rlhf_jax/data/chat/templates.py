"""Chat templates with generation marks, for the model families that people fine-tune.

Published templates rarely mark the tokens of the assistant, so they cannot be used for training. The templates here
write the same text as the published ones of their family and put ``{% generation %}`` marks around every answer and the
token that ends it. They fix two things that published templates leave open, so that training and generation see the
same prompt: the date in Llama 3.1's system turn, and Qwen3's thoughts, which are empty.

A family has several forms (with or without a default system turn, with or without spaces around marks). The form of a
tokenizer is the one that writes the same text as its own template.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import Any

DATE = "26 Jul 2024"
"""The date that Llama's own templates write if the current date is not available."""

OPTIONS: Mapping[str, Any] = {"date_string": DATE, "enable_thinking": False}
"""Variables with which every template is rendered, including a tokenizer's own."""


@dataclasses.dataclass(frozen=True)
class Family:
    """A family of models, with the forms of its chat template; the first is the most common."""

    name: str
    model_types: tuple[str, ...]
    tokens: tuple[str, ...]
    """Control tokens that the templates need."""
    forms: tuple[str, ...]
    unambiguous: bool = True
    """Whether the control tokens alone identify the family; if not, a tokenizer may need a different template."""


def _turns(*, before: str = "", user: str, assistant: str, system: str, prompt: str = "") -> str:
    """Returns a template that writes the turns in order; the arguments are the template's bodies for each role."""
    return (
        f"{before}{{%- for message in messages -%}}"
        "{%- set content = message['content'] -%}"
        f"{{%- if message['role'] == 'user' -%}}{user}"
        f"{{%- elif message['role'] == 'assistant' -%}}{assistant}"
        f"{{%- elif message['role'] == 'system' -%}}{system}"
        "{%- else -%}{{ raise_exception('the role is system, user or assistant, not ' + message['role']) }}"
        "{%- endif -%}{%- endfor -%}" + (f"{{%- if add_generation_prompt -%}}{prompt}{{%- endif -%}}" if prompt else "")
    )


def _say(*parts: str) -> str:
    return "{{ " + " + ".join(parts) + " }}"


def _answer(*parts: str) -> str:
    return "{% generation %}" + _say(*parts) + "{% endgeneration %}"


def _headed(opening: str, ending: str, *, bos: bool, answers: str = "assistant", trim: bool = False) -> str:
    """Returns a template of turns that begin with their role: ``opening``, which contains ``ROLE``, text, ``ending``.

    The part of ``ending`` after ``|rest|`` is written by the template, not by the model.
    """
    stop, rest = ending.split("|rest|") if "|rest|" in ending else (ending, "")
    content = "(content | trim)" if trim else "content"

    def turn(role: str) -> str:
        return _say(repr(opening.replace("ROLE", role)), content, repr(stop + rest))

    answer_opening = repr(opening.replace("ROLE", answers))
    return _turns(
        before="{{- bos_token -}}" if bos else "",
        user=turn("user"),
        assistant=_say(answer_opening) + _answer(content, repr(stop)) + (_say(repr(rest)) if rest else ""),
        system=turn("system"),
        prompt=_say(answer_opening),
    )


def _with_system(template: str, text: str) -> str:
    """Adds a default system turn, for messages that start without one."""
    own = f"{{'role': 'system', 'content': {text!r}}}"
    return (
        "{%- if messages[0]['role'] != 'system' -%}"
        f"{{%- set messages = [{own}] + messages -%}}"
        "{%- endif -%}" + template
    )


def _chatml() -> Iterator[str]:
    plain = _headed("<|im_start|>ROLE\n", "<|im_end|>|rest|\n", bos=False)
    yield plain
    # Qwen3 without thinking: an empty thought precedes the last answer only.
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
    # The dates precede the text of the system turn, or form a separate system turn.
    content = f"({dated!r} + (content | trim))"
    head, tail = plain.split("message['role'] == 'system'")
    with_dates = head + "message['role'] == 'system'" + tail.replace("(content | trim)", content, 1)
    yield _with_system(with_dates, "")


def _gemma() -> Iterator[str]:
    """Yields a template without system turns: as in Gemma 3, the system text precedes the first question."""
    opening = "{{- bos_token -}}{%- set system = namespace(text='') -%}"
    question = _say(repr("<start_of_turn>user\n"), "system.text", "(content | trim)", repr("<end_of_turn>\n"))
    answer_opening = _say(repr("<start_of_turn>model\n"))
    yield _turns(
        before=opening,
        user=question + "{%- set system.text = '' -%}",
        assistant=answer_opening + _answer("(content | trim)", repr("<end_of_turn>")) + _say(repr("\n")),
        system="{%- set system.text = content + " + repr("\n\n") + " -%}",
        prompt=answer_opening,
    )


def _phi3() -> Iterator[str]:
    for bos in (False, True):
        yield _headed("<|ROLE|>\n", "<|end|>|rest|\n", bos=bos)


def _bracketed(
    *, question: tuple[str, str], answer: tuple[str, str, str], system: tuple[str, str], each: bool, trim: bool
) -> str:
    """Returns a template with questions between brackets, and the system text before the first question.

    ``question``, ``answer`` and ``system`` hold the strings before and after a text; the third of ``answer`` follows
    the end token. ``each`` writes the beginning-of-sequence token before every question, not only before the first.
    """
    question_text = "((system.text + content) | trim)" if trim else "(system.text + content)"
    answer_text = "(content | trim)" if trim else "content"
    return _turns(
        before="{%- set system = namespace(text='') -%}" + ("" if each else "{{- bos_token -}}"),
        user=_say(*(["bos_token"] if each else []), repr(question[0]), question_text, repr(question[1]))
        + "{%- set system.text = '' -%}",
        assistant=_answer(repr(answer[0]), answer_text, repr(answer[1]), "eos_token") + _say(repr(answer[2])),
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
    """Returns a template for base models without a chat format: ``User:`` and ``Assistant:`` start paragraphs.

    The names are ordinary text, so a user can write text that looks like the next turn. ``bos`` adds the
    beginning-of-sequence token at the start.
    """
    return _turns(
        before="{{- bos_token -}}" if bos else "",
        user=_say(repr("User:\n"), "content", repr("\n\n")),
        assistant=_say(repr("Assistant:\n")) + _answer("content", "eos_token"),
        system=_say("content", repr("\n\n")),
        prompt=_say(repr("Assistant:\n")),
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
"""Families that can be identified by their control tokens come first."""


def candidates(has_token: Callable[[str], bool]) -> list[Family]:
    """Returns the families whose control tokens the tokenizer has."""
    return [family for family in FAMILIES if all(map(has_token, family.tokens))]


def likely(has_token: Callable[[str], bool], model_type: str | None) -> Family | None:
    """Returns the family of ``model_type`` if its tokens are present, else the one its tokens identify, else None."""
    present = candidates(has_token)
    by_type = [family for family in present if model_type in family.model_types]
    return next(iter([*by_type, *(family for family in present if family.unambiguous)]), None)
