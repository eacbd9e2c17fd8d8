"""Write the part of docs/cli.md that lists the commands and their options, from the parser of the command line.

    python -m benchmarks.cli_doc            # rewrite the lists in docs/cli.md
    python -m benchmarks.cli_doc --check    # exit code 1 if they are not what the parser says

What an option means stands in its `help`; what a command does, in the docstring of its function. Options that several
commands share are listed once. The rest of the file is written by hand.
"""

from __future__ import annotations

import inspect
import sys
from typing import Any

import typer

from benchmarks import harness
from fastfip.cli import app
from fastfip.cli.errors import CODES

FILE = harness.DOCS / "cli.md"
#: From how many commands on an option of one meaning is listed once, for all of them.
SEVERAL = 3


def commands() -> dict[str, Any]:
    """Return the commands by their names, in the order of `fastfip --help`."""
    return dict(typer.main.get_command(app).commands)  # type: ignore[attr-defined]


def overview() -> str:
    """Return a table of the commands."""
    rows = [(f"[`{name}`](#fastfip-{name})", harness.inline(one.short_help)) for name, one in commands().items()]
    return harness.table(["command", "what it does"], rows)


def reference() -> str:
    """Return a section for each command, then the options that several commands share."""
    shared = _shared()
    out = [_section(name, one, shared) for name, one in commands().items()]
    head = ["option", "meaning", "default", "commands"]
    rows = [[*row, ", ".join(f"`{name}`" for name in names)] for row, names in shared.items()]
    out += ["### Options of several commands", harness.table(head, rows)]
    return "\n\n".join(out)


def exit_codes() -> str:
    """Return a table of the exit codes."""
    return harness.table(["exit code", "meaning"], [(code, harness.inline(text)) for code, text in CODES.items()])


def _section(name: str, command: Any, shared: dict[Any, list[str]]) -> str:
    params = [one for one in command.params if one.opts != ["--help"]]
    usage = " ".join([f"fastfip {name}", *(one.metavar for one in params if _is_argument(one)), "[OPTIONS]"])
    rows = [_row(one) for one in params]
    own = [row for row in rows if name not in shared.get(row, [])]
    others = [row[0].split()[0].strip("`") for row in rows if name in shared.get(row, [])]
    out = [f"### fastfip {name}", f"```\n{usage}\n```", *harness.markdown(inspect.cleandoc(command.help))]
    if own:
        out.append(harness.table(["option", "meaning", "default"], own))
    if others:
        names = ", ".join(f"`{other}`" for other in others)
        out.append(f"[Options of several commands](#options-of-several-commands): {names}.")
    return "\n\n".join(out)


def _shared() -> dict[Any, list[str]]:
    """Return the options that at least SEVERAL commands have with one meaning and default, and these commands."""
    found: dict[Any, list[str]] = {}
    for name, command in commands().items():
        for one in command.params:
            if not _is_argument(one):
                found.setdefault(_row(one), []).append(name)
    return {row: names for row, names in found.items() if len(names) >= SEVERAL}


def _is_argument(one: Any) -> bool:
    return bool(one.param_type_name == "argument")


def _row(one: Any) -> tuple[str, str, str]:
    """Return how an argument or option is written, what it means, and its default."""
    if _is_argument(one):
        written = f"`{one.metavar.strip('[]')}`"
    else:
        written = f"`{'/'.join([*one.opts, *one.secondary_opts])}` {harness.inline(one.metavar or '')}".rstrip()
    return written, harness.inline(one.help or ""), _default(one)


def _default(one: Any) -> str:
    if one.required:
        return "required"
    if isinstance(one.show_default, str):
        return harness.inline(one.show_default)
    if one.default is None or one.default is False:
        return "-"
    return "on" if one.default is True else f"`{one.default}`"


def parts() -> dict[str, str]:
    """Return what stands between each pair of marks."""
    return {"commands": overview(), "options": reference(), "exit-codes": exit_codes()}


def main() -> None:
    """Rewrite or check the file."""
    parser = harness.Parser(__doc__)
    parser.add_argument("--check", action="store_true")
    if parser.parse().check:
        old = new = FILE.read_text(encoding="utf-8")
        for mark, text in parts().items():
            new = harness.spliced(new, mark, text)
        sys.exit(0 if new == old else "docs/cli.md is out of date: python -m benchmarks.cli_doc")
    for mark, text in parts().items():
        harness.splice(FILE, mark, text)


if __name__ == "__main__":
    main()
