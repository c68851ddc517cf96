"""Chat formats: ids are those of the tokenizer's own template, and the loss mask selects what the assistant writes."""
# pyright: reportArgumentType=false, reportGeneralTypeIssues=false

import datetime
import json

import pytest
import tokenizers as library
from chat_cases import (
    FORMATS,
    LLAMA3,
    MAKERS,
    OWN,
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
    learnt_texts,
    make_gpt2,
    make_llama2,
    make_llama3,
    make_qwen,
    make_qwen3,
    random_dialogues,
    shown,
)

from rlhf_jax.data import chat, errors, padding, tokenizers
from rlhf_jax.data.chat import templates

# --------------------------------------------------------------------------------------------- the tokenizer's template


@pytest.mark.parametrize("name", OWN)
def test_the_answers_of_a_template_are_those_found_by_hand(name):
    make, template, answers = OWN[name]
    fmt = chat.chat_format(make(template=template))
    assert fmt.template == template and fmt.origin == "the tokenizer's own"
    ids, learnt = chat.encode_dialogue(fmt, TURNS)
    assert ids == hf(fmt.tokenizer, TURNS, None, prompt=False)
    assert learnt_texts(fmt, ids, learnt) == answers
    ids, learnt = chat.encode_dialogue(fmt, TURNS, train_on="last")
    assert learnt_texts(fmt, ids, learnt) == answers[1:]
    assert shown(fmt, chat.encode_answer(fmt, TURNS[:3], TURNS[3].text)).lstrip() == answers[1].lstrip()


@pytest.mark.parametrize("name", OWN)
def test_ids_are_those_of_apply_chat_template_for_any_text(name):
    make, template, _ = OWN[name]
    fmt = chat.chat_format(make(template=template))
    compared = 0
    for turns in random_dialogues():
        try:
            expected = hf(fmt.tokenizer, turns, None, prompt=False)
        except Exception:  # the template rejects a system turn
            with pytest.raises(errors.DataError, match="rejects the turns"):
                chat.encode_dialogue(fmt, turns)
            continue
        ids, learnt = chat.encode_dialogue(fmt, turns)
        assert ids == expected
        prompt = chat.encode_prompt(fmt, turns[:-1])
        assert prompt == hf(fmt.tokenizer, turns[:-1], None)
        (answer,) = chat.try_answers(fmt, [turns[:-1]], [turns[-1]])
        if ids[: len(prompt)] == prompt:
            assert not isinstance(answer, errors.DataError)
            assert (prompt + answer) == ids[: len(prompt + answer)]
            assert learnt[len(prompt) :] == [True] * len(answer) + [False] * (len(ids) - len(prompt + answer))
            assert answer[-1] == fmt.stop_ids[0]
        compared += 1
    assert compared >= 26


def test_thoughts_follow_the_template():
    make, template, _ = OWN["qwen3"]
    fmt = chat.chat_format(make(template=template))
    thought = [Turn(U, "why so"), Turn(A, "<think>\nwhere\n</think>\n\nso"), Turn(U, "who"), Turn(A, "nobody")]
    ids, learnt = chat.encode_dialogue(fmt, thought)
    assert learnt_texts(fmt, ids, learnt) == ["so<|im_end|>", "<think>\n\n</think>\n\nnobody<|im_end|>"]
    ids, learnt = chat.encode_dialogue(fmt, thought[:2])
    assert learnt_texts(fmt, ids, learnt) == ["<think>\nwhere\n</think>\n\nso<|im_end|>"]
    assert ids.count(backend_of(fmt.tokenizer).token_to_id("<think>")) == 1, "a thought is not encoded as letters"


