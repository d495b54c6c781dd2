"""What a run is, for comparisons: the training behind a checkpoint, and where two of them differ.

A training is a JSON object of parts (PARTS), read from a manifest. A part that the manifest lacks
is absent, which means unknown: imported weights name their model and no more.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from math import isclose, isqrt, prod
from typing import Annotated, Any

from pydantic import BaseModel, Field, ValidationError

from shards.format import summary_of
from shards.format.checks import Fields, Text
from shards.format.checks import check as check_fields

from ..config import EmaConfig, OptimConfig
from ..model.config import shift_of, table_side
from ..model.dit import DiTConfig
from ..model.flow import FlowConfig
from ..model.tokens import patch_of

Json = dict[str, Any]
PARTS = (
    *("model", "optim", "ema", "flow", "caption_dropout", "deepspeed", "global_batch"),
    *("steps_planned", "step", "position", "seed", "order", "data", "init", "changes"),
)
CONFIGS: dict[str, type[BaseModel]] = {
    "model": DiTConfig,
    "optim": OptimConfig,
    "ema": EmaConfig,
    "flow": FlowConfig,
}
# of these, what moves neither the weights nor their plain average
ASIDE = {"ema": {"power", "snapshots"}}
PRECISION = ("torch_autocast", "communication_data_type")  # of the DeepSpeed JSON
LONGEST = 1 << 16  # side of a latent
DEEPEST = 100  # levels of a training's JSON
YOUNG = 0.05  # share of the initial weights in an average, above which it is of little use
# What cannot but differ where the latent column is another VAE's.
# where both have the same tokens all the same, or those that `auto` makes of their latents
GRID = ("model.patch_size", "model.sample_size")
# where both have the table that a config has which leaves the two out
TABLE = ("model.pos_embed_max_size", "model.sample_size")
SHIFT_KEY = "flow.shift"  # where both have the one of their latent
FOLLOWS = ("model.in_channels", "model.out_channels", "tokens")
COLUMN = ("encoder", "norm", "kind")  # likewise, of a latent column
CHOSEN = "encoder.precision"  # but this is the user's choice
LOCATION = ("path", "subfolder", "revision")  # of weights that are known by their digest
INIT = "init.training."  # before the keys of the run that weights came from


class _Training(Fields):
    """The fields that are computed with; the rest is compared and shown, whatever it says."""

    model: dict[str, Any] = {}
    seed: Annotated[int, Field(ge=0, lt=1 << 64)] = 0
    caption_dropout: float = 0
    init: _Init | None = None


class _Init(Fields):
    path: Text = ""
    training: _Training = Field(default_factory=_Training)


def check(training: Any) -> None:
    """Raises ValueError where a record is no training, or nests deeper than forty runs."""
    _refuse_deep(training, DEEPEST)
    check_fields(_Training, training)


def _refuse_deep(value: Any, levels: int) -> None:
    if not levels:
        raise ValueError("nested too deep")
    items = value.values() if isinstance(value, Mapping) else value
    for item in items if isinstance(value, Mapping | list) else ():
        _refuse_deep(item, levels - 1)


def training_of(manifest: Mapping[str, Any]) -> Json:
    """Returns the training behind a checkpoint, by part; ValueError where a part is none."""
    try:
        training = _parts(manifest)
        check(training)
    except (KeyError, TypeError, AttributeError, ZeroDivisionError) as error:
        raise ValueError(f"no training can be read from it ({error!r:.200})") from None
    return training


def _parts(manifest: Mapping[str, Any]) -> Json:
    training = {
        key: manifest[key] for key in ("model", "init", "step", "position") if key in manifest
    }
    if "latent_shape" in manifest:
        _, *sides = manifest["latent_shape"]
        training["tokens"] = prod(side // manifest["model"]["patch_size"] for side in sides)
    if "data" in manifest:
        training["data"] = _columns(manifest["data"])
    if "order" in manifest:
        order = manifest["order"]
        training["order"] = {key: order[key] for key in ("lanes", "window", "weights")}
        training["order"]["valid_rows"] = order["valid"]  # a digest of the row ids of each source
    if "config" in manifest:
        config = manifest["config"]
        training |= resumed(manifest)
        training |= {"flow": _flow(manifest), "caption_dropout": config["data"]["caption_dropout"]}
        training |= {"seed": config["seed"], "changes": manifest.get("changes", [])}
    return training


def _flow(manifest: Mapping[str, Any]) -> Any:
    """Returns the flow with its timestep shift as a number, where it follows a latent that is known."""
    flow = manifest["config"]["flow"]
    if isinstance(flow, Mapping) and flow.get("shift") == "auto" and "latent_shape" in manifest:
        return {**flow, "shift": shift_of(prod(manifest["latent_shape"]))}
    return flow


def resumed(manifest: Mapping[str, Any]) -> Json:
    """Returns the parts that move the weights and may change when a run goes on."""
    config = manifest["config"]
    parts = {key: config[key] for key in ("optim", "ema", "global_batch")}
    constant = config["optim"]["schedule"] == "constant"  # then the length of the run moves no rate
    parts["steps_planned"] = None if constant else config["steps"]
    # of older checkpoints it may be the path of the JSON file
    parts["deepspeed"] = precision(manifest.get("deepspeed", config["deepspeed"]))
    return with_defaults(parts)


def precision(deepspeed: Any) -> Any:
    """Returns what of a DeepSpeed JSON changes the numbers: not its stage, nor its buckets."""
    if not isinstance(deepspeed, Mapping):
        return deepspeed
    parts = {key: deepspeed[key] for key in PRECISION if key in deepspeed}
    autocast = parts.get("torch_autocast")
    if isinstance(autocast, Mapping) and not autocast.get("enabled"):
        del parts["torch_autocast"]
    return parts


def with_defaults(training: Mapping[str, Any]) -> Json:
    """Returns the training with the defaults of fields that it lacks; unknown fields stay."""
    filled = dict(training)
    for part, config in CONFIGS.items():
        with suppress(KeyError, ValidationError):
            values = config.model_validate(training[part])
            filled[part] = values.model_dump(mode="json", exclude=ASIDE.get(part))
    return filled


def _columns(data: Mapping[str, Any]) -> Json:
    """Returns the columns of each source without their snapshots, which the order's rows show."""
    columns = [
        {
            name: _column(record)
            for name, record in source.items()
            if isinstance(record, Mapping) and "identity" in record
        }
        | ({"masks": source["masks"]} if "masks" in source else {})
        for source in [data, *data.get("more", ())]
    ]
    keys = ("truncated", "rates", "weights", "text_encoder")
    return {"sources": columns} | {key: data[key] for key in keys if data.get(key) is not None}


