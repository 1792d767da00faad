"""Example arguments for a function: an object that fits its JSON Schema.

No I/O. Only required properties are filled in; patterns and lengths are ignored.
"""

from collections.abc import Mapping
from typing import Any

_MAX_DEPTH = 8  # a JSON Schema may refer to itself

_EXAMPLE_STRINGS = {
    "date": "2026-01-31",
    "date-time": "2026-01-31T12:00:00Z",
    "time": "12:00:00",
    "email": "ines@example.com",
    "uri": "https://example.com/",
    "uuid": "123e4567-e89b-42d3-a456-426614174000",
    "city": "Lisbon",
    "location": "Lisbon",
    "place": "Lisbon",
    "country": "Portugal",
    "name": "Ines",
    "query": "the light that paused",
}
"""By `format` or by property name."""


def example(schema: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments that fit a function's `parameters`, a JSON Schema of type object.

    {} where it is not one; None for a value whose schema is not understood.
    """
    value = _example(schema, "", schema, _MAX_DEPTH)
    return value if isinstance(value, dict) else {}


def _example(schema: object, name: str, root: Mapping[str, Any], depth: int) -> Any:
    if not isinstance(schema, Mapping) or depth == 0:
        return None
    if "const" in schema:
        return schema["const"]
    for key in ("enum", "examples"):
        match schema.get(key):
            case [first, *_]:
                return first
    if "default" in schema:
        return schema["default"]
    for key in ("anyOf", "oneOf", "allOf"):
        match schema.get(key):
            case [first, *_]:
                return _example(first, name, root, depth - 1)
    match schema.get("$ref"):
        case str(reference):
            return _example(_referred(reference, root), name, root, depth - 1)
    kind = schema.get("type")
    if isinstance(kind, list):
        kind = next((one for one in kind if one != "null"), "null")
    match kind:
        case "string":
            by_format = _EXAMPLE_STRINGS.get(str(schema.get("format")))
            return by_format or _EXAMPLE_STRINGS.get(name, f"some {name or 'text'}")
        case "integer" | "number":
            return schema.get("minimum", 1)
        case "boolean":
            return True
        case "array":
            return [_example(schema.get("items"), name, root, depth - 1)]
        case "object" | None:
            return _example_object(schema, root, depth)
    return None


def _example_object(
    schema: Mapping[str, Any], root: Mapping[str, Any], depth: int
) -> dict[str, Any]:
    match schema:
        case {"properties": Mapping() as properties, "required": [*required]}:
            return {
                name: _example(properties[name], name, root, depth - 1)
                for name in required
                if isinstance(name, str) and name in properties
            }
    return {}


def _referred(reference: str, root: Mapping[str, Any]) -> object:
    found: object = root
    for part in filter(None, reference.removeprefix("#").split("/")):
        found = found.get(part) if isinstance(found, Mapping) else None
    return found
