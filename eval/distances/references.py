"""What sets of pictures are compared with: a folder of real ones, and what a network makes of them.

    python -m eval score reference val2014 --out val2014.safetensors --crop cc256-lanczos ...

A file holds the features (N, D), their mean and covariance, each picture's group and digest, and a
record: network, weights, resize, crop, and the digest of all pictures. The digest of that record,
not a free name, says which it is.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from shutil import rmtree
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np
from numpy.typing import NDArray
from pydantic import Field
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from shards import FormatVersion, atomic_write, canonical_json, sha256
from shards.format import differences
from shards.format.atomic import open_file, parse_json, refuse_version
from shards.format.checks import Fields, Text, check

from ..errors import BadReference
from ..features.features import Floats, Pictures, extract, identity, of_folder
from .frechet import Gaussian

if TYPE_CHECKING:
    from ..features.networks import Network

FORMAT, VERSION = "latentbank-reference", 1
SEED = 0  # of drawn pictures
LABEL = re.compile(r"[\w.-]+")
Json = dict[str, Any]


class _Record(Fields):
    network: Text
    weights: Text
    resize: Text
    crop: Text
    count: Annotated[int, Field(ge=2, le=1 << 40)]


class _Head(Fields):
    label: Annotated[str, Field(max_length=200)]
    groups: Annotated[list[Text], Field(max_length=1 << 20)]
    record: _Record


@dataclass(frozen=True, eq=False)
class Reference:
    label: str  # for people; part of a score's name
    record: Json  # network, weights, resize, crop, source, count
    features: Floats  # (N, D)
    groups: tuple[str | None, ...]
    pictures: tuple[str, ...] = ()  # digest of each
    fitted: Gaussian | None = None  # where it was stored
    validation: Reference | None = None  # other real pictures, for what is relative to theirs
    _parts: dict[str, Reference | None] = field(default_factory=dict)

    @property
    def digest(self) -> str:
        if self.validation is None:
            return sha256(canonical_json(self.record))
        return sha256(canonical_json({**self.record, "validation": self.validation.digest}))

    @property
    def name(self) -> str:
        """The label with as much of the digest as no other reference shares."""
        return f"{self.label}-{self.digest[:8]}"

    @cached_property
    def gaussian(self) -> Gaussian:
        return self.fitted or Gaussian.fitted(self.features)

    def of_group(self, group: str) -> Reference | None:
        """Returns the part of a group, None where it has fewer than two pictures."""
        if group not in self._parts:
            members = np.array([name == group for name in self.groups])
            count = int(members.sum())
            validation = self.validation.of_group(group) if self.validation else None
            part = Reference(self.label, self.record, self.features[members], (group,) * count)
            lacking = self.validation is not None and validation is None
            part = replace(part, validation=validation, _parts={})
            self._parts[group] = part if count > 1 and not lacking else None
        return self._parts[group]

    def drawn(self, count: int) -> Floats:
        """Returns features of `count` of the pictures, or of all where they are fewer.

        They are drawn by a fixed seed, the same ones in each score of as many pictures.
        """
        if len(self.features) <= count:
            return self.features
        order = np.random.RandomState(SEED).permutation(len(self.features))
        return self.features[np.sort(order[:count])]

    def beside(self, validation: Reference) -> Reference:
        """Returns this reference with a validation half; BadReference where the two share pictures."""
        check_disjoint(self.pictures, validation.pictures, validation.label)
        return replace(self, validation=validation, _parts={})


def make(
    pictures: Pictures, network: Network, cut: str, label: str, folder: Path | None = None,
    batch_size: int = 32,
) -> Reference:  # fmt: skip
    """Returns the reference of real pictures; features are kept in `folder`."""
    check_label(label)
    features = extract(pictures, network, cut, folder, batch_size)
    record = identity(network, cut) | {"source": pictures.digest, "count": len(features)}
    return Reference(label, record, features, tuple(pictures.groups), tuple(pictures.digests))


def default_label(folder: Path, cut: str) -> str:
    """`val2014-cc256-lanczos`."""
    name = re.sub(r"[^\w.-]+", "-", folder.resolve().name)
    return name if cut == "none" else f"{name}-{cut}"


def check_label(label: str) -> None:
    if not LABEL.fullmatch(label):
        raise BadReference(
            f"found the label {label!r}, expected letters, digits, dots and hyphens: it names files"
        )


def build(
    folder: Path, out: Path, network: Network, cut: str, label: str | None, batch_size: int = 32
) -> Reference:
    """Makes a reference of a folder and writes it; goes on where an earlier attempt was stopped."""
    if out.exists():
        raise BadReference(f"{out}: exists already. Take it, delete it, or choose another name")
    label = label or default_label(folder, cut)
    check_label(label)
    blocks = out.with_name(f".{out.name}.blocks")
    reference = make(of_folder(folder), network, cut, label, blocks, batch_size)
    write(reference, out)
    rmtree(blocks)
    return reference


def write(reference: Reference, path: Path) -> None:
    names = sorted({name for name in reference.groups if name is not None})
    fitted = reference.gaussian
    groups = [-1 if group is None else names.index(group) for group in reference.groups]
    digests = [list(bytes.fromhex(digest)) for digest in reference.pictures]
    tensors: dict[str, NDArray[Any]] = {
        "features": reference.features, "mean": fitted.mean, "covariance": fitted.covariance,
        "pictures": np.array(digests, np.uint8), "groups": np.array(groups, np.int32),
    }  # fmt: skip
    record = {
        "format": FORMAT, "version": VERSION, "label": reference.label, "record": reference.record, "groups": names,
        "contents": _contents(tensors),
    }  # fmt: skip
    atomic_write(path, save(tensors, {"record": canonical_json(record).decode()}))


def read(path: Path) -> Reference:
    """Returns a reference that `write` put there; BadReference where it is none, or was damaged."""
    try:
        os.close(open_file(path))
        with safe_open(path, "numpy") as file:
            head = parse_json((file.metadata() or {})["record"])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  # no mapping
        refuse_version(head, str(path), FORMAT, VERSION)
        check(_Head, head)
        check_label(head["label"])
        count, width = tensors["features"].shape
        for name, shape in {
            "mean": (width,), "covariance": (width, width), "groups": (count,), "pictures": (count, 32)
        }.items():  # fmt: skip
            if tensors[name].size and tensors[name].shape != shape:
                raise ValueError(f"{name} is of shape {tensors[name].shape}, expected {shape}")
        if head["contents"] != _contents(tensors):
            raise ValueError("its numbers are not those that were written")
        if not np.isfinite(tensors["features"]).all():
            raise ValueError("its features hold NaN or infinity")
        fitted = Gaussian(tensors["mean"], tensors["covariance"], int(head["record"]["count"]))
        groups = tuple(None if i < 0 else str(head["groups"][i]) for i in tensors["groups"])
        pictures = tuple(bytes(digest).hex() for digest in tensors["pictures"])
        return Reference(
            head["label"], head["record"], tensors["features"], groups, pictures, fitted
        )
    except FormatVersion:
        raise
    except FileNotFoundError:
        raise BadReference(
            f"{path}: no such file. Make one with `python -m eval score reference`"
        ) from None
    except (OSError, SafetensorError, KeyError, IndexError, TypeError, ValueError) as error:
        raise BadReference(
            f"{path}: not a reference of ours ({error}). Make it again with `python -m eval score reference`"
        ) from None


def check_disjoint(reference: Sequence[str], validation: Sequence[str], where: str) -> None:
    """BadReference where digests of pictures are in both, or are not known."""
    if not (reference and validation):
        raise BadReference(
            f"{where}: found no digests of pictures beside the features, of it or of the reference, so nothing says "
            "that the two share none. Make both again with `python -m eval score reference`"
        )
    if shared := len(set(reference) & set(validation)):
        raise BadReference(
            f"{where}: {shared} of its {len(validation)} pictures are in the reference too, expected none: a distance "
            "to pictures that are in the reference is smaller than that of other real ones. Take two halves"
        )


def check_network(reference: Reference, network: Network, path: Path) -> None:
    """BadReference where the reference's features are another network's."""
    expected = identity(network, reference.record["crop"])
    actual = {key: reference.record[key] for key in expected}
    if lines := differences(actual, expected):
        problem = f"{path}: made by another network than is to score:"
        raise BadReference("\n  ".join([problem, *lines, "Make a reference with this one"]))


def _contents(tensors: Mapping[str, NDArray[Any]]) -> dict[str, str]:
    return {name: sha256(np.ascontiguousarray(t).tobytes()) for name, t in sorted(tensors.items())}
