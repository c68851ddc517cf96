"""Rendering of chat templates, and the parts of a rendering that the assistant writes.

A template renders a list of messages as text. This module finds the *span* of each answer in that text: from the end of
the prompt to which the model replies, through the token that ends the answer. It compares renderings and makes no
assumption about what a template writes:

- The prompt of an answer is the rendering of the messages before it, with the *generation prompt*, which begins an
  answer. If the text starts with it, the answer starts at its end.
- The rendering of the messages up to the answer contains the end of the answer.
- Some templates write earlier answers differently from the last one; Qwen3's, for example, removes their thoughts. Then
  one of the two renderings is not a prefix of the text, and a message is located by rendering the messages again with
  another text in its place.

If a template has *generation marks*, ``{% generation %}`` and ``{% endgeneration %}``, the spans are the marked parts.
"""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Mapping, Sequence
from typing import Any

from rlhf_jax.data import errors

MARKED = re.compile(r"\{%[-+]?\s*generation\s*[-+]?%\}")
"""Matches ``{% generation %}``."""
PROBE = "\ue000"
"""A text that no template writes itself: a character of the private use area."""

Message = Mapping[str, Any]
Span = tuple[int, int]


@dataclasses.dataclass(frozen=True)
class Renderer:
    """A chat template, with the values of its variables."""

    template: str
    variables: Mapping[str, Any]
    """Special tokens of the tokenizer, and the date."""

    def render(self, messages: Sequence[Message], *, tools: Sequence[Mapping[str, Any]] = (), prompt: bool) -> str:
        """Returns the messages as text, followed by the generation prompt if ``prompt`` is set.

        Raises:
            DataError: If the template rejects the messages.
        """
        return self._render(messages, tools, prompt, marks=False)[0]

    def marked_spans(self, messages: Sequence[Message], *, tools: Sequence[Mapping[str, Any]] = ()) -> list[Span]:
        """Returns the parts of the text inside the generation marks, in order."""
        return self._render(messages, tools, False, marks=True)[1]

    def _render(
        self, messages: Sequence[Message], tools: Sequence[Mapping[str, Any]], prompt: bool, *, marks: bool
    ) -> tuple[str, list[Span]]:
        from transformers.utils import chat_template_utils

        try:
            rendered: Any = chat_template_utils.render_jinja_template(
                conversations=[[dict(message) for message in messages]],
                tools=[dict(tool) for tool in tools] or None,
                chat_template=self.template,
                add_generation_prompt=prompt,
                return_assistant_tokens_mask=marks,
                **self.variables,
            )
        # A template is a program; what it raises for unexpected messages is not limited to errors of Jinja.
        except Exception as error:
            raise errors.DataError(f"the chat template rejects the turns: {error}") from error
        (text,), spans = rendered
        return text, [span for group in spans for span in group]


@dataclasses.dataclass(frozen=True)
class Ending:
    """How a template ends answers."""

    stop: str
    """Spelling of the token that ends an answer."""
    text: str
    """What follows the text of an answer, up to and including ``stop``."""


def answer_spans(
    renderer: Renderer,
    ending: Ending,
    messages: Sequence[Message],
    answers: Sequence[int],
    *,
    tools: Sequence[Mapping[str, Any]] = (),
) -> tuple[str, list[Span]]:
    """Returns the rendering of messages, and the spans of some answers in it.

    Args:
        renderer: The template.
        ending: How it ends answers.
        messages: The messages.
        answers: Indices of the messages whose spans to find; they must be the assistant's.
        tools: Descriptions of tools, for the template.

    Returns:
        ``(text, spans)``; each span is ``(start, end)``, from the end of the prompt through the stop token.

    Raises:
        DataError: If the template rejects the messages, or its rendering does not determine a span.
    """
    text = renderer.render(messages, tools=tools, prompt=False)
    if MARKED.search(renderer.template):
        spans = renderer.marked_spans(messages, tools=tools)
        marked = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
        if len(spans) != len(marked):
            raise errors.DataError(
                f"the chat template marks {len(spans)} parts of a dialogue with {len(marked)} answers"
            )
        of_answer = dict(zip(marked, spans))
        return text, [_up_to_stop(text, of_answer[i], ending) for i in answers]
    views = _Views(renderer, messages, tools, text)
    return text, [(views.start(i), views.end(i, ending)) for i in answers]


