"""`Watch`: a log that reads what it writes, and says what is wrong while there is time to stop."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from rlhf_jax.diagnostics import alarms as alarms_lib
from rlhf_jax.train import loop


class Watch:
    """A ``log`` for `loop.fit` that passes rows on to another and checks them (`diagnostics.alarms`).

    Each alarm is told once a stage. Alarms follow from the rows alone, so a resumed run that is given its old rows
    knows those that were told before: it neither tells them again nor stops for them again.

    Example::

        watch = Watch(loop.StageLog(log, "ppo"), tell=print, stop=True, rows=log.rows("ppo"))
        loop.fit(..., stage="ppo", log=watch)

    Attributes:
        alarms: Those raised so far, in order.

    Args:
        log: Where rows go on to, before they are checked; None for nowhere.
        tell: Called with each new alarm in words.
        stop: Raise `loop.Alarmed` on a new alarm, with which `loop.fit` saves and stops.
        rows: What the stage has logged before, with its ``"step"``; `loop.fit` says up to where they hold (``rewind``).
        thresholds: Of the checks, as in `diagnostics.alarms.check_all`.
    """

    def __init__(
        self,
        log: loop.Log | None = None,
        *,
        tell: Callable[[str], None],
        stop: bool = False,
        rows: Iterable[Mapping[str, Any]] = (),
        **thresholds: Any,
    ) -> None:
        """Read the rows that are there; TypeError for a threshold that no check has."""
        self._log, self._tell, self._stop, self._thresholds = log, tell, stop, thresholds
        alarms_lib.check_all([], **thresholds)
        self._start_over(rows)

    def __call__(self, step: int, values: dict[str, float]) -> None:
        """Pass a row on, check it, and tell what is new."""
        if self._log is not None:
            self._log(step, values)
        new = self._add({**values, "step": step})
        for alarm in new:
            self._tell(f"alarm at step {alarm.step} ({alarm.name}): {alarm.message}")
        if new and self._stop:
            raise loop.Alarmed("; ".join(f"{alarm.name} at step {alarm.step}" for alarm in new))

    def rewind(self, step: int) -> None:
        """Forget rows after ``step``, and the alarms that they raised."""
        rewind = getattr(self._log, "rewind", None)
        if rewind is not None:
            rewind(step)
        self._start_over([row for row in self._rows if row["step"] <= step])

    def _start_over(self, rows: Iterable[Mapping[str, Any]]) -> None:
        self._rows: list[Mapping[str, Any]] = []
        self.alarms: list[alarms_lib.Alarm] = []
        for row in rows:
            self._add(row)

    def _add(self, row: Mapping[str, Any]) -> list[alarms_lib.Alarm]:
        self._rows.append(row)
        told = {alarm.name for alarm in self.alarms}
        new = [alarm for alarm in alarms_lib.check_all(self._rows, **self._thresholds) if alarm.name not in told]
        self.alarms += new
        return new
