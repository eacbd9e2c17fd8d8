"""The command line: `fastfip COMMAND`. docs/cli.md describes it.

Nothing heavy is imported before a command needs it, so that `fastfip --help` is quick.
"""

from __future__ import annotations

import functools
import textwrap
from typing import Annotated, Any

import typer

from fastfip.cli.audit import audit
from fastfip.cli.compare import compare
from fastfip.cli.errors import guarded, run
from fastfip.cli.evaluate import evaluate, sharpness
from fastfip.cli.fisher import fisher
from fastfip.cli.info import attacks, demo, env, methods
from fastfip.cli.inspect_file import inspect
from fastfip.cli.options import grouped
from fastfip.cli.purify import purify
from fastfip.cli.purify_many import purify_many
from fastfip.cli.train_backdoor import train_backdoor

__all__ = ["app", "main"]

app = typer.Typer(
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
for command, summary, example in (
    (
        purify,
        "Remove a backdoor from a model with a few clean images",
        "purify in.pth out.pth --arch nets:resnet18 --data clean/ --mean imagenet --report report.json",
    ),
    (
        purify_many,
        "Purify every checkpoint of a manifest, several at a time",
        "purify-many manifest.csv --out results --workers 2",
    ),
    (
        compare,
        "Run several methods on a model, side by side",
        "compare in.pth --arch nets:resnet18 --data clean/ --test-data test/ "
        "--methods fisher_steps,fine_tune --seeds 0,1",
    ),
    (
        audit,
        "Look for signs of a backdoor without knowing the trigger",
        "audit in.pth --arch nets:resnet18 --data clean/ --picture found.png",
    ),
    (
        inspect,
        "Show what a checkpoint holds, what it fits, and the next command",
        "inspect in.pth --arch nets:resnet18 --data clean/",
    ),
    (
        evaluate,
        "Measure ACC, ASR and RA of a checkpoint",
        "evaluate in.pth --arch nets:resnet18 --test-data test/ --attack badnets:size=3 --target 0",
    ),
    (
        sharpness,
        "Measure lambda_max, Tr(H) and Tr(F) of a checkpoint",
        "sharpness in.pth --arch nets:resnet18 --data clean/",
    ),
    (
        fisher,
        "Write the diagonal of a checkpoint's Fisher information to a file",
        "fisher in.pth fisher.safetensors --arch nets:resnet18 --data clean/ --kind exact",
    ),
    (
        train_backdoor,
        "Train a model that has backdoors, to test defences",
        "train-backdoor out.pth --arch nets:resnet18 --data train/ --attack badnets:size=3 --target 0",
    ),
    (methods, "List the methods, or the settings of one method", "methods fisher_steps"),
    (attacks, "List the attacks, or the settings of one attack", "attacks badnets"),
    (env, "Show versions, processor and backends, for bug reports", "env --json"),
    (demo, "Plant and remove a backdoor in a small model of handwritten digits", "demo --out here"),
):
    shown = textwrap.wrap(f"fastfip {example}", 74, subsequent_indent="    ", break_on_hyphens=False)
    epilog = "Example:\n\n\b\n" + " \\\n".join(f"  {line}" for line in shown)
    app.command(short_help=summary, epilog=epilog)(guarded(grouped(command)))


def _version(wanted: bool) -> None:
    if wanted:
        from fastfip import __version__

        print(f"fastfip {__version__}")
        raise typer.Exit


@app.callback()
def _fastfip(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="show the version")
    ] = False,
) -> None:
    """Remove backdoors from models with a few clean samples."""


@functools.cache
def _command() -> Any:
    """The command line as it is run: reading the signatures of all commands takes longer than many a command."""
    return typer.main.get_command(app)


def main(arguments: list[str] | None = None) -> int:
    """Run the command line (None: that of the process) and return its exit code."""
    return run(_command(), arguments)
