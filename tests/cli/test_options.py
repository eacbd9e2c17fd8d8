"""Groups of options: their fields are options of the command, which gets them as one value."""

from dataclasses import dataclass
from typing import Annotated

import typer
from typer.testing import CliRunner

from fastfip.cli.options import Group, grouped


@dataclass
class Place(Group):
    town: Annotated[str, typer.Option("--town", help="where")]
    floor: Annotated[int, typer.Option("--floor")] = 1


@dataclass
class High(Place):
    floor: Annotated[int, typer.Option("--floor")] = 9


def app(command) -> typer.Typer:
    found = typer.Typer()
    found.command()(grouped(command))
    return found


def test_a_group_is_one_parameter_of_the_command_and_its_fields_are_options():
    seen = []

    def visit(name: Annotated[str, typer.Argument()], place: Place, times: Annotated[int, typer.Option()] = 2) -> None:
        seen.append((name, place, times))

    run = CliRunner().invoke
    assert run(app(visit), ["Ann", "--town", "Ulm", "--times", "3"]).exit_code == 0
    assert seen == [("Ann", Place("Ulm", 1), 3)]
    assert run(app(visit), ["Ann"]).exit_code == 2 and len(seen) == 1  # what has no default is required
    assert "--town" in run(app(visit), ["--help"]).output
    visit("Bea", Place("Bonn"), 1)  # from Python it stays as it was written
    assert seen[-1] == ("Bea", Place("Bonn", 1), 1)


def test_a_group_may_have_another_default():
    seen = []

    def visit(place: High) -> None:
        seen.append(place)

    assert CliRunner().invoke(app(visit), ["--town", "Ulm"]).exit_code == 0
    assert seen == [High("Ulm", 9)]
