"""Batches made with grain: shuffling, repetition, division among hosts, and exact resumption.

The batch of a step depends on the data and on settings such as the seed, but not on the number of hosts. Each host
reads an equal share of the rows of every batch, so all hosts run the same number of steps.

The state of a grain iterator is only an index, which would select different batches from different data.
`Batches.get_state` therefore adds a fingerprint of everything that determines the batches, and `Batches.set_state`
rejects a state with a different fingerprint. Use these two methods in a custom training loop. With `train.loop.fit`,
use ``batch_at`` and ``fingerprint`` instead::

    batches = pipeline.from_arrays(rows, batch_size=64, seed=0)
    fit(..., batch_at=batches.batch_at, fingerprint=batches.fingerprint)

`batching` is an alternative without grain, for data that fits in memory and needs no prefetching.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import jax
import numpy as np

from rlhf_jax.data import batching, errors

if TYPE_CHECKING:
    import grain

_ORDER_SAMPLE = 16
"""Number of indices at the start of the first epoch that the fingerprint includes, to detect a grain version that
shuffles differently. The number is small because grain looks up indices slowly for small data sets."""


class Batches:
    """A finite or endless iterator over batches; created by `from_arrays` and `from_source`."""

    def __init__(self, dataset: grain.MapDataset, *, endless: bool, fingerprint: dict[str, Any], prefetch: int) -> None:
        """Starts an iterator; use `from_arrays` or `from_source` instead.

        Args:
            dataset: This host's batches.
            endless: Whether ``dataset`` repeats without end.
            fingerprint: Everything that determines the batches; see the attribute of this name.
            prefetch: Number of batches that a separate thread keeps ready.
        """
        import grain

        self._dataset = dataset
        self._endless = endless
        self.fingerprint = fingerprint
        """Everything that determines the batches, as values that JSON can represent: ``data`` and ``identity`` (see
        `from_source`), number of records, seed, batch size, epochs, ``shuffle``, ``drop_last``, and a digest of the
        first indices of the first epoch. The fingerprint is the same on all hosts."""
        options = grain.ReadOptions(num_threads=min(prefetch, 1), prefetch_buffer_size=prefetch)
        self._iterator = iter(dataset.to_iter_dataset(options))

    @property
    def steps(self) -> int | None:
        """Total number of batches; None if the batches are endless."""
        return None if self._endless else len(self._dataset)

    def batch_at(self, step: int) -> Any:
        """Returns this host's rows of the batch at ``step``, counted from 0, without changing the iterator's position.

        Raises:
            IndexError: If there is no such step.
        """
        if not 0 <= step < len(self._dataset):
            raise IndexError(f"there is no step {step}; the steps are 0 to {len(self._dataset) - 1}")
        return self._dataset[step]

    def __iter__(self) -> Batches:
        """Returns this object; all loops over it share one position."""
        return self

    def __next__(self) -> Any:
        """Returns this host's rows of the next batch."""
        return next(self._iterator)

    def get_state(self) -> dict[str, Any]:
        """Returns the position and the fingerprint, which `checkpoint.Checkpoints.save` can store as metadata."""
        return {"fingerprint": dict(self.fingerprint), "grain": self._iterator.get_state()}

    def set_state(self, state: Mapping[str, Any]) -> None:
        """Restores the position at which `get_state` was called.

        Raises:
            DataError: If the state was not returned by `get_state`, or its fingerprint differs, for example because the
                data, the seed or the batch size has changed.
        """
        saved, position = state.get("fingerprint"), state.get("grain")
        if not isinstance(saved, Mapping) or not isinstance(position, Mapping):
            raise errors.DataError("not a state returned by get_state: it must contain 'fingerprint' and 'grain'")
        for name in dict.fromkeys([*self.fingerprint, *saved]):
            if saved.get(name) != self.fingerprint.get(name):
                raise errors.DataError(
                    f"cannot resume these batches: the state was saved with {name} = {saved.get(name)!r}, but now "
                    f"{name} = {self.fingerprint.get(name)!r}"
                )
        if any(not isinstance(index, int) for index in position.values()):
            raise errors.DataError("not a state returned by get_state: the index in 'grain' is not a whole number")
        try:
            self._iterator.set_state(dict(position))
        except (KeyError, TypeError, IndexError, ValueError) as error:
            raise errors.DataError(f"not a state returned by get_state: grain cannot resume ({error})") from None

    def close(self) -> None:
        """Stops the prefetching thread. The iterator cannot be used afterwards; `batch_at` still can."""
        self._iterator.close()