def find_ending(renderer: Renderer, is_token: re.Pattern[str], *, messages: Sequence[Message]) -> Ending | None:
    """Returns how the answer ends whose text is ``PROBE``: at the first token after it. None if no token follows it."""
    text = renderer.render(messages, prompt=False)
    if text.count(PROBE) != 1:
        raise errors.DataError(f"the chat template writes the text of an answer {text.count(PROBE)} times, not once")
    rest = text[text.index(PROBE) + len(PROBE) :]
    found = is_token.search(rest)
    return None if found is None else Ending(stop=found[0], text=rest[: found.end()])


def _up_to_stop(text: str, span: Span, ending: Ending) -> Span:
    start, end = span
    stop = text.rfind(ending.stop, start, end)
    if stop < 0:
        raise errors.DataError(
            "the generation marks of the chat template exclude the end of an answer from the loss: put the token "
            f"{ending.stop!r} after the assistant's text and before {{% endgeneration %}}"
        )
    return start, stop + len(ending.stop)


@dataclasses.dataclass(frozen=True)
class _Views:
    """A rendering of messages, compared with renderings of parts of them."""

    renderer: Renderer
    messages: Sequence[Message]
    tools: Sequence[Mapping[str, Any]]
    text: str

    def start(self, i: int) -> int:
        """Returns where the answer ``i`` starts in the text."""
        prompt = self._render(self.messages[:i], prompt=True)
        if self.text.startswith(prompt):
            return len(prompt)
        if i == 0:
            raise self._undetermined(i)
        # What follows the previous message in the prompt, such as the header of an answer, also follows it here, as far
        # as the template writes it.
        after = prompt[self._content(prompt, self.messages[:i], i - 1, prompt=True)[1] :]
        previous_end = self._content(self.text, self.messages, i - 1)[1]
        shared = len(os.path.commonprefix([self.text[previous_end:], after]))
        start = previous_end + shared
        if shared != len(after) and start != self._content(self.text, self.messages, i)[0]:
            raise self._undetermined(i)
        return start

    def end(self, i: int, ending: Ending) -> int:
        """Returns where the answer ``i`` ends in the text, after its stop token."""
        upto = self.text if i == len(self.messages) - 1 else self._render(self.messages[: i + 1], prompt=False)
        end = upto.rfind(ending.stop) + len(ending.stop)
        if ending.stop in upto and self.text.startswith(upto[:end]):
            return end
        end = self._content(self.text, self.messages, i)[1]
        if not self.text.startswith(ending.text, end):
            raise self._undetermined(i)
        return end + len(ending.text)

    def _content(self, text: str, messages: Sequence[Message], i: int, *, prompt: bool = False) -> Span:
        """Returns the part of ``text``, the rendering of ``messages``, that depends on the text of message ``i``."""
        changed = [message if j != i else {**message, "content": PROBE} for j, message in enumerate(messages)]
        other = self._render(changed, prompt=prompt)
        if other.count(PROBE) != 1:
            raise self._undetermined(i)
        before = len(os.path.commonprefix([text, other]))
        after = len(os.path.commonprefix([text[before:][::-1], other[before:][::-1]]))
        return before, len(text) - after

    def _render(self, messages: Sequence[Message], *, prompt: bool) -> str:
        return self.renderer.render(messages, tools=self.tools, prompt=prompt)

    def _undetermined(self, i: int) -> errors.DataError:
        return errors.DataError(
            f"the rendering of the chat template does not show where message {i + 1} starts and ends: put the "
            "assistant's text and its stop token between {% generation %} and {% endgeneration %} in the template"
        )
