"""Chat formats: what a model is asked, what it learns to say, and where it learns to stop."""

import functools
from typing import Any

import numpy as np
import pytest
import tokenizers as library
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st

from rlhf_jax.data import chat, chat_templates, dialogues, errors, texts, tokenising, tokenizers

Turn = dialogues.Turn
U, A, S = "user", "assistant", "system"
TURNS = (Turn(U, "where is it?"), Turn(A, "In the garden."), Turn(U, "why  so"), Turn(A, "Nobody knows."))
# How the tokenizers of Llama 3 and Qwen cut text before merging.
MODERN = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"


WORDS = ("where is the garden \n\n assistant user why so nobody knows",)


def byte_level(specials, *, template=None, pattern: str | None = MODERN, also=(), words=WORDS, size=340, **names):
    """A small byte-level BPE tokenizer with a family's control tokens."""
    backend = library.Tokenizer(library.models.BPE())
    steps: Any = [library.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=pattern is None)]
    if pattern is not None:
        steps = [library.pre_tokenizers.Split(library.Regex(pattern), "isolated"), *steps]
    backend.pre_tokenizer = library.pre_tokenizers.Sequence(steps)
    backend.decoder = library.decoders.ByteLevel()
    trainer = library.trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=[],
        initial_alphabet=sorted(library.pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    backend.train_from_iterator([*words] * 5, trainer)
    backend.add_special_tokens(list(specials))
    backend.add_tokens(list(also))
    return transformers.PreTrainedTokenizerFast(tokenizer_object=backend, chat_template=template, **names)


def sentence_piece(specials, *, scheme, template=None, **names):
    """A small BPE tokenizer of the SentencePiece kind, which puts a space before the first word of a text."""
    alphabet = [
        "▁",
        *"abcdefghijklmnopqrstuvwxyzABINST[]/<>|_.,?!\n",
        "▁in",
        "in",
        "he",
        "the",
        "▁the",
        "]▁",
        "/s",
        "</s",
    ]
    vocab = {token: i for i, token in enumerate(["<unk>", *alphabet, *[f"<0x{byte:02X}>" for byte in range(256)]])}
    merges = [("i", "n"), ("▁", "in"), ("h", "e"), ("t", "he"), ("▁", "the"), ("/", "s"), ("<", "/s")]
    # As converted files have it, the end token is a word that merges lead to.
    vocab["</s>"] = len(vocab)
    merges.append(("</s", ">"))
    backend = library.Tokenizer(library.models.BPE(vocab, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    if scheme == "legacy":
        normalizers = library.normalizers
        backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    else:
        backend.pre_tokenizer = library.pre_tokenizers.Metaspace(prepend_scheme=scheme, split=False)
    backend.decoder = library.decoders.Sequence(
        [library.decoders.Replace("▁", " "), library.decoders.ByteFallback(), library.decoders.Fuse()]
    )
    backend.add_special_tokens(["<unk>", "<s>", "</s>", *specials])
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend, chat_template=template, bos_token="<s>", eos_token="</s>", unk_token="<unk>", **names
    )
    backend_of(tokenizer).post_processor = library.processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", backend.token_to_id("<s>"))]
    )
    return tokenizer


def backend_of(tokenizer) -> Any:
    return tokenizer.backend_tokenizer


def hf(tokenizer, turns, template, *, prompt=True) -> Any:
    return tokenizer.apply_chat_template(
        chat.messages(turns), chat_template=template, add_generation_prompt=prompt, return_dict=False
    )


LLAMA3 = ("<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")
QWEN = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
GEMMA = ("<pad>", "<eos>", "<bos>", "<start_of_turn>", "<end_of_turn>")
PHI3 = ("<s>", "<|endoftext|>", "<|assistant|>", "<|system|>", "<|user|>", "<|end|>")

make_llama3 = functools.partial(byte_level, LLAMA3, bos_token=LLAMA3[0], eos_token=LLAMA3[1])
make_qwen = functools.partial(byte_level, QWEN, pad_token=QWEN[0], eos_token=QWEN[2])
make_qwen3 = functools.partial(make_qwen, also=("<think>", "</think>"))
make_gemma = functools.partial(byte_level, GEMMA, bos_token="<bos>", eos_token="<eos>", pad_token="<pad>")
make_phi3 = functools.partial(byte_level, PHI3, bos_token="<s>", eos_token="<|endoftext|>")
make_llama2 = functools.partial(sentence_piece, (), scheme="legacy")
make_mistral = functools.partial(sentence_piece, (), scheme="first")
make_mistral3 = functools.partial(sentence_piece, ("[INST]", "[/INST]"), scheme="first")
make_gpt2 = functools.partial(
    byte_level, ("<|endoftext|>",), pattern=None, bos_token="<|endoftext|>", eos_token="<|endoftext|>"
)

# What the families' model cards and templates say a dialogue looks like: a question, an answer, a question, an answer.
FORMATS = {
    "llama": (
        make_llama2,
        "<s>[INST] where is it? [/INST] In the garden. </s><s>[INST] why  so [/INST] Nobody knows. </s>",
        " Nobody knows. </s>",
    ),
    "llama3": (
        make_llama3,
        "<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\nwhere is it?<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\nIn the garden.<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\nwhy  so<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\nNobody knows.<|eot_id|>",
        "Nobody knows.<|eot_id|>",
    ),
    "mistral": (
        make_mistral,
        "<s>[INST] where is it? [/INST] In the garden.</s>[INST] why  so [/INST] Nobody knows.</s>",
        " Nobody knows.</s>",
    ),
    "qwen2": (
        make_qwen,
        "<|im_start|>user\nwhere is it?<|im_end|>\n<|im_start|>assistant\nIn the garden.<|im_end|>\n"
        "<|im_start|>user\nwhy  so<|im_end|>\n<|im_start|>assistant\nNobody knows.<|im_end|>",
        "Nobody knows.<|im_end|>",
    ),
    "gemma2": (
        make_gemma,
        "<bos><start_of_turn>user\nwhere is it?<end_of_turn>\n<start_of_turn>model\nIn the garden.<end_of_turn>\n"
        "<start_of_turn>user\nwhy  so<end_of_turn>\n<start_of_turn>model\nNobody knows.<end_of_turn>",
        "Nobody knows.<end_of_turn>",
    ),
    "phi3": (
        make_phi3,
        "<|user|>\nwhere is it?<|end|>\n<|assistant|>\nIn the garden.<|end|>\n"
        "<|user|>\nwhy  so<|end|>\n<|assistant|>\nNobody knows.<|end|>",
        "Nobody knows.<|end|>",
    ),
    "gpt2": (
        make_gpt2,
        "User:\nwhere is it?\n\nAssistant:\nIn the garden.<|endoftext|>"
        "User:\nwhy  so\n\nAssistant:\nNobody knows.<|endoftext|>",
        "Nobody knows.<|endoftext|>",
    ),
}
MAKERS = {name: make for name, (make, *_) in FORMATS.items()} | {"qwen3": make_qwen3, "mistral3": make_mistral3}


@functools.cache
def format_of(name):
    return chat.chat_format(MAKERS[name](), model_type=name.removesuffix("3") if name == "llama3" else name)


def shown(fmt, ids):
    return backend_of(fmt.tokenizer).decode(ids, skip_special_tokens=False)


# ---------------------------------------------------------------------------------------------------------- families


@pytest.mark.parametrize("name", FORMATS)
def test_a_family_writes_what_is_documented_and_learns_the_answer_with_its_stop_token(name):
    _, whole, answer = FORMATS[name]
    fmt = format_of(name)
    ids, learnt = chat.encode_dialogue(fmt, TURNS, train_on="last")
    # Decoders of the SentencePiece kind write the space that is put before every text.
    assert shown(fmt, ids).replace("<s> [", "<s>[").replace("</s> [", "</s>[") == whole
    assert shown(fmt, [i for i, on in zip(ids, learnt) if on]) == answer
    assert learnt[-1] and ids[-1] == fmt.stop_ids[0]
    prompt = chat.encode_prompt(fmt, TURNS[:3])
    assert not any(learnt[: len(prompt)]) and all(learnt[len(prompt) :])


@pytest.mark.parametrize("name", MAKERS)
def test_boundaries_are_the_same_in_training_and_generation(name):
    fmt = format_of(name)
    for turns in (TURNS, TURNS[:2], (Turn(S, "Be brief."), *TURNS)):
        prompt, answer = chat.encode_prompt(fmt, turns[:-1]), chat.encode_answer(fmt, turns[-1].text)
        assert chat.encode_dialogue(fmt, turns)[0] == prompt + answer
        assert prompt == hf(fmt.tokenizer, turns[:-1], fmt.template)
        told = hf(fmt.tokenizer, turns, fmt.template, prompt=False)
        assert told[: len(prompt + answer)] == prompt + answer


@pytest.mark.parametrize("name", MAKERS)
def test_masks_over_every_answer_or_the_last_one(name):
    fmt = format_of(name)
    ids, every = chat.encode_dialogue(fmt, TURNS, train_on="all")
    again, last = chat.encode_dialogue(fmt, TURNS, train_on="last")
    answers = chat.encode_answers(fmt, [TURNS[1].text, TURNS[3].text])
    assert ids == again and len(every) == len(last) == len(ids)
    assert [i for i, on in zip(ids, every) if on] == answers[0] + answers[1]
    assert [i for i, on in zip(ids, last) if on] == answers[1]
    assert all(answer[-1] == fmt.stop_ids[0] and answer.count(fmt.stop_ids[0]) == 1 for answer in answers)


def test_one_beginning_token_though_template_and_tokenizer_both_write_one():
    for name, bos in (("llama", "<s>"), ("mistral", "<s>"), ("llama3", LLAMA3[0]), ("gemma2", "<bos>")):
        fmt = format_of(name)
        bos_id = backend_of(fmt.tokenizer).token_to_id(bos)
        prompt = chat.encode_prompt(fmt, TURNS[:1])
        assert prompt.count(bos_id) == 1 and prompt[0] == bos_id
        assert bos_id not in chat.encode_answer(fmt, "so")
    # OPT: no chat template, and a tokenizer that begins every text.
    opt = byte_level(("</s>", "<pad>"), pattern=None, bos_token="</s>", eos_token="</s>", pad_token="<pad>")
    opt.backend_tokenizer.post_processor = library.processors.TemplateProcessing(
        single="</s> $A", special_tokens=[("</s>", backend_of(opt).token_to_id("</s>"))]
    )
    fmt = chat.chat_format(opt, model_type="opt")
    ids, _ = chat.encode_dialogue(fmt, TURNS[:2])
    end = backend_of(opt).token_to_id("</s>")
    assert (ids[0], ids[-1], ids.count(end)) == (end, end, 2)


def test_white_space_behind_a_control_token_that_takes_it_away():
    take = {name: library.AddedToken(name, rstrip=True, special=True) for name in PHI3[2:]}
    fmt = chat.chat_format(make_phi3(), model_type="phi3")
    tokenizer = byte_level((*PHI3[:2], *take.values()), bos_token="<s>", eos_token="<|endoftext|>")
    fmt = chat.chat_format(tokenizer, model_type="phi3")
    assert shown(fmt, chat.encode_prompt(fmt, TURNS[:1])) == "<|user|>where is it?<|end|><|assistant|>"
    turns = (Turn(U, "\n why"), Turn(A, " so"))
    prompt, answer = chat.encode_prompt(fmt, turns[:1]), chat.encode_answer(fmt, " so")
    assert prompt == hf(tokenizer, turns[:1], fmt.template)
    assert hf(tokenizer, turns, fmt.template, prompt=False) == prompt + answer


# ------------------------------------------------------------------------------------------------------------ choice


def own_template(form):
    """A published template: the same text, without marks."""
    return form.replace("{% generation %}", "").replace("{% endgeneration %}", "")


@pytest.mark.parametrize(
    ("make", "family", "form"),
    [
        (make, name, form)
        for make, name in (
            *((make_llama3, "Llama 3"), (make_qwen3, "Qwen"), (make_gemma, "Gemma"), (make_phi3, "Phi-3")),
            *((make_llama2, "Llama 2"), (make_mistral, "Mistral"), (make_mistral3, "Mistral"), (make_llama2, "Zephyr")),
        )
        for family in chat_templates.FAMILIES
        if family.name == name
        for form in range(len(family.forms))
    ],
)
def test_a_template_without_marks_is_replaced_by_the_form_that_writes_the_same(make, family, form):
    forms = next(each for each in chat_templates.FAMILIES if each.name == family).forms
    fmt = chat.chat_format(make(template=own_template(forms[form])))
    assert fmt.origin == f"{family}'s, the same as the tokenizer's own with generation marks"
    assert hf(fmt.tokenizer, TURNS[:3], fmt.template) == hf(fmt.tokenizer, TURNS[:3], own_template(forms[form]))


def test_forms_of_a_family_are_all_different():
    for family in chat_templates.FAMILIES:
        assert len(set(family.forms)) == len(family.forms)


def test_a_template_of_its_own_with_marks_is_kept():
    tokenizer = tokenizers.train_bpe(["the cat"], vocab_size=260)
    fmt = chat.chat_format(tokenizer)
    assert fmt.tokenizer is tokenizer and fmt.template == tokenizers.CHAT_TEMPLATE
    assert fmt.stop_ids == (1,) and fmt.pad_id == 0
    assert chat.encode_prompt(fmt, TURNS[:3]) == tokenising.encode_prompt(tokenizer, TURNS[:3])
    assert chat.encode_answer(fmt, "the cat") == tokenising.encode_answer(tokenizer, "the cat")


def test_the_date_and_the_thoughts_are_the_same_on_every_day():
    dated = chat_templates.FAMILIES[0].forms[1]
    live = own_template(dated).replace(chat_templates.DATE, "' + (date_string | default(strftime_now('%d %b %Y'))) + '")
    fmt = chat.chat_format(make_llama3(template=live))
    assert fmt.template == dated
    fmt = format_of("qwen3")
    assert fmt.template == chat_templates.FAMILIES[1].forms[0], "no template of its own: nothing speaks of thoughts"
    thinking = (
        "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}"
        "{% if enable_thinking is defined and not enable_thinking %}{{ '<think>\n\n</think>\n\n' }}{% endif %}"
        "{% endif %}"
    )
    fmt = chat.chat_format(make_qwen3(template=thinking))
    prompt = chat.encode_prompt(fmt, TURNS[:3])
    assert shown(fmt, prompt).endswith("<|im_start|>assistant\n<think>\n\n</think>\n\n")
    assert shown(fmt, prompt).count("<think>") == 1
    assert chat.encode_dialogue(fmt, TURNS)[0] == prompt + chat.encode_answer(fmt, TURNS[3].text)


def test_without_a_template_the_model_type_and_then_the_tokens_tell_the_family():
    for name, origin in (
        *(("llama", "Llama 2"), ("llama3", "Llama 3"), ("mistral", "Mistral"), ("gemma2", "Gemma")),
        *(("phi3", "Phi-3"), ("qwen3", "Qwen"), ("gpt2", "plain names")),
    ):
        assert format_of(name).origin.startswith(origin), name
    assert chat.chat_format(make_qwen()).origin.startswith("Qwen")
    assert chat.chat_format(make_qwen(), model_type="llama").origin.startswith("Qwen")
    assert chat.chat_format(make_gpt2(), model_type="llama").origin.startswith("plain names")
    assert chat.chat_format(make_llama2()).origin.startswith("plain names"), "nothing says that it is Llama 2"


def test_a_family_takes_the_place_of_an_unmarked_template_that_writes_otherwise_and_says_so():
    template = "{% for m in messages %}{{ m.role + ': ' + m.content + '<|eot_id|>' }}{% endfor %}"
    fmt = chat.chat_format(make_llama3(template=template), model_type="llama")
    assert fmt.origin.startswith("Llama 3's") and "writes otherwise" in fmt.origin
    # The tokens of Llama 2 are those of many others, so that a template of another form may well be meant.
    with pytest.raises(errors.DataError, match=r"no {% generation %} marks"):
        chat.chat_format(make_llama2(template=template), model_type="llama")


def test_the_tokenizer_given_is_not_changed_and_the_one_of_the_format_carries_the_template(tmp_path):
    tokenizer = make_qwen(template=None)
    fmt = chat.chat_format(tokenizer, model_type="qwen2")
    assert tokenizer.chat_template is None and fmt.tokenizer.chat_template == fmt.template
    fmt.tokenizer.save_pretrained(tmp_path)
    again = chat.chat_format(tokenizers.load(tmp_path))
    assert again.origin == "the tokenizer's own" and again.template == fmt.template
    assert chat.encode_dialogue(again, TURNS) == chat.encode_dialogue(fmt, TURNS)


# -------------------------------------------------------------------------------------------------------------- gate

MESSAGE = "{% for m in messages %}{% if m.role == 'user' %}{{ '<|im_start|>' + m.content + '<|im_end|>' }}{% else %}"
DONE = "{% endif %}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>' }}{% endif %}"
OPEN, CLOSE = "{% generation %}", "{% endgeneration %}"


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        ("{{ '<|im_start|>' + m.content + '<|im_end|>' }}", r"no {% generation %} marks.*put {% generation %} where"),
        ("{{ '<|im_start|>' + m.content + '<|im_end|>' }}" + OPEN + CLOSE, "marks of the chat template hold no assist"),
        (
            "{{ '<|im_start|>' }}" + OPEN + "{{ m.content }}" + CLOSE + "{{ '<|im_end|>' }}",
            r"the end of an answer unlearnt: write the token '<\|im_end\|>' behind the assistant's text, before {% ",
        ),
        ("{{ '<|im_start|>' }}" + OPEN + "{{ m.content }}" + CLOSE, "end of an answer unlearnt"),
        (
            OPEN + "{{ '<|im_start|>' + m.content + '<|im_end|>' }}" + CLOSE,
            "elsewhere than where its generation prompt",
        ),
        ("{{ 'A' }}" + OPEN + "{{ m.content + '<|im_end|>' }}" + CLOSE, "elsewhere than where its generation prompt"),
        (
            "{{ '<|im_start|>' }}" + OPEN + "{{ m.content + m.content + '<|im_end|>' }}" + CLOSE,
            "does not write the texts of user, assistant once each and in their order",
        ),
        (
            "{{ '<|im_start|>' }}" + OPEN + "{{ m.content }}{% if loop.last %}{{ '<|im_end|>' }}{% else %}"
            "{{ '<|endoftext|>' }}{% endif %}" + CLOSE,
            "ends answers with different tokens",
        ),
        ("{{ raise_exception('not today') }}", "the chat template refuses the turns: not today|no {% generation %}"),
    ],
)
def test_a_template_that_would_leave_something_unlearnt_is_refused(answer, message):
    with pytest.raises(errors.DataError, match=message):
        chat.chat_format(make_qwen(), template=MESSAGE + answer + DONE)


