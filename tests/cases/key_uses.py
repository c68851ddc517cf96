"""The random keys that orders of rows and other draws use."""

from typing import NamedTuple

import jax
import jax.core
import numpy as np

from rlhf_jax.data import batching


class KeyUses(NamedTuple):
    """Data of keys."""

    orders: list[bytes]
    """Keys of `batching.epoch_batches`, in the order of the calls."""
    others: set[bytes]
    """Keys from which other keys are derived outside compiled functions, or which divide data."""


def record(monkeypatch) -> KeyUses:
    """Returns the keys that are used from now on, except those within `batching.epoch_batches`."""
    fold_in, split, epoch_batches = jax.random.fold_in, batching.split, batching.epoch_batches
    uses, within = KeyUses([], set()), []

    def note(add, key):
        if not within and not isinstance(key, jax.core.Tracer):
            add(np.asarray(jax.random.key_data(key)).tobytes())

    def noted_fold_in(key, data):
        note(uses.others.add, key)
        return fold_in(key, data)

    def noted_split(*args, key, **options):
        note(uses.others.add, key)
        return split(*args, key=key, **options)

    def noted_order(*args, key, **options):
        note(uses.orders.append, key)
        within.append(key)
        try:
            return epoch_batches(*args, key=key, **options)
        finally:
            within.pop()

    monkeypatch.setattr(jax.random, "fold_in", noted_fold_in)
    monkeypatch.setattr(batching, "split", noted_split)
    monkeypatch.setattr(batching, "epoch_batches", noted_order)
    return uses
