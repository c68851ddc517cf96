"""Terminal output of a run: a table of results, and a progress display for a job with several stages."""

from __future__ import annotations

import copy
import dataclasses
import sys
import textwrap
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from rich import box
from rich.console import Console, ConsoleOptions, Group, RenderResult
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from rlhf_jax.data import errors
from rlhf_jax.report import results as results_lib


class NumbersTable(Table):
    """A table whose first column has names, for terminals of any width: numbers are neither wrapped nor cut off.

    If the table is too wide, names and headings wrap. If that is not enough, the other columns are divided among
    several tables below each other, each with the names.

    Args:
        names: Headings of the columns, of which all but the first are aligned to the right.
        **options: Options of `rich.table.Table`.
    """

    def __init__(self, *names: str, **options: Any) -> None:
        """Creates the columns."""
        defaults: dict[str, Any] = {"box": box.SIMPLE_HEAD, "padding": (0, 1), "show_edge": False, "pad_edge": False}
        super().__init__(**(defaults | options))
        for name in names:
            self.add_column(name, justify="right" if self.columns else "left", overflow="fold")

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """Renders one table or several."""
        unlimited = options.update_width(_UNLIMITED)
        names = self._part([0])
        least = min(names.__rich_measure__(console, unlimited).maximum, max(_NAME_WIDTH, options.max_width // 3))

        def width(indices: list[int], *, wrap: bool) -> int:
            """Returns the width of a table of these columns, in which the names have their least width."""
            part = self._part([0, *indices], wrap=wrap)
            natural, whole = (each.__rich_measure__(console, unlimited).maximum for each in (names, part))
            return whole - natural + least

        every = list(range(1, len(self.columns)))
        wrap = width(every, wrap=False) > options.max_width
        if self.title:
            yield Text(str(self.title), style=self.title_style or "italic")
        groups: list[list[int]] = [[]]
        for i in every:
            if groups[-1] and width([*groups[-1], i], wrap=wrap) > options.max_width:
                groups.append([])
            groups[-1].append(i)
        for place, group in enumerate(groups):
            alone = len(group) == 1 and width(group, wrap=wrap) > options.max_width
            part = self._part([0, *group], wrap=wrap, fold=alone)
            if place:
                yield Text("")
            yield from Table.__rich_console__(part, console, options)
        if self.caption:
            yield Text(str(self.caption), style="dim")

    def _part(self, indices: Sequence[int], *, wrap: bool = False, fold: bool = False) -> NumbersTable:
        """Returns a table of some columns; ``wrap`` wraps their headings, and ``fold`` also their cells."""
        part = copy.copy(self)
        part.title = part.caption = None
        part.columns = []
        for place, i in enumerate(indices):
            column = self.columns[i]
            header = column.header
            if wrap and place and isinstance(header, str):
                longest = max((len(line) for cell in column.cells for line in str(cell).splitlines()), default=0)
                wide = max(longest, _HEADING_WIDTH)
                parts = textwrap.wrap(header, wide, break_on_hyphens=False, break_long_words=False)
                header = "\n".join(parts)
            part.columns.append(
                dataclasses.replace(column, header=header, no_wrap=place > 0 and not fold, _index=place)  # type: ignore
            )
        return part


_UNLIMITED = 10_000
_NAME_WIDTH, _HEADING_WIDTH = 24, 10
"""Widths below which names and headings are not wrapped."""


def results_table(results: Mapping[str, Any]) -> Table:
    """Returns a table of the results with one row per policy.

    The columns are the metrics in `results.COLUMNS` that have a short heading and a value for at least one policy. In a
    narrow terminal, a 95 % interval wraps to the line below its number. The table fits in 80 columns of text, so only
    win rates have their intervals.
    """
    columns = [c for c in results_lib.columns(results) if c.short]
    table = Table(
        title=results_lib.headline(results),
        title_justify="left",
        title_style="bold",
        caption=" · ".join(_caption(results)) or None,
        caption_justify="left",
        box=box.SIMPLE_HEAD,
        padding=0,
        show_edge=False,
        pad_edge=False,
    )
    table.add_column("policy", no_wrap=True)
    bounds = {c: max(len(_parts(results, p, c)[1]) for p in results_lib.policies(results)) for c in columns}
    for c in columns:
        # Only columns with intervals may wrap; they do so between the number and its interval.
        table.add_column(c.short, justify="right", no_wrap=not bounds[c])
    for policy in results_lib.policies(results):
        table.add_row(results_lib.label(policy), *(_cell(*_parts(results, policy, c), bounds[c]) for c in columns))
    return table


def _parts(results: Mapping[str, Any], policy: str, column: results_lib.Column) -> tuple[str, str]:
    value = results_lib.value(results, policy, column.key)
    mean, bounds = results_lib.format_parts(value, percent=column.percent, digits=column.digits)
    return mean, bounds if column.intervals else ""


def _cell(mean: str, bounds: str, width: int) -> Text:
    """Returns a number and its interval, padded so that the numbers of a column align."""
    return Text.assemble(mean, (f" {bounds:>{width}}", "dim")) if bounds else Text(mean)


def _caption(results: Mapping[str, Any]) -> list[str]:
    differs = results_lib.best_of_n_differs(results)
    parts = [*_gap_closed(results), *([differs] if differs else []), *_reward_model(results)]
    return [*parts, *results_lib.rough_intervals(results), *results_lib.run_facts(results)]


def _gap_closed(results: Mapping[str, Any]) -> list[str]:
    shares = results_lib.gap_closed(results)
    return [f"share of the gap between SFT and the maximum of the gold utility closed: {shares}"] if shares else []


def _reward_model(results: Mapping[str, Any]) -> list[str]:
    mean, bounds = results_lib.format_parts((results.get("reward_model") or {}).get("accuracy"), percent=True)
    if mean == results_lib.MISSING:
        return []
    return [f"reward model accuracy {mean} %" + (f" ({bounds})" if bounds else "")]


def remaining_seconds(
    *,
    finished: Iterable[tuple[float, float]],
    waiting: float,
    current: float = 0.0,
    elapsed: float = 0.0,
    rest: float | None = None,
) -> float | None:
    """Estimates the remaining seconds of a job from the weights and the measured durations of its stages.

    A stage's weight is its expected duration in any unit, for example in seconds on a reference machine. Weights are
    converted to seconds by the ratio of measured seconds to weight, over the finished stages and the current one.

    Args:
        finished: ``(weight, seconds)`` of each finished stage.
        waiting: Total weight of the stages that have not started.
        current: Weight of the current stage, 0 between stages.
        elapsed: Seconds since the current stage started.
        rest: Remaining seconds of the current stage according to its own speed; None if that is not known yet.

    Returns:
        The estimated number of seconds; None if nothing has been measured yet.

    Example:
        >>> from rlhf_jax.report import console
        >>> console.remaining_seconds(finished=[(10, 30)], waiting=20)  # 3 s per unit of weight
        60.0
    """
    finished = list(finished)
    weight, seconds = sum(w for w, _ in finished), sum(s for _, s in finished)
    if rest is not None:
        weight, seconds = weight + current, seconds + elapsed + rest
    unknown = waiting + (current if rest is None else 0.0)
    if unknown > 0 and weight == 0:
        return None
    pace = seconds / weight if weight > 0 else 0.0
    return (max(0.0, pace * current - elapsed) if rest is None else rest) + pace * waiting


def clock_text(seconds: float) -> str:
    """Formats a duration in whole seconds, such as 0:07, 4:05 or 1:02:03."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


class _Stage(NamedTuple):
    """The current stage; immutable, because the thread that draws the display can read it at any time."""

    name: str
    resumed_at: int
    """Number of steps that an earlier run completed."""
    done: int
    total: int
    started: float

    reports: tuple[tuple[int, float], ...] = ()
    """Number of steps done and the time at the first two reports of steps by this run."""
    last: float = 0.0
    """Time of the last report of a step."""

    def rest(self, now: float) -> float | None:
        """Returns the remaining seconds at the mean speed since the first steps; None if there is only one report.

        The first step, which includes compilation, does not count, nor does the second if there is a third: its report
        follows the first one immediately if logging started slowly.
        """
        starts = [each for each in self.reports if each[0] < self.done]
        if not starts:
            return None
        done, start = starts[-1]
        seconds = (self.last - start) / (self.done - done)
        return max(0.0, seconds * (self.total - self.done) - (now - self.last))

    @property
    def fraction(self) -> float:
        """Completed fraction of the stage."""
        return self.done / self.total if self.total > 0 else 0.0

    @property
    def own_fraction(self) -> float:
        """Completed fraction of the steps that an earlier run did not complete."""
        own_steps = self.total - self.resumed_at
        return (self.done - self.resumed_at) / own_steps if own_steps > 0 else 0.0

    @property
    def own_share(self) -> float:
        """Fraction of the stage that an earlier run did not complete."""
        return 1.0 - self.resumed_at / self.total if self.total > 0 else 1.0


class StageProgress:
    """Shows the progress of a job with several stages on stderr, live in a terminal and as plain lines otherwise.

    Example::

        with StageProgress([("sft", 20), ("reward_model", 30)]) as progress:
            progress.start("sft", 300)
            for step in range(300):
                ...
                progress.update("sft", step + 1, 300, {"loss": loss})
            progress.finish("sft")
            progress.skip("reward_model")  # restored, not trained

    Args:
        stages: ``(name, expected seconds)`` in order. Only the ratios of these seconds matter.
        console: Console to write to; stderr by default.
        live: Whether to draw a live display; by default, True if the console writes to a terminal.
        line_interval: Minimum number of seconds between two plain lines of a stage.
        clock: Function that returns the time in seconds.
        elapsed: Seconds that the job has already run when the display starts; they count as elapsed.

    Raises:
        ValueError: If two stages have the same name or a stage has a negative number of expected seconds.
    """

    def __init__(
        self,
        stages: Sequence[tuple[str, float]],
        *,
        console: Console | None = None,
        live: bool | None = None,
        line_interval: float = 10.0,
        clock: Callable[[], float] = time.monotonic,
        elapsed: float = 0.0,
    ) -> None:
        """Creates the display, which prints nothing before the ``with`` block starts."""
        self._weights = dict(stages)
        if len(self._weights) != len(stages):
            raise ValueError("two stages have the same name")
        if any(weight < 0 for weight in self._weights.values()):
            raise ValueError("a stage has a negative number of expected seconds")
        self._console = console or Console(stderr=True)
        self._line_interval, self._clock, self._elapsed = line_interval, clock, elapsed
        self._started = self._last_line = clock()
        self._stage: _Stage | None = None
        self._finished: frozenset[str] = frozenset()
        self._durations: tuple[tuple[float, float], ...] = ()  # (weight, seconds) of the stages that this run finished
        self._metrics = ""
        live = _is_terminal(self._console) if live is None else live
        self._live = _live(self._console, self._render) if live else None

    def __enter__(self) -> StageProgress:
        """Starts the clock and the display."""
        self._started = self._clock() - self._elapsed
        if self._live:
            self._live.start(refresh=True)
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """Removes the display and prints that the job is done, or where and when it stopped."""
        if self._live:
            self._live.stop()
        stage = self._stage
        if kind is not None:
            seconds = clock_text(self._clock() - self._started)
            place = f" in {self._heading(stage.name)} at step {stage.done}/{stage.total}" if stage else ""
            self._print(f"stopped{place} after {seconds}")
        else:
            self._print(f"{len(self._finished)} of {errors.counted(len(self._weights), 'stages')} done")

    def start(self, stage: str, total: int, *, done: int = 0) -> None:
        """Starts a stage of ``total`` steps, of which an earlier run completed ``done``."""
        self._check(stage)
        now = self._clock()
        self._last_line, self._metrics, self._finished = now, "", self._finished - {stage}
        self._stage = _Stage(stage, done, done, total, now)
        if not self._live:
            self._print(
                f"{self._heading(stage)}: {errors.counted(total, 'steps')}"
                + (f", resumed after {done}" if done else "")
            )

    def update(self, stage: str, done: int, total: int, metrics: Mapping[str, Any] | None = None) -> None:
        """Records the progress of a stage; cheap enough to call after every step.

        Args:
            stage: Name of the stage.
            done: Number of completed steps, including those of an earlier run.
            total: Number of steps of the whole stage.
            metrics: Numbers by name; four of them are shown, as in `metrics_text`. An empty dict before the first step
                means that an earlier run completed the ``done`` steps.

        Raises:
            ValueError: If the stage is unknown.
        """
        self._check(stage)
        if self._stage is None or stage != self._stage.name:
            self.start(stage, total)
        assert self._stage is not None
        current, now = self._stage, self._clock()
        if metrics is not None and not metrics and not current.reports:
            if 0 < done < total and done != current.resumed_at:
                self._print(f"{self._heading(stage)}: resumed after {done}")
            self._stage = current._replace(done=done, total=total, resumed_at=done)
            return
        reports = (*current.reports, (done, now))[:2]
        self._stage = current._replace(done=done, total=total, reports=reports, last=now)
        # Reading a metric blocks until the accelerator has computed it, so metrics are read only when they are shown.
        if now - self._last_line < (0.5 if self._live else self._line_interval):
            return
        self._last_line = now
        if metrics:
            self._metrics = metrics_text(metrics)
        if not self._live:
            shown = f" · {self._metrics}" if self._metrics else ""
            self._print(f"{self._heading(stage)} {done}/{total} · {self._times()}{shown}")

    def finish(self, stage: str) -> None:
        """Ends a stage; its duration is used to estimate those of later stages."""
        self._check(stage)
        current = self._stage
        if current is None or stage != current.name:
            self.skip(stage)
            return
        seconds = self._clock() - current.started
        # A stage without an `update` counts as complete; otherwise only the steps up to its last update count.
        updated = current.done > current.resumed_at
        share = current.own_share * (current.own_fraction if updated else 1.0)
        steps = (current.done if updated else current.total) - current.resumed_at
        self._stage, self._finished = None, self._finished | {stage}
        self._durations += ((share * self._weights[stage], seconds),)
        duration = results_lib.seconds_text(seconds)
        self._print(f"{self._heading(stage)} done: {errors.counted(steps, 'steps')} in {duration} · {self._times()}")

    def skip(self, stage: str) -> None:
        """Marks a stage as done without running it, for example because it was restored."""
        self._check(stage)
        self._finished |= {stage}
        self._print(f"{self._heading(stage)}: already done")

    def message(self, stage: str, text: str) -> None:
        """Prints a message on a separate line, above the live display if there is one.

        ``stage`` is a stage or another subject, such as the data.
        """
        self._print(f"{self._heading(stage) if stage in self._weights else stage}: {text}")

    def remaining(self) -> float | None:
        """Returns the estimated remaining seconds of the whole job (`remaining_seconds`).

        The current stage is estimated from its own speed, without its first steps, which include compilation.
        """
        stage, started = self._stage, self._finished
        if stage is None:
            current = {}
        else:
            started = started | {stage.name}
            now = self._clock()
            current = {
                "current": stage.own_share * self._weights[stage.name],
                "elapsed": now - stage.started,
                "rest": stage.rest(now),
            }
        waiting = sum(weight for name, weight in self._weights.items() if name not in started)
        return remaining_seconds(finished=self._durations, waiting=waiting, **current)

    def _check(self, stage: str) -> None:
        if stage not in self._weights:
            raise ValueError(f"unknown stage {stage!r}; the stages are {', '.join(self._weights)}")

    def _heading(self, stage: str) -> str:
        place = list(self._weights).index(stage) + 1
        return f"stage {place}/{len(self._weights)} {results_lib.label(stage)}"

    def _times(self) -> str:
        elapsed, remaining = f"{clock_text(self._clock() - self._started)} elapsed", self.remaining()
        return elapsed if remaining is None else f"{elapsed}, about {clock_text(remaining)} left"

    def _print(self, text: str) -> None:
        self._console.print(Text(text), soft_wrap=True)

    def _render(self) -> Group:
        """Returns two lines: the progress of the job, and the metrics of the stage."""
        stage, total = self._stage, sum(self._weights.values())
        completed = sum(self._weights[name] for name in self._finished)
        completed += stage.fraction * self._weights[stage.name] if stage else 0.0
        line = Table.grid(padding=(0, 1), expand=True)
        for ratio in (None, 1, None, None):
            line.add_column(ratio=ratio, no_wrap=True)
        line.add_row(
            Text(self._heading(stage.name) if stage else "between stages", style="bold"),
            ProgressBar(total=total or 1.0, completed=completed),
            Text(f"{stage.done}/{stage.total}" if stage else ""),
            Text(self._times(), style="dim"),
        )
        return Group(line, Text(self._metrics, style="dim", no_wrap=True, overflow="ellipsis"))


_FIRST = ("reward", "kl", "length", "stopped", "loss", "margin", "accuracy")
"""Metrics that the progress shows before others."""


def metrics_text(metrics: Mapping[str, Any], *, most: int = 4) -> str:
    """Formats ``most`` numbers of a metrics record in one line: reward, KL and losses first, then others in order."""
    parts = []
    for name, metric in sorted(metrics.items(), key=lambda each: (*_FIRST, each[0]).index(each[0])):
        interval = results_lib.interval(metric)
        if interval is not None and name not in ("stage", "step"):
            parts.append(f"{name.replace('_', ' ')} {results_lib.number_text(interval.mean)}")
    return " · ".join(parts[:most])


def _is_terminal(console: Console) -> bool:
    # Environment variables can override rich's check, but a log file must not contain control characters.
    isatty = getattr(console.file, "isatty", None)
    return bool(isatty and isatty()) and not console.is_dumb_terminal


def _live(console: Console, render: Callable[[], Group]) -> Live:
    # A piped stdout must not be redirected to the console.
    return Live(
        get_renderable=render,
        console=console,
        refresh_per_second=4,
        transient=True,
        redirect_stdout=sys.stdout.isatty(),
        redirect_stderr=True,
    )