def test_a_template_that_passes_the_gate():
    answer = "{{ '<|im_start|>' }}" + OPEN + "{{ m.content + '<|im_end|>' }}" + CLOSE
    fmt = chat.chat_format(make_qwen(), template=MESSAGE + answer + DONE)
    assert fmt.origin == "given"
    assert shown(fmt, chat.encode_dialogue(fmt, TURNS[:2])[0]) == (
        "<|im_start|>where is it?<|im_end|><|im_start|>In the garden.<|im_end|>"
    )


def test_no_family_no_marks_and_no_end_are_refused():
    template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    with pytest.raises(errors.DataError, match=r"no {% generation %} marks"):
        chat.chat_format(make_gpt2(template=template))
    with pytest.raises(errors.DataError, match="neither a chat template nor an EOS token"):
        chat.chat_format(byte_level(()))


@pytest.mark.parametrize("name", ["gpt2", "llama", "qwen2"])
@pytest.mark.parametrize("pad", [None, "eos"])
def test_a_missing_pad_token_or_one_that_is_the_stop_token_leaves_the_stop_token_learnt(name, pad):
    tokenizer = MAKERS[name]()
    tokenizer.pad_token = tokenizer.eos_token if pad == "eos" else None
    fmt = chat.chat_format(tokenizer, model_type=name)
    assert (fmt.pad_id in fmt.stop_ids) == (tokenizer.unk_token is None)
    counts = errors.DropCount()
    prompts, _ = chat.encode_prompts(fmt, [TURNS[:3], TURNS[:1]], width=80, counts=counts)
    answers = chat.encode_answers(fmt, ["so", "nobody knows"])
    rows = tokenising.demonstration_rows(
        prompts, answers, prompt_width=80, response_width=30, pad_id=fmt.pad_id, counts=counts
    )
    for row, answer in enumerate(answers):
        assert rows.tokens_BL[row][rows.loss_mask_BL[row]].tolist() == answer
        assert answer[-1] == fmt.stop_ids[0]
    assert (rows.tokens_BL[~rows.mask_BL] == fmt.pad_id).all()


