"""What a run shows in a terminal: the table of results, and the progress of a job of several stages."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from rich import box
from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from rlhf_jax.report import results as results_lib


def results_table(results: Mapping[str, Any]) -> Table:
    """The policies as rows; a column that no policy has a number for is not there.

    Win rates come with their 95 % interval, which moves below the number where the terminal is narrow; the table needs
    80 characters.
    """
    columns = [c for c in results_lib.columns(results) if c.short]
    table = Table(
        title=results_lib.headline(results),
        title_justify="left",
        title_style="bold",
        caption=" · ".join([*_reward_model(results), *results_lib.run_facts(results)]) or None,
        caption_justify="left",
        box=box.SIMPLE_HEAD,
        padding=0,
        show_edge=False,
        pad_edge=False,
    )
    table.add_column("policy", no_wrap=True)
    bounds = {c: max(len(_parts(results, p, c)[1]) for p in results_lib.policies(results)) for c in columns}
    for c in columns:
        # Columns with intervals may fold, and do so between the number and its interval; the others must not.
        table.add_column(c.short, justify="right", no_wrap=not bounds[c])
    for policy in results_lib.policies(results):
        table.add_row(results_lib.label(policy), *(_cell(*_parts(results, policy, c), bounds[c]) for c in columns))
    return table


def _parts(results: Mapping[str, Any], policy: str, column: results_lib.Column) -> tuple[str, str]:
    found = results_lib.value(results, policy, column.key)
    return results_lib.format_parts(found, percent=column.percent, digits=column.digits)


def _cell(mean: str, bounds: str, width: int) -> Text:
    """A number and its interval, the interval padded so that the numbers stand below each other."""
    return Text.assemble(mean, (f" {bounds:>{width}}", "dim")) if bounds else Text(mean)


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
    fraction: float = 0.0,
) -> float:
    """Seconds left of a job, from what its stages were expected to take and what they took.

    Stage weights are the seconds expected on some machine; this machine's pace is learned from the finished stages and,
    as far as it has come, from the current one. The rest of the current stage goes by the pace of the stages before it
    at first, while compilation blurs its own, and more and more by its own.

    Args:
        finished: (weight, seconds taken) of each finished stage.
        waiting: summed weight of the stages to come.
        current: weight of the stage at work, 0 between stages.
        elapsed: seconds since the current stage began.
        fraction: share of the current stage that is done, in [0, 1].
    """
    finished = list(finished)
    weight, seconds = sum(w for w, _ in finished), sum(s for _, s in finished)
    pace = seconds / weight if weight > 0 else 1.0
    rest = max(0.0, pace * current - elapsed)
    if fraction > 0:
        own = elapsed * (1 - fraction) / fraction
        rest = (1 - fraction) * rest + fraction * own
    seen = weight + fraction * current
    if seen > 0:
        pace = (seconds + fraction * (elapsed + rest)) / seen
    return rest + pace * waiting


def clock_text(seconds: float) -> str:
    """A duration in whole seconds: 0:07, 4:05, 1:02:03."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


class _At(NamedTuple):
    """Where the job is. Replaced as a whole, for the thread that draws may read it at any moment."""

    stage: str
    first: int
    """Steps that an earlier run did."""
    done: int
    total: int
    began: float

    @property
    def share(self) -> float:
        """Of the whole stage."""
        return self.done / self.total if self.total > 0 else 0.0

    @property
    def share_here(self) -> float:
        """Of what this run has to do of the stage."""
        return (self.done - self.first) / (self.total - self.first) if self.total > self.first else 0.0

    @property
    def part_here(self) -> float:
        """What this run has to do, as a share of the stage."""
        return 1.0 - self.first / self.total if self.total > 0 else 1.0