def from_arrays(
    arrays: Any,
    *,
    batch_size: int,
    seed: int,
    epochs: int | None = None,
    shuffle: bool = True,
    drop_last: bool = False,
    host: int = 0,
    hosts: int = 1,
    prefetch: int = 2,
) -> Batches:
    """Returns batches of the rows of arrays, such as the arrays in `types.Comparisons` or `padding.Rows`.

    >>> import numpy as np
    >>> from rlhf_jax.data import pipeline
    >>> batches = pipeline.from_arrays(np.arange(5), batch_size=2, seed=0, epochs=1, shuffle=False, prefetch=0)
    >>> [batch.tolist() for batch in batches]
    [[0, 1], [2, 3]]

    Args:
        arrays: A pytree of arrays with the same number of rows; each row is one record.
        batch_size: Number of rows in a batch, over all hosts; a multiple of ``hosts``. It may exceed the number of
            records if the epochs together fill a batch and ``drop_last`` is not set.
        seed: Seed of the shuffle; each epoch has a different order.
        epochs: Number of passes over the records; None means endless batches. Records at the end of the last epoch that
            do not fill a batch are dropped.
        shuffle: Whether to shuffle; otherwise the records keep their order.
        drop_last: Whether to drop the records of each epoch that do not fill a batch, so that no batch spans two
            epochs.
        host: Index of this host, usually ``jax.process_index()``. Each host reads one block of the rows of a batch, and
            the blocks are in the order of the hosts; ``jax.make_array_from_process_local_data`` assembles the blocks.
        hosts: Number of hosts, usually ``jax.process_count()``.
        prefetch: Number of batches that a separate thread keeps ready; 0 disables prefetching.

    Returns:
        The batches of this host.

    Raises:
        DataError: If there are no records or too few for one batch, or the arrays differ in their number of rows.
        ValueError: If an argument is out of range.
    """
    sizes = {len(leaf) for leaf in jax.tree.leaves(arrays)}
    if len(sizes) > 1:
        raise errors.DataError(f"the arrays differ in their number of rows: {', '.join(map(str, sorted(sizes)))}")

    def rows(indices: list[int]) -> Any:
        return jax.tree.map(lambda leaf: leaf[np.asarray(indices)], arrays)

    return from_source(
        range(max(sizes, default=0)),
        collate=rows,
        data=batching.fingerprint(arrays),
        batch_size=batch_size,
        seed=seed,
        epochs=epochs,
        shuffle=shuffle,
        drop_last=drop_last,
        host=host,
        hosts=hosts,
        prefetch=prefetch,
    )


