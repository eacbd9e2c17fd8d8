"""`fastfip purify-many MANIFEST --out DIR`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fastfip.cli import options as o
from fastfip.cli.errors import say


def purify_many(
    manifest: Annotated[
        Path,
        typer.Argument(metavar="MANIFEST", help="CSV file with a row for each checkpoint; docs/many.md describes it"),
    ],
    out: Annotated[
        Path,
        typer.Option("--out", metavar="DIR", help="folder for the results; a second run with it does what is missing"),
    ],
    workers: Annotated[
        int | None,
        typer.Option(
            "--workers",
            metavar="N",
            help="number of rows that run at the same time",
            show_default="number of processors divided by --threads",
        ),
    ] = None,
    threads: Annotated[int, typer.Option("--threads", metavar="N", help="threads that each worker may use")] = 1,
    retries: Annotated[
        int,
        typer.Option(
            "--retries",
            metavar="N",
            help="how often a row is tried again after its process died or failed unexpectedly",
        ),
    ] = 1,
    timeout: Annotated[
        float | None,
        typer.Option("--timeout", metavar="S", help="seconds that one attempt may take", show_default="no limit"),
    ] = None,
    retry_failed: Annotated[
        bool, typer.Option("--retry-failed", help="also run the rows that failed in an earlier run")
    ] = False,
    ray: Annotated[
        bool, typer.Option("--ray", help="run the rows as tasks of Ray; needs pip install fastfip[ray]")
    ] = False,
    ray_address: Annotated[
        str | None,
        typer.Option(
            "--ray-address",
            metavar="ADDRESS",
            help="address of a Ray cluster whose machines see the same files, e.g. auto",
            show_default="Ray is started on this machine",
        ),
    ] = None,
    quiet: o.Quiet = False,
    as_json: o.Json = False,
    debug: o.Debug = False,
) -> None:
    """Purify the checkpoint of every row of MANIFEST, each in its own process, and write the results to DIR.

    Rows that are already in DIR/results.csv are skipped, so that the same command continues after a crash, a full disk
    or Ctrl-C.
    """
    from fastfip.cli.many.run import purify_many as all_of

    result = all_of(
        manifest,
        out,
        workers=workers,
        retries=retries,
        timeout=timeout,
        threads=threads,
        retry_failed=retry_failed,
        ray=ray,
        ray_address=ray_address,
        progress=None if quiet else say,
    )
    if as_json:
        print((result.path / "report.json").read_text(encoding="utf-8").rstrip())
    else:
        print(f"{result}: {result.path / 'report.md'}")
    if result.failed:
        say(f"{len(result.failed)} of {result.asked} rows failed, e.g. {result.failed[0]['error']}")
        raise typer.Exit(8)