class StageProgress:
    """The progress of a job of several stages, on stderr: a live display in a terminal, plain lines elsewhere.

    Example::

        with StageProgress([("sft", 20), ("reward_model", 30)]) as progress:
            progress.start("sft", 300)
            for step in range(300):
                ...
                progress.update("sft", step + 1, 300, {"loss": loss})
            progress.finish("sft")
            progress.skip("reward_model")  # restored, not trained

    Args:
        stages: (name, expected seconds) in order; only the ratios matter once a stage has finished.
        console: where to write; stderr by default.
        live: whether to draw; by default where the console's file is a terminal.
        every: seconds between two plain lines of one stage.
        clock: seconds, growing.
    """

    def __init__(
        self,
        stages: Sequence[tuple[str, float]],
        *,
        console: Console | None = None,
        live: bool | None = None,
        every: float = 10.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Nothing is shown before the ``with`` block begins."""
        self._weights = dict(stages)
        if len(self._weights) != len(stages):
            raise ValueError("two stages have the same name")
        if any(weight < 0 for weight in self._weights.values()):
            raise ValueError("a stage has a negative weight")
        self._console = console or Console(stderr=True)
        self._every, self._clock = every, clock
        self._began = self._last_line = clock()
        self._at: _At | None = None
        self._over: frozenset[str] = frozenset()
        self._took: tuple[tuple[float, float], ...] = ()  # (weight, seconds) of what ran here
        self._metrics = ""
        drawn = _is_terminal(self._console) if live is None else live
        self._live = _live(self._console, self._render) if drawn else None

    def __enter__(self) -> StageProgress:
        """Starts the clock and the display."""
        self._began = self._clock()
        if self._live:
            self._live.start(refresh=True)
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """Takes the display away and says how long the job took, or where it stopped."""
        if self._live:
            self._live.stop()
        spent, at = clock_text(self._clock() - self._began), self._at
        if kind is not None:
            where = f" in {self._heading(at.stage)} at step {at.done}/{at.total}" if at else ""
            self._print(f"stopped{where} after {spent}")
        else:
            self._print(f"{len(self._over)} of {len(self._weights)} stages done in {spent}")

    def start(self, stage: str, total: int, *, done: int = 0) -> None:
        """Begins a stage of ``total`` steps, ``done`` of them by an earlier run."""
        self._check(stage)
        now = self._clock()
        self._last_line, self._metrics, self._over = now, "", self._over - {stage}
        self._at = _At(stage, done, done, total, now)
        if not self._live:
            self._print(f"{self._heading(stage)}: {total} steps" + (f", {done} done before" if done else ""))

    def update(self, stage: str, done: int, total: int, metrics: Mapping[str, Any] | None = None) -> None:
        """Says how far the stage is; cheap enough for every step. Metrics are numbers, the first few are shown."""
        self._check(stage)
        if self._at is None or stage != self._at.stage:
            self.start(stage, total)
        assert self._at is not None
        self._at = self._at._replace(done=done, total=total)
        now = self._clock()
        # To read a number off an accelerator is to wait for it: only for a line that will be seen.
        if now - self._last_line < (0.5 if self._live else self._every):
            return
        self._last_line = now
        if metrics:
            self._metrics = metrics_text(metrics)
        if not self._live:
            told = f" · {self._metrics}" if self._metrics else ""
            self._print(f"{self._heading(stage)} {done}/{total} · {self._times()}{told}")

    def finish(self, stage: str) -> None:
        """Ends a stage; the time that it took teaches the estimate."""
        self._check(stage)
        at = self._at
        if at is None or stage != at.stage:
            self.skip(stage)
            return
        took = self._clock() - at.began
        # A stage that never said how far it was has done all of it; one that stopped early has not.
        part = at.part_here * (at.share_here if at.done > at.first else 1.0)
        steps = (at.done if at.done > at.first else at.total) - at.first
        self._at, self._over = None, self._over | {stage}
        self._took += ((part * self._weights[stage], took),)
        self._print(f"{self._heading(stage)} done: {steps} steps in {results_lib.seconds_text(took)} · {self._times()}")

    def skip(self, stage: str) -> None:
        """Marks a stage as done without running it, as when it was restored; the estimate learns nothing from it."""
        self._check(stage)
        self._over |= {stage}
        self._print(f"{self._heading(stage)}: already done")

    def tell(self, stage: str, text: str) -> None:
        """Prints a line of its own about a stage, whole, above the live display where there is one."""
        self._check(stage)
        self._print(f"{self._heading(stage)}: {text}")

    def remaining(self) -> float:
        """Seconds left of the whole job, as `remaining_seconds` estimates them."""
        at, over = self._at, self._over
        waiting = sum(w for name, w in self._weights.items() if name not in over and (at is None or name != at.stage))
        if at is None:
            return remaining_seconds(finished=self._took, waiting=waiting)
        return remaining_seconds(
            finished=self._took,
            waiting=waiting,
            current=at.part_here * self._weights[at.stage],
            elapsed=self._clock() - at.began,
            fraction=at.share_here,
        )

    def _check(self, stage: str) -> None:
        if stage not in self._weights:
            raise ValueError(f"unknown stage {stage!r}; the stages are {', '.join(self._weights)}")

    def _heading(self, stage: str) -> str:
        place = list(self._weights).index(stage) + 1
        return f"stage {place}/{len(self._weights)} {results_lib.label(stage)}"

    def _times(self) -> str:
        return f"{clock_text(self._clock() - self._began)} elapsed, about {clock_text(self.remaining())} left"

    def _print(self, text: str) -> None:
        self._console.print(Text(text), soft_wrap=True)

    def _render(self) -> Group:
        """Two lines: where the job is, and the metrics of the stage."""
        at, whole = self._at, sum(self._weights.values())
        over = sum(self._weights[name] for name in self._over) + (at.share * self._weights[at.stage] if at else 0.0)
        line = Table.grid(padding=(0, 1), expand=True)
        for ratio in (None, 1, None, None):
            line.add_column(ratio=ratio, no_wrap=True)
        line.add_row(
            Text(self._heading(at.stage) if at else "between stages", style="bold"),
            ProgressBar(total=whole or 1.0, completed=over),
            Text(f"{at.done}/{at.total}" if at else ""),
            Text(self._times(), style="dim"),
        )
        return Group(line, Text(self._metrics, style="dim", no_wrap=True, overflow="ellipsis"))


def metrics_text(metrics: Mapping[str, Any], *, most: int = 4) -> str:
    """The first few numbers of a metrics record in one line."""
    told = []
    for name, metric in metrics.items():
        found = results_lib.interval(metric)
        if found is not None and name not in ("stage", "step"):
            told.append(f"{name.replace('_', ' ')} {found.mean:.4g}")
    return " · ".join(told[:most])


def _is_terminal(console: Console) -> bool:
    # Not rich's own answer, which environment variables can override: control characters do not belong in a log file.
    isatty = getattr(console.file, "isatty", None)
    return bool(isatty and isatty()) and not console.is_dumb_terminal


def _live(console: Console, render: Callable[[], Group]) -> Live:
    # What the job prints to stdout goes around the display only where both share the terminal; a piped stdout is left
    # alone.
    return Live(
        get_renderable=render,
        console=console,
        refresh_per_second=4,
        transient=True,
        redirect_stdout=sys.stdout.isatty(),
        redirect_stderr=True,
    )
