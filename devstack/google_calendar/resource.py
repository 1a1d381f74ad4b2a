"""JSON resources: their Python type, reading and writing them, and Google's patch semantics.

Every module that handles an event, a calendar or a list entry takes its types and its (de)serialiser from here.
What the fields of a resource mean does not belong here.
"""

import json
from typing import Any, TypeAlias

import orjson

# A resource is open: clients may send fields this simulator has never heard of, and must get them back.
Resource: TypeAlias = dict[str, Any]
JsonValue: TypeAlias = Any


class NotAnObjectError(ValueError):
    """A body is JSON, but not an object."""


def dumps(value: object) -> bytes:
    """Serialise a JSON value as compact UTF-8.

    Lone surrogates, which orjson refuses, go over the wire as ASCII escapes, as servers in other languages send them.
    """
    try:
        return orjson.dumps(value)
    except TypeError:
        return json.dumps(value, ensure_ascii=True, separators=(",", ":")).encode("ascii")


def loads_object(body: bytes) -> Resource:
    """Parse a JSON object, accepting the escaped lone surrogates that orjson refuses.

    Raises:
        ValueError: if the body is not JSON or not an object.
    """
    if not body:
        return {}
    try:
        value = orjson.loads(body)
    except orjson.JSONDecodeError:
        value = json.loads(body)
    if not isinstance(value, dict):
        raise NotAnObjectError("The request body must be a JSON object.")
    return value


def patched(resource: Resource, change: Resource) -> Resource:
    """Return `resource` with `change` applied by the rules of PATCH.

    null removes a field, objects are merged field by field, arrays and scalars are replaced (guides/performance#patch).
    """
    result = dict(resource)
    for name, value in change.items():
        if value is None:
            result.pop(name, None)
        elif isinstance(value, dict) and isinstance(result.get(name), dict):
            result[name] = patched(result[name], value)
        elif isinstance(value, dict):
            result[name] = patched({}, value)
        else:
            result[name] = value
    return result