def test_options_are_saved_with_the_template_and_their_tokens_are_not_trained_on(tmp_path):
    make, template, _ = OWN["qwen3"]
    fmt = chat.chat_format(make(template=template), options={"enable_thinking": False})
    assert fmt.origin == "the tokenizer's own, with enable_thinking = False"
    assert shown(fmt, chat.encode_prompt(fmt, TURNS[:1])).endswith("assistant\n<think>\n\n</think>\n\n")
    ids, learnt = chat.encode_dialogue(fmt, TURNS)
    assert learnt_texts(fmt, ids, learnt) == ["In the garden.<|im_end|>", "Nobody knows.<|im_end|>"]
    assert ids == make(template=template).apply_chat_template(
        chat.messages(TURNS), enable_thinking=False, return_dict=False
    )
    fmt.tokenizer.save_pretrained(tmp_path)
    again = chat.chat_format(tokenizers.load(tmp_path))
    assert chat.encode_prompt(again, TURNS[:3]) == chat.encode_prompt(fmt, TURNS[:3])
    # An answer with a thought does not continue a prompt that ends with an empty thought.
    (answer,) = chat.try_answers(fmt, [TURNS[:1]], ["<think>\nwhere\n</think>\n\nso"])
    assert isinstance(answer, errors.DataError) and "after its generation prompt" in str(answer)
    with pytest.raises(errors.DataError, match=r"no variable 'enable_thinkin'; it has .*enable_thinking"):
        chat.chat_format(make(template=template), options={"enable_thinkin": False})
    tools = [{"type": "function", "function": {"name": "get", "parameters": None, "strict": True}}]
    listing = "{% for tool in tools or [] %}{{ tool | tojson }}{% endfor %}" + template
    plain = make(template=listing).apply_chat_template(chat.messages(TURNS), tools=tools, tokenize=False)
    fmt = chat.chat_format(make(template=listing), options={"tools": tools})
    assert fmt.renderer.render(chat.messages(TURNS), prompt=False) == plain


def test_the_date_is_fixed_for_all_prompts():
    dated = "{{ strftime_now('%d %b %Y') }}{{ '\n' }}" + OWN["qwen2"][1]
    fmt = chat.chat_format(make_qwen(template=dated), date=datetime.date(2024, 7, 26))
    assert shown(fmt, chat.encode_prompt(fmt, TURNS[:1])).startswith("26 Jul 2024\n")
    assert fmt.origin == "the tokenizer's own, with the date 26 Jul 2024"
    today = chat.chat_format(make_qwen(template=dated))
    assert chat.encode_prompt(today, TURNS[:1]) == hf(today.tokenizer, TURNS[:1], None)
    named = "{{ date_string | default('never') }}" + OWN["qwen2"][1]
    fmt = chat.chat_format(make_qwen(template=named), options={"date_string": "1 May"})
    assert shown(fmt, chat.encode_prompt(fmt, TURNS[:1])).startswith("1 May<|im_start|>")


def test_a_template_that_refuses_a_system_turn_drops_such_prompts():
    make, template, _ = OWN["gemma"]
    fmt = chat.chat_format(make(template=template))
    counts = errors.DropCount(max_dropped=1.0)
    _, kept = chat.encode_prompts(fmt, [(Turn(S, "Be brief."), TURNS[0]), TURNS[:1]], width=99, counts=counts)
    assert kept.tolist() == [1] and counts.dropped == {"refused by the chat template": 1}


def test_tool_calls_reach_the_template_and_unused_keys_are_named():
    call = {"tool_calls": [{"type": "function", "function": {"name": "look", "arguments": {"at": "garden"}}}]}
    writes_calls = OWN["qwen2"][1].replace(
        "message['content'] +",
        "message['content'] + (message['tool_calls'] | tojson if message['tool_calls'] else '') +",
    )
    turns = [*TURNS[:1], Turn(A, "", call), Turn("tool", "so", {"name": "look"}), TURNS[3]]
    fmt = chat.chat_format(make_qwen(template=writes_calls))
    ids, learnt = chat.encode_dialogue(fmt, turns)
    texts = learnt_texts(fmt, ids, learnt)
    assert '"garden"' in texts[0] and texts[0].endswith("<|im_end|>") and texts[1] == "Nobody knows.<|im_end|>"
    assert chat.unused_keys(fmt, turns) == {"name"}
    assert '"garden"' in shown(fmt, chat.encode_answer(fmt, turns[:1], turns[1]))
    fmt = chat.chat_format(make_qwen(template=OWN["qwen2"][1]))
    assert chat.unused_keys(fmt, turns, tools=[{"name": "look"}]) == {"name", "tool_calls", "tools"}


def test_a_call_that_starts_like_a_thought_is_found_among_earlier_answers():
    make, template, _ = OWN["qwen3"]
    calls = template.replace("{{ text }}", "{{ text }}{% for c in m.tool_calls or [] %}{{ '<tool>' + c }}{% endfor %}")
    fmt = chat.chat_format(make(template=calls), options={"enable_thinking": False})
    turns = [TURNS[0], Turn(A, "", {"tool_calls": ["look"]}), Turn("tool", "so"), TURNS[3]]
    ids, learnt = chat.encode_dialogue(fmt, turns)
    assert learnt_texts(fmt, ids, learnt) == ["<tool>look<|im_end|>", "Nobody knows.<|im_end|>"]


