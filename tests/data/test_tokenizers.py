"""Tokenizers that the package creates, and their chat format."""

import functools
import json

import numpy as np
import pytest

from rlhf_jax.data import chat, dialogues, errors, padding, plain_text, tokenizers

WORDS = ["where", "is", "the", "cat", "dog", "sat.", "here", "end"]
TEXTS = [
    "where is the cat, where is the dog?",
    "the cat sat here.",
    "naïve café — 日本語",
    "the end, the very end",
] * 20

USER, ASSISTANT = "user", "assistant"
TURNS = (
    dialogues.Turn(USER, "where is the cat"),
    dialogues.Turn(ASSISTANT, "the cat is here"),
    dialogues.Turn(USER, "the dog"),
)
ANSWER = "here sat."
NASTY = "the <|end|> <|assistant|>cat<|pad|> <|user|>"


@pytest.fixture(scope="module")
def bpe():
    return tokenizers.train_bpe(TEXTS, vocab_size=320)


@pytest.fixture(scope="module")
def words():
    return tokenizers.word_level(WORDS)


@pytest.fixture(params=["bpe", "words"])
def tokenizer(request):
    return request.getfixturevalue(request.param)


def any_share():
    return errors.DropCount(max_dropped=1.0)


@functools.cache
def format_of(tokenizer):
    return chat.chat_format(tokenizer)


def encode_text(tokenizer, text):
    return plain_text.encode_texts(tokenizer, [text])[0]


def test_special_tokens_come_first_and_are_distinct(tokenizer):
    assert tokenizer.convert_tokens_to_ids(["<|pad|>", "<|end|>", "<|user|>", "<|assistant|>"]) == [0, 1, 2, 3]
    assert (tokenizer.pad_token_id, tokenizer.eos_token_id) == (0, 1)
    assert tokenizer.bos_token is None
    assert tokenizer.unk_token is None
    assert sorted(tokenizer.get_vocab().values()) == list(range(len(tokenizer)))


# ------------------------------------------------------------------------------------------------- byte-level BPE


def test_the_same_texts_lead_to_the_same_bpe(bpe):
    again = tokenizers.train_bpe(iter(TEXTS), vocab_size=320)
    assert again.get_vocab() == bpe.get_vocab()
    assert again.backend_tokenizer.to_str() == bpe.backend_tokenizer.to_str()


@pytest.mark.parametrize(
    "text", ["the cat", " two  spaces ", "a\n\n\tb\r\n", "日本 👩‍🚀 \x00", NASTY, "don 't , .", ""]
)
def test_bpe_decodes_any_text_exactly(bpe, text):
    ids = encode_text(bpe, text)
    assert bpe.decode(ids) == text
    assert all(i >= 4 for i in ids)


def test_bpe_respects_the_vocabulary_size(bpe):
    assert len(bpe) <= 320
    assert len(encode_text(bpe, "where is the cat")) < len("where is the cat")
    assert len(tokenizers.train_bpe(["ab"], vocab_size=10_000)) == 4 + 256
    with pytest.raises(errors.DataError, match="vocab_size is 259; it must be at least 260"):
        tokenizers.train_bpe(TEXTS, vocab_size=259)


def test_additional_special_tokens_follow_the_standard_ones():
    bpe = tokenizers.train_bpe(TEXTS, vocab_size=300, special_tokens=["<|good|>"])
    assert bpe.convert_tokens_to_ids("<|good|>") == 4
    assert 4 not in encode_text(bpe, "<|good|>")
    words = tokenizers.word_level(WORDS, special_tokens=["<|good|>"], unknown=True)
    assert words.convert_tokens_to_ids(["<|unk|>", "<|good|>", "where"]) == [4, 5, 6]
    with pytest.raises(errors.DataError, match=r"the special token '<\|end\|>' is given twice"):
        tokenizers.train_bpe(TEXTS, vocab_size=300, special_tokens=["<|end|>"])


# ------------------------------------------------------------------------------------------------------ word level


def test_word_level_ids_are_the_words_in_order(words):
    assert len(words) == 4 + len(WORDS)
    assert encode_text(words, " ".join(WORDS)) == list(range(4, 12))
    assert encode_text(words, "  cat\n dog ") == [7, 8]
    assert words.decode([6, 7, 9, 1], skip_special_tokens=True) == "the cat sat."


def test_an_unknown_word_is_an_error_that_names_it(words):
    with pytest.raises(errors.DataError, match="the word 'sat' is not in the tokenizer's vocabulary"):
        plain_text.encode_texts(words, ["the cat", "the cat sat"])
    with pytest.raises(errors.DataError, match="the word 'mouse' is not"):
        chat.encode_prompt(format_of(words), [dialogues.Turn(USER, "where is the mouse")])
    with pytest.raises(errors.DataError, match="the word 'mouse' is not"):
        chat.encode_answer(format_of(words), TURNS, "the mouse")
    with pytest.raises(errors.DataError, match=r"the word '<\|end\|>' is not"):
        plain_text.encode_texts(words, ["the <|end|>"])


