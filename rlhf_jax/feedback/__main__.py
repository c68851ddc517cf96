"""The commands of a comparison store: ``python -m rlhf_jax.feedback serve | assign | report | export | import``."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Annotated

import tyro

from rlhf_jax.data import errors
from rlhf_jax.feedback import store_schema
from rlhf_jax.feedback.commands import assign, export_labels, import_labels, report_labelers, serve

_RUN = {
    serve.Serve: serve.run,
    assign.Assign: assign.run,
    report_labelers.Report: report_labelers.run,
    export_labels.Export: export_labels.run,
    import_labels.Import: import_labels.run,
}
Command = (
    Annotated[serve.Serve, tyro.conf.subcommand(name="serve")]
    | Annotated[assign.Assign, tyro.conf.subcommand(name="assign")]
    | Annotated[report_labelers.Report, tyro.conf.subcommand(name="report")]
    | Annotated[export_labels.Export, tyro.conf.subcommand(name="export")]
    | Annotated[import_labels.Import, tyro.conf.subcommand(name="import")]
)


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs a command. A user error is printed as one line, and the exit status is 2.

    ``arguments`` is the command line without the program's name; None means ``sys.argv``.
    """
    settings = tyro.cli(
        Command,  # type: ignore[arg-type]
        args=arguments,
        prog="python -m rlhf_jax.feedback",
        description="Collects judgements of people in a comparison store, an SQLite file.",
    )
    try:
        _RUN[type(settings)](settings)
    except (store_schema.StoreError, errors.DataError) as error:
        _fail(str(error))
    except OSError as error:
        _fail(f"{f'{error.filename}: ' if error.filename else ''}{error.strerror or error}")


def _fail(message: str) -> None:
    print(f"error: {message}", file=sys.stderr)
    raise SystemExit(2)


if __name__ == "__main__":
    main()
