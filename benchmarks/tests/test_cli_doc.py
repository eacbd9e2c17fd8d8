"""docs/cli.md is what the parser of the command line says."""

from __future__ import annotations

from benchmarks import cli_doc, harness


def test_the_document_is_up_to_date():
    text = cli_doc.FILE.read_text(encoding="utf-8")
    new = text
    for mark, made in cli_doc.parts().items():
        new = harness.spliced(new, mark, made)
    assert new == text, "python -m benchmarks.cli_doc"


def test_every_option_of_every_command_is_listed_with_its_help_and_in_the_right_place():
    text = cli_doc.reference()
    sections, _, shared = text.partition("### Options of several commands")
    for name, command in cli_doc.commands().items():
        section = sections.split(f"### fastfip {name}\n")[1].split("\n### ")[0]
        for one in command.params:
            if one.opts == ["--help"] or one.param_type_name == "argument":
                continue
            row = next((line for line in section.splitlines() if line.startswith(f"| `{one.opts[0]}")), None)
            if row is None:  # it is one of those that several commands share, which name this one
                assert f"`{one.opts[0]}`" in section.rpartition("](#options-of-several-commands)")[2]
                rows = [line for line in shared.splitlines() if line.startswith(f"| `{one.opts[0]}`")]
                (row,) = [line for line in rows if f"`{name}`" in line.rsplit("|", 2)[1]]
            assert harness.inline(one.help) in row


def test_a_default_is_written_as_users_type_it():
    text = cli_doc.reference()
    assert "| `--reach` SHARE | share of the images that a change must send to the class | `0.9` |" in text
    assert "| `--sharpness/--no-sharpness` |" in text and "| on |" in text
    assert "object at 0x" not in text and "Sentinel" not in text
