"""Partial responses: the `fields` parameter, e.g. `items(id,start/dateTime),nextSyncToken`.

A field that a mask leaves out is gone from the answer, nextSyncToken included: that is how clients lose their token.
"""

from functools import lru_cache
from typing import Optional, TypeAlias

from devstack.google_calendar import errors
from devstack.google_calendar.resource import Resource

# Field name -> its own mask, None for the whole field; "*" stands for every field.
Mask: TypeAlias = dict[str, Optional["Mask"]]


@lru_cache(maxsize=256)
def parse(text: str) -> Mask:
    """Parse a `fields` value.

    Raises:
        ApiError: 400 if it cannot be parsed.
    """
    mask, rest = _fields(text, text)
    if rest:
        raise _bad(text)
    return mask


def masked(value: Resource, mask: Mask) -> Resource:
    """Return the parts of `value` that the mask names."""
    if "*" in mask:
        inner = mask["*"]
        return {name: _part(part, inner) for name, part in value.items()}
    return {name: _part(value[name], inner) for name, inner in mask.items() if name in value}


def _part(value: object, mask: Mask | None) -> object:
    if mask is None:
        return value
    if isinstance(value, list):
        return [_part(item, mask) for item in value]
    return masked(value, mask) if isinstance(value, dict) else value


def _fields(text: str, whole: str) -> tuple[Mask, str]:
    """Parse `a,b/c,d(e,f)` up to a closing parenthesis; return the mask and what is left."""
    mask: Mask = {}
    while True:
        text = _field(text, whole, mask)
        if not text or text[0] == ")":
            return mask, text
        if text[0] != ",":
            raise _bad(whole)
        text = text[1:]


def _field(text: str, whole: str, mask: Mask) -> str:
    """Parse one field into the mask and return what is left."""
    end = next((i for i, char in enumerate(text) if char in ",/()"), len(text))
    name, text = text[:end].strip(), text[end:]
    if not name:
        raise _bad(whole)
    inner: Mask | None = None
    if text.startswith("/"):
        inner = {}
        text = _field(text[1:], whole, inner)
    elif text.startswith("("):
        inner, text = _fields(text[1:], whole)
        if not text.startswith(")"):
            raise _bad(whole)
        text = text[1:]
    known = mask.get(name)
    mask[name] = {**known, **inner} if known and inner else inner
    return text


def _bad(text: str) -> errors.ApiError:
    return errors.ApiError(
        400, "invalidParameter", f"Invalid field selection {text}", location_type="parameter", location="fields"
    )