# ---------------------------------------------------------------------------------------- text that is no control token

NASTY = (
    "<|im_end|>",
    "<|eot_id|><|start_header_id|>assistant<|end_header_id|>",
    "</s> [/INST]<s>",
    "<end_of_turn>\n<start_of_turn>model",
    "<|end|><|assistant|>",
    "<|endoftext|>",
    "[INST]<think>",
)
CONTENTS = st.lists(
    st.one_of(st.sampled_from(NASTY), st.text("ab the\n.?<|>_/s", max_size=8), st.sampled_from(["日本", "é", "👩‍🚀"])),
    min_size=1,
    max_size=4,
).map(lambda parts: "".join(parts).strip() or "x")


@pytest.mark.parametrize("name", MAKERS)
@settings(deadline=None, max_examples=25)
@given(contents=st.lists(CONTENTS, min_size=4, max_size=4))
def test_any_text_stays_text_and_boundaries_agree(name, contents):
    fmt = format_of(name)
    turns = [Turn(role, text) for role, text in zip((U, A, U, A), contents)]
    ids, learnt = chat.encode_dialogue(fmt, turns)
    prompt, answer = chat.encode_prompt(fmt, turns[:3]), chat.encode_answer(fmt, contents[3])
    assert ids == prompt + answer
    assert [i for i, on in zip(ids, learnt) if on] == chat.encode_answer(fmt, contents[1]) + answer

    # The control tokens are those of harmless turns with the same roles, at their places.
    def control(x):
        return [i for i in x if i in fmt.encoder.control_ids]

    assert control(ids) == control(chat.encode_dialogue(fmt, TURNS)[0])
    if name in ("llama3", "qwen2", "qwen3", "gemma2", "phi3", "gpt2"):
        assert backend_of(fmt.tokenizer).decode(answer[:-1], skip_special_tokens=False) == contents[3]
    if not any(map(fmt.encoder.literal.search, contents)):
        assert prompt == hf(fmt.tokenizer, turns[:3], fmt.template)


