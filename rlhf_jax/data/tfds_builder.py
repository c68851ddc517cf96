"""Builders that turn any source of `files` into a set of tensorflow-datasets, in array_record files.

Why: a prepared set is read lazily, at any place and by many processes, and every tool that knows TFDS knows it. No
TensorFlow is needed, to write or to read::

    counts = tfds_builder.prepare(tfds_builder.RlhfRankings, "mine", {"train": "pairs.jsonl.gz"}, data_dir="sets")
    rankings, _ = reading.read_rankings(files.Tfds("rlhf_rankings/mine", split="train", data_dir="sets"))
    rows = tfds.data_source("rlhf_rankings/mine", split="train", data_dir="sets")

The records of a set stand in the order of their files, with these features, and ``fields_json``, a text that holds all
else that a record said, as one JSON object (numbers too: TFDS keeps 32 bits of a float):

=======================  =========================================================================
``rlhf_demonstrations``  ``prompt`` (a sequence of ``role`` and ``content``), ``response``
``rlhf_rankings``        ``prompt``, ``responses``, ``ranks`` (1 is best)
``rlhf_judged``          ``prompt``, ``response``, ``label``
``rlhf_prompts``         ``prompt``
=======================  =========================================================================

TFDS finds builders by importing them, which is why this is a module of the package. It imports tensorflow-datasets, and
nothing else in the package imports it.
"""

from __future__ import annotations

import abc
import dataclasses
import json
import os
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
import tensorflow_datasets as tfds

from rlhf_jax.data import errors, files, reading, records


@dataclasses.dataclass(eq=False, kw_only=True)
class Files(tfds.core.BuilderConfig):
    """A set of a user's own: its name, and where each split comes from."""

    sources: Mapping[str, files.Source] = dataclasses.field(default_factory=dict)
    counts: errors.DropCount = dataclasses.field(default_factory=errors.DropCount)
    """Where broken records are counted, and how many may be."""


class _Builder(tfds.core.GeneratorBasedBuilder, abc.ABC, skip_registration=True):
    """What the builders share."""

    VERSION = tfds.core.Version("1.0.0")
    BUILDER_CONFIG_CLASS = Files
    features: Mapping[str, Any]
    read: Callable[..., tuple[list[Any], errors.DropCount]]

    def _info(self) -> tfds.core.DatasetInfo:
        turns = tfds.features.Sequence({"role": tfds.features.Text(), "content": tfds.features.Text()})
        features = {"prompt": turns, **self.features, files.JSON_FIELD: tfds.features.Text()}
        # Without its shuffle TFDS keeps the order of the files, and needs whole numbers as keys.
        return tfds.core.DatasetInfo(
            builder=self, features=tfds.features.FeaturesDict(features), disable_shuffling=True
        )

    def _split_generators(self, dl_manager: Any) -> dict[str, Any]:
        config = self.builder_config
        if not isinstance(config, Files) or not config.sources:
            raise errors.DataError(f"{self.name} needs a config that names its files: see tfds_builder.prepare")
        return {split: self._generate_examples(source) for split, source in config.sources.items()}

    def _generate_examples(self, source: files.Source) -> Iterator[tuple[int, dict[str, Any]]]:
        config = self.builder_config
        assert isinstance(config, Files)
        found, _ = type(self).read(source, counts=config.counts)
        for n, record in enumerate(found):
            yield n, example(record)


class RlhfDemonstrations(_Builder):
    """``rlhf_demonstrations``: answers to imitate."""

    features = {"response": tfds.features.Text()}  # noqa: RUF012
    read = staticmethod(reading.read_demonstrations)


class RlhfRankings(_Builder):
    """``rlhf_rankings``: compared answers, pairs and rankings alike."""

    features = {  # noqa: RUF012
        "responses": tfds.features.Sequence(tfds.features.Text()),
        "ranks": tfds.features.Sequence(np.int32),
    }
    read = staticmethod(reading.read_rankings)


class RlhfJudged(_Builder):
    """``rlhf_judged``: answers with a thumb up or down."""

    features = {"response": tfds.features.Text(), "label": np.bool_}  # noqa: RUF012
    read = staticmethod(reading.read_judged)


class RlhfPrompts(_Builder):
    """``rlhf_prompts``: what is asked."""

    features = {}  # noqa: RUF012
    read = staticmethod(reading.read_prompts)


def prepare(
    builder: type[_Builder],
    name: str,
    sources: Mapping[str, files.Source],
    *,
    data_dir: str | os.PathLike[str],
    counts: errors.DropCount | None = None,
) -> errors.DropCount:
    """Write a TFDS set, ``<builder>/<name>:1.0.0``, from files.

    Args:
      builder: `RlhfDemonstrations`, `RlhfRankings`, `RlhfJudged` or `RlhfPrompts`.
      name: of the set; letters, digits, ``_``, ``-`` and ``.``, a letter or digit at the end.
      sources: for each split, such as ``"train"``, where its records come from; letters, digits and ``_``.
      data_dir: where TFDS keeps its sets.
      counts: of records that are dropped; see `reading.read_demonstrations`.

    Returns:
      ``counts``.

    Raises:
      DataError: a source cannot be read, or has too many broken records; the name is taken, or is none,
        or that of a split; array_record is missing.
    """
    if not re.fullmatch(r"[A-Za-z0-9_.-]*[A-Za-z0-9]", name):
        raise errors.DataError(f"{name!r} is no name for a set: it may hold letters, digits, '_', '-' and '.'")
    for split in sources:
        if split == "all" or not re.fullmatch(r"[A-Za-z0-9_]+", split):
            raise errors.DataError(
                f"{split!r} is no name for a split: it may hold letters, digits and '_', and 'all' is taken"
            )
    counts = errors.DropCount() if counts is None else counts
    config = Files(name=name, sources=dict(sources), counts=counts)
    made = builder(data_dir=os.fspath(data_dir), config=config, file_format="array_record")
    if os.path.exists(made.data_path):
        raise errors.DataError(f"{made.data_path} is there already; delete it, or choose another name than {name!r}")
    try:
        made.download_and_prepare()
    except ImportError as error:
        raise errors.DataError(
            f"writing {made.data_path} needs array_record, which has packages for Linux and macOS: "
            f"pip install array_record ({error})"
        ) from None
    return counts


def example(record: records.Prompt) -> dict[str, Any]:
    """A record as an example of its builder; `files.plain_fields` and the parsers of `records` undo it."""
    fields: dict[str, Any] = {"prompt": [{"role": turn.role, "content": turn.text} for turn in record.prompt]}
    others: dict[str, Any] = {"metadata": dict(record.metadata)}
    if isinstance(record, records.Demonstration):
        fields["response"] = record.response
    if isinstance(record, records.Judged):
        fields["label"] = record.good
    if isinstance(record, records.Ranking):
        fields |= {"responses": list(record.responses), "ranks": list(record.ranks)}
        others |= {"scores": record.scores, "margin": record.margin}
    return fields | {files.JSON_FIELD: json.dumps(others, ensure_ascii=False, allow_nan=False)}