def from_source(
    source: Sequence[Any],
    *,
    collate: Callable[[list[Any]], Any],
    batch_size: int,
    seed: int,
    epochs: int | None = None,
    shuffle: bool = True,
    drop_last: bool = False,
    host: int = 0,
    hosts: int = 1,
    prefetch: int = 2,
    data: str | None = None,
    identity: Any = None,
) -> Batches:
    """Returns batches of any sequence of records, such as a list or a data set that is read lazily from disk.

    Args:
        source: A sequence of records, such as those from a reader in `readers` or from `sources.tfds_source`.
        collate: Function that converts a list of records to a batch, such as token rows. It must be pure, and should
            always return the same shapes. It receives only this host's records and, with prefetching, runs in a
            separate thread.
        batch_size: See `from_arrays`.
        seed: See `from_arrays`.
        epochs: See `from_arrays`.
        shuffle: See `from_arrays`.
        drop_last: See `from_arrays`.
        host: See `from_arrays`.
        hosts: See `from_arrays`.
        prefetch: See `from_arrays`.
        data: String that identifies the data in the fingerprint. None means the `fingerprint` of ``source``; computing
            it reads all records once.
        identity: Identifies ``collate`` in the fingerprint, because a function cannot be hashed. It can be any value
            that `fingerprint` accepts as a record, such as ``{"tokenizer": "gpt2", "prompt_width": 256}``. A state that
            was saved with a different identity is rejected. With None, a change of ``collate`` is not detected.

    Returns:
        The batches of this host.

    Raises:
        DataError: If there are no records, or too few for one batch.
        TypeError: If ``source`` or ``identity`` contains a value that `fingerprint` does not accept.
        ValueError: If an argument is out of range.
    """
    import grain

    if batch_size < 1 or hosts < 1 or batch_size % hosts or (epochs is not None and epochs < 1) or prefetch < 0:
        raise ValueError(
            f"batch_size = {batch_size} must be a multiple of hosts = {hosts}, both at least 1; epochs = {epochs} must "
            f"be at least 1, or None; prefetch = {prefetch} must be at least 0"
        )
    if not 0 <= host < hosts:
        raise ValueError(f"host = {host} must be at least 0 and less than hosts = {hosts}")
    n, get_many = len(source), getattr(source, "__getitems__", None)
    if n < 1:
        raise errors.DataError("there are no records to make batches from")
    indices = grain.MapDataset.range(n)
    if shuffle:
        # In grain, epoch e of seed s has the same order as epoch 0 of seed s + e. Without the hash, runs with
        # consecutive seeds would share epochs.
        indices = indices.shuffle(int.from_bytes(hashlib.sha256(f"{int(seed)}".encode()).digest()[:4], "little"))
    first_indices = [int(indices[i] or 0) for i in range(min(n, _ORDER_SAMPLE))]
    batches_fingerprint = {
        "data": fingerprint(source) if data is None else data,
        "records": n,
        "seed": int(seed),
        "batch_size": batch_size,
        "epochs": epochs,
        "shuffle": shuffle,
        "drop_last": drop_last,
        "order": hashlib.sha256(repr(first_indices).encode()).hexdigest()[:16],
        **({} if identity is None else {"identity": fingerprint([identity])}),
    }
    share = batch_size // hosts

    def take_share(batch: Sequence[int]) -> np.ndarray:
        return np.asarray(batch[host * share : (host + 1) * share], np.int64)

    def fetch(batch: np.ndarray) -> Any:
        rows = batch.tolist()
        return collate(list(get_many(rows) if get_many is not None else [source[row] for row in rows]))

    dataset = indices if drop_last else indices.repeat(epochs)
    dataset = dataset.batch(batch_size, drop_remainder=True, batch_fn=take_share)
    if len(dataset) < 1:
        raise errors.DataError(
            f"{n} records with epochs = {epochs} and drop_last = {drop_last} do not fill one batch of {batch_size}"
        )
    dataset = dataset.repeat(epochs) if drop_last else dataset
    return Batches(dataset.map(fetch), endless=epochs is None, fingerprint=batches_fingerprint, prefetch=prefetch)


def fingerprint(source: Sequence[Any]) -> str:
    """Returns the SHA-256 digest of records, in hexadecimal.

    Records may consist of dataclasses, dictionaries, lists, tuples, strings, bytes, numbers and arrays. Order and types
    matter: for example, a list and a tuple with the same items have different fingerprints. Dataclass fields that are
    excluded from comparison, such as `records.Prompt.location`, are ignored.

    Raises:
        TypeError: If a record contains a value of another type, or a dictionary with a key that is not a string.
    """
    digest = hashlib.sha256()
    for i in range(len(source)):
        digest.update(json.dumps(_tagged(source[i]), sort_keys=True).encode() + b"\n")
    return digest.hexdigest()


def _tagged(value: Any) -> Any:
    """Converts a value to JSON in which every list starts with the name of the type that it encodes."""
    if isinstance(value, np.ndarray | np.generic):
        array = np.asarray(value)
        return ["array", array.dtype.str.lstrip("<>=|"), list(array.shape), _tagged(array.tolist())]
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, bytes):
        return ["bytes", value.hex()]
    if isinstance(value, list | tuple):
        return ["tuple" if isinstance(value, tuple) else "list", *map(_tagged, value)]
    if isinstance(value, Mapping):
        for key in value:
            if not isinstance(key, str):
                raise TypeError(f"cannot fingerprint a dictionary with the key {key!r}; keys must be strings")
        return ["dict", {key: _tagged(item) for key, item in value.items()}]
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {f.name: _tagged(getattr(value, f.name)) for f in dataclasses.fields(value) if f.compare}
        return ["dataclass", type(value).__name__, fields]
    raise TypeError(
        f"cannot fingerprint a {type(value).__name__}; use dataclasses, dictionaries, lists, tuples, strings, bytes, "
        "numbers or arrays"
    )