def test_an_answer_of_weight_0_is_not_trained_on():
    fmt = format_of("qwen2")
    turns = [TURNS[0], Turn(A, TURNS[1].text, {"weight": 0}), TURNS[2], Turn(A, TURNS[3].text, {"weight": 1})]
    ids, learnt = chat.encode_dialogue(fmt, turns)
    assert learnt_texts(fmt, ids, learnt) == ["Nobody knows.<|im_end|>"]
    assert ids == chat.encode_dialogue(fmt, TURNS)[0]


@pytest.mark.parametrize("name", OWN)
def test_a_token_of_the_prompt_is_never_trained_on(name):
    make, template, _ = OWN[name]
    fmt = chat.chat_format(make(template=template))
    for turns in random_dialogues():
        try:
            prompt = fmt.renderer.render(chat.messages(turns[:-1]), prompt=True)
            ids, learnt = chat.encode_dialogue(fmt, turns, train_on="last")
        except errors.DataError:
            continue
        first = learnt.index(True) if True in learnt else len(ids)
        before = backend_of(fmt.tokenizer).decode(ids[:first], skip_special_tokens=False)
        if fmt.renderer.render(chat.messages(turns), prompt=False).startswith(prompt) and name not in (
            "llama2",
            "mistral",
        ):
            assert len(before) >= len(prompt)


# ------------------------------------------------------------------------------------------------------- stand-ins


@pytest.mark.parametrize("name", FORMATS)
def test_a_family_has_its_documented_format_and_learns_the_answer_with_its_stop_token(name):
    _, dialogue_text, answer = FORMATS[name]
    fmt = format_of(name)
    ids, learnt = chat.encode_dialogue(fmt, TURNS, train_on="last")
    # SentencePiece decoders write the prefix space of every text.
    text = shown(fmt, ids).replace("<s> [", "<s>[").replace("</s> [", "</s>[").removesuffix("\n")
    assert text == dialogue_text
    assert shown(fmt, [i for i, on in zip(ids, learnt) if on]) == answer
    prompt = chat.encode_prompt(fmt, TURNS[:3])
    end = len(ids) - learnt[::-1].index(True)
    assert ids[end - 1] == fmt.stop_ids[0] and learnt == [False] * len(prompt) + [True] * (end - len(prompt)) + [
        False
    ] * (len(ids) - end)


@pytest.mark.parametrize("name", MAKERS)
def test_boundaries_are_the_same_in_training_and_generation(name):
    fmt = format_of(name)
    for turns in (TURNS, TURNS[:2], (Turn(S, "Be brief."), *TURNS)):
        prompt, answer = chat.encode_prompt(fmt, turns[:-1]), chat.encode_answer(fmt, turns[:-1], turns[-1].text)
        ids = chat.encode_dialogue(fmt, turns)[0]
        assert ids[: len(prompt + answer)] == prompt + answer
        assert prompt == hf(fmt.tokenizer, turns[:-1], fmt.template)
        assert ids == hf(fmt.tokenizer, turns, fmt.template, prompt=False)


@pytest.mark.parametrize("name", MAKERS)
def test_the_loss_mask_covers_all_answers_or_the_last(name):
    fmt = format_of(name)
    ids, every = chat.encode_dialogue(fmt, TURNS, train_on="all")
    again, last = chat.encode_dialogue(fmt, TURNS, train_on="last")
    answers = [chat.encode_answer(fmt, TURNS[:n], TURNS[n].text) for n in (1, 3)]
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
        assert bos_id not in chat.encode_answer(fmt, TURNS[:1], "so")
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
    tokenizer = byte_level((*PHI3[:2], *take.values()), bos_token="<s>", eos_token="<|endoftext|>")
    fmt = chat.chat_format(tokenizer, model_type="phi3")
    assert shown(fmt, chat.encode_prompt(fmt, TURNS[:1])) == "<|user|>where is it?<|end|><|assistant|>"
    turns = (Turn(U, "\n why"), Turn(A, " so"))
    prompt, answer = chat.encode_prompt(fmt, turns[:1]), chat.encode_answer(fmt, turns[:1], " so")
    assert prompt == hf(tokenizer, turns[:1], fmt.template)
    assert hf(tokenizer, turns, fmt.template, prompt=False) == prompt + answer


def test_without_a_template_the_model_type_and_then_the_tokens_determine_the_family():
    for name, origin in (
        *(("llama", "Llama 2"), ("llama3", "Llama 3"), ("mistral", "Mistral"), ("gemma2", "Gemma")),
        *(("phi3", "Phi-3"), ("qwen3", "Qwen"), ("gpt2", "plain text")),
    ):
        assert format_of(name).origin.startswith(origin), name
        assert format_of(name).origin.endswith("because the tokenizer has none")
    assert chat.chat_format(make_qwen()).origin.startswith("Qwen")
    assert chat.chat_format(make_qwen(), model_type="llama").origin.startswith("Qwen")
    assert chat.chat_format(make_gpt2(), model_type="llama").origin.startswith("plain text")
    assert chat.chat_format(make_llama2()).origin.startswith("plain text"), "nothing identifies it as Llama 2"
    assert chat.chat_format(make_qwen3()).template == templates.FAMILIES[1].template


