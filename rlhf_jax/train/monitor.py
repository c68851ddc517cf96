"""`Watch`: a log that checks every row that it receives and raises alarms during training."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from rlhf_jax.diagnostics import alarms as alarms_lib
from rlhf_jax.train import loop


class Watch:
    """A ``log`` for `loop.fit` that forwards rows to another log and checks them with `diagnostics.alarms`.

    Each alarm is reported once per stage. Alarms depend only on the rows, so a resumed run that receives its earlier
    rows neither reports earlier alarms again nor stops for them again.

    Example::

        watch = Watch(loop.StageLog(log, "ppo"), warn=print, stop=True, rows=log.rows("ppo"))
        loop.fit(..., stage="ppo", log=watch)

    Args:
        log: Log to which each row is forwarded before it is checked; None for no log.
        warn: Called with a message for each new alarm.
        stop: Whether a new alarm raises `loop.Alarmed`, so that `loop.fit` saves the state and stops.
        rows: Rows that the stage logged earlier, each with its ``"step"``. `loop.fit` drops those after the step from
            which it resumes (``rewind``).
        **thresholds: Thresholds of the checks, as in `diagnostics.alarms.check_all`.

    Raises:
        TypeError: If a keyword is not the name of a threshold.

    Attributes:
        alarms: The alarms raised so far, in order.
    """

    def __init__(
        self,
        log: loop.Log | None = None,
        *,
        warn: Callable[[str], None],
        stop: bool = False,
        rows: Iterable[Mapping[str, Any]] = (),
        **thresholds: Any,
    ) -> None:
        """Checks the thresholds and reads the earlier rows."""
        self._log, self._warn, self._stop, self._thresholds = log, warn, stop, thresholds
        alarms_lib.check_all([], **thresholds)
        self._reset(rows)

    def __call__(self, step: int, values: dict[str, float]) -> None:
        """Logs a row, checks it and reports new alarms."""
        if self._log is not None:
            self._log(step, values)
        new = self._add({**values, "step": step})
        for alarm in new:
            self._warn(f"alarm at step {alarm.step} ({alarm.name}): {alarm.message}")
        if new and self._stop:
            raise loop.Alarmed("; ".join(f"{alarm.name} at step {alarm.step}" for alarm in new))

    def rewind(self, step: int) -> None:
        """Drops the rows after ``step`` and the alarms that they raised."""
        rewind = getattr(self._log, "rewind", None)
        if rewind is not None:
            rewind(step)
        self._reset([row for row in self._rows if row["step"] <= step])

    def _reset(self, rows: Iterable[Mapping[str, Any]]) -> None:
        self._rows: list[Mapping[str, Any]] = []
        self.alarms: list[alarms_lib.Alarm] = []
        for row in rows:
            self._add(row)

    def _add(self, row: Mapping[str, Any]) -> list[alarms_lib.Alarm]:
        self._rows.append(row)
        reported = {alarm.name for alarm in self.alarms}
        new = [alarm for alarm in alarms_lib.check_all(self._rows, **self._thresholds) if alarm.name not in reported]
        self.alarms += new
        return new
