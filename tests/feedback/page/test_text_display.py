"""Texts on the labelling page: nothing is executed, and nothing is hidden."""

import hypothesis
import pytest
from hypothesis import strategies as st

from rlhf_jax.feedback import judgements
from rlhf_jax.feedback.page import answer_forms, text_display


@hypothesis.given(st.text())
def test_markup_of_a_text_is_escaped_and_control_characters_are_shown(text):
    shown = text_display.visible(text)
    rest = shown.replace('<span class="control">', "").replace("</span>", "")
    assert not set(rest) & set("<>\"'\x1b\x00\u202e\u2066")
    ordinary = "".join(c for c in text.replace("\r\n", "\n") if c.isprintable() or c in "\n\t")
    if ordinary == text:
        assert shown.unescape() == text


def test_the_names_of_hidden_characters_are_shown():
    assert text_display.visible("a\x1b[31m\u202eb") == (
        'a<span class="control">U+001B</span>[31m<span class="control">U+202E</span>b'
    )
    joined = "👩\u200d👩\u200d👧 \u200fשלום é"
    assert text_display.visible(joined) == joined


def test_fences_separate_code_from_prose():
    text = "Before\n```python\nif a < b:\n    pass\n```\nAfter\n~~~\nopen"
    assert [(each.is_code, str(each.text)) for each in text_display.parts(text)] == [
        (False, "Before\n"),
        (True, "if a &lt; b:\n    pass\n"),
        (False, "After\n"),
        (True, "open"),
    ]
    assert [each.text for each in text_display.parts("")] == [""]


def test_other_keys_of_a_message_are_shown_as_json():
    message = {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "f<b>"}}]}
    shown = text_display.parts(text_display.content(message))
    assert [each.is_code for each in shown] == [True]
    assert "tool_calls" in shown[0].text and "f&lt;b&gt;" in shown[0].text


ANSWERS = [
    (judgements.PAIR, 2, {"answer": "3"}, judgements.Judgement(strength=3)),
    (
        judgements.PAIR,
        2,
        {"answer": "tie", "comment": " both\r\nbad "},
        judgements.Judgement(tie=True, comment="both\nbad"),
    ),
    (judgements.PAIR, 2, {"answer": "unsure", "seconds": "2.5"}, judgements.Judgement(unsure=True, seconds=2.5)),
    (judgements.PAIR, 2, {"answer": "8", "seconds": "nan"}, judgements.Judgement(strength=8)),
    (judgements.PAIR, 2, {"answer": "8", "seconds": "1e9"}, judgements.Judgement(strength=8, seconds=86400.0)),
    (
        judgements.RANKING,
        3,
        {"rank-0": "2", "rank-1": "1", "rank-2": "2", "answer": ""},
        judgements.Judgement(ranks=(2, 1, 2)),
    ),
    (judgements.RANKING, 3, {"answer": "unsure", "rank-0": "", "rank-1": ""}, judgements.Judgement(unsure=True)),
    (
        judgements.LIKERT,
        1,
        {"answer": "7", "hallucination": "yes", "sexual_content": "no"},
        judgements.Judgement(rating=7, flags={name: name == "hallucination" for name in judgements.FLAGS}),
    ),
    (judgements.LIKERT, 1, {"answer": "unsure", "hallucination": "yes"}, judgements.Judgement(unsure=True)),
]


@pytest.mark.parametrize(("kind", "n", "form", "said"), ANSWERS)
def test_a_form_means_one_judgement(kind, n, form, said):
    assert answer_forms.judgement(form, kind=kind, n=n) == said
    assert answer_forms.judgement(answer_forms.values(said) | {"seconds": str(said.seconds)}, kind=kind, n=n) == said


@pytest.mark.parametrize(
    ("kind", "n", "form", "message"),
    [
        (judgements.PAIR, 2, {}, "The preference is missing"),
        (judgements.PAIR, 2, {"answer": "0"}, "from 1 to 8"),
        (judgements.PAIR, 2, {"answer": "9"}, "from 1 to 8"),
        (judgements.PAIR, 2, {"answer": "1.0"}, "from 1 to 8"),
        (judgements.PAIR, 2, {"answer": "١"}, "from 1 to 8"),
        (judgements.PAIR, 2, {"answer": "1", "comment": "x" * 10_001}, "at most 10000"),
        (judgements.RANKING, 3, {"rank-0": "1", "rank-1": "2"}, "The rank of answer C is missing"),
        (judgements.RANKING, 3, {"rank-0": "1", "rank-1": "2", "rank-2": "4"}, "from 1 to 3"),
        (judgements.RANKING, 3, {"answer": "unsure", "rank-1": "2"}, "not both"),
        (judgements.RANKING, 3, {"answer": "tie"}, "exactly one of ranks, unsure"),
        (judgements.LIKERT, 1, {"answer": "8"}, "from 1 to 7"),
        (judgements.LIKERT, 1, {"answer": "tie"}, "exactly one of rating, unsure"),
    ],
)
def test_a_form_that_is_no_answer_is_refused(kind, n, form, message):
    with pytest.raises(ValueError, match=message):
        answer_forms.judgement(form, kind=kind, n=n)
