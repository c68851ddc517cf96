"""Where steps are compiled."""

from __future__ import annotations

import concurrent.futures
import functools
from collections.abc import Callable
from typing import Any

import jax


class JitStep:
    """A compiled train step that counts how often it was traced.

    Call it as the step it wraps. ``traces`` stays 1 while the arguments keep their shapes, dtypes and structure; it
    grows where a hyperparameter became static or a batch changed its width, and each time means compiling again.
    """

    def __init__(self, train_step: Callable[..., Any], *, donate_argnums: tuple[int, ...] = (0,)) -> None:
        """Wrap; nothing is compiled yet."""
        self.traces = 0
        self._ahead: concurrent.futures.Future | None = None

        @functools.wraps(train_step)
        def counted(*args: Any) -> Any:
            self.traces += 1
            return train_step(*args)

        self._step = jax.jit(counted, donate_argnums=donate_argnums)

    def __call__(self, *args: Any) -> Any:
        """Run the step; the donated arguments are gone afterwards."""
        if self._ahead is not None:
            # Still waiting for its turn, it is compiled here instead; under way, it is waited for.
            if not self._ahead.cancel():
                concurrent.futures.wait([self._ahead])
            self._ahead = None
        return self._step(*args)

    def compile_ahead(self, executor: concurrent.futures.Executor, *args: Any) -> None:
        """Compile in a thread of ``executor`` for arguments like these, arrays or their shapes; returns at once.

        The next call waits for it and then finds the program there. Threads compile beside whatever the device does,
        which is worth most for a large program that is needed late.
        """
        shapes = jax.eval_shape(lambda *same: same, *args)  # with weak types, which a call is matched by too
        # What goes wrong here goes wrong again in the call, which raises it.
        self._ahead = executor.submit(lambda: self._step.lower(*shapes).compile())

    def lower(self, *args: Any) -> jax.stages.Lowered:
        """As ``jax.jit(step).lower``: for cost and memory analysis, and for compiling ahead of time."""
        return self._step.lower(*args)


def jit_step(train_step: Callable[..., Any]) -> JitStep:
    """Compile ``train_step(state, frozen, hyper, batch, rng) -> (state, metrics)``, donating the state.

    A donated state's buffers are reused for the new one: the caller must not touch the old one again, and no two
    states may share arrays (`train.state.create` copies for this reason).
    """
    return JitStep(train_step)