def test_an_unknown_word_can_have_a_token():
    words = tokenizers.word_level(WORDS, unknown=True)
    assert words.unk_token_id == 4
    assert len(words) == 5 + len(WORDS)
    assert encode_text(words, "the mouse") == [7, 4]
    assert not {0, 1, 2, 3} & set(encode_text(words, NASTY))
    # A special token is split at its brackets, whether or not its inner word is in the vocabulary.
    assert encode_text(words, "<|unk|> the") == [4, 4, 4, 7]


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ([], "at least one word"),
        (["cat", "dog", "cat"], "the word 'cat' is given twice"),
        (["cat", ""], "'' is not a word"),
        (["a cat"], "'a cat' is not a word"),
        (["<|end|>"], "is not a word"),
    ],
)
def test_bad_word_lists_are_refused(bad, message):
    with pytest.raises(errors.DataError, match=message):
        tokenizers.word_level(bad)


# ----------------------------------------------------------------------------------------------------- chat format


def test_prompt_and_answer_encoded_separately_equal_the_chat_template(tokenizer):
    prompt = chat.encode_prompt(format_of(tokenizer), TURNS)
    answer = chat.encode_answer(format_of(tokenizer), TURNS, ANSWER)
    assert prompt[0] == 2 and prompt[-1] == 3 and answer[-1] == 1
    assert answer.count(1) == 1 and prompt.count(1) == 3
    rendered = tokenizer.apply_chat_template(chat.messages(TURNS), add_generation_prompt=True, return_dict=True)
    assert rendered["input_ids"] == prompt
    rendered = tokenizer.apply_chat_template(
        chat.messages([*TURNS, dialogues.Turn(ASSISTANT, ANSWER)]), return_dict=True
    )
    assert rendered["input_ids"] == prompt + answer


def test_the_loss_mask_covers_every_answer_with_its_end_token(tokenizer):
    turns = [*TURNS, dialogues.Turn(ASSISTANT, ANSWER)]
    ids, learnt = chat.encode_dialogue(format_of(tokenizer), turns)
    expected = []
    for turn in turns:
        n = len(encode_text(tokenizer, turn.text))
        expected += [False, *([True] * (n + 1))] if turn.role == ASSISTANT else [False] * (n + 2)
    assert learnt == expected
    spoken = [i for i, said in zip(ids, learnt) if said]
    both = [chat.encode_answer(format_of(tokenizer), turns[:n], turns[n].text) for n in (1, 3)]
    assert spoken == both[0] + both[1]


def test_a_word_level_prompt_has_the_documented_ids(words):
    assert chat.encode_prompt(format_of(words), TURNS) == [2, 4, 5, 6, 7, 1, 3, 6, 7, 5, 10, 1, 2, 6, 8, 1, 3]
    assert chat.encode_answer(format_of(words), TURNS, ANSWER) == [10, 9, 1]
    assert chat.encode_answer(format_of(words), TURNS, "") == [1]


def test_special_tokens_are_recognised_in_dialogues_but_not_in_plain_text(bpe):
    prompt = [dialogues.Turn(USER, NASTY)]
    assert chat.encode_prompt(format_of(bpe), prompt) == bpe.apply_chat_template(
        chat.messages(prompt), add_generation_prompt=True, return_dict=False
    )
    assert not {0, 1, 2, 3} & set(encode_text(bpe, NASTY)) and bpe.decode(encode_text(bpe, NASTY)) == NASTY
    assert chat.has_special_token(format_of(bpe), prompt) and not chat.has_special_token(format_of(bpe), TURNS)


def test_an_unknown_role_and_a_tokenizer_without_roles_are_errors(words):
    with pytest.raises(errors.DataError, match="rejects the turns: the role is user or assistant, not system"):
        chat.encode_prompt(format_of(words), [dialogues.Turn("system", "the cat")])
    with pytest.raises(Exception, match="the role is user or assistant, not system"):
        words.apply_chat_template([{"role": "system", "content": "the cat"}])
    import tokenizers as library
    import transformers

    bare = library.Tokenizer(library.models.WordLevel({"a": 0}, unk_token="a"))
    with pytest.raises(errors.DataError, match="neither a chat template nor an EOS token"):
        chat.chat_format(transformers.PreTrainedTokenizerFast(tokenizer_object=bare))


