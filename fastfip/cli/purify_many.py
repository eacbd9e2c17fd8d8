"""`fastfip purify-many MANIFEST --out DIR`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fastfip.cli import options as o
from fastfip.cli.errors import say


def purify_many(
    manifest: Annotated[
        Path, typer.Argument(metavar="MANIFEST", help="CSV with a row for each checkpoint: docs/many.md")
    ],
    out: Annotated[
        Path, typer.Option("--out", metavar="DIR", help="folder for the results; a second run goes on in it")
    ],
    workers: Annotated[
        int | None,
        typer.Option("--workers", metavar="N", help="rows at a time", show_default="processors / threads"),
    ] = None,
    threads: Annotated[int, typer.Option("--threads", metavar="N", help="threads of each worker")] = 1,
    retries: Annotated[
        int, typer.Option("--retries", metavar="N", help="further attempts of a row whose process died or broke")
    ] = 1,
    timeout: Annotated[
        float | None, typer.Option("--timeout", metavar="S", help="seconds for one attempt", show_default="none")
    ] = None,
    retry_failed: Annotated[
        bool, typer.Option("--retry-failed", help="try rows again that failed in an earlier run")
    ] = False,
    ray: Annotated[
        bool, typer.Option("--ray", help="tasks of Ray instead of processes: pip install fastfip[ray]")
    ] = False,
    ray_address: Annotated[
        str | None,
        typer.Option(
            "--ray-address",
            metavar="ADDRESS",
            help="a cluster whose machines see the same files, e.g. auto",
            show_default="one inside this process",
        ),
    ] = None,
    quiet: o.Quiet = False,
    as_json: o.Json = False,
    debug: o.Debug = False,
) -> None:
    """Purify every row of MANIFEST, each in a process of its own, into DIR.

    Rows that DIR/results.csv has are passed over: the same command goes on after a crash, a full disk or Ctrl-C.
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
