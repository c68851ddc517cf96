"""Batches through grain: shuffled by seed, repeated, shared among hosts, and to be gone on with exactly.

The batch of a step is a function of the data, the seed, the batch size and the step, and of nothing else: not of how
many hosts there are. Each host reads its own rows of every batch, so all hosts run the same number of steps, their rows
have none in common, and together they are the batch.

grain's own state is an index alone, which means other batches in other data. `Batches.get_state` puts beside it what it
belongs to, and `Batches.set_state` refuses all else. Use either that, for a loop of your own, or ``batch_at`` and
``fingerprint`` for `train.loop.fit`::

    batches = pipeline.from_arrays(rows, batch_size=64, seed=0)
    fit(..., batch_at=batches.batch_at, fingerprint=batches.fingerprint)

For data that fits in memory and has no need of read-ahead, `batching` does the same without grain.
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

_PROBE = 16
"""So many places of the first epoch's order are part of a fingerprint: another grain may shuffle in another way. Few,
since grain takes long over each place where there are few records.
"""


class Batches:
    """An endless or finite iterator over batches; made by `from_arrays` and `from_source`."""

    def __init__(self, dataset: grain.MapDataset, *, endless: bool, fingerprint: dict[str, Any], prefetch: int) -> None:
        """See `from_arrays`."""
        import grain

        self._dataset = dataset
        self._endless = endless
        self.fingerprint = fingerprint
        """What the batches hang on, as JSON: data, number of records, seed, batch size, epochs, and whether they are
        shuffled and cut at the end of an epoch; ``identity`` where `from_source` was given one. The same on every
        host."""
        options = grain.ReadOptions(num_threads=min(prefetch, 1), prefetch_buffer_size=prefetch)
        self._iterator = iter(dataset.to_iter_dataset(options))

    @property
    def steps(self) -> int | None:
        """The number of batches in all, or None where there is no end."""
        return None if self._endless else len(self._dataset)

    def batch_at(self, step: int) -> Any:
        """This host's rows of the batch at a step, from 0: a pure function, which leaves the iterator where it is.

        Raises:
          IndexError: there is no such step.
        """
        if not 0 <= step < len(self._dataset):
            raise IndexError(f"there is no step {step}: the batches are {len(self._dataset)}")
        return self._dataset[step]

    def __iter__(self) -> Batches:
        """The object itself: there is one position."""
        return self

    def __next__(self) -> Any:
        """This host's rows of the next batch."""
        return next(self._iterator)

    def get_state(self) -> dict[str, Any]:
        """Where the iterator stands, and in what, as JSON: fit for the metadata of `checkpoint.Checkpoints.save`."""
        return {"fingerprint": dict(self.fingerprint), "grain": self._iterator.get_state()}

    def set_state(self, state: Mapping[str, Any]) -> None:
        """Go on where `get_state` was called: the next batch is the one that came next there.

        Raises:
          DataError: the state is of other data, another seed, batch size, or whatever else the order hangs on; or it is
            no such state.
        """
        theirs, position = state.get("fingerprint"), state.get("grain")
        if not isinstance(theirs, Mapping) or not isinstance(position, Mapping):
            raise errors.DataError("this is no state of batches: it has no 'fingerprint' and 'grain'")
        for name in dict.fromkeys([*self.fingerprint, *theirs]):
            mine = self.fingerprint.get(name)
            if theirs.get(name) != mine:
                raise errors.DataError(
                    f"cannot go on with these batches: the state was saved with {name} = {theirs.get(name)!r}, and "
                    f"here it is {mine!r}"
                )
        if any(not isinstance(place, int) for place in position.values()):
            raise errors.DataError("this is no state of batches: its place in 'grain' is no whole number")
        try:
            self._iterator.set_state(dict(position))
        except (KeyError, TypeError, IndexError, ValueError) as error:
            raise errors.DataError(f"this is no state of batches: grain cannot go on from it ({error})") from None

    def close(self) -> None:
        """End what reads ahead; no batch can be taken any more, though `batch_at` still answers."""
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
    """Batches of rows of arrays, such as `types.Comparisons` or `tokenising.Rows`.

    Args:
      arrays: a pytree of arrays that have the same number of rows, which are the records.
      batch_size: over all hosts together; must be a multiple of ``hosts``. May be larger than the number of records.
      seed: of the shuffle; each epoch has another order.
      epochs: how often each record comes, or None for no end. What does not fill the very last batch is left out.
      shuffle: where False, records come in their order.
      drop_last: no batch goes across the end of an epoch, and what does not fill a batch is left out of every epoch,
        another part each time.
      host: which share to read, from 0: ``jax.process_index()``. It is one block of each batch's rows, in the order in
        which ``jax.make_array_from_process_local_data`` puts hosts together.
      hosts: how many hosts there are: ``jax.process_count()``.
      prefetch: how many batches to have ready, made in a thread of their own; 0 for none.

    Raises:
      DataError: there is no record, or not one full batch; arrays differ in their number of rows.
      ValueError: a number is out of its range.
    """
    sizes = {len(leaf) for leaf in jax.tree.leaves(arrays)}
    if len(sizes) > 1:
        raise errors.DataError(f"the arrays differ in their number of rows: {', '.join(map(str, sorted(sizes)))}")

    def rows(places: list[int]) -> Any:
        return jax.tree.map(lambda leaf: leaf[np.asarray(places)], arrays)

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
    """Batches of anything that has a length and random access: a list of records, or a set read lazily from disk.

    Args:
      source: such as the records of `reading`, or `files.tfds_source`.
      collate: makes a batch of the records of this host, such as tokenised rows. Must be a pure function, and should
        give the same shapes each time. Runs in the thread that reads ahead.
      batch_size: see `from_arrays` for this and the rest.
      seed: see `from_arrays`.
      epochs: see `from_arrays`.
      shuffle: see `from_arrays`.
      drop_last: see `from_arrays`.
      host: see `from_arrays`.
      hosts: see `from_arrays`.
      prefetch: see `from_arrays`.
      data: what to know the data by; by default `fingerprint` of the source, which reads all of it once.
      identity: what to know ``collate`` by, since a function has no fixed bytes: anything that `fingerprint` takes,
        such as ``{"tokenizer": "gpt2", "prompt_width": 256}``. Becomes part of the fingerprint, so that a state saved
        with another one is refused; None for nothing.

    Raises:
      DataError: see `from_arrays`.
      TypeError: see `fingerprint`.
      ValueError: a number is out of its range.
    """
    import grain

    if batch_size < 1 or hosts < 1 or batch_size % hosts or (epochs is not None and epochs < 1) or prefetch < 0:
        raise ValueError(
            f"batch_size = {batch_size} must be a multiple of hosts = {hosts}, both 1 or more; epochs = {epochs} 1 or "
            f"more, or None; prefetch = {prefetch} 0 or more"
        )
    if not 0 <= host < hosts:
        raise ValueError(f"host = {host} is not one of {hosts}, which count from 0")
    n, many = len(source), getattr(source, "__getitems__", None)
    if n < 1:
        raise errors.DataError("there is no record to make batches of")
    places = grain.MapDataset.range(n)
    if shuffle:
        # grain's epoch e with seed s is its epoch 0 with seed s + e: without this, runs of neighbouring seeds would see
        # each other's epochs.
        places = places.shuffle(int.from_bytes(hashlib.sha256(f"{int(seed)}".encode()).digest()[:4], "little"))
    told = {
        "data": fingerprint(source) if data is None else data,
        "records": n,
        "seed": int(seed),
        "batch_size": batch_size,
        "epochs": epochs,
        "shuffle": shuffle,
        "drop_last": drop_last,
        "order": hashlib.sha256(repr([int(places[i] or 0) for i in range(min(n, _PROBE))]).encode()).hexdigest()[:16],
        **({} if identity is None else {"identity": fingerprint([identity])}),
    }
    share = batch_size // hosts

    def collect(drawn: Sequence[int]) -> np.ndarray:
        return np.asarray(drawn[host * share : (host + 1) * share], np.int64)

    def fetch(drawn: np.ndarray) -> Any:
        rows = drawn.tolist()
        return collate(list(many(rows) if many is not None else [source[row] for row in rows]))

    whole = places if drop_last else places.repeat(epochs)
    whole = whole.batch(batch_size, drop_remainder=True, batch_fn=collect)
    if len(whole) < 1:
        raise errors.DataError(f"{n} records, {epochs or 1} times, do not fill one batch of {batch_size}")
    whole = whole.repeat(epochs) if drop_last else whole
    return Batches(whole.map(fetch), endless=epochs is None, fingerprint=told, prefetch=prefetch)


def fingerprint(source: Sequence[Any]) -> str:
    """SHA-256, in hexadecimal, of records: dataclasses, dictionaries, lists, texts, numbers and arrays. Order counts.

    Types count too: a list is no tuple, and bytes are no text. Fields of dataclasses that do not take part in
    comparisons are left out: the same records have one fingerprint wherever they were read from.

    Raises:
      TypeError: a record holds something else, whose bytes are not known to be the same elsewhere, or a dictionary with
        a key that is no string.
    """
    digest = hashlib.sha256()
    for place in range(len(source)):
        digest.update(json.dumps(_tagged(source[place]), sort_keys=True).encode() + b"\n")
    return digest.hexdigest()


def _tagged(value: Any) -> Any:
    """A value as JSON in which every list begins with the type of what it stands for."""
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
                raise TypeError(f"a dictionary with the key {key!r}, which is no string, has no fixed bytes")
        return ["dict", {key: _tagged(item) for key, item in value.items()}]
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        told = {f.name: _tagged(getattr(value, f.name)) for f in dataclasses.fields(value) if f.compare}
        return ["dataclass", type(value).__name__, told]
    raise TypeError(f"a {type(value).__name__} has no fixed bytes")
