"""Texts at the boundaries of prompts and answers, and long prompts, which lose whole turns."""

import numpy as np
import pytest
from chat_cases import MAKERS, TURNS, A, S, Turn, U, format_of, hf, make_qwen, sentence_piece, shown
from hypothesis import given, settings
from hypothesis import strategies as st

from rlhf_jax.data import chat, errors, plain_text, tokenizers

CONTENTS = st.lists(
    st.one_of(
        st.text("ab the\n.?<|>_/s", max_size=8), st.sampled_from(["日本", "é", "👩‍🚀", "<|im_end|>", "</s>", "[INST]"])
    ),
    max_size=4,
).map("".join)


@pytest.mark.parametrize("name", MAKERS)
@settings(deadline=None, max_examples=25)
@given(contents=st.lists(CONTENTS, min_size=4, max_size=4))
def test_prompts_and_answers_make_up_the_dialogue(name, contents):
    fmt = format_of(name)
    turns = [Turn(role, text) for role, text in zip((U, A, U, A), contents)]
    ids, learnt = chat.encode_dialogue(fmt, turns)
    assert ids == hf(fmt.tokenizer, turns, None, prompt=False)
    prompt, answer = chat.encode_prompt(fmt, turns[:3]), chat.encode_answer(fmt, turns[:3], contents[3])
    assert prompt == hf(fmt.tokenizer, turns[:3], None) and answer[-1] == fmt.stop_ids[0]
    # Both parts decode to the whole, even if a token of the dialogue spans their boundary.
    assert shown(fmt, ids).startswith(shown(fmt, prompt + answer)) or name in ("llama", "mistral", "mistral3")
    if ids[: len(prompt)] == prompt:
        assert ids[: len(prompt + answer)] == prompt + answer
        assert learnt[len(prompt) :] == [True] * len(answer) + [False] * (len(ids) - len(prompt + answer))


def test_an_answer_is_encoded_separately_if_a_token_spans_its_start():
    tokenizer = make_qwen(words=("a\n\nb",))
    fmt = chat.chat_format(tokenizer)
    tokenizer = fmt.tokenizer
    newline, pair = ([tokenizer.convert_tokens_to_ids(token)] for token in ("Ċ", "ĊĊ"))
    prompt, answer = chat.encode_prompt(fmt, TURNS[:1]), chat.encode_answer(fmt, TURNS[:1], "\nso")
    assert prompt[-1:] == newline == answer[:1]
    turns = [TURNS[0], Turn(A, "\nso")]
    ids, learnt = chat.encode_dialogue(fmt, turns)
    assert ids == hf(tokenizer, turns, None, prompt=False)
    n = len(prompt)
    assert ids[n - 1 : n] == pair and learnt[n - 1 : n + 1] == [False, True]


def test_a_text_that_continues_another_has_no_prefix_space():
    for scheme in ("legacy", "first", "always", "never"):
        tokenizer = sentence_piece((), scheme=scheme)
        ids = plain_text.encode_continuation(tokenizer, "the in")
        assert tokenizer.convert_ids_to_tokens(ids) == ["the", "▁in"], scheme


def test_prefix_spaces_are_where_the_tokenizer_puts_them_in_the_whole_dialogue():
    for scheme in ("legacy", "first", "always", "never"):
        tokenizer = sentence_piece((), scheme=scheme)
        fmt = chat.chat_format(tokenizer, model_type="llama")
        turns = [Turn(U, "the in"), Turn(A, "in the"), Turn(U, "the")]
        assert chat.encode_prompt(fmt, turns) == hf(tokenizer, turns, fmt.template), scheme


# ----------------------------------------------------------------------------------------------------------- fitting


def test_long_prompts_lose_their_oldest_turns_and_keep_the_system_turn():
    fmt = format_of("qwen2")
    system = Turn(S, "Be brief.")
    whole, short = (system, *TURNS[:3]), (system, TURNS[2])
    n, m = (len(chat.encode_prompt(fmt, turns)) for turns in (whole, short))
    for width, expected in ((n, whole), (n - 1, short), (m, short)):
        counts = errors.DropCount()
        (ids,), kept = chat.encode_prompts(fmt, [whole], width=width, counts=counts)
        assert ids == chat.encode_prompt(fmt, expected) and kept.tolist() == [0]
        assert counts.truncated == ({} if expected is whole else {"prompt turns dropped": 1})
    counts = errors.DropCount(max_dropped=1.0)
    prompts = [whole, (system,), TURNS[:1], (*TURNS[:1], Turn("tool", "3"))]
    _, kept = chat.encode_prompts(fmt, prompts, width=m - 1, counts=counts)
    assert kept.tolist() == [2] and kept.dtype == np.int64
    assert counts.dropped == {"prompt too long": 1, "no user turn": 1, "refused by the chat template": 1}


def test_a_dialogue_must_end_in_an_answer_and_have_known_roles():
    fmt = format_of("llama3")
    with pytest.raises(errors.DataError, match="does not end in an assistant turn"):
        chat.encode_dialogue(fmt, TURNS[:3])
    with pytest.raises(
        errors.DataError, match="the chat template rejects the turns: the role is system, user or assistant, not tool"
    ):
        chat.encode_prompt(fmt, [Turn("tool", "3"), TURNS[0]])


def test_the_error_names_an_unknown_word():
    fmt = chat.chat_format(tokenizers.word_level(["the", "cat"]))
    with pytest.raises(errors.DataError, match="the word 'dog' is not in the tokenizer's vocabulary"):
        chat.encode_answer(fmt, [Turn(U, "cat")], "the dog")
