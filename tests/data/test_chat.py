"""Chat formats: the ids of prompts and answers, loss masks, and the choice and checks of templates."""

import pytest
import tokenizers as library
from chat_cases import (
    FORMATS,
    LLAMA3,
    MAKERS,
    PHI3,
    TURNS,
    A,
    S,
    Turn,
    U,
    backend_of,
    byte_level,
    format_of,
    hf,
    make_gemma,
    make_gpt2,
    make_llama2,
    make_llama3,
    make_mistral,
    make_mistral3,
    make_phi3,
    make_qwen,
    make_qwen3,
    shown,
)

from rlhf_jax.data import chat, errors, padding, tokenizers
from rlhf_jax.data.chat import templates

# ---------------------------------------------------------------------------------------------------------- families


@pytest.mark.parametrize("name", FORMATS)
def test_a_family_has_its_documented_format_and_learns_the_answer_with_its_stop_token(name):
    _, dialogue_text, answer = FORMATS[name]
    fmt = format_of(name)
    ids, learnt = chat.encode_dialogue(fmt, TURNS, train_on="last")
    # SentencePiece decoders write the prefix space of every text.
    assert shown(fmt, ids).replace("<s> [", "<s>[").replace("</s> [", "</s>[") == dialogue_text
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
        dialogue_ids = hf(fmt.tokenizer, turns, fmt.template, prompt=False)
        assert dialogue_ids[: len(prompt + answer)] == prompt + answer


@pytest.mark.parametrize("name", MAKERS)
def test_the_loss_mask_covers_all_answers_or_the_last(name):
    fmt = format_of(name)
    ids, every = chat.encode_dialogue(fmt, TURNS, train_on="all")
    again, last = chat.encode_dialogue(fmt, TURNS, train_on="last")
    answers = chat.encode_answers(fmt, [TURNS[1].text, TURNS[3].text])
    assert ids == again and len(every) == len(last) == len(ids)
    assert [i for i, on in zip(ids, every) if on] == answers[0] + answers[1]
    assert [i for i, on in zip(ids, last) if on] == answers[1]
    assert all(answer[-1] == fmt.stop_ids[0] and answer.count(fmt.stop_ids[0]) == 1 for answer in answers)


def test_there_is_one_bos_token_even_if_template_and_tokenizer_both_add_one():
    for name, bos in (("llama", "<s>"), ("mistral", "<s>"), ("llama3", LLAMA3[0]), ("gemma2", "<bos>")):
        fmt = format_of(name)
        bos_id = backend_of(fmt.tokenizer).token_to_id(bos)
        prompt = chat.encode_prompt(fmt, TURNS[:1])
        assert prompt.count(bos_id) == 1 and prompt[0] == bos_id
        assert bos_id not in chat.encode_answer(fmt, "so")
    # OPT has no chat template, and its tokenizer starts every text with </s>.
    opt = byte_level(("</s>", "<pad>"), pattern=None, bos_token="</s>", eos_token="</s>", pad_token="<pad>")
    opt.backend_tokenizer.post_processor = library.processors.TemplateProcessing(
        single="</s> $A", special_tokens=[("</s>", backend_of(opt).token_to_id("</s>"))]
    )
    fmt = chat.chat_format(opt, model_type="opt")
    ids, _ = chat.encode_dialogue(fmt, TURNS[:2])
    end = backend_of(opt).token_to_id("</s>")
    assert (ids[0], ids[-1], ids.count(end)) == (end, end, 2)


def test_a_control_token_can_remove_the_white_space_after_it():
    take = {name: library.AddedToken(name, rstrip=True, special=True) for name in PHI3[2:]}
    fmt = chat.chat_format(make_phi3(), model_type="phi3")
    tokenizer = byte_level((*PHI3[:2], *take.values()), bos_token="<s>", eos_token="<|endoftext|>")
    fmt = chat.chat_format(tokenizer, model_type="phi3")
    assert shown(fmt, chat.encode_prompt(fmt, TURNS[:1])) == "<|user|>where is it?<|end|><|assistant|>"
    turns = (Turn(U, "\n why"), Turn(A, " so"))
    prompt, answer = chat.encode_prompt(fmt, turns[:1]), chat.encode_answer(fmt, " so")
    assert prompt == hf(tokenizer, turns[:1], fmt.template)
    assert hf(tokenizer, turns, fmt.template, prompt=False) == prompt + answer


