"""The help of every command ends with an example that works, and fits 80 columns; so do the tables of settings."""

import dataclasses
import shlex

import pytest
import typer

import fastfip
from fastfip.cli import app, main
from fastfip.reporting.table import Sheet

COMMANDS = typer.main.get_command(app).commands


@pytest.mark.parametrize("name", COMMANDS)
def test_help_ends_with_an_example_that_the_command_reads(name, capsys):
    command = COMMANDS[name]
    words = shlex.split(command.epilog.partition("\b\n")[2].replace("\\\n", " "))
    assert words[:2] == ["fastfip", name]
    command.make_context(name, words[2:])  # an unknown option ends it, and so does a value of another kind
    with pytest.raises(Exception, match="no-such-option"):
        command.make_context(name, [*words[2:], "--no-such-option"])
    assert main([name, "--help"]) == 0
    said = capsys.readouterr().out
    assert f"  fastfip {name}" in said and max(map(len, said.splitlines())) <= 80


@pytest.mark.parametrize("name", fastfip.methods.names())
def test_a_table_of_settings_fits_80_columns_and_says_all_of_them(name, capsys):
    assert main(["methods", name]) == 0
    said = capsys.readouterr().out
    method = fastfip.methods.get(name)
    assert max(map(len, said.splitlines()[1:])) <= 80
    assert all(f"\n{setting} " in said for setting in (field.name for field in dataclasses.fields(method.Config)))


def test_a_broken_cell_goes_on_below_itself():
    sheet = Sheet("", ("a", "b"), [("x", "one two three"), ("y", "z")], width=12)
    assert str(sheet) == "a  b\nx  one two\n   three\ny  z"
