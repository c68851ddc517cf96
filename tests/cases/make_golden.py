"""Writes tests/cases/golden_families.npz: the outputs of transformers for the models of family_cases.py.

python tests/cases/make_golden.py        # needs torch; run again after each change to family_cases.py
"""

import json
import pathlib
import tempfile

import family_cases
import numpy as np
import torch
import transformers
from safetensors import numpy as st_numpy

FILE = pathlib.Path(__file__).with_name("golden_families.npz")
COLUMNS = 3
"""Number of last columns of each prompt's logits that are stored."""


def model_of(name: str) -> transformers.PreTrainedModel:
    """Returns the torch model of a case, with weights generated from the names of its tensors."""
    given = family_cases.config_json(name)
    config = transformers.CONFIG_MAPPING[given["model_type"]].from_dict(given)
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    with torch.no_grad():
        for tensor, parameter in model.named_parameters():
            parameter.copy_(torch.tensor(family_cases.weight(tensor, tuple(parameter.shape))))
    return model


def logits(model: transformers.PreTrainedModel, tokens: np.ndarray, mask: np.ndarray) -> torch.Tensor:
    """Returns the logits of a left-padded batch."""
    positions = torch.tensor(mask).long().cumsum(1).sub(1).clamp(min=0)
    return model(torch.tensor(tokens), attention_mask=torch.tensor(mask).long(), position_ids=positions).logits


def greedy(model: transformers.PreTrainedModel, tokens: np.ndarray, mask: np.ndarray, steps: int) -> np.ndarray:
    """Returns ``steps`` greedy tokens, computed without a cache."""
    width = tokens.shape[1]
    with torch.no_grad():
        for _ in range(steps):
            chosen = logits(model, tokens, mask)[:, -1].argmax(-1).numpy()[:, None]
            tokens = np.concatenate([tokens, chosen], axis=1)
            mask = np.concatenate([mask, np.ones_like(chosen, bool)], axis=1)
    return tokens[:, width:]


def main() -> None:
    """Writes the file."""
    arrays = {}
    for name in family_cases.CASES:
        model = model_of(name)
        tokens, mask = family_cases.prompts(model.config.vocab_size)
        with torch.no_grad():
            arrays[f"{name}/logits"] = logits(model, tokens, mask)[:, -COLUMNS:].numpy()
        arrays[f"{name}/greedy"] = greedy(model, tokens, mask, family_cases.NEW_TOKENS).astype(np.int16)
        with tempfile.TemporaryDirectory() as folder:
            model.save_pretrained(folder)
            tensors = st_numpy.load_file(pathlib.Path(folder) / "model.safetensors")
        shapes = {tensor: list(x.shape) for tensor, x in sorted(tensors.items())}
        arrays[f"{name}/shapes"] = np.array(json.dumps(shapes))
        print(name, sum(p.numel() for p in model.parameters()), np.abs(arrays[f"{name}/logits"]).max())
    np.savez_compressed(FILE, **arrays)


if __name__ == "__main__":
    main()
