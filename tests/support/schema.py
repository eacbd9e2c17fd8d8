"""Checks values against the part of JSON schema (draft 2020-12) that reports use; jsonschema is no dependency."""

import re

_TYPES = {
    "object": dict, "array": list, "string": str, "boolean": bool, "null": type(None), "number": (int, float),
    "integer": int,
}  # fmt: skip
_KNOWN = {
    "$schema", "$defs", "$ref", "title", "description", "type", "properties", "required", "additionalProperties",
    "items", "minItems", "maxItems", "enum", "const", "pattern", "anyOf", "allOf", "if", "then",
}  # fmt: skip


def errors(value, schema, root=None, place="$"):
    """What is wrong with a value, one line each; a word of the schema that is not known here is an error as well."""
    root = schema if root is None else root
    out = [f"{place}: the checker does not know {word}" for word in set(schema) - _KNOWN]
    if "$ref" in schema:
        out += errors(value, root["$defs"][schema["$ref"].removeprefix("#/$defs/")], root, place)
    kinds = schema.get("type", [])
    kinds = [kinds] if isinstance(kinds, str) else kinds
    if kinds and not any(_is(value, kind) for kind in kinds):
        return [*out, f"{place}: {value!r:.60} is no {' or '.join(kinds)}"]
    if "const" in schema and value != schema["const"]:
        out.append(f"{place}: {value!r:.60} is not {schema['const']!r}")
    if "enum" in schema and value not in schema["enum"]:
        out.append(f"{place}: {value!r:.60} is none of {schema['enum']}")
    if "pattern" in schema and isinstance(value, str) and not re.search(schema["pattern"], value):
        out.append(f"{place}: {value!r:.60} does not match {schema['pattern']}")
    if "anyOf" in schema and all(errors(value, one, root, place) for one in schema["anyOf"]):
        out += [f"{place}: fits none of anyOf", *errors(value, schema["anyOf"][-1], root, place)]
    for one in schema.get("allOf", []):
        if not ("if" in one and errors(value, one["if"], root, place)):
            out += errors(value, one.get("then", one), root, place)
    if isinstance(value, dict):
        out += [f"{place}: {name} is missing" for name in schema.get("required", []) if name not in value]
        rest = schema.get("additionalProperties", True)
        for name, one in value.items():
            if name in schema.get("properties", {}):
                out += errors(one, schema["properties"][name], root, f"{place}.{name}")
            elif isinstance(rest, dict):
                out += errors(one, rest, root, f"{place}.{name}")
    if isinstance(value, list):
        if not schema.get("minItems", 0) <= len(value) <= schema.get("maxItems", len(value)):
            out.append(f"{place}: {len(value)} items")
        for number, one in enumerate(value):
            out += errors(one, schema.get("items", {}), root, f"{place}[{number}]")
    return out


def _is(value, kind):
    return isinstance(value, _TYPES[kind]) and not (isinstance(value, bool) and kind in ("number", "integer"))
