"""Chat templates that a model can be trained with, for the families that people start from.

Published templates rarely say which tokens the assistant speaks, so nothing can be learnt from them alone. The ones
here write what their family's published ones write and put ``{% generation %}`` marks around every answer, the token
that ends the turn inside them. Two things are fixed that published ones leave open, so that training and generation see
the same prompt: the date in Llama 3.1's system turn, and Qwen3's thoughts, which are empty.

A family has several forms (with or without a system turn of its own, with or without spaces around marks). Which one
a tokenizer means shows in what its own template writes.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import Any

DATE = "26 Jul 2024"
"""What Llama's own templates fall back to where they cannot ask for the date."""

OPTIONS: Mapping[str, Any] = {"date_string": DATE, "enable_thinking": False}
"""What every template is rendered with, the tokenizer's own too."""


@dataclasses.dataclass(frozen=True)
class Family:
    """A family of models with one way to write a chat, in its forms; the first form is the usual one."""

    name: str
    model_types: tuple[str, ...]
    tokens: tuple[str, ...]
    """Control tokens that it cannot do without."""
    forms: tuple[str, ...]
    telling: bool = True
    """Whether the tokens alone tell the family; where they do not, another template may be meant."""


def _turns(*, before: str = "", user: str, assistant: str, system: str, prompt: str = "") -> str:
    """A template that writes one turn after the other; each argument is what stands between its tags."""
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
    """Turns that all begin with their role: ``opening`` with ``ROLE`` in it, the text, and ``ending``.

    What follows the first token of ``ending`` is written by the template, not by the model.
    """
    stop, rest = ending.split("|rest|") if "|rest|" in ending else (ending, "")
    content = "(content | trim)" if trim else "content"

    def turn(role: str) -> str:
        return _say(repr(opening.replace("ROLE", role)), content, repr(stop + rest))

    asked = repr(opening.replace("ROLE", answers))
    return _turns(
        before="{{- bos_token -}}" if bos else "",
        user=turn("user"),
        assistant=_say(asked) + _answer(content, repr(stop)) + (_say(repr(rest)) if rest else ""),
        system=turn("system"),
        prompt=_say(asked),
    )


def _with_system(template: str, text: str) -> str:
    """The template with a system turn of its own where the messages bring none."""
    own = f"{{'role': 'system', 'content': {text!r}}}"
    return (
        "{%- if messages[0]['role'] != 'system' -%}"
        f"{{%- set messages = [{own}] + messages -%}}"
        "{%- endif -%}" + template
    )


def _chatml() -> Iterator[str]:
    plain = _headed("<|im_start|>ROLE\n", "<|im_end|>|rest|\n", bos=False)
    yield plain
    # Qwen3 with its thoughts switched off: the empty thought stands before the last answer and in no other.
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
    # The dates stand before the system turn's text, in a turn of their own where there is none.
    content = f"({dated!r} + (content | trim))"
    head, tail = plain.split("message['role'] == 'system'")
    with_dates = head + "message['role'] == 'system'" + tail.replace("(content | trim)", content, 1)
    yield _with_system(with_dates, "")


def _gemma() -> Iterator[str]:
    """Gemma has no system turn: Gemma 3 writes its text before the first question."""
    opening = "{{- bos_token -}}{%- set system = namespace(text='') -%}"
    asked = _say(repr("<start_of_turn>user\n"), "system.text", "(content | trim)", repr("<end_of_turn>\n"))
    told = _say(repr("<start_of_turn>model\n"))
    yield _turns(
        before=opening,
        user=asked + "{%- set system.text = '' -%}",
        assistant=told + _answer("(content | trim)", repr("<end_of_turn>")) + _say(repr("\n")),
        system="{%- set system.text = content + " + repr("\n\n") + " -%}",
        prompt=told,
    )


def _phi3() -> Iterator[str]:
    for bos in (False, True):
        yield _headed("<|ROLE|>\n", "<|end|>|rest|\n", bos=bos)


def _bracketed(
    *, question: tuple[str, str], answer: tuple[str, str, str], system: tuple[str, str], each: bool, trim: bool
) -> str:
    """Questions between brackets, nothing before an answer; the system text in front of the first question.

    The pairs stand around the text, the third of ``answer`` behind the end token; ``each``: the first token stands
    before every question, not only the first.
    """
    asked = "((system.text + content) | trim)" if trim else "(system.text + content)"
    said = "(content | trim)" if trim else "content"
    return _turns(
        before="{%- set system = namespace(text='') -%}" + ("" if each else "{{- bos_token -}}"),
        user=_say(*(["bos_token"] if each else []), repr(question[0]), asked, repr(question[1]))
        + "{%- set system.text = '' -%}",
        assistant=_answer(repr(answer[0]), said, repr(answer[1]), "eos_token") + _say(repr(answer[2])),
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
    for before, behind, *answer in (
        ("[INST] ", " [/INST]", " ", "", ""),
        ("[INST] ", " [/INST]", "", "", ""),
        ("[INST] ", " [/INST]", "", "", " "),
        ("[INST] ", "[/INST]", " ", "", ""),
        (" [INST] ", " [/INST]", " ", "", ""),
        ("[INST]", "[/INST]", "", "", ""),
    ):
        first, second, third = answer
        yield _bracketed(
            question=(before, behind), answer=(first, second, third), system=("", "\n\n"), each=False, trim=False
        )


def plain(*, bos: bool) -> str:
    """For base models that know no chat: names at the start of a paragraph, the end token behind an answer.

    The names are ordinary text, so here a user can write what reads like the next turn.
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
    Family("Mistral", ("mistral", "mixtral"), ("<s>", "</s>"), tuple(_mistral()), telling=False),
    Family("Llama 2", ("llama",), ("<s>", "</s>"), tuple(_llama2()), telling=False),
    Family("Zephyr", (), ("</s>",), (_headed("<|ROLE|>\n", "</s>|rest|\n", bos=False),), telling=False),
)
"""Those that a tokenizer's tokens tell apart come first."""


def candidates(has_token: Callable[[str], bool]) -> list[Family]:
    """The families whose control tokens are all there."""
    return [family for family in FAMILIES if all(map(has_token, family.tokens))]


def likely(has_token: Callable[[str], bool], model_type: str | None) -> Family | None:
    """The family by ``model_type`` if its tokens are there, else by the tokens alone; None if they tell nothing."""
    there = candidates(has_token)
    by_type = [family for family in there if model_type in family.model_types]
    return next(iter([*by_type, *(family for family in there if family.telling)]), None)
