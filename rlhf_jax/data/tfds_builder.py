"""Builders that convert any source (see `sources`) to a tensorflow-datasets (TFDS) set of array_record files.

A prepared set can be read lazily, in any order and by many processes, and works with tools that support TFDS.
Neither writing nor reading a set requires TensorFlow::

    counts = tfds_builder.prepare(tfds_builder.RlhfRankings, "mine", {"train": "pairs.jsonl.gz"}, data_dir="sets")
    rankings, _ = readers.read_rankings(sources.Tfds("rlhf_rankings/mine", split="train", data_dir="sets"))
    rows = tfds.data_source("rlhf_rankings/mine", split="train", data_dir="sets")

A set keeps the records in the order of their source. Its text feature ``fields_json`` contains the scores, the margin
and the metadata of a record as one JSON object, because a TFDS feature would round floats to 32 bits. It also contains
the tools, and the messages of a record in which a message has more than a role and a text. The other features are:

=======================  =========================================================================
``rlhf_demonstrations``  ``prompt`` (a sequence of ``role`` and ``content``), ``response``
``rlhf_rankings``        ``prompt``, ``responses``, ``ranks`` (1 is best)
``rlhf_judged``          ``prompt``, ``response``, ``label``
``rlhf_prompts``         ``prompt``
=======================  =========================================================================

TFDS registers the builders when this module is imported. The module requires tensorflow-datasets, so no other module of
rlhf_jax imports it.
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

from rlhf_jax.data import dialogues, errors, readers, records, sources


@dataclasses.dataclass(eq=False, kw_only=True)
class Files(tfds.core.BuilderConfig):
    """Configuration of a builder. ``name`` is the name of the set, and ``splits`` maps split names to sources."""

    splits: Mapping[str, sources.Source] = dataclasses.field(default_factory=dict)
    counts: errors.DropCount = dataclasses.field(default_factory=errors.DropCount)
    """Counts dropped records and limits their share."""


class _Builder(tfds.core.GeneratorBasedBuilder, abc.ABC, skip_registration=True):
    """Common base class of the builders."""

    VERSION = tfds.core.Version("1.0.0")
    BUILDER_CONFIG_CLASS = Files
    features: Mapping[str, Any]
    read: Callable[..., tuple[list[Any], errors.DropCount]]

    def _info(self) -> tfds.core.DatasetInfo:
        turns = tfds.features.Sequence({"role": tfds.features.Text(), "content": tfds.features.Text()})
        features = {"prompt": turns, **self.features, sources.JSON_FIELD: tfds.features.Text()}
        # Without shuffling, TFDS keeps the order of the records and needs integer keys.
        return tfds.core.DatasetInfo(
            builder=self, features=tfds.features.FeaturesDict(features), disable_shuffling=True
        )

    def _split_generators(self, dl_manager: Any) -> dict[str, Any]:
        config = self.builder_config
        if not isinstance(config, Files) or not config.splits:
            raise errors.DataError(f"{self.name} needs a config that names its files; use tfds_builder.prepare")
        return {split: self._generate_examples(source) for split, source in config.splits.items()}

    def _generate_examples(self, source: sources.Source) -> Iterator[tuple[int, dict[str, Any]]]:
        config = self.builder_config
        assert isinstance(config, Files)
        read_records, _ = type(self).read(source, counts=config.counts)
        for n, record in enumerate(read_records):
            yield n, example(record)


class RlhfDemonstrations(_Builder):
    """``rlhf_demonstrations``: prompts with an answer to imitate."""

    features = {"response": tfds.features.Text()}  # noqa: RUF012
    read = staticmethod(readers.read_demonstrations)


class RlhfRankings(_Builder):
    """``rlhf_rankings``: compared answers, both pairs and rankings."""

    features = {  # noqa: RUF012
        "responses": tfds.features.Sequence(tfds.features.Text()),
        "ranks": tfds.features.Sequence(np.int32),
    }
    read = staticmethod(readers.read_rankings)


class RlhfJudged(_Builder):
    """``rlhf_judged``: answers labelled good or bad."""

    features = {"response": tfds.features.Text(), "label": np.bool_}  # noqa: RUF012
    read = staticmethod(readers.read_judged)


class RlhfPrompts(_Builder):
    """``rlhf_prompts``: prompts without answers."""

    features = {}  # noqa: RUF012
    read = staticmethod(readers.read_prompts)


def prepare(
    builder: type[_Builder],
    name: str,
    splits: Mapping[str, sources.Source],
    *,
    data_dir: str | os.PathLike[str],
    counts: errors.DropCount | None = None,
) -> errors.DropCount:
    """Writes a TFDS set, ``<builder>/<name>:1.0.0``, from one source for each split.

    Args:
        builder: `RlhfDemonstrations`, `RlhfRankings`, `RlhfJudged` or `RlhfPrompts`.
        name: Name of the set: letters, digits, ``_``, ``-`` and ``.``, with a letter or digit at the end.
        splits: Maps the name of each split, such as ``"train"``, to its source. Names consist of letters, digits and
            ``_``; ``"all"`` is reserved.
        data_dir: Directory of the prepared sets.
        counts: Counts dropped records and limits their share; see `readers.read_demonstrations`.

    Returns:
        ``counts``, or a new `errors.DropCount` if it is None.

    Raises:
        DataError: If a source cannot be read or too many of its records are dropped; the set already exists; its name
            or the name of a split is invalid; or array_record is not installed.
    """
    if not re.fullmatch(r"[A-Za-z0-9_.-]*[A-Za-z0-9]", name):
        raise errors.DataError(
            f"{name!r} is not a valid name for a set: use letters, digits, '_', '-' and '.', with a letter or digit at "
            "the end"
        )
    for split in splits:
        if split == "all" or not re.fullmatch(r"[A-Za-z0-9_]+", split):
            raise errors.DataError(
                f"{split!r} is not a valid name for a split: use letters, digits and '_', but not the name 'all'"
            )
    counts = errors.DropCount() if counts is None else counts
    config = Files(name=name, splits=dict(splits), counts=counts)
    dataset = builder(data_dir=os.fspath(data_dir), config=config, file_format="array_record")
    if os.path.exists(dataset.data_path):
        raise errors.DataError(f"{dataset.data_path} already exists; delete it, or choose a name other than {name!r}")
    try:
        dataset.download_and_prepare()
    except ImportError as error:
        raise errors.DataError(
            f"writing {dataset.data_path} needs array_record, which is available for Linux and macOS; install it with "
            f"pip install array_record ({error})"
        ) from None
    return counts


def example(record: records.Prompt) -> dict[str, Any]:
    """Converts a record to a TFDS example; `sources.plain_fields` and the parsers of `records` convert it back."""
    fields: dict[str, Any] = {"prompt": [{"role": turn.role, "content": turn.text} for turn in record.prompt]}
    others: dict[str, Any] = {"metadata": dict(record.metadata)}
    if record.tools:
        others["tools"] = record.tools
    # Messages with more than a role and a text are also stored as JSON, which replaces the features when read.
    if any(turn.extra for turn in record.prompt):
        others["prompt"] = [_message(turn) for turn in record.prompt]
    if isinstance(record, records.Demonstration):
        fields["response"] = dialogues.answer_text(record.response)
        if not isinstance(record.response, str):
            others["response"] = _message(record.response)
    if isinstance(record, records.Judged):
        fields["label"] = record.good
    if isinstance(record, records.Ranking):
        fields |= {"responses": [dialogues.answer_text(each) for each in record.responses], "ranks": list(record.ranks)}
        if not all(isinstance(each, str) for each in record.responses):
            others["responses"] = [each if isinstance(each, str) else _message(each) for each in record.responses]
        others |= {"scores": record.scores, "margin": record.margin}
    return fields | {sources.JSON_FIELD: json.dumps(others, ensure_ascii=False, allow_nan=False)}


def _message(turn: dialogues.Turn) -> dict[str, Any]:
    return {**turn.extra, "role": turn.role, "content": turn.text}