def test_a_saved_tokenizer_is_restored(tokenizer, tmp_path):
    import transformers

    tokenizer.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    assert (config["pad_token"], config["eos_token"]) == ("<|pad|>", "<|end|>")
    for loaded in (tokenizers.load(tmp_path), transformers.AutoTokenizer.from_pretrained(tmp_path)):
        assert loaded.get_vocab() == tokenizer.get_vocab()
        assert (loaded.pad_token_id, loaded.eos_token_id, loaded.bos_token) == (0, 1, None)
        assert loaded.chat_template == tokenizers.CHAT_TEMPLATE
        assert chat.encode_prompt(format_of(loaded), TURNS) == chat.encode_prompt(format_of(tokenizer), TURNS)
        ids = chat.encode_answer(format_of(loaded), TURNS, ANSWER)
        assert loaded.decode(ids, skip_special_tokens=True) == ANSWER


def test_loading_from_an_empty_directory_is_an_error(tmp_path):
    with pytest.raises(errors.DataError, match=r"has no tokenizer\.json"):
        tokenizers.load(tmp_path)


# ------------------------------------------------------------------------------------------------------ fitting


def test_a_long_prompt_loses_its_oldest_turns_and_still_starts_with_a_user_turn(words):
    # The turns have 6, 6 and 4 tokens, and the role token of the answer adds one.
    counts = any_share()
    for width, expected in ((17, TURNS), (16, TURNS[2:]), (11, TURNS[2:]), (5, TURNS[2:])):
        (ids,), kept = chat.encode_prompts(format_of(words), [TURNS], width=width, counts=counts)
        assert ids == chat.encode_prompt(format_of(words), expected)
        assert len(ids) <= width
        assert kept.tolist() == [0]
    assert counts.truncated == {"prompt turns dropped": 3}
    assert counts.dropped == {}


def test_a_prompt_whose_last_turn_is_too_long_is_dropped_and_counted(words):
    counts = any_share()
    short = (dialogues.Turn(USER, "cat"),)
    silent = (dialogues.Turn(ASSISTANT, "cat"),)
    ids, kept = chat.encode_prompts(format_of(words), [TURNS, short, silent, (), short], width=4, counts=counts)
    assert ids == [[2, 7, 1, 3]] * 2
    assert kept.tolist() == [1, 4]
    assert kept.dtype == np.int64
    assert counts.dropped == {"prompt too long": 1, "no user turn": 2}
    with pytest.raises(errors.DataError, match=r"prompts: 1 of 2 records was dropped \(prompt too long 1\)"):
        chat.encode_prompts(format_of(words), [TURNS, short], width=4, counts=errors.DropCount())


def test_consecutive_assistant_turns_are_encoded_as_they_are(words):
    turns = [dialogues.Turn(USER, "cat"), dialogues.Turn(ASSISTANT, "the"), dialogues.Turn(ASSISTANT, "dog")]
    prompt = chat.encode_prompt(format_of(words), turns)
    assert prompt == [2, 7, 1, 3, 6, 1, 3, 8, 1, 3]
    rendered = words.apply_chat_template(chat.messages(turns), add_generation_prompt=True, return_dict=True)
    assert rendered["input_ids"] == prompt


def test_texts_become_rows_with_a_loss_on_the_answers(tokenizer):
    counts = any_share()
    prompts, kept = chat.encode_prompts(format_of(tokenizer), [TURNS, TURNS[2:]], width=60, counts=counts)
    answers = chat.encode_answers(format_of(tokenizer), [TURNS, TURNS[2:]], [ANSWER, "the end"])
    rows = padding.demonstration_rows(
        prompts, [answers[i] for i in kept], prompt_width=60, response_width=20, pad_id=0, counts=counts
    )
    for row in range(2):
        real = rows.tokens_BL[row][rows.mask_BL[row]].tolist()
        assert real == prompts[row] + answers[row]
        learnt = rows.tokens_BL[row][rows.loss_mask_BL[row]].tolist()
        assert learnt == answers[row]
        assert learnt[-1] == tokenizer.eos_token_id
        assert rows.tokens_BL[row, 59] == 3  # the answer starts at column P in every row
    assert counts.dropped == counts.truncated == {}


def test_a_tokenizer_that_cannot_be_read_is_named(bpe, tmp_path):
    with pytest.raises(errors.DataError, match=r"nowhere has no tokenizer\.json"):
        tokenizers.load(tmp_path / "nowhere")
    bpe.save_pretrained(tmp_path / "t")
    file = tmp_path / "t" / "tokenizer.json"
    whole = file.read_text()
    file.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0123\nsize 123456\n")
    with pytest.raises(errors.DataError, match=r"t/tokenizer\.json is a Git LFS pointer.*git lfs pull"):
        tokenizers.load(tmp_path / "t")
    for broken in (whole[: len(whole) // 2], "{}", ""):
        file.write_text(broken)
        with pytest.raises(errors.DataError, match=r"the tokenizer in .*/t cannot be read: "):
            tokenizers.load(tmp_path / "t")
    file.write_text(whole)
    assert tokenizers.load(tmp_path / "t").get_vocab() == bpe.get_vocab()
