"""The model card of a purified model: a README.md with the metadata that Hugging Face's hub reads, then figures.

Names and texts come from files and models that nobody trusts: they are written so that they are text and nothing else.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from fastfip.errors import printable

__all__ = ["card", "escaped", "front_matter"]

_SPECIAL = re.compile(r"([\\`*_{}\[\]()#+!|~$@:-])")
_LICENCE = re.compile(r"[A-Za-z0-9][A-Za-z0-9.+-]{0,60}")


def escaped(text: object) -> str:
    """Return a text that may come from a file as one line of Markdown that shows it: no link, no tag, no cell."""
    shown = printable(text).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return _SPECIAL.sub(r"\\\1", shown).replace("www.", "www\\.")


def card(
    result: Mapping[str, Any],
    rows: Sequence[Sequence[str]],
    *,
    name: str,
    load: str,
    license: str | None = None,
    base_model: str | None = None,
    tags: Sequence[str] = (),
    library: str | None = None,
    pipeline_tag: str | None = None,
    extra: str = "",
) -> str:
    """Return the text of the card.

    Args:
        result: of a purification, as plain values (`PurifyResult.to_dict()`).
        rows: of its table: what, before, after.
        name: of the model.
        load: lines of Python that load it.
        license: identifier of the licence of the weights that were purified; None: not known, and the card says so.
        base_model: what was purified, as the hub names it ("owner/name"); None: not said.
        tags: more of them.
        library: whose model it is: "transformers", "timm"; None: none of the hub's.
        pipeline_tag: what it is for, as the hub names it, e.g. "image-classification".
        extra: Markdown of the user's own, put below the rest as it is.
    """
    about: dict[str, Any] = {
        "license": license if license is not None and _LICENCE.fullmatch(license) else None,
        "base_model": base_model,
        "library_name": library,
        "pipeline_tag": pipeline_tag,
        "tags": list(dict.fromkeys(["fastfip", "backdoor-removal", *tags])),
    }
    parts = [
        _yaml(about),
        f"# {escaped(name)}",
        _opening(result, base_model),
        *[f"**{escaped(alert)}**" for alert in result["alerts"]],
        "## Before and after",
        _table(result, rows),
        "## What was done",
        _done(result),
        "## What was not checked",
        _unchecked(result),
        "## Use",
        f"```python\n{load.strip()}\n```",
        "## Licence",
        _licence(about["license"]),
        extra.strip(),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _yaml(about: Mapping[str, Any]) -> str:
    """Return the metadata; texts are written as JSON has them, which YAML reads as the same texts."""
    lines = [f"{key}: {json.dumps(value)}" for key, value in about.items() if value is not None]
    return "\n".join(["---", *lines, "---"])


def _opening(result: Mapping[str, Any], base_model: str | None) -> str:
    what = f"`{_code(base_model)}`" if base_model is not None else "a model"
    return (
        f"This is {what} after the Python package fastfip has purified it: its weights were changed by the method "
        f"`{_code(result['method'])}` on {result['settings'].get('clean_samples', 'some')} clean samples, in order to "
        "remove a backdoor that it may have had."
    )


def _code(text: object) -> str:
    return printable(text, 200).replace("`", "'")


def _table(result: Mapping[str, Any], rows: Sequence[Sequence[str]]) -> str:
    lines = ["| | before | after |", "|---|---:|---:|"]
    lines += ["| " + " | ".join(escaped(cell) for cell in row) + " |" for row in rows]
    after = result["after"]
    words = ["ACC is the accuracy on clean samples"]
    words[0] += f" ({after['n']} of `{_code(after['on'])}`)" if after["n"] else ""
    if after["asr"] is not None:
        words.append(f"ASR the share of {after['n_triggered']} triggered samples that get the attacker's class")
        words.append("RA the share of these that get their true class")
    said = f"{', '.join(words)}."
    ratings = [f"{key.upper()} {100 * result[key]:.2f} %" for key in ("der", "rir") if result[key] is not None]
    return "\n".join(lines) + f"\n\n{said}" + (f" {', '.join(ratings)}." if ratings else "")


def _done(result: Mapping[str, Any]) -> str:
    settings, seconds = result["settings"], float(result["seconds"].get("total", 0.0))
    versions = ", ".join(f"{escaped(name)} {escaped(value)}" for name, value in result["versions"].items())
    moved, numbers = result["coverage"]["tuned_numbers"], max(1, result["coverage"]["numbers"])
    text = json.dumps(settings, indent=1, default=str)
    fence = "`" * (3 + max((len(run) for run in re.findall("`+", text)), default=0))
    return "\n".join(
        [
            f"- method: `{_code(result['method'])}`, {settings.get('steps', '?')} steps, {seconds:.1f} s",
            f"- seed: {escaped(settings.get('seed', '?'))}",
            f"- tuned parameters: {100 * moved / numbers:.1f} % of the numbers",
            f"- versions: {versions}",
            "",
            "<details><summary>All settings</summary>",
            "",
            f"{fence}json",
            text,
            fence,
            "",
            "</details>",
        ]
    )


def _unchecked(result: Mapping[str, Any]) -> str:
    if result["after"]["asr"] is None:
        found = (
            "No triggered samples were given, so that nobody measured whether there was a backdoor, or whether one is "
            "left."
        )
    else:
        found = "ASR was measured with one trigger. A backdoor with another trigger may be left."
    lines = [
        f"- {found}",
        "- There is no certificate: no method proves that a model has no backdoor.",
        "- Accuracy was measured on the samples named above. Other data, bias and robustness were not tested.",
        *[f"- {escaped(note)}" for note in result["notes"]],
    ]
    return "\n".join(lines)


def _licence(license: str | None) -> str:
    if license is None:
        return "The licence of the received weights is not known. It also applies to the purified weights."
    return f"`{license}`, the licence of the received weights."


def front_matter(text: str) -> dict[str, str]:
    """Return the plain entries `key: value` of the metadata at the head of a README.md, without lists and blocks."""
    match = re.match(r"---\r?\n(.*?)\r?\n---", text, re.DOTALL)
    found = re.findall(r"^([A-Za-z_]+):[ \t]*([^\s#\[{|>&*!][^\n\r]*)$", match[1], re.MULTILINE) if match else []
    return {key: value.strip().strip("\"'") for key, value in found}
