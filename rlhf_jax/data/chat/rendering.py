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
    """Special tokens of the tokenizer."""

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
        import jinja2
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
        except jinja2.TemplateSyntaxError as error:
            raise errors.DataError(f"the chat template is not valid Jinja: line {error.lineno}: {error}") from error
        # A template is a program; what it raises for unexpected messages is not limited to errors of Jinja.
        except Exception as error:
            raise errors.DataError(f"the chat template rejects the turns: {error}") from error
        (text,), spans = rendered
        return text, [span for group in spans for span in group]


def answer_spans(
    renderer: Renderer,
    messages: Sequence[Message],
    answers: Sequence[int],
    *,
    stop: str,
    tools: Sequence[Mapping[str, Any]] = (),
    prompts: Mapping[int, str] | None = None,
) -> tuple[str, list[Span]]:
    """Returns the rendering of messages, and the spans of some answers in it.

    Args:
        renderer: The template.
        messages: The messages.
        answers: Indices of the messages whose spans to find; they must be the assistant's.
        stop: Spelling of the token that ends answers.
        tools: Descriptions of tools, for the template.
        prompts: Renderings of the prompts of answers, if they are known, by the index of the answer.

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
        return text, [_up_to_stop(text, of_answer[i], stop) for i in answers]
    views = _Views(renderer, messages, tools, text, prompts or {})
    return text, [(views.start(i), views.end(i, stop)) for i in answers]


def find_stop(renderer: Renderer, token: re.Pattern[str], *, messages: Sequence[Message]) -> str | None:
    """Returns the first match of ``token`` after the message whose text is ``PROBE``, or None."""
    text = renderer.render(messages, prompt=False)
    if text.count(PROBE) != 1:
        raise errors.DataError(f"the chat template writes the text of an answer {text.count(PROBE)} times, not once")
    found = token.search(text, text.index(PROBE))
    return None if found is None else found[0]


def _up_to_stop(text: str, span: Span, stop: str) -> Span:
    start, end = span
    place = text.rfind(stop, start, end)
    if place < 0:
        raise errors.DataError(
            "the generation marks of the chat template exclude the end of an answer from the loss: put the token "
            f"{stop!r} after the assistant's text and before {{% endgeneration %}}"
        )
    return start, place + len(stop)


def _common(a: Sequence[Any], b: Sequence[Any]) -> int:
    """Returns the length of the longest common prefix."""
    return next((n for n, (x, y) in enumerate(zip(a, b)) if x != y), min(len(a), len(b)))


@dataclasses.dataclass(frozen=True)
class _Views:
    """A rendering of messages, compared with renderings of parts of them."""

    renderer: Renderer
    messages: Sequence[Message]
    tools: Sequence[Mapping[str, Any]]
    text: str
    prompts: Mapping[int, str]

    def start(self, i: int) -> int:
        """Returns where the answer ``i`` starts in the text."""
        prompt = self.prompts[i] if i in self.prompts else self._render(self.messages[:i], prompt=True)
        if self.text.startswith(prompt):
            return len(prompt)
        if i == len(self.messages) - 1:
            n = _common(self.text, prompt)
            raise errors.DataError(
                "the chat template does not write the last answer after its generation prompt, which ends in "
                f"{prompt[n:]!r} where the dialogue has {self.text[n : n + 20]!r}: an option of the template may "
                "contradict the data"
            )
        if i == 0:
            raise self._undetermined(i)
        # What follows the previous message in the prompt, such as the header of an answer, also follows it here, as far
        # as the template writes it.
        after = prompt[self._content(prompt, self.messages[:i], i - 1, prompt=True)[1] :]
        previous_end = self._content(self.text, self.messages, i - 1)[1]
        shared = _common(self.text[previous_end:], after)
        if shared == len(after):
            return previous_end + shared
        content_start = self._content(self.text, self.messages, i)[0]
        if previous_end + shared < content_start:
            raise self._undetermined(i)
        return content_start

    def end(self, i: int, stop: str) -> int:
        """Returns where the answer ``i`` ends in the text, after its stop token."""
        upto = self.text if i == len(self.messages) - 1 else self._render(self.messages[: i + 1], prompt=False)
        end = upto.rfind(stop) + len(stop)
        if stop in upto and self.text.startswith(upto[:end]):
            return end
        # The first stop token after the text of the answer ends it; other parts, such as tool calls, may come between.
        place = self.text.find(stop, self._content(self.text, self.messages, i)[1])
        end = place + len(stop)
        if place < 0 or end > self._content(self.text, self.messages, i + 1)[0]:
            raise self._undetermined(i)
        return end

    def _content(self, text: str, messages: Sequence[Message], i: int, *, prompt: bool = False) -> Span:
        """Returns the part of ``text``, the rendering of ``messages``, that depends on the text of message ``i``."""
        changed = [message if j != i else {**message, "content": PROBE} for j, message in enumerate(messages)]
        other = self._render(changed, prompt=prompt)
        if other.count(PROBE) != 1:
            raise self._undetermined(i)
        before = _common(text, other)
        after = _common(text[before:][::-1], other[before:][::-1])
        return before, len(text) - after

    def _render(self, messages: Sequence[Message], *, prompt: bool) -> str:
        return self.renderer.render(messages, tools=self.tools, prompt=prompt)

    def _undetermined(self, i: int) -> errors.DataError:
        return errors.DataError(
            f"the rendering of the chat template does not show where message {i + 1} starts and ends: put the "
            "assistant's text and its stop token between {% generation %} and {% endgeneration %} in the template"
        )
