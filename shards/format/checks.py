"""Checks of JSON that other programs may have written: what was found, where, and what was expected.

A schema is a pydantic model or a type; nothing is converted. `having`, `table`, `listed` and the
others make a schema of parts for records that stay JSON objects.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from functools import cached_property
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    FiniteFloat,
    TypeAdapter,
    ValidationError,
    create_model,
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
    """The first fault of a record as `field[0].name: found X, expected Y`; UnknownField where a field is
    unknown, whatever else is wrong: it may be of a newer release.
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


# ---- schemas of parts --------------------------------------------------------------------------


def _base_name(name: str) -> str:
    """Refuses all but a file's name without a folder."""
    if name in ("", ".", "..") or len(name.encode()) > 255 or set(name) & {"/", "\\", "\0"}:
        raise ValueError(mismatch(name, "a file's base name"))
    return name


Text = Annotated[str, Field(max_length=MAX_TEXT)]
Digest = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
BaseName = Annotated[str, AfterValidator(_base_name)]


class Check:
    """A schema that is called: ValueError, saying where, unless a JSON value fits."""

    def __init__(self, schema: Any) -> None:
        self.schema = schema

    @cached_property
    def _adapter(self) -> TypeAdapter[Any]:
        model = isinstance(self.schema, type) and issubclass(self.schema, BaseModel)
        return TypeAdapter(self.schema, config=None if model else STRICT)

    def __call__(self, value: Any) -> None:
        check(self._adapter, value)


Checks = Check | Callable[[Any], object]  # what raises ValueError will do too


def _schema(part: Checks) -> Any:
    if isinstance(part, Check):
        return part.schema

    def passed(value: Any) -> Any:
        part(value)
        return value

    return Annotated[Any, AfterValidator(passed)]


def integer(least: int, most: int) -> Check:
    return Check(Annotated[int, Field(ge=least, le=most)])


def text(most: int = MAX_TEXT) -> Check:
    """Texts of at most so many characters."""
    return Check(Annotated[str, Field(max_length=most)])


def one_of(*values: str) -> Check:
    return Check(Literal[values])


def optional(part: Checks) -> Check:
    return Check(_schema(part) | None)


def listed(part: Checks, least: int, most: int) -> Check:
    """Lists of `least` to `most` items."""
    limits = Field(min_length=least, max_length=most, fail_fast=True)
    return Check(Annotated[list[_schema(part)], limits])  # type: ignore[misc]


def table(name: Checks, part: Checks, most: int) -> Check:
    """Objects of at most so many fields of any name."""
    return Check(Annotated[dict[_schema(name), _schema(part)], Field(max_length=most)])  # type: ignore[misc]


def having(
    required: Mapping[str, Checks], more: Mapping[str, Checks] | None = None, extra: Any = "ignore"
) -> Check:
    """Objects of these fields, perhaps of `more`, and of any others."""
    types: dict[str, Any] = {key: (_schema(part), ...) for key, part in required.items()}
    types |= {key: (_schema(part), None) for key, part in (more or {}).items()}
    config = ConfigDict(strict=True, extra=extra, defer_build=True, protected_namespaces=())
    return Check(create_model("Object", __config__=config, **types))


def fields(required: Mapping[str, Checks], more: Mapping[str, Checks] | None = None) -> Check:
    """Objects of just these fields, and perhaps of `more`."""
    return having(required, more, extra="forbid")


anything, boolean, mapping = Check(Any), Check(bool), Check(dict[str, Any])
finite, digest, base_name = Check(FiniteFloat), Check(Digest), Check(BaseName)