def test_a_tokenizers_template_is_kept_even_if_it_differs_from_its_family():
    template = "{% for m in messages %}{{ m.role + ': ' + m.content + '<|eot_id|>' }}{% endfor %}"
    prompt = template + "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
    fmt = chat.chat_format(make_llama3(template=prompt), model_type="llama")
    assert fmt.origin == "the tokenizer's own" and fmt.template == prompt
    ids, learnt = chat.encode_dialogue(fmt, TURNS)
    assert learnt_texts(fmt, ids, learnt) == ["In the garden.<|eot_id|>", "Nobody knows.<|eot_id|>"]


def test_the_tokenizer_argument_is_unchanged_and_the_formats_tokenizer_has_the_template(tmp_path):
    tokenizer = make_qwen(template=None)
    fmt = chat.chat_format(tokenizer, model_type="qwen2")
    assert tokenizer.chat_template is None and fmt.tokenizer.chat_template == fmt.template
    fmt.tokenizer.save_pretrained(tmp_path)
    again = chat.chat_format(tokenizers.load(tmp_path))
    assert again.origin == "the tokenizer's own" and again.template == fmt.template
    assert chat.encode_dialogue(again, TURNS) == chat.encode_dialogue(fmt, TURNS)
    own = tokenizers.train_bpe(["the cat"], vocab_size=260)
    fmt = chat.chat_format(own)
    assert fmt.tokenizer.get_vocab() == own.get_vocab() and fmt.stop_ids == (1,) and fmt.pad_id == 0


# ------------------------------------------------------------------------------------------------- template checks

MESSAGE = "{% for m in messages %}{% if m.role == 'user' %}{{ '<|im_start|>' + m.content + '<|im_end|>' }}{% else %}"
DONE = "{% endif %}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>' }}{% endif %}"
OPEN, CLOSE = "{% generation %}", "{% endgeneration %}"


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        ("{{ '<|im_start|>' + m.content + '<|im_end|>' }}" + OPEN + CLOSE, "generation marks .* exclude the end"),
        (
            "{{ '<|im_start|>' }}" + OPEN + "{{ m.content }}" + CLOSE + "{{ '<|im_end|>' }}",
            r"exclude the end of an answer from the loss: put the token '<\|im_end\|>' after the assistant's text and",
        ),
        (
            "{{ '<|im_start|>' }}" + OPEN + "{{ m.content }}" + CLOSE,
            "ends answers with different tokens|not end an ans",
        ),
        (
            OPEN + "{{ '<|im_start|>' + m.content + '<|im_end|>' }}" + CLOSE,
            "starts an answer before the end of its generation prompt",
        ),
        ("{{ 'A' + m.content + '<|im_end|>' }}", "does not show where message 2 starts and ends"),
        (
            "{{ '<|im_start|>' + m.content + m.content + '<|im_end|>' }}",
            "writes the text of an answer 2 times, not once",
        ),
        ("{{ '<|im_start|>' + m.content | upper + '<|im_end|>' }}", "does not show the text of an answer"),
        (
            "{{ '<|im_start|>' + m.content }}{% if loop.last %}{{ '<|im_end|>' }}{% else %}{{ '<|endoftext|>' }}"
            "{% endif %}",
            "ends answers with different tokens .*: end all answers with the same token",
        ),
        (
            "{{ '<|im_start|>' + m.content }}{% if not loop.last %}{{ '<|im_end|>' }}{% endif %}",
            "does not end an answer",
        ),
        ("{{ raise_exception('not today') }}", "the chat template rejects the turns: not today"),
    ],
)
def test_a_template_that_leaves_part_of_an_answer_without_a_loss_is_refused(answer, message):
    with pytest.raises(errors.DataError, match=message):
        chat.chat_format(make_qwen(), template=MESSAGE + answer + DONE)