def _column(record: Mapping[str, Any]) -> Json:
    norm = record.get("norm")
    norm = summary_of(norm) if isinstance(norm, dict) else norm
    more = {"norm": norm, "digest": record.get("column")}
    return {**record["identity"], **{key: value for key, value in more.items() if value}}


def initial_share(manifest: Mapping[str, Any]) -> float | None:
    """Returns the share of the initial weights in a checkpoint's average; None where it is unknown.

    Manifests that do not say it are of runs whose decay was the same in all updates."""
    try:
        if "average" in manifest:
            return float(manifest["average"]["initial_share"])
        return float(manifest["config"]["ema"]["decay"] ** manifest["optimizer"]["step"])
    except (KeyError, TypeError, ValueError, OverflowError):
        return None


def young_average(share: float | None, init: Mapping[str, Any] | None) -> str | None:
    """Returns a message where an average holds more than YOUNG of initial weights (of `init`)."""
    if share is None or share <= YOUNG:
        return None
    origin = f" ({init['path']})" if init else ", which are noise"
    return (
        f"{share:.1%} of the averaged weights are the weights that training began with{origin}: the average is younger "
        "than its decay. Train longer, lower ema.decay, or take the weights themselves"
    )


# Differences ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class TrainingDifferences:
    """Where two trainings differ, each key with both values."""

    beside: dict[str, tuple[Any, Any]] = field(default_factory=dict)
    follow: dict[str, tuple[Any, Any]] = field(default_factory=dict)  # from the VAE of the latents
    unknown: tuple[str, ...] = ()  # parts that one of them lacks

    @property
    def all(self) -> dict[str, tuple[Any, Any]]:
        return {**self.beside, **self.follow}


def compared(a: Mapping[str, Any], b: Mapping[str, Any]) -> TrainingDifferences:
    """Returns where the parts differ that both have. Columns of `also` and masks count by their rows."""
    a, b = _comparable(a), _comparable(b)
    unknown = tuple(part for part in PARTS if part not in a or part not in b)
    shared = a.keys() & b.keys()
    differ = differing({part: a[part] for part in shared}, {part: b[part] for part in shared})
    if "order.valid_rows" not in differ:
        differ = {key: value for key, value in differ.items() if not _selects_rows(key)}
    following = {key for key in differ if _follows(key) or _follow_latents(key, a, b)}
    return TrainingDifferences(
        {key: value for key, value in differ.items() if key not in following},
        {key: value for key, value in differ.items() if key in following},
        unknown,
    )


def _follow_latents(key: str, a: Mapping[str, Any], b: Mapping[str, Any]) -> bool:
    """Whether each of two trainings has what follows its own latents; also in the runs that their
    weights came from."""
    while key.startswith(INIT):
        key = key.removeprefix(INIT)
        a, b = ((run.get("init") or {}).get("training") or {} for run in (a, b))
    if key == SHIFT_KEY:
        return _shift_follows(a) and _shift_follows(b)
    if key in TABLE and _table_follows(a) and _table_follows(b):
        return True
    same_grid = None not in _grid(a) and _grid(a) == _grid(b)
    return key in GRID and (same_grid or _patches_follow(a, b))


