"""Small tokenizers of the model families, and the documented chat formats of these families."""

import functools
import random
from typing import Any

import tokenizers as library
import transformers

from rlhf_jax.data import chat, dialogues

Turn = dialogues.Turn
U, A, S = "user", "assistant", "system"
TURNS = (Turn(U, "where is it?"), Turn(A, "In the garden."), Turn(U, "why  so"), Turn(A, "Nobody knows."))
# The pre-tokenization pattern of Llama 3 and Qwen.
MODERN = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"


WORDS = ("where is the garden \n\n assistant user why so nobody knows",)


def byte_level(specials, *, template=None, pattern: str | None = MODERN, also=(), words=WORDS, size=340, **names):
    """Returns a small byte-level BPE tokenizer with a family's control tokens."""
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
    """Returns a small SentencePiece-like BPE tokenizer, which adds a space before the first word of a text."""
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
    # Merges can produce the end token, as in converted files.
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

# A dialogue of two questions and two answers, in the format documented by each family's model card or template.
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


def learnt_texts(fmt, ids, learnt):
    """Returns the texts of the runs of tokens that a loss mask selects."""
    runs = [[]]
    for i, on in zip(ids, learnt):
        if on:
            runs[-1].append(i)
        elif runs[-1]:
            runs.append([])
    return [shown(fmt, run) for run in runs if run]


def _headed(opening, ending, *, role="message['role']", before="", content="message['content']"):
    header = f"'{opening[0]}' + {role} + '{opening[1]}'"
    return (
        before
        + "{% for message in messages %}{{ "
        + f"{header} + {content} + '{ending}'"
        + " }}{% endfor %}{% if add_generation_prompt %}{{ '"
        + f"{opening[0]}assistant{opening[1]}"
        + "' }}{% endif %}"
    )


_CHATML = _headed(("<|im_start|>", "\\n"), "<|im_end|>\\n")
_DEFAULT_SYSTEM = (
    "{% if messages[0]['role'] != 'system' %}{{ '<|im_start|>system\\nYou know.<|im_end|>\\n' }}{% endif %}"
)
_GEMMA = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system turns') }}{% endif %}"
    "{% for m in messages %}{% set role = 'model' if m['role'] == 'assistant' else m['role'] %}"
    "{{ '<start_of_turn>' + role + '\\n' + m['content'] | trim + '<end_of_turn>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\\n' }}{% endif %}"
)
_PHI3 = (
    "{% for m in messages %}{{ '<|' + m['role'] + '|>\\n' + m['content'] + '<|end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\\n' }}{% else %}{{ eos_token }}{% endif %}"
)
_BRACKETS = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}{{ ' [INST] ' + m['content'] + ' [/INST]' }}"
    "{% elif m['role'] == 'assistant' %}{{ ' ' + m['content'] + eos_token }}{% else %}{{ m['content'] }}{% endif %}"
    "{% endfor %}"
)
_DEEPSEEK = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}{{ '<|user|>' + m['content'] }}"
    "{% elif m['role'] == 'assistant' %}{{ '<|assistant|>' + m['content'] + '<|end|>' }}{% else %}{{ m['content'] }}"
    "{% endif %}{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
# The thoughts of earlier answers are removed, and the last answer has a thought, which may be empty.
_QWEN3 = (
    "{% set ns = namespace(last=-1) %}{% for m in messages %}{% if m.role == 'user' %}{% set ns.last = loop.index0 %}"
    "{% endif %}{% endfor %}{% for m in messages %}{% if m.role == 'assistant' %}{% set text = m.content %}"
    "{% set thought = '' %}{% if '</think>' in text %}"
    "{% set thought = text.split('</think>')[0].rstrip('\\n').split('<think>')[-1].lstrip('\\n') %}"
    "{% set text = text.split('</think>')[-1].lstrip('\\n') %}{% endif %}{{ '<|im_start|>assistant\\n' }}"
    "{% if loop.index0 > ns.last and (loop.last or thought) %}"
    "{{ '<think>\\n' + thought.strip('\\n') + '\\n</think>\\n\\n' + text.lstrip('\\n') }}"
    "{% else %}{{ text }}{% endif %}"
    "{{ '<|im_end|>\\n' }}{% else %}{{ '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}"
    "{% if enable_thinking is defined and enable_thinking is false %}{{ '<think>\\n\\n</think>\\n\\n' }}{% endif %}"
    "{% endif %}"
)
_ANSWERS = ("In the garden.", "Nobody knows.")

OWN: dict[str, Any] = {
    "qwen2": (make_qwen, _CHATML, [f"{text}<|im_end|>" for text in _ANSWERS]),
    "default system": (make_qwen, _DEFAULT_SYSTEM + _CHATML, [f"{text}<|im_end|>" for text in _ANSWERS]),
    "qwen3": (
        make_qwen3,
        _QWEN3,
        ["In the garden.<|im_end|>", "<think>\n\n</think>\n\nNobody knows.<|im_end|>"],
    ),
    "llama3": (
        make_llama3,
        _headed(
            ("<|start_header_id|>", "<|end_header_id|>\\n\\n"),
            "<|eot_id|>",
            before="{{ bos_token }}",
            content="message['content'] | trim",
        ),
        [f"{text}<|eot_id|>" for text in _ANSWERS],
    ),
    "always prompts": (
        make_llama3,
        _headed(("<|start_header_id|>", "<|end_header_id|>\\n"), "<|eot_id|>").replace(
            "{% if add_generation_prompt %}", "{% if true %}"
        ),
        [f"{text}<|eot_id|>" for text in _ANSWERS],
    ),
    "gemma": (make_gemma, _GEMMA, [f"{text}<end_of_turn>" for text in _ANSWERS]),
    "phi3": (make_phi3, _PHI3, [f"{text}<|end|>" for text in _ANSWERS]),
    "deepseek": (make_phi3, _DEEPSEEK, [f"{text}<|end|>" for text in _ANSWERS]),
    "zephyr": (
        make_llama2,
        _headed(("<|", "|>\\n"), "</s>\\n"),
        [f"{text}</s>" for text in _ANSWERS],
    ),
    "mistral": (make_mistral, _BRACKETS, [f" {text}</s>" for text in _ANSWERS]),
    "llama2": (make_llama2, _BRACKETS, [f" {text}</s>" for text in _ANSWERS]),
}
"""Templates as tokenizers have them, without generation marks: a tokenizer, the template, and what the assistant writes
in ``TURNS``, found by hand."""

# White space and new lines at the edges, empty texts, code of templates, control tokens typed as text, emoji, text
# written from right to left, and thoughts.
TEXTS = (
    *("hi", "  two spaces  ", "\n\nnew lines\n\n", "", " ", "\n", "tab\tend\t", "a\r\nb", "{{ x }} {% y %}"),
    *("<|im_end|> and </s><end_of_turn><|eot_id|><｜end▁of▁sentence｜>", "👩‍🚀🙂", "שלום עולם مرحبا", "日本語"),
    *("<think>\nhm\n</think>\n\nfour", "\nlead", "tail\n"),
)


def random_dialogues(n=40):
    """Returns dialogues of one to three questions and answers, some after a system turn."""
    rng = random.Random(0)
    made = []
    for i in range(n):
        turns = [Turn(S, rng.choice(("Be brief.", *TEXTS[:3])))] if i % 3 == 0 else []
        for _ in range(rng.choice((1, 1, 2, 3))):
            turns += [Turn(U, rng.choice(TEXTS)), Turn(A, rng.choice(TEXTS))]
        made.append(turns)
    return made
