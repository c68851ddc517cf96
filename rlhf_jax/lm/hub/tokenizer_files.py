"""Writing of a tokenizer's files in a form that older versions of ``transformers`` and other libraries read too."""

from __future__ import annotations

import pathlib
import re
from typing import Any

from rlhf_jax.lm.hub import tensor_files

MARKED = "generation_marks"
"""Name of the chat template with generation marks among the additional templates."""

_CONFIG = "tokenizer_config.json"
_FORCED = "clean_up_tokenization_spaces_for_bpe_even_though_it_will_corrupt_output"
_MARK = re.compile(r"\{%([-+]?)\s*(end)?generation\s*([-+]?)%\}")


def write(folder: pathlib.Path, tokenizer: Any, *, pad_id: int | None) -> None:
    """Saves a tokenizer.

    The files differ from those that ``save_pretrained`` writes in the following ways:

    * The class is ``PreTrainedTokenizerFast``, which all versions know and which uses ``tokenizer.json`` unchanged.
    * A chat template with generation marks, a tag that only ``transformers`` knows, is saved as the additional template
      `MARKED`. The main template writes the same text without marks.
    * Versions before 5 remove spaces before punctuation from decoded text if ``clean_up_tokenization_spaces`` is set;
      version 5 ignores it for BPE tokenizers, so it is saved as false for them.
    * The pad token has the id ``pad_id``; if that is None, there is no pad token.
    * How this process loaded the tokenizer is left out.

    Args:
        folder: Directory to write to.
        tokenizer: Object with a ``save_pretrained`` method.
        pad_id: Id of the pad token.
    """
    tokenizer.save_pretrained(folder)
    _split_template(folder)
    if not (folder / _CONFIG).exists() or not (folder / "tokenizer.json").exists():
        return
    fields = tensor_files.read_json(folder / _CONFIG)
    fields = {name: value for name, value in fields.items() if name not in ("is_local", "local_files_only")}
    fields["tokenizer_class"] = "PreTrainedTokenizerFast"
    if isinstance(fields.get("extra_special_tokens"), list):
        # Versions before 5 have this name for the list and expect a dict under the other one.
        fields["additional_special_tokens"] = fields.pop("extra_special_tokens")
    model = getattr(getattr(tokenizer, "backend_tokenizer", None), "model", None)
    if type(model).__name__ == "BPE" and not fields.get(_FORCED):
        fields["clean_up_tokenization_spaces"] = False
    if pad_id != getattr(tokenizer, "pad_token_id", None):
        fields["pad_token"] = None if pad_id is None else tokenizer.convert_ids_to_tokens(pad_id)
    tensor_files.write_json(folder / _CONFIG, dict(sorted(fields.items())))


def restore_marks(template: Any) -> Any:
    """Returns a tokenizer's chat template or templates with the marked template as the main one, if there is one."""
    if not isinstance(template, dict) or MARKED not in template:
        return template
    others = {name: text for name, text in template.items() if name not in ("default", MARKED)}
    return {"default": template[MARKED], **others} if others else template[MARKED]


def without_marks(template: str) -> str:
    """Returns a template that writes the same text without generation marks.

    Each mark becomes a tag without an effect, so that white space is removed next to it as before.
    """
    return _MARK.sub(lambda mark: f"{{%{mark[1]} {'endif' if mark[2] else 'if true'} {mark[3]}%}}", template)


def _split_template(folder: pathlib.Path) -> None:
    main = folder / "chat_template.jinja"
    marked = main.read_text(encoding="utf-8") if main.exists() else ""
    if _MARK.search(marked):
        more = folder / "additional_chat_templates"
        more.mkdir(exist_ok=True)
        (more / f"{MARKED}.jinja").write_text(marked, encoding="utf-8")
        main.write_text(without_marks(marked), encoding="utf-8")