def _patches_follow(a: Mapping[str, Any], b: Mapping[str, Any]) -> bool:
    """Whether the patches of two trainings are those that `auto` takes of their square latents for one
    number of tokens, and where a table of positions is added, it is the same or follows the tokens."""
    try:
        patches, tokens, coordinates = zip(
            *(
                (model["patch_size"], run["tokens"], model["sample_size"] // model["patch_size"])
                for run in (a, b)
                for model in [run["model"]]
            ),
            strict=True,
        )
        sides = [isqrt(n) * p for n, p in zip(tokens, patches, strict=True)]
        square = all(
            isqrt(n) ** 2 == n and s <= LONGEST for n, s in zip(tokens, sides, strict=True)
        )
        # a patch above 1 is the largest for the tokens that it leaves
        automatic = square and any(
            tuple(patch_of(s, s, n) for s in sides) == patches for n in tokens
        )
        added = "ape" in (a["model"]["pos_embed"], b["model"]["pos_embed"])
    except (KeyError, TypeError, ValueError, ZeroDivisionError):
        return False
    same = not added or len(set(coordinates)) == 1 or (_table_follows(a) and _table_follows(b))
    return automatic and same


def _shift_follows(training: Mapping[str, Any]) -> bool:
    """Whether the timestep shift is the one that `auto` stands for."""
    model = training.get("model", {})
    try:
        values = model["in_channels"] * training["tokens"] * model["patch_size"] ** 2
        return isclose(training["flow"]["shift"], shift_of(values), rel_tol=1e-6)
    except (KeyError, TypeError, ValueError):
        return False


def _grid(training: Mapping[str, Any]) -> list[Any]:
    """Returns how many tokens the model has and, where it adds a table of positions, the largest
    coordinate; None of what is unknown. Where two are equal, patches of another size follow the
    VAE."""
    tokens, model = training.get("tokens"), training.get("model", {})
    if model.get("pos_embed") != "ape":
        return [tokens]
    try:
        return [tokens, model["sample_size"] // model["patch_size"]]
    except (KeyError, TypeError, ZeroDivisionError):
        return [None]


def _table_follows(training: Mapping[str, Any]) -> bool:
    """Whether the table of positions is the one that square latents have by default."""
    model = training.get("model", {})
    try:
        side, patch = model["sample_size"], model["patch_size"]
        tokens = side // patch
        table = table_side(tokens)
        return bool(tokens**2 == training.get("tokens") and model["pos_embed_max_size"] == table)
    except (KeyError, TypeError, ZeroDivisionError):
        return False


def _by_content(data: Any) -> Any:
    """Returns columns without how they are stored, where the encoder's weights were read, and
    figures that were measured of it."""
    if isinstance(data, list):
        return [_by_content(value) for value in data]
    if not isinstance(data, Mapping):
        return data
    excluded = ("digest", "outputs", *LOCATION) if "weights" in data else ("digest",)
    return {key: _by_content(value) for key, value in data.items() if key not in excluded}


def _comparable(training: Mapping[str, Any]) -> Json:
    """Returns the training with columns by their content, and the run that the initial weights came
    from by its own training, where that is recorded."""
    parts = with_defaults(training)
    if "data" in parts:
        parts["data"] = _by_content(parts["data"])
    init = parts.get("init")
    if init and init.get("training", {}).keys() >= set(PARTS):
        rest = {key: value for key, value in init.items() if key not in ("path", "sha256")}
        parts["init"] = rest | {"training": _comparable(init["training"])}
    return parts


def without_seed(training: Mapping[str, Any]) -> Json:
    """Returns the leaves that trainings share which differ in their seeds alone."""
    return {
        key: value
        for key, value in leaves(_comparable(training)).items()
        if _innermost(key) != "seed" and not _selects_rows(key)
    }


def _selects_rows(key: str) -> bool:
    """Whether a key is of what only says which rows are read, and `order.valid_rows` says too."""
    return ".also." in key or (key.startswith("data.sources.") and key.endswith(".masks"))


def _innermost(key: str) -> str:
    """Returns a leaf's path within its own training, also in the run that the weights came from."""
    return key.rpartition(INIT)[2]


def _follows(key: str) -> bool:
    """Whether a difference of this key belongs to the VAE; also in the run that the weights came
    from."""
    key = _innermost(key)
    column, _, below = key.partition(".latents.")
    of_latents = column.startswith("data.sources.") and below.split(".")[0] in COLUMN
    return key in FOLLOWS or (of_latents and below != CHOSEN)


def differing(a: Any, b: Any) -> dict[str, tuple[Any, Any]]:
    """Returns the leaves that differ between two JSON values, by dotted path; None for none."""
    first, second = leaves(a), leaves(b)
    return {
        key: (first.get(key), second.get(key))
        for key in sorted(first.keys() | second.keys())
        if first.get(key) != second.get(key)
    }


def leaves(value: Any, path: str = "") -> Json:
    """Returns a JSON value's leaves by dotted path; a list without objects in it is a leaf."""
    if isinstance(value, Mapping):
        items = list(value.items())
    elif isinstance(value, list) and any(isinstance(item, Mapping) for item in value):
        items = [(str(i), item) for i, item in enumerate(value)]
    else:
        return {path: value}
    below = f"{path}." if path else ""
    return {k: v for key, item in items for k, v in leaves(item, f"{below}{key}").items()}
