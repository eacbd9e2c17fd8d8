"""What a report says, as plain values: its JSON, of which the page is made. Its form: templates/report.schema.json."""

from __future__ import annotations

import os
from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, ClassVar

import fastfip
from fastfip.reporting.table import Report, plain, to_json, write_text

__all__ = ["SCHEMA_VERSION", "Documented", "as_document", "schema"]

#: Of the form of a report: the first number changes when something that was there is gone or means something else.
SCHEMA_VERSION = "1.0"


@dataclass
class Origin:
    """Where what a report is about came from; empty for a model in memory.

    Attributes:
        files: the checkpoint's files: name, sha256 and bytes of each. architecture: what built the model.
        data: what it was given, by name: "clean", "test", "triggered", ...
        command: what to type to do it again.
    """

    files: list[dict[str, Any]] = field(default_factory=list)
    architecture: str = ""
    data: dict[str, str] = field(default_factory=dict)
    command: str = ""

    def to_dict(self) -> dict[str, Any]:
        """Return it as plain values, without the command; what only a model can tell is left open."""
        unknown = dict.fromkeys(("parameters", "shapes", "classes", "inputs", "images"))
        return {"files": self.files, "architecture": self.architecture, "data": self.data, **unknown}


class Documented(Report):
    """A result that has a report: a page for people, and JSON with the same content for programs."""

    kind: ClassVar[str]

    @abstractmethod
    def document(self) -> dict[str, Any]:
        """Return what the report says, as plain values; `templates/report.schema.json` has the form."""

    def report(self, path: str | os.PathLike[str]) -> Path:
        """Write the report: one page without network or scripts (.html), or the same content as JSON (any other name).

        Args:
            path: the file; it is written beside it and renamed, so that no half of it is left.

        Returns:
            the path.

        Raises:
            OSError: it cannot be written.
        """
        target = Path(path)
        if target.suffix.lower() in (".html", ".htm"):
            from fastfip.reporting.html import page

            write_text(target, page(self.document()))
        else:
            write_text(target, to_json(self.document()) + "\n")
        return target


def as_document(kind: str, title: str, alerts: list[str], values: Mapping[str, Any]) -> dict[str, Any]:
    """Return a document: what all of them begin with, then the values; all of it plain, so that it goes to JSON."""
    head = {
        "schema": "fastfip-report",
        "schema_version": SCHEMA_VERSION,
        "kind": kind,
        "made": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "fastfip": fastfip.__version__,
        "title": title,
        "alerts": alerts,
    }
    found: dict[str, Any] = plain({**values, **head})
    return found


def schema() -> dict[str, Any]:
    """Return the JSON schema (draft 2020-12) of reports."""
    import json

    text = Path(__file__).with_name("templates").joinpath("report.schema.json").read_text(encoding="utf-8")
    found: dict[str, Any] = json.loads(text)
    return found