# ------------------------------------------------------------------------------------------------- template choice


def own_template(form):
    """Returns the published form of a template, which has no generation marks."""
    return form.replace("{% generation %}", "").replace("{% endgeneration %}", "")


@pytest.mark.parametrize(
    ("make", "family", "form"),
    [
        (make, name, form)
        for make, name in (
            *((make_llama3, "Llama 3"), (make_qwen3, "Qwen"), (make_gemma, "Gemma"), (make_phi3, "Phi-3")),
            *((make_llama2, "Llama 2"), (make_mistral, "Mistral"), (make_mistral3, "Mistral"), (make_llama2, "Zephyr")),
        )
        for family in templates.FAMILIES
        if family.name == name
        for form in range(len(family.forms))
    ],
)
def test_a_template_without_marks_is_replaced_by_an_equivalent_template_with_marks(make, family, form):
    forms = next(family_ for family_ in templates.FAMILIES if family_.name == family).forms
    fmt = chat.chat_format(make(template=own_template(forms[form])))
    assert fmt.origin == f"{family}'s, equal to the tokenizer's own but with generation marks"
    assert hf(fmt.tokenizer, TURNS[:3], fmt.template) == hf(fmt.tokenizer, TURNS[:3], own_template(forms[form]))


def test_the_templates_of_a_family_are_distinct():
    for family in templates.FAMILIES:
        assert len(set(family.forms)) == len(family.forms)


def test_a_tokenizers_template_with_marks_is_kept():
    tokenizer = tokenizers.train_bpe(["the cat"], vocab_size=260)
    fmt = chat.chat_format(tokenizer)
    assert fmt.tokenizer is tokenizer and fmt.template == tokenizers.CHAT_TEMPLATE
    assert fmt.stop_ids == (1,) and fmt.pad_id == 0
    assert chat.encode_prompt(fmt, TURNS[:3]) == hf(tokenizer, TURNS[:3], None)


def test_the_date_is_fixed_and_thoughts_are_empty():
    dated = templates.FAMILIES[0].forms[1]
    live = own_template(dated).replace(templates.DATE, "' + (date_string | default(strftime_now('%d %b %Y'))) + '")
    fmt = chat.chat_format(make_llama3(template=live))
    assert fmt.template == dated
    fmt = format_of("qwen3")
    assert fmt.template == templates.FAMILIES[1].forms[0], "the default template has no thinking"
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


def test_without_a_template_the_model_type_and_then_the_tokens_determine_the_family():
    for name, origin in (
        *(("llama", "Llama 2"), ("llama3", "Llama 3"), ("mistral", "Mistral"), ("gemma2", "Gemma")),
        *(("phi3", "Phi-3"), ("qwen3", "Qwen"), ("gpt2", "plain text")),
    ):
        assert format_of(name).origin.startswith(origin), name
    assert chat.chat_format(make_qwen()).origin.startswith("Qwen")
    assert chat.chat_format(make_qwen(), model_type="llama").origin.startswith("Qwen")
    assert chat.chat_format(make_gpt2(), model_type="llama").origin.startswith("plain text")
    assert chat.chat_format(make_llama2()).origin.startswith("plain text"), "nothing identifies it as Llama 2"


def test_a_family_template_replaces_a_different_template_without_marks():
    template = "{% for m in messages %}{{ m.role + ': ' + m.content + '<|eot_id|>' }}{% endfor %}"
    fmt = chat.chat_format(make_llama3(template=template), model_type="llama")
    assert fmt.origin.startswith("Llama 3's") and "differs from it" in fmt.origin
    # Many families share the tokens of Llama 2, so these tokens do not determine the template.
    with pytest.raises(errors.DataError, match=r"no {% generation %} marks"):
        chat.chat_format(make_llama2(template=template), model_type="llama")


def test_the_tokenizer_argument_is_unchanged_and_the_formats_tokenizer_has_the_template(tmp_path):
    tokenizer = make_qwen(template=None)
    fmt = chat.chat_format(tokenizer, model_type="qwen2")
    assert tokenizer.chat_template is None and fmt.tokenizer.chat_template == fmt.template
    fmt.tokenizer.save_pretrained(tmp_path)
    again = chat.chat_format(tokenizers.load(tmp_path))
    assert again.origin == "the tokenizer's own" and again.template == fmt.template
    assert chat.encode_dialogue(again, TURNS) == chat.encode_dialogue(fmt, TURNS)


