"""Records as token rows: rows are those of the chat template; what it does not write is dropped or counted."""

import numpy as np
from chat_cases import OWN, TURNS, A, Turn, U, hf, make_qwen, make_qwen3, shown

from rlhf_jax.data import chat, encoding, errors, records

CALL = {"tool_calls": [{"type": "function", "function": {"name": "look", "arguments": {"at": "the garden"}}}]}
WIDTHS = {"prompt_width": 100, "response_width": 200}
WRITES_CALLS = OWN["qwen2"][1].replace(
    "message['content'] +", "message['content'] + (message['tool_calls'] | tojson if message['tool_calls'] else '') +"
)


def lenient():
    return errors.DropCount(max_dropped=1.0)


def test_rows_are_those_of_the_template_and_keep_tool_calls():
    record = records.Demonstration(prompt=TURNS[:1], response=Turn(A, "so", CALL), tools=({"name": "look"},))
    fmt = chat.chat_format(make_qwen(template=WRITES_CALLS))
    counts = lenient()
    rows, kept = encoding.encode_demonstrations(fmt, [record], counts=counts, **WIDTHS)
    assert kept.tolist() == [0]
    ids = rows.tokens_BL[0][rows.mask_BL[0]].tolist()
    whole = hf(fmt.tokenizer, [*record.prompt, record.response], None, prompt=False)
    assert ids == whole[: len(ids)] and shown(fmt, whole[len(ids) :]) == "\n"
    learnt = shown(fmt, rows.tokens_BL[0][rows.loss_mask_BL[0]].tolist())
    assert learnt.startswith('so[{"type"') and learnt.endswith("<|im_end|>") and '"the garden"' in learnt
    assert counts.unused == {"tools": 1} and counts.dropped == {}


def test_what_the_template_does_not_write_is_counted_and_an_answer_without_text_is_dropped():
    fmt = chat.chat_format(make_qwen(template=OWN["qwen2"][1]))
    pairs = [
        records.Ranking(prompt=TURNS[:1], responses=(Turn(A, "so", CALL), "no"), ranks=(1, 2)),
        records.Ranking(prompt=TURNS[:1], responses=(Turn(A, "", CALL), "no"), ranks=(1, 2)),
        records.Ranking(prompt=TURNS[:1], responses=(Turn(A, "so", CALL), Turn(A, "so")), ranks=(1, 2)),
        records.Ranking(prompt=(Turn(U, "is </s> or <|im_end|>"),), responses=("so", "no"), ranks=(1, 2)),
    ]
    counts = lenient()
    rows, kept = encoding.encode_rankings(fmt, pairs, counts=counts, **WIDTHS)
    assert kept.tolist() == [0, 3] and len(rows.ranks_BK) == 2
    assert counts.dropped == {
        "the chat template does not write tool calls": 1,
        "same answer within the width": 1,
    }
    assert counts.unused == {"tool_calls": 2}
    assert counts.noted == {"a text contains the spelling of a special token": 1}
    noted = "noted 1 (a text contains the spelling of a special token 1)"
    assert counts.report().endswith(f"fields with text that are not used: 'tool_calls' 2, {noted}")


def test_an_answer_that_does_not_continue_its_prompt_is_dropped():
    fmt = chat.chat_format(make_qwen3(template=OWN["qwen3"][1]), options={"enable_thinking": False})
    thought = "<think>\nwhere\n</think>\n\nso"
    demonstrations = [records.Demonstration(prompt=TURNS[:1], response=text) for text in ("so", thought, "no")]
    counts = lenient()
    rows, kept = encoding.encode_demonstrations(fmt, demonstrations, counts=counts, **WIDTHS)
    assert kept.tolist() == [0, 2] and kept.dtype == np.int64 and len(rows.tokens_BL) == 2
    assert counts.dropped == {"the chat template does not write the answer after the prompt": 1}
