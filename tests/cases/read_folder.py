"""Saves what an installed version of transformers computes from folders; run by tests/lm/test_old_transformers.py.

python read_folder.py FOLDER NAME...  # reads FOLDER/NAME and writes FOLDER/NAME.npz for each NAME

FOLDER contains the inputs: tokens.npz, and texts.json with texts and a conversation.
"""
# pyright: reportArgumentType=false, reportGeneralTypeIssues=false

import json
import pathlib
import sys

import numpy as np
import torch
import transformers


def read(folder: pathlib.Path) -> dict[str, np.ndarray]:
    """Returns the logits, the greedy answer and, if the folder has a tokenizer, ids and texts."""
    given = np.load(folder.parent / "tokens.npz")
    tokens, mask = torch.tensor(given["tokens"]), torch.tensor(given["mask"]).long()
    reward = "SequenceClassification" in json.loads((folder / "config.json").read_text())["architectures"][0]
    auto = transformers.AutoModelForSequenceClassification if reward else transformers.AutoModelForCausalLM
    model, info = auto.from_pretrained(folder, output_loading_info=True, attn_implementation="eager")
    wrong = {key: list(info[key]) for key in ("missing_keys", "unexpected_keys", "mismatched_keys") if info[key]}
    assert not wrong, wrong
    positions = mask.cumsum(1).sub(1).clamp(min=0)
    if reward:
        tokens = torch.where(mask.bool(), tokens, model.config.pad_token_id)
    with torch.no_grad():
        found = {"numbers": model.eval()(tokens, attention_mask=mask, position_ids=positions).logits.numpy()}
    if not reward:
        first = tokens[:1]
        answer = model.generate(first, attention_mask=torch.ones_like(first), do_sample=False, max_new_tokens=20)
        found["answer"] = answer[0, first.shape[1] :].numpy()
    if (folder / "tokenizer.json").exists():
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
        content = json.loads((folder.parent / "texts.json").read_text())
        ids = [tokenizer(text)["input_ids"] for text in content["texts"]]
        rendered = tokenizer.apply_chat_template(content["conversation"], tokenize=False, add_generation_prompt=True)
        texts = [tokenizer.decode(row) for row in ids]
        shown = {"ids": ids, "texts": texts, "rendered": rendered, "pad": tokenizer.pad_token}
        found["tokenizer"] = np.array(json.dumps(shown))
    return found


if __name__ == "__main__":
    root = pathlib.Path(sys.argv[1])
    for name in sys.argv[2:]:
        np.savez(root / f"{name}.npz", **read(root / name))