def test_generation_marks_are_used():
    answer = "{{ '<|im_start|>' }}" + OPEN + "{{ m.content + '<|im_end|>' }}" + CLOSE
    fmt = chat.chat_format(make_qwen(), template=MESSAGE + answer + DONE)
    assert fmt.origin == "given"
    ids, learnt = chat.encode_dialogue(fmt, TURNS[:2])
    assert shown(fmt, ids) == "<|im_start|>where is it?<|im_end|><|im_start|>In the garden.<|im_end|>"
    assert learnt_texts(fmt, ids, learnt) == ["In the garden.<|im_end|>"]
    header = "{{ '<|im_start|>Well: ' }}" + OPEN + "{{ m.content + '<|im_end|>' }}" + CLOSE
    fmt = chat.chat_format(make_qwen(), template=MESSAGE + header + DONE)
    ids, learnt = chat.encode_dialogue(fmt, TURNS[:2])
    assert learnt_texts(fmt, ids, learnt) == ["In the garden.<|im_end|>"], "what is not marked is not learnt"


def test_a_tokenizer_with_neither_template_nor_eos_is_refused():
    with pytest.raises(errors.DataError, match="the chat template does not end an answer: put the token"):
        chat.chat_format(make_gpt2(template="{% for m in messages %}{{ m.content }}{% endfor %}"))
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
    answers = chat.encode_answers(fmt, [TURNS[:3], TURNS[:1]], ["so", "nobody knows"])
    rows = padding.demonstration_rows(
        prompts, answers, prompt_width=80, response_width=30, pad_id=fmt.pad_id, counts=counts
    )
    for row, answer in enumerate(answers):
        assert rows.tokens_BL[row][rows.loss_mask_BL[row]].tolist() == answer
        assert answer[-1] == fmt.stop_ids[0]
    assert (rows.tokens_BL[~rows.mask_BL] == fmt.pad_id).all()


def test_the_stop_ids_of_a_models_files_end_answers(tmp_path):
    make_qwen(template=OWN["qwen2"][1]).save_pretrained(tmp_path)
    tokenizer = tokenizers.load(tmp_path)
    stop, other = tokenizer.convert_tokens_to_ids(["<|im_end|>", "<|endoftext|>"])
    assert chat.chat_format(tokenizer).stop_ids == (stop,)
    ids = [
        other,
        stop,
        1 + max(tokenizer.get_vocab().values()),
    ]  # the model's vocabulary is larger than the tokenizer's
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": ids}))
    fmt = chat.chat_format(tokenizers.load(tmp_path))
    assert fmt.stop_ids == (stop, other) == fmt.tokenizer.stop_ids
    assert chat.chat_format(tokenizers.load(tmp_path), stop_ids=()).stop_ids == (stop,)
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": ["x"]}')
    with pytest.raises(errors.DataError, match="eos_token_id contains 'x'"):
        tokenizers.load(tmp_path)


def test_what_a_template_leaves_out_is_an_error():
    make, template, _ = OWN["qwen2"]
    silent = "{% for m in messages if m['role'] in ('user', 'assistant') %}{% set message = m %}" + template.partition(
        "{% for message in messages %}"
    )[2].replace("{% endfor %}", "{% endfor %}", 1)
    fmt = chat.chat_format(make(template=silent))
    turns = [TURNS[0], TURNS[1], Turn("human", "what is 2+2?"), TURNS[3]]
    with pytest.raises(errors.DataError, match="does not write a turn of role 'human'"):
        chat.encode_dialogue(fmt, turns)
    with pytest.raises(errors.DataError, match="does not write a turn of role 'human'"):
        chat.encode_prompt(fmt, turns[:3])
    call = {"tool_calls": [{"function": {"name": "look"}}]}
    with pytest.raises(errors.DataError, match="does not write tool calls"):
        chat.encode_dialogue(fmt, [TURNS[0], Turn(A, "", call)])
    with pytest.raises(ValueError, match="train_on must be"):
        chat.encode_dialogue(fmt, TURNS, train_on="none")
    thinking = chat.chat_format(make_qwen3(template=OWN["qwen3"][1]), options={"enable_thinking": False})
    with pytest.raises(errors.DataError, match="an option of the template may contradict the data"):
        chat.encode_dialogue(thinking, [TURNS[0], Turn(A, "<think>\nwhere\n</think>\n\nso")])


def test_unusable_arguments_of_a_format_are_refused():
    make, template, _ = OWN["qwen2"]
    for arguments, message in (
        ({"template": "{% for m in messages %}"}, "not valid Jinja: line 1"),
        ({"options": {"messages": []}}, "'messages' is not an option"),
        ({"stop_ids": [-1]}, "stop_ids contains -1"),
        ({"stop_ids": ["x"]}, "stop_ids contains 'x'"),
    ):
        with pytest.raises(errors.DataError, match=message):
            chat.chat_format(make(template=template), **arguments)
