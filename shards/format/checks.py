"""Checks of JSON that other programs may have written: what was found, where, and what was expected.

A schema is a pydantic model or a TypeAdapter, and nothing is converted.
"""

from __future__ import annotations

import re
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


def mismatch(value: Any, expected: str) -> str:
    shown = f"a {type(value).__name__}" if isinstance(value, dict | list) else repr(value)
    return f"found {shown if len(shown) <= 80 else shown[:77] + '...'}, expected {expected}"


def explained(error: ValidationError) -> ValueError:
    """Returns the first fault of a record as `field[0].name: found X, expected Y`; UnknownField where a
    field is unknown, whatever else is wrong: it may be of a newer release.
    """
    faults = error.errors(include_url=False)
    for fault in faults:
        if fault["type"] in ("extra_forbidden", "unexpected_keyword_argument"):
            return UnknownField(str(fault["loc"][-1]))
    fault = faults[0]
    place = "".join(f"[{p}]" if isinstance(p, int) else f".{p}" for p in fault["loc"]).lstrip(".")
    if fault["type"] == "missing":
        return ValueError(f"{place} is missing")
    if fault["type"] == "value_error":  # of a validator of ours
        message = str(fault["ctx"]["error"])
    elif fault["type"] in ("model_type", "dataclass_type"):
        message = mismatch(fault["input"], "an object")
    else:
        expected = re.sub(
            r"^(Input|String|List|Tuple|Dictionary) should (be |have )?", "", fault["msg"]
        )
        expected = expected.replace("greater than or equal to", "at least")
        expected = expected.replace("less than or equal to", "at most")
        message = mismatch(fault["input"], expected)
    return ValueError(f"{place}: {message}" if place else message)


def check(schema: type[BaseModel] | TypeAdapter[Any], value: Any) -> Any:
    """Returns the typed form of a JSON value; ValueError, saying where, unless it fits the schema."""
    try:
        if isinstance(schema, TypeAdapter):
            return schema.validate_python(value)
        return schema.model_validate(value)
    except ValidationError as error:
        raise explained(error) from None


# ---- types --------------------------------------------------------------------------------------


def _base_name(name: str) -> str:
    """Refuses all but a file's name without a folder."""
    if name in ("", ".", "..") or len(name.encode()) > 255 or set(name) & {"/", "\\", "\0"}:
        raise ValueError(mismatch(name, "a file's base name"))
    return name


Count = Annotated[int, Field(ge=0, le=1 << 62)]
Text = Annotated[str, Field(max_length=MAX_TEXT)]
Digest = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
BaseName = Annotated[str, AfterValidator(_base_name)]


class Fields(BaseModel):
    """A JSON object of these fields and of any others; those with a default may be missing."""

    model_config = ConfigDict(strict=True, extra="ignore", allow_inf_nan=False)