# ------------------------------------------------------------------------------------------------- template checks

MESSAGE = "{% for m in messages %}{% if m.role == 'user' %}{{ '<|im_start|>' + m.content + '<|im_end|>' }}{% else %}"
DONE = "{% endif %}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>' }}{% endif %}"
OPEN, CLOSE = "{% generation %}", "{% endgeneration %}"


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        ("{{ '<|im_start|>' + m.content + '<|im_end|>' }}", r"no {% generation %} marks.*put {% generation %} before"),
        (
            "{{ '<|im_start|>' + m.content + '<|im_end|>' }}" + OPEN + CLOSE,
            "of the chat template contain no assist",
        ),
        (
            "{{ '<|im_start|>' }}" + OPEN + "{{ m.content }}" + CLOSE + "{{ '<|im_end|>' }}",
            r"end of an answer from the loss: put the token '<\|im_end\|>' after the assistant's text and before {% ",
        ),
        ("{{ '<|im_start|>' }}" + OPEN + "{{ m.content }}" + CLOSE, "end of an answer from the loss"),
        (
            OPEN + "{{ '<|im_start|>' + m.content + '<|im_end|>' }}" + CLOSE,
            "does not start an answer at the end of its generation",
        ),
        (
            "{{ 'A' }}" + OPEN + "{{ m.content + '<|im_end|>' }}" + CLOSE,
            "does not start an answer at the end of its generation",
        ),
        (
            "{{ '<|im_start|>' }}" + OPEN + "{{ m.content + m.content + '<|im_end|>' }}" + CLOSE,
            r"does not write the text of each turn \(user, assistant\) exactly once and in order",
        ),
        (
            "{{ '<|im_start|>' }}" + OPEN + "{{ m.content }}{% if loop.last %}{{ '<|im_end|>' }}{% else %}"
            "{{ '<|endoftext|>' }}{% endif %}" + CLOSE,
            "ends answers with different tokens .*: end all answers with the same token",
        ),
        ("{{ raise_exception('not today') }}", "the chat template rejects the turns: not today|no {% generation %}"),
    ],
)
def test_a_template_that_leaves_part_of_an_answer_without_a_loss_is_refused(answer, message):
    with pytest.raises(errors.DataError, match=message):
        chat.chat_format(make_qwen(), template=MESSAGE + answer + DONE)


def test_a_template_with_correct_marks_is_accepted():
    answer = "{{ '<|im_start|>' }}" + OPEN + "{{ m.content + '<|im_end|>' }}" + CLOSE
    fmt = chat.chat_format(make_qwen(), template=MESSAGE + answer + DONE)
    assert fmt.origin == "given"
    assert shown(fmt, chat.encode_dialogue(fmt, TURNS[:2])[0]) == (
        "<|im_start|>where is it?<|im_end|><|im_start|>In the garden.<|im_end|>"
    )


def test_a_template_without_marks_and_a_tokenizer_without_eos_are_refused():
    template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    with pytest.raises(errors.DataError, match=r"no {% generation %} marks"):
        chat.chat_format(make_gpt2(template=template))
    with pytest.raises(errors.DataError, match="neither a chat template nor an EOS token"):
        chat.chat_format(byte_level(()))


@pytest.mark.parametrize("name", ["gpt2", "llama", "qwen2"])
@pytest.mark.parametrize("pad", [None, "eos"])
def test_the_stop_token_is_learnt_even_if_the_pad_token_is_missing_or_equal_to_it(name, pad):
    tokenizer = MAKERS[name]()
    tokenizer.pad_token = tokenizer.eos_token if pad == "eos" else None
    fmt = chat.chat_format(tokenizer, model_type=name)
    assert (fmt.pad_id in fmt.stop_ids) == (tokenizer.unk_token is None)
    counts = errors.DropCount()
    prompts, _ = chat.encode_prompts(fmt, [TURNS[:3], TURNS[:1]], width=80, counts=counts)
    answers = chat.encode_answers(fmt, ["so", "nobody knows"])
    rows = padding.demonstration_rows(
        prompts, answers, prompt_width=80, response_width=30, pad_id=fmt.pad_id, counts=counts
    )
    for row, answer in enumerate(answers):
        assert rows.tokens_BL[row][rows.loss_mask_BL[row]].tolist() == answer
        assert answer[-1] == fmt.stop_ids[0]
    assert (rows.tokens_BL[~rows.mask_BL] == fmt.pad_id).all()
