"""`fastfip methods`, `fastfip attacks`, `fastfip env`, `fastfip demo`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from fastfip.cli import options as o


def methods(
    name: Annotated[str | None, typer.Argument(metavar="[NAME]", help="show the settings of this method")] = None,
    as_json: o.Json = False,
    debug: o.Debug = False,
) -> None:
    """List the methods, or the settings of one method with their defaults."""
    from fastfip import methods as registry
    from fastfip.reporting.table import settings_sheet, show, to_json

    if name is None:
        _list(registry, "method", as_json)
    elif as_json:
        print(to_json(registry.get(name).Config().to_dict()))
    else:
        show(settings_sheet(registry.get(name)))


def attacks(
    name: Annotated[str | None, typer.Argument(metavar="[NAME]", help="show the settings of this attack")] = None,
    as_json: o.Json = False,
    debug: o.Debug = False,
) -> None:
    """List the attacks, or the settings of one attack with their defaults."""
    import dataclasses

    from fastfip import attacks as registry
    from fastfip.reporting.table import mapping_sheet, show, to_json

    if name is None:
        _list(registry, "attack", as_json)
        return
    kind: Any = registry.get(name)
    settings = {item.name: item.default for item in dataclasses.fields(kind) if item.repr}
    if as_json:
        print(to_json(settings))
    else:
        show(mapping_sheet(settings, f"{name}: {kind.summary}"))


def _list(registry: Any, kind: str, as_json: bool) -> None:
    """Print the names and summaries of a registry."""
    from fastfip.reporting.table import methods_sheet, show, to_json

    known = [registry.get(one) for one in registry.names()]
    if as_json:
        print(to_json({one.name: one.summary for one in known}))
    else:
        show(methods_sheet(known, kind))


def env(as_json: o.Json = False, debug: o.Debug = False) -> None:
    """Show versions, the processor and the backends, and why a backend cannot run here. For bug reports."""
    from fastfip.env import collect
    from fastfip.reporting.table import mapping_sheet, show, to_json

    values = collect()
    if as_json:
        print(to_json(values))
    else:
        show(mapping_sheet(values))


def demo(
    out: Annotated[Path, typer.Option("--out", metavar="DIR", help="folder for the picture and the report")] = Path(
        "fastfip-demo"
    ),
    seed: o.Seed = 0,
    debug: o.Debug = False,
) -> None:
    """Train a small model with a backdoor on handwritten digits, remove the backdoor, and show both results."""
    from fastfip.cli.demonstration import run_demo
    from fastfip.errors import BackendError
    from fastfip.reporting.table import show

    try:
        shown = run_demo(out, seed=seed)
    except ModuleNotFoundError as error:
        raise BackendError(str(error)) from None
    show(shown)
