"""Tests of the tokenizer files of saved models."""

import json
from typing import Any

import chat_cases
import jax
import jinja2
import jinja2.sandbox
import pytest

from rlhf_jax import lm
from rlhf_jax.data import chat, dialogues, tokenizers
from rlhf_jax.lm.hub import tokenizer_files

MESSAGES = [
    {"role": "user", "content": " where\nis it? "},
    {"role": "assistant", "content": "In the garden.\n"},
    {"role": "user", "content": "why  so"},
]
MARKED = (
    "{% for m in messages %}{% if m.role == 'assistant' %}{{ '<|assistant|>' }}{% generation %}"
    "{{ m.content + '<|end|>' }}{% endgeneration %}{% else %}{{ '<|user|>' + m.content + '<|end|>' }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
SPACED = """{%- for m in messages %}
    {%- if m.role == 'assistant' %}
  {{ '<|assistant|>' }}  {%- generation -%}
      {{ m.content }}<|end|>
  {% endgeneration %}

    {%- else %}
<|user|>{{ m.content }}<|end|>
    {%- endif %}
{%- endfor %}"""


def save(folder, tokenizer, **arguments):
    cfg = lm.LMConfig(vocab_size=len(tokenizer), n_layers=1, d_model=16, n_heads=2)
    lm.save(folder, cfg, lm.init(jax.random.key(0), cfg), tokenizer, **arguments)


def plain_jinja(template, **variables):
    """Renders a template with the options of ``transformers``, but without its additional tags."""
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    return environment.from_string(template).render(messages=MESSAGES, **variables)


@pytest.mark.parametrize("template", [MARKED, SPACED])
def test_the_main_template_is_plain_jinja_and_writes_the_same_text(template, tmp_path):
    tokenizer = chat_cases.byte_level(("<|user|>", "<|assistant|>", "<|end|>"), template=template, eos_token="<|end|>")
    expected: Any = tokenizer.apply_chat_template(MESSAGES, tokenize=False)
    save(tmp_path / "m", tokenizer)
    main = (tmp_path / "m" / "chat_template.jinja").read_text()
    assert plain_jinja(main, eos_token="<|end|>", add_generation_prompt=False) == expected
    assert "generation %}" not in main.replace("-", "")
    assert tokenizers.load(tmp_path / "m").chat_template == template
    assert tokenizer.chat_template == template, "the tokenizer of the caller is unchanged"
    save(tmp_path / "again", tokenizers.load(tmp_path / "m"))
    for file in ("chat_template.jinja", "additional_chat_templates/generation_marks.jinja", "tokenizer_config.json"):
        assert (tmp_path / "again" / file).read_bytes() == (tmp_path / "m" / file).read_bytes()


def test_a_template_without_marks_is_saved_unchanged(tmp_path):
    template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    save(tmp_path / "m", chat_cases.byte_level(("<|end|>",), template=template, eos_token="<|end|>"))
    assert (tmp_path / "m" / "chat_template.jinja").read_text() == template
    assert not (tmp_path / "m" / "additional_chat_templates").exists()
    assert tokenizers.load(tmp_path / "m").chat_template == template


def test_other_named_templates_are_kept(tmp_path):
    named = {"default": MARKED, "tool_use": "tools"}
    tokenizer = chat_cases.byte_level(("<|user|>", "<|assistant|>", "<|end|>"), eos_token="<|end|>")
    tokenizer.chat_template = named
    save(tmp_path / "m", tokenizer)
    assert tokenizers.load(tmp_path / "m").chat_template == named


def test_transformers_finds_the_marked_template_by_its_name(tmp_path):
    import transformers

    trained = tokenizers.train_bpe(["where is it"], vocab_size=280)
    trained.chat_template = MARKED
    save(tmp_path / "m", trained)
    tokenizer: Any = transformers.AutoTokenizer.from_pretrained(tmp_path / "m")
    messages = chat.messages([dialogues.Turn("user", "where"), dialogues.Turn("assistant", "it")])
    marked = tokenizer.apply_chat_template(
        messages, chat_template=tokenizer_files.MARKED, return_dict=True, return_assistant_tokens_mask=True
    )
    assert marked["input_ids"] == tokenizer.apply_chat_template(messages)["input_ids"]
    learnt = [i for i, on in zip(marked["input_ids"], marked["assistant_masks"]) if on]
    assert tokenizer.decode(learnt) == "it<|end|>"


def test_every_version_has_the_class_of_the_saved_tokenizer(tmp_path):
    import transformers

    tokenizer = tokenizers.train_bpe(["where is it"], vocab_size=280, special_tokens=["<|more|>"])
    save(tmp_path / "m", tokenizer)
    fields = json.loads((tmp_path / "m" / "tokenizer_config.json").read_text())
    assert fields["tokenizer_class"] == "PreTrainedTokenizerFast" and "extra_special_tokens" not in fields
    assert fields["additional_special_tokens"] == ["<|user|>", "<|assistant|>", "<|more|>"]
    auto: Any = transformers.AutoTokenizer
    for again in (tokenizers.load(tmp_path / "m"), auto.from_pretrained(tmp_path / "m")):
        assert again.get_vocab() == tokenizer.get_vocab()
        assert again.all_special_tokens == tokenizer.all_special_tokens
        assert again.padding_side == "left"


@pytest.mark.parametrize("forced", [False, True])
def test_decoded_text_keeps_its_spaces_in_every_version(forced, tmp_path):
    """Llama 3's published tokenizer asks for a cleanup that version 5 of transformers does not carry out."""
    option = "clean_up_tokenization_spaces"
    options = {option: True, f"{option}_for_bpe_even_though_it_will_corrupt_output": forced}
    tokenizer: Any = chat_cases.byte_level(("<|end|>",), eos_token="<|end|>", **options)
    save(tmp_path / "m", tokenizer)
    assert json.loads((tmp_path / "m" / "tokenizer_config.json").read_text())[option] is forced
    again: Any = tokenizers.load(tmp_path / "m")
    ids = again("where , is it ?")["input_ids"]
    assert again.decode(ids) == tokenizer.decode(ids) == ("where, is it?" if forced else "where , is it ?")
