"""Checks of JSON that other programs may have written: what was found, where, and what was expected.

A schema is a pydantic model or a TypeAdapter, and nothing is converted.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import takewhile
from typing import Annotated, Any

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    TypeAdapter,
    ValidationError,
)

MAX_TEXT = 2**16  # characters of a key, a name, a note or a reason
STRICT = ConfigDict(strict=True, extra="forbid")  # True and 1.0 are no integers


class UnknownField(ValueError):
    """A field that this version does not know."""

    def __str__(self) -> str:
        return f"found the field {self.args[0][:80]!r}, which this program does not know"


# ---- messages -----------------------------------------------------------------------------------

MOST = 80  # characters of a name or value that are shown
# type of an error of pydantic -> what was expected, with words of the error's context
EXPECTED = {
    **dict.fromkeys(("model_type", "dataclass_type", "dict_type"), "an object"),
    **dict.fromkeys(("list_type", "tuple_type"), "a list"),
    "string_type": "text",
    "bool_type": "true or false",
    **dict.fromkeys(("int_type", "int_from_float"), "a whole number"),
    "float_type": "a number",
    "finite_number": "a finite number",
    "literal_error": "{expected}",
    "string_pattern_mismatch": "text of the form {pattern}",
    "string_too_long": "text of at most {max_length} characters",
    "too_long": "at most {max_length} items",
    "too_short": "{min_length} or more items",
    "greater_than": "more than {gt}",
    "greater_than_equal": "at least {ge}",
    "less_than": "less than {lt}",
    "less_than_equal": "at most {le}",
    "multiple_of": "a multiple of {multiple_of}",
}
UNKNOWN = ("extra_forbidden", "unexpected_keyword_argument")
DIGITS = "^[0-9a-f]{64}$"  # of a sha256


def mismatch(value: Any, expected: str) -> str:
    words = {dict: "an object", list: "a list", bool: str(value).lower(), type(None): "null"}
    return f"found {words.get(type(value)) or _cut(repr(value))}, expected {expected}"


def _cut(text: str) -> str:
    return text if len(text) <= MOST else f"{text[: MOST - 3]}..."


def explained(error: ValidationError, value: Any) -> ValueError:
    """Returns the first fault of a value as `field[0].name: found X, expected Y`; UnknownField where a
    field is unknown, whatever else is wrong: it may be of a newer release.
    """
    faults = error.errors(include_url=False)
    for fault in faults:
        if fault["type"] in UNKNOWN:
            return UnknownField(str(fault["loc"][-1]))
    place = _place(faults[0], value)
    # of a field that may have several types the last, which is the widest
    *_, fault = takewhile(lambda fault: _place(fault, value) == place, faults)
    if fault["type"] == "missing":
        return ValueError(f"{place} is missing")
    if fault["type"] == "value_error":  # of a validator of ours
        message = str(fault["ctx"]["error"])
        if place and message.startswith((f"{place}.", f"{place}:")):
            return ValueError(message)
    else:
        expected = EXPECTED.get(fault["type"], "another value").format(**fault.get("ctx", {}))
        expected = expected.replace(f"text of the form {DIGITS}", "64 hexadecimal digits")
        message = mismatch(fault["input"], expected)
    return ValueError(f"{place}: {message}" if place else message)


def _place(fault: Mapping[str, Any], value: Any) -> str:
    """Returns the path of a field as the value has it: without the names of types, of which it may have
    several.
    """
    parts, loc = [], fault["loc"]
    for number, part in enumerate(loc, 1):
        is_there = isinstance(value, dict) and part in value
        if is_there or (isinstance(value, list) and part in range(len(value))):
            value = value[part]
        elif fault["type"] != "missing" or number < len(loc):
            continue  # the name of a type, or the words "this is a key"
        parts.append(f"[{part}]" if isinstance(part, int) else f".{_cut(part)}")
    return "".join(parts).lstrip(".")


def check(schema: type[BaseModel] | TypeAdapter[Any], value: Any) -> Any:
    """Returns the typed form of a JSON value; ValueError, saying where, unless it fits the schema."""
    try:
        if isinstance(schema, TypeAdapter):
            return schema.validate_python(value)
        return schema.model_validate(value)
    except ValidationError as error:
        raise explained(error, value) from None


# ---- types --------------------------------------------------------------------------------------


def _base_name(name: str) -> str:
    """Refuses all but a file's name without a folder."""
    if name in ("", ".", "..") or len(name.encode()) > 255 or set(name) & {"/", "\\", "\0"}:
        raise ValueError(mismatch(name, "a file's base name"))
    return name


Count = Annotated[int, Field(ge=0, le=1 << 62)]
Text = Annotated[str, Field(max_length=MAX_TEXT)]
Digest = Annotated[str, Field(pattern=DIGITS)]
BaseName = Annotated[str, AfterValidator(_base_name)]


class Fields(BaseModel):
    """A JSON object of these fields and of any others; those with a default may be missing."""

    model_config = ConfigDict(strict=True, extra="ignore", allow_inf_nan=False)
