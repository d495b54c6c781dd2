"""What is wrong with a config, in words: the key, what was found, what was expected, what to do.

steps: found 'many', expected a whole number. Correct it, or leave it out for 1000
scorers: found 'fid', expected a list. Write [fid]

A key that takes several types has one line, with all of them.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

import yaml
from pydantic import BaseModel, ValidationError, ValidatorFunctionWrapHandler, WrapValidator
from pydantic_core import PydanticUndefined

MOST = 80  # characters of a value that are shown
MOST_LINES = 20  # of keys that are named
NEAR = 0.75  # share of the letters of two names that one is asked for by the other
KEYS, NAMES, LIST = "keys with values", "names with values, as {NAME: VALUE}", "a list"
# type of an error of pydantic -> what was expected, with words of the error's context
EXPECTED = {
    **dict.fromkeys(("model_type", "model_attributes_type", "dataclass_type"), KEYS),
    "dict_type": "{names}",
    **dict.fromkeys(("list_type", "tuple_type"), LIST),
    **dict.fromkeys(("string_type", "invalid_key"), "text"),
    "path_type": "a path",
    **dict.fromkeys(("bool_type", "bool_parsing"), "true or false"),
    **dict.fromkeys(("int_type", "int_parsing", "int_from_float"), "a whole number"),
    **dict.fromkeys(("float_type", "float_parsing", "finite_number"), "a number"),
    "int_parsing_size": "a whole number of fewer digits",
    "none_required": "null",
    **dict.fromkeys(("literal_error", "union_tag_invalid"), "{expected}"),
    "string_pattern_mismatch": "text of the form {pattern}",
    "greater_than": "{number} above {gt}",
    "greater_than_equal": "{number} from {ge} on",
    "less_than": "{number} below {lt}",
    "less_than_equal": "{number} up to {le}",
    "multiple_of": "a multiple of {multiple_of}",
    "too_short": "a list of {min_length} or more",
    "too_long": "a list of {max_length} or fewer",
    "missing": "a list of {length}",  # of a list alone; a key that is missing has a line of its own
}
OTHER = "another value"  # of a type that is not listed
# ends of the types of which nothing is said where a part of the value is at fault
MISMATCH = ("_type", "_parsing", "_required", "literal_error", "too_short")
UNKNOWN = ("extra_forbidden", "unexpected_keyword_argument")
MISSING = ("missing", "union_tag_not_found")


def expects(text: str) -> WrapValidator:
    """Says of a key in these words what it takes, whatever of its value does not fit."""

    def validate(value: Any, fits: ValidatorFunctionWrapHandler) -> Any:
        try:
            return fits(value)
        except ValidationError:
            raise ValueError(f"expected {text}") from None

    return WrapValidator(validate)


def did_you_mean(word: str, names: Iterable[str], end: str = ".") -> str:
    """Returns `; did you mean NAME?` with the nearest of the names, or `end` where none is near: but for
    a letter or two, or with the same letters.
    """
    names = list(names)
    near = difflib.get_close_matches(word, names, n=1, cutoff=NEAR)
    near = near or [name for name in names if sorted(name) == sorted(word)]
    return f"; did you mean {near[0]}?" if near else end


class _OneLine(yaml.SafeDumper):
    def ignore_aliases(self, data: Any) -> bool:
        return True


_OneLine.add_multi_representer(object, lambda dumper, value: dumper.represent_str(str(value)))


def shown(value: Any) -> str:
    """Returns a value as a YAML has it, on one line and shortened; text in quotes."""
    text = repr(value) if isinstance(value, str) else in_yaml(value)
    return text if len(text) <= MOST else f"{text[: MOST - 3]}..."


def in_yaml(value: Any) -> str:
    """Returns a value as a YAML has it, on one line."""
    text = yaml.dump(
        value, Dumper=_OneLine, default_flow_style=True, width=1 << 30, sort_keys=False
    )
    return text.removesuffix("\n").removesuffix("\n...")


# ---- a text that is no YAML -------------------------------------------------------------------

# what PyYAML says -> what was found, and what to do
NO_YAML = (
    (
        "mapping values",
        "a `: ` where none fits. Indent the keys of one level alike, write a space after each `KEY:`, and quote text "
        "with a `: `",
    ),
    (r"character '\\t'", "a tab, expected spaces"),
    ("character '(.)'", r"a value that begins with \1. Quote it"),
    ("expected ',' or '(.)'", r"a bracket without its \1, or values without a comma between them"),
    ("find expected ':'", "a line without `: `, expected `key: value`"),
    ("unexpected end of stream", "a quote that is not closed"),
    ("block end", "a line that does not fit those above. Indent the keys of one level alike"),
    ("alias|alphabetic", "a value that begins with * or &. Quote it"),
    ("the tag '(.*)'", r"a value that begins with \1. Quote it"),
    ("another document", "a second document after `---`, expected one"),
    ("escape", "a backslash in double quotes. Write single quotes, or two of it"),
    ("special characters", "a control character. Remove it"),
)


def no_yaml(error: Exception, text: str) -> str:
    """Returns why a text is no YAML, and in which of its lines."""
    problem = str(getattr(error, "problem", None) or getattr(error, "reason", None) or error)
    for pattern, words in NO_YAML:
        if match := re.search(pattern, problem):
            problem = f"found {match.expand(words)}"
            break
    # what is not closed is at fault where it begins; else what does not fit what came before
    in_block = re.search("block|document", str(getattr(error, "context", "")))
    marks = [getattr(error, name, None) for name in ("context_mark", "problem_mark")]
    mark = next((mark for mark in (reversed(marks) if in_block else marks) if mark), None)
    return f"line {mark.line + 1}: {problem}" if mark and "\n" in text.strip() else problem


# ---- lines ------------------------------------------------------------------------------------


def explained(
    model: type[BaseModel],
    values: Any,
    error: ValidationError,
    *,
    above: str = "",
    takes_words: bool = False,
    defaults: bool = True,
) -> list[str]:
    """Returns a line for each key that is wrong in the values of a model.

    `above` is the key that has these values, `takes_words` whether the command line may set keys,
    `defaults` whether a key that is left out has the model's default.
    """
    faults: dict[tuple[str, ...], list[_Fault]] = {}
    for problem in error.errors(include_url=False):
        fault = _Fault.of(model, values, dict(problem))
        faults.setdefault(fault.path, []).append(fault)
    above_others = {path[:length] for path in faults for length in range(len(path))}
    lines = [
        _line(model, several, above, takes_words, defaults)
        for path, several in faults.items()
        # of a list or mapping that fits one type but for a part, the part alone is of interest
        if path not in above_others or not all(fault.error.endswith(MISMATCH) for fault in several)
    ]
    more = [f"and {len(lines) - MOST_LINES} more"] if len(lines) > MOST_LINES else []
    return lines[:MOST_LINES] + more


@dataclass(frozen=True)
class _Fault:
    error: str  # its type, of pydantic
    path: tuple[str, ...]  # of the key as the user wrote it
    value: Any  # what was found there
    parents: tuple[Any, ...]  # types of what holds the key
    kinds: tuple[Any, ...]  # types of its value
    context: dict[str, Any]
    is_name: bool  # whether the key itself is wrong, a name that the user gave

    @classmethod
    def of(cls, model: type[BaseModel], values: Any, problem: dict[str, Any]) -> _Fault:
        loc, error_type, context = problem["loc"], problem["type"], dict(problem.get("ctx", {}))
        value, path = values, list[str]()
        kinds: tuple[Any, ...] = (model,)
        parents: tuple[Any, ...] = ()
        for part in loc:
            if _holds(value, part):
                parents, kinds = kinds, _inside(kinds, part)
                value = value[part]
                path.append(str(part))
            else:  # the name of a type, where there are several
                kinds = tuple(kind for kind in kinds if part in _tags(kind)) or kinds
        if error_type == "missing" and isinstance(loc[-1], int):
            context["length"] = loc[-1] + 1
        elif error_type in (*MISSING, "union_tag_invalid"):
            path.append(context["discriminator"].strip("'") if context else str(loc[-1]))
            parents, kinds = kinds, _inside(kinds, path[-1])
            value = context.get("tag")
        if is_name := bool(loc) and loc[-1] == "[key]":
            path.pop()
            value, parents, kinds = problem["input"], (), ()
        return cls(error_type, tuple(path), value, parents, kinds, context, is_name)

    @property
    def owners(self) -> list[type]:
        """Models that have the key; none of a name or an index."""
        return [kind for kind in self.parents if self.path and self.path[-1] in key_types(kind)]

    @property
    def expected(self) -> str:
        words = {k: f"{v:g}" if isinstance(v, float) else v for k, v in self.context.items()}
        bounds = [self.context[k] for k in ("gt", "ge", "lt", "le") if k in self.context]
        words["names"] = NAMES
        words["number"] = "a number" if float in map(type, bounds) else "a whole number"
        listed = str(self.context.get("expected_tags") or self.context.get("expected"))
        words["expected"] = _listed(re.findall("'(.*?)'", listed))
        text = EXPECTED.get(self.error, OTHER).format(**words)
        pairs = [
            kind for kind in self.kinds if get_origin(kind) is tuple and ... not in get_args(kind)
        ]
        return f"{LIST} of {len(get_args(pairs[0]))}" if text.startswith(LIST) and pairs else text


def _line(
    model: type[BaseModel],
    faults: Sequence[_Fault],
    above: str,
    takes_words: bool,
    defaults: bool,
) -> str:
    """Returns what is said of one key."""
    fault = faults[0]
    name = ".".join(filter(None, (above, *fault.path)))
    found = f"found {'the name ' if fault.is_name else ''}{shown(fault.value)}"
    by_type = {fault.error: fault for fault in faults}
    if own := by_type.get("value_error"):
        return _own_words(own, name, found)
    if any(kind in by_type for kind in UNKNOWN):
        known = _known(kind for fault in faults for kind in fault.parents)
        elsewhere = [n for n in _names(model) if n.rpartition(".")[2] == fault.path[-1]]
        hint = (
            f"; did you mean {_listed(elsewhere)}?"
            if elsewhere and not above
            else did_you_mean(fault.path[-1], known)
        )
        return f"{name}: unknown key{hint} Known keys there: {', '.join(known)}"
    if any(kind in by_type for kind in MISSING) and "length" not in fault.context:
        words = [word for kind in fault.kinds for word in _choices(kind)]
        choice = f", expected {_listed(words)}" if words else ""
        is_word = takes_words and not any(part.isdigit() for part in fault.path)
        command = f" or say {name}=VALUE on the command line" if is_word else ""
        return f"{name}: missing{choice}. Put it into the YAML{command}"
    expected = list(dict.fromkeys(fault.expected for fault in by_type.values()))
    line = f"{found}, expected {_listed(expected)}{_advice(fault, expected, defaults)}"
    return f"{name}: {line}" if name else line


def _own_words(fault: _Fault, name: str, found: str) -> str:
    """Returns the message of a validator, with the name of its key and what was found there."""
    message = str(fault.context["error"])
    if not name or message.startswith((f"{name}.", f"{name}:")):
        return message
    key = re.match(r"\w*", message)
    if key and key[0] in _known(fault.kinds):
        return f"{name}.{message}"  # of one key of several
    if message.startswith("expected"):
        return f"{name}: {found}, {message}"
    is_told = isinstance(fault.value, Mapping) or "found " in message
    return f"{name}: {message}" if is_told else f"{name}: {found}: {message}"


def _advice(fault: _Fault, expected: Sequence[str], defaults: bool) -> str:
    """Returns what to do about a value that does not fit."""
    value, items = fault.value, _inside(fault.kinds, 0)
    if isinstance(value, str):
        words = [word for kind in fault.kinds for word in _choices(kind)]
        if near := difflib.get_close_matches(value, words, n=1, cutoff=0.8):
            return f"; did you mean {near[0]}?"
        if value.lower() in ("none", "off", "no") and type(None) in fault.kinds:
            return ". Write null"
    if expected == [KEYS] and (known := _known(fault.kinds)):
        return f". Its keys are {', '.join(known)}"
    if expected == [LIST] and (known := _known(items)):
        return f" of keys with values. The keys are {', '.join(known)}"
    if expected == [LIST] and any(_takes(item, value) for item in items):
        return f". Write [{in_yaml(value)}]"
    if expected == [LIST] and (words := [word for item in items for word in _choices(item)]):
        return f" of {_listed(words)}. Write [{words[0]}]"
    named = (get_args(kind)[1] for kind in fault.kinds if get_origin(kind) is dict)
    if expected == [NAMES] and any(_takes(k, value) for a in named for k in _alternatives(a)):
        return f". Write {{NAME: {in_yaml(value)}}}"
    default = next((_default(owner, fault.path[-1]) for owner in fault.owners if defaults), "")
    return f". Correct it, or leave it out for {default}" if default else ". Correct it"


def _known(kinds: Iterable[Any]) -> list[str]:
    return sorted({key for kind in kinds for key in key_types(kind)})


def _listed(words: Sequence[str]) -> str:
    return " or ".join([", ".join(words[:-1]), words[-1]] if len(words) > 1 else words)


# ---- types of keys ----------------------------------------------------------------------------


def key_types(kind: Any) -> dict[str, Any]:
    """Returns the keys of a model as a YAML has them, with their types; none of what is no model."""
    if isinstance(kind, type) and issubclass(kind, BaseModel):
        return {f.alias or name: f.annotation for name, f in kind.model_fields.items()}
    if isinstance(kind, type) and is_dataclass(kind):
        types = get_type_hints(kind)
        return {field.name: types[field.name] for field in fields(kind)}
    return {}


def _names(model: Any, above: str = "") -> Iterator[str]:
    """Yields the full names of the keys of a model, and of those of models below it."""
    for key, annotation in key_types(model).items():
        yield f"{above}{key}"
        for kind in _alternatives(annotation):
            yield from _names(kind, f"{above}{key}.")


def types_in(annotation: Any) -> Iterator[type]:
    """Yields the plain types that an annotation is put together of."""
    arguments = get_args(annotation)
    if not arguments and isinstance(annotation, type):
        yield annotation
    for argument in arguments:
        yield from types_in(argument)


def _alternatives(annotation: Any) -> Iterator[Any]:
    """Yields the types of which a value may have any."""
    if get_origin(annotation) is Annotated:
        yield from _alternatives(get_args(annotation)[0])
    elif get_origin(annotation) in (Union, UnionType):
        for kind in get_args(annotation):
            yield from _alternatives(kind)
    else:
        yield annotation


def _inside(kinds: Iterable[Any], part: str | int) -> tuple[Any, ...]:
    """Returns the types of what is at a key or an index of values of some types."""
    inside = []
    for kind in kinds:
        arguments = get_args(kind)
        if part in key_types(kind):
            inside.append(key_types(kind)[str(part)])
        elif get_origin(kind) is dict:
            inside.append(arguments[1])
        elif get_origin(kind) in (list, tuple) and isinstance(part, int):
            inside.append(arguments[0])  # all are alike
    return tuple(kind for annotation in inside for kind in _alternatives(annotation))


def _holds(value: Any, part: str | int) -> bool:
    if isinstance(value, list):
        return part in range(len(value))
    return isinstance(value, Mapping) and part in value


def _tags(kind: Any) -> set[str]:
    """Returns how pydantic calls a model as one of several: its name, or the one word of a literal."""
    literals = map(_choices, key_types(kind).values())
    return {getattr(kind, "__name__", ""), *(words[0] for words in literals if len(words) == 1)}


def _takes(kind: Any, value: Any) -> bool:
    """Whether a value is of a type, by its type alone."""
    if isinstance(value, str):
        return kind in (str, Path) or value in _choices(kind)
    return type(value) in (int, float) and kind in (type(value), float)


def _choices(kind: Any) -> tuple[str, ...]:
    """Returns the words among which a key chooses; none where it is not one of them."""
    return get_args(kind) if get_origin(kind) is Literal else ()


def _default(model: type, key: str) -> str:
    """Returns the default of a key as a YAML has it; empty where it has none, or one of many values."""
    if not issubclass(model, BaseModel):
        return ""
    (info,) = (f for name, f in model.model_fields.items() if key == (f.alias or name))
    default = info.get_default(call_default_factory=True, validated_data={})
    if default is PydanticUndefined or isinstance(default, Mapping | BaseModel):
        return ""
    return in_yaml(default)
