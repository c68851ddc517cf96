"""Settings with which commands sample answers to the prompts of a file."""

from __future__ import annotations

import dataclasses

from launch import mesh_settings
from launch.run_settings import Compute, Mesh, Template
from launch.setting_checks import check_finite, require, template_options


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sampling:
    """Settings with which answers are sampled."""

    n: int = 1
    """Number of answers to each prompt."""
    temperature: float = 1.0
    """Sampling temperature. 0 chooses the most likely token."""
    top_k: int | None = None
    """Number of most likely tokens from which the next token is drawn. None uses all."""
    top_p: float | None = None
    """Total probability of the most likely tokens from which the next token is drawn. None uses all."""
    max_new_tokens: int = 256
    """Maximum number of tokens in an answer."""
    prompt_width: int | None = None
    """Maximum number of tokens in a prompt. Longer prompts lose their oldest turns or, with a single turn, are dropped;
    both are counted. None shortens only prompts that exceed the model's maximum length without --max-new-tokens."""
    batch: int = 16
    """Number of answers that are decoded together."""
    limit: int | None = None
    """Number of prompts to use, from the start of the file. None uses all."""
    max_dropped: float = 0.01
    """Maximum share of unusable prompts. A file with a larger share is refused."""
    seed: int = 0
    """Seed of the samples."""
    template: Template = dataclasses.field(default_factory=Template)
    compute: Compute = dataclasses.field(default_factory=Compute)
    mesh: Mesh = dataclasses.field(default_factory=Mesh)

    def batches(self) -> dict[str, int]:
        """Returns the number of rows that must be a multiple of --mesh.data x --mesh.fsdp, by flag."""
        return {"--batch": self.batch}


def check(settings: Sampling) -> None:
    """Raises SettingError for the first setting that is out of range."""
    check_finite(settings)
    for name in ("n", "max_new_tokens", "batch", "prompt_width", "limit", "top_k"):
        value = getattr(settings, name)
        require(value is None or value >= 1, settings, name, "at least 1")
    for name in ("temperature", "seed"):
        require(getattr(settings, name) >= 0, settings, name, "at least 0")
    require(0 <= settings.max_dropped <= 1, settings, "max_dropped", "between 0 and 1")
    require(settings.top_p is None or 0 < settings.top_p <= 1, settings, "top_p", "above 0 and at most 1")
    template_options(settings.template.options)
    mesh_settings.check(settings)