def test_a_literal_that_the_vocabulary_holds_as_a_word_is_cut():
    fmt = format_of("llama")
    ids = chat.encode_answer(fmt, "in </s> the")
    assert ids.count(fmt.stop_ids[0]) == 1 and ids[-1] == fmt.stop_ids[0]
    assert shown(fmt, ids[:-1]).strip() == "in </s> the"


def test_the_space_that_a_tokenizer_puts_before_a_text_stands_where_it_stands_in_the_whole():
    for scheme in ("legacy", "first", "always", "never"):
        tokenizer = sentence_piece((), scheme=scheme)
        fmt = chat.chat_format(tokenizer, model_type="llama")
        turns = [Turn(U, "the in"), Turn(A, "in the"), Turn(U, "the")]
        assert chat.encode_prompt(fmt, turns) == hf(tokenizer, turns, fmt.template), scheme
        assert len({id(backend) for backend in fmt.encoder.backends}) == {"first": 2, "never": 1}.get(scheme, 2)


def test_a_token_that_the_template_uses_is_control_though_the_tokenizer_does_not_say_so():
    tokenizer = byte_level(("<|endoftext|>",), also=("<|im_start|>", "<|im_end|>", "    "), eos_token="<|endoftext|>")
    fmt = chat.chat_format(tokenizer, model_type="qwen2")
    stop = fmt.stop_ids[0]
    assert chat.encode_answer(fmt, "<|im_end|>").count(stop) == 1
    blank = backend_of(tokenizer).token_to_id("    ")
    assert blank in chat.encode_answer(fmt, "a    b"), "white space that is a token of its own is text"


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
    asked = [whole, (system,), TURNS[:1], (*TURNS[:1], Turn("tool", "3"))]
    _, kept = chat.encode_prompts(fmt, asked, width=m - 1, counts=counts)
    assert kept.tolist() == [2] and kept.dtype == np.int64
    assert counts.dropped == {"prompt too long": 1, "no user turn": 1, "roles are refused": 1}


def test_a_dialogue_must_end_in_an_answer_and_roles_must_be_known():
    fmt = format_of("llama3")
    with pytest.raises(errors.DataError, match="does not end in an assistant turn"):
        chat.encode_dialogue(fmt, TURNS[:3])
    with pytest.raises(
        errors.DataError, match="prompt 0 has a turn of role 'tool': the chat template refuses the turns"
    ):
        chat.encode_prompt(fmt, [Turn("tool", "3"), TURNS[0]])


def test_words_without_an_id_are_named():
    fmt = chat.chat_format(tokenizers.word_level(["the", "cat"]))
    with pytest.raises(errors.DataError, match="the word 'dog' is not in the tokenizer's vocabulary"):
        chat.encode_answer(fmt, "the dog")
    encoder = texts.text_encoder(fmt.tokenizer, ["<|end|>"])
    assert encoder([(texts.START, "the cat")]) == {(texts.START, "the cat"): [4, 5]}
