"""Reading of ``adapter_config.json``, the settings of a PEFT adapter directory."""

from __future__ import annotations

import math
import pathlib
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

from rlhf_jax.lm.hub import tensor_files

_READ = (
    *("peft_type", "r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern", "target_modules"),
    *("exclude_modules", "layers_to_transform", "modules_to_save", "task_type", "fan_in_fan_out", "init_lora_weights"),
)
_WITHOUT_EFFECT = (
    *("auto_mapping", "base_model_name_or_path", "eva_config", "inference_mode", "layers_pattern", "lora_dropout"),
    *("megatron_core", "peft_version", "qalora_group_size", "revision"),
)
"""Fields that do not affect the computation."""
_BASE_KEPT = (True, False, "gaussian", "eva", "orthogonal")
"""Values of ``init_lora_weights`` that leave the weights of the base model unchanged."""
_HEAD = ("classifier", "score")
"""Names that PEFT gives to the head of a sequence classifier."""
MERGE = "merge the adapters in PEFT (merge_and_unload), save the model there and read it with lm.load"
"""What to do with a directory that contains more than this library can represent."""


class Settings(NamedTuple):
    """The settings of an adapter directory that affect the computation."""

    fields: Mapping[str, Any]
    source: pathlib.Path
    """Path of ``adapter_config.json``, for error messages."""

    @property
    def has_head(self) -> bool:
        """Whether PEFT saves the head of the model together with the adapters."""
        return self.fields.get("task_type") == "SEQ_CLS" or "score" in (self.fields.get("modules_to_save") or ())

    @property
    def scale(self) -> float:
        """Scale of all modules that match no pattern."""
        return self._scale(self.fields["r"], self.fields["lora_alpha"])

    def rank(self, module: str) -> int:
        """Returns the rank of a module with the given name, such as ``model.layers.0.self_attn.q_proj``."""
        return _of_pattern(self.fields.get("rank_pattern"), module, self.fields["r"])

    def scale_of(self, module: str) -> float:
        """Returns the scale of a module."""
        alpha = _of_pattern(self.fields.get("alpha_pattern"), module, self.fields["lora_alpha"])
        return self._scale(self.rank(module), alpha)

    def adapts(self, module: str, layer: int) -> bool:
        """Returns whether PEFT adapts the module, which is in the given layer."""
        targets, layers = self.fields.get("target_modules"), self.fields.get("layers_to_transform")
        if self.fields.get("exclude_modules") and _matches(self.fields["exclude_modules"], module):
            return False
        layers = [layers] if isinstance(layers, int) else layers
        if layers and layer not in layers:
            return False
        return not isinstance(targets, list | str) or targets == "all-linear" or _matches(targets, module)

    def _scale(self, rank: int, alpha: float) -> float:
        return alpha / (math.sqrt(rank) if self.fields.get("use_rslora") else rank)


def read(source: pathlib.Path, *, fan_in_fan_out: bool) -> Settings:
    """Returns the settings in ``adapter_config.json``.

    Raises:
        FileNotFoundError: The file is missing.
        ValueError: A field is missing or senseless, or requests more than W + scale A B and a head.
    """
    fields = tensor_files.read_json(source)
    for field in ("peft_type", "r", "lora_alpha"):
        if field not in fields:
            raise ValueError(f"{source} lacks the field {field}")
    known = {"peft_type": ("LORA",), "init_lora_weights": _BASE_KEPT, "fan_in_fan_out": (fan_in_fan_out,)}
    for field, value in fields.items():
        if field in known:
            refused = value not in known[field]
        elif field == "modules_to_save":
            refused = not isinstance(value or [], list) or any(name not in _HEAD for name in value or [])
        else:
            # Unknown fields of newer PEFT versions are accepted only if they are switched off.
            refused = field not in _READ + _WITHOUT_EFFECT and value not in (None, False, 0, "", "none", [], {})
        if refused:
            raise ValueError(f"{source} has {field} = {value!r}, which is not supported for this model; {MERGE}")
    for field, good, what in (
        ("r", _is_rank, "an integer of at least 1"),
        ("lora_alpha", _is_alpha, "a number above 0"),
    ):
        if not good(fields[field]):
            raise ValueError(f"{source} has {field} = {fields[field]!r}; it must be {what}")
        pattern = f"{'rank' if field == 'r' else 'alpha'}_pattern"
        for name, value in _patterns(source, pattern, fields.get(pattern)):
            if not good(value):
                raise ValueError(f"{source} has {value!r} for {name!r} in {pattern}; it must be {what}")
    for field in ("target_modules", "exclude_modules"):
        if isinstance(fields.get(field), str):
            _check_regex(source, field, fields[field])
    return Settings(fields, source)


def _patterns(source: pathlib.Path, field: str, patterns: Any) -> list[tuple[str, Any]]:
    if not isinstance(patterns or {}, dict):
        raise ValueError(f"{source} has {field} = {patterns!r}; it must be an object of module names and numbers")
    for name in patterns or {}:
        _check_regex(source, field, name)
    return list((patterns or {}).items())


def _check_regex(source: pathlib.Path, field: str, regex: str) -> None:
    try:
        re.compile(regex)
    except re.error as error:
        raise ValueError(f"{source}: {regex!r} in {field} is not a valid regular expression: {error}") from error


def _of_pattern(patterns: Mapping[str, Any] | None, module: str, default: Any) -> Any:
    """Returns the value of the first pattern that matches the end of the module's name, as PEFT does."""
    return next((x for name, x in (patterns or {}).items() if re.fullmatch(rf"(.*\.)?({name})", module)), default)


def _matches(targets: str | list[str], module: str) -> bool:
    if isinstance(targets, str):
        return re.fullmatch(targets, module) is not None
    return any(f".{module}".endswith(f".{target}") for target in targets)


def _is_rank(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def _is_alpha(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < math.inf
