"""Autoencoders of a user's own class: from its config to a column, and what is refused."""

from __future__ import annotations

import inspect
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import configs
from encode.config import EncodeConfig
from encode.errors import ModelNotUsable
from encode.models import load_encoders
from encode.models.own import OwnVae, fixed_pictures, load_vae
from encode.models.pixels import to_pixels
from encode.registry import ModelSpec
from encode.run.job import run
from shards import Column, IdentityMismatch, Norm
from shards.tools.info import information
from tests.encode import adapters
from tests.encode.adapters import ADAPTERS, SIDE, own, plain_own, save_weights
from tests.encode.toy import picture, write_source

ROOT = Path(__file__).parents[3]
CROP = np.stack([np.array(picture(n, SIDE, SIDE)) for n in range(3)])
PIXELS = to_pixels(CROP)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("own")
    save_weights(folder)
    return folder


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], str]]:
    """Writes a module of the user's own with a class `Mine`; its name in a config."""
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "dont_write_bytecode", True)  # it is changed within a second
    name = "module_of_a_user"

    def write(text: str) -> str:
        (tmp_path / f"{name}.py").write_text(text)
        sys.modules.pop(name, None)
        return f"{name}:Mine"

    yield write
    sys.modules.pop(name, None)


MINE = """
class Mine:
    version = "1"
    norm = (0.0, 1.0)
    def encode(self, pixels): return pixels[:, :, ::2, ::2] * {factor}
    def decode(self, latents): return latents.repeat_interleave(2, 2).repeat_interleave(2, 3) / {factor}
"""


def config_of(
    root: Path, tars: str, encoder: dict[str, Any], kind: str, **engine: Any
) -> EncodeConfig:
    column = {"kind": kind, "encoder": encoder, "resolution": SIDE}
    return EncodeConfig.model_validate(
        {
            "root": str(root), "sources": {"toy": tars}, "columns": {"own": column}, "shard_rows": 1024,
            "engine": {"executor": "inline", "batch": 4, "device": "cpu", **engine},
        }
    )  # fmt: skip


def vae(name: str, folder: Path, **fields: Any) -> OwnVae:
    return OwnVae(ModelSpec.model_validate({**own(name, folder), **fields}), resolution=SIDE)


@pytest.mark.parametrize("name", list(ADAPTERS))
def test_encodes_and_decodes_as_the_class_does(name: str, folder: Path) -> None:
    kind, shape, _ = ADAPTERS[name]
    encoder = vae(name, folder)
    assert (encoder.kind, encoder.moments_shape(SIDE)) == (kind, shape)
    actual = encoder.encode(PIXELS)
    latents = actual.chunk(2, 1)[0] if kind == "moments" else actual
    rows, pixels = plain_own(name, folder, PIXELS, latents)
    assert torch.equal(actual, rows)
    if kind == "moments":
        assert (actual.chunk(2, 1)[1] == -30).all()  # as diffusers bounds it
    torch.testing.assert_close(encoder.decode(latents), pixels, rtol=0, atol=1e-6)
    error = (encoder.decode(latents) - PIXELS).square().mean()
    assert 10 * torch.log10(4 / error) > 30 or name == "Pixels"


def test_an_adapter_takes_few_lines() -> None:
    for name in ADAPTERS:
        cls = getattr(adapters, name.partition(".")[0])
        assert len(inspect.getsource(cls).splitlines()) <= 40, name


def test_norms_of_every_form(folder: Path) -> None:
    tensors = load_file(folder / "weights.safetensors")
    assert vae("Tokens", folder).norm == Norm((0.0,), (1.5,))
    assert vae("Pixels", folder).norm == Norm((0.0,) * 3, (2.0,) * 3)
    norm = vae("Representation", folder).norm
    assert np.array_equal(norm.arrays[0], tensors["mean"].numpy())
    np.testing.assert_allclose(norm.arrays[1], 1 / tensors["deviation"].numpy(), rtol=1e-6)


@pytest.mark.parametrize("name", list(ADAPTERS))
def test_a_column_by_a_class_of_ones_own(name: str, folder: Path, tmp_path: Path) -> None:
    kind, shape, _ = ADAPTERS[name]
    tars = write_source(tmp_path / "tars", 2, 6)
    config = config_of(tmp_path / "root", tars, own(name, folder), kind)
    assert run(config) == 0
    column = Column.open(tmp_path / "root/toy/own")
    assert column.layout.row_shape == shape
    encoder = column.identity.encoder
    assert encoder.cls == f"tests.encode.adapters:{name}"
    assert encoder.version == getattr(adapters, name.partition(".")[0]).version
    assert encoder.outputs["resolution"] == SIDE
    commit = json.loads((tmp_path / "root/toy/own/commits/00000.json").read_bytes())
    assert len(commit["provenance"]["class_source"]) == 64
    assert information(tmp_path / "root/toy/own")["norm_source"] == ["norm of the class"]
    with pytest.raises(ModelNotUsable, match=f"say --allow-class tests.encode.adapters:{name}"):
        load_vae(encoder)
    decoder = load_vae(encoder, allow=[encoder.cls])
    rows = torch.from_numpy(column.read(np.arange(3))).float()
    latents = rows.chunk(2, 1)[0] if kind == "moments" else rows
    assert decoder.decode(latents).shape == (3, 3, SIDE, SIDE)
    assert run(config) == 0  # nothing is left to do


def test_a_class_that_only_a_column_names_is_not_imported(
    module: Callable[[str], str], tmp_path: Path
) -> None:
    name = module(MINE.format(factor=1))
    identity = {"class": name, "path": "", "precision": "fp32", "version": "1", "outputs": None}
    identity["weights"] = OwnVae(ModelSpec.model_validate({"class": name})).weights
    module(f"open({str(tmp_path / 'imported')!r}, 'w')\n" + MINE.format(factor=1))
    for allow in ([], ["module_of_a_user"], ["module_of_a_user:Other"]):
        with pytest.raises(ModelNotUsable, match="none is imported because a column says so"):
            load_vae(identity, allow=allow)
    assert not (tmp_path / "imported").exists()
    load_vae(identity, allow=[name])
    assert (tmp_path / "imported").exists()


def test_what_a_column_was_made_with(
    module: Callable[[str], str], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A comment is said, another version or other values are refused, rounding is not."""
    name = module(MINE.format(factor=1))
    tars = write_source(tmp_path / "tars", 2, 3)
    config = config_of(tmp_path / "root", tars, {"class": name}, "latents")
    assert run(config) == 0
    record = (tmp_path / "root/toy/own/column.json").read_bytes()
    encoder = Column.open(tmp_path / "root/toy/own").identity.encoder

    module(MINE.format(factor=1) + "# a comment\n")
    assert not caplog.records
    assert run(config) == 0
    assert "module_of_a_user:Mine has changed since shard 0 was encoded" in caplog.text
    module(MINE.format(factor=1.001))  # another machine
    assert run(config) == 0
    assert (tmp_path / "root/toy/own/column.json").read_bytes() == record
    load_vae(encoder, allow=[name])

    module(MINE.format(factor=1.1))
    with pytest.raises(IdentityMismatch, match=r"identity.encoder.outputs.figures"):
        run(config)
    with pytest.raises(ModelNotUsable, match="of two fixed pictures it makes other values"):
        load_vae(encoder, allow=[name])
    module(MINE.format(factor=1).replace('"1"', '"2"'))
    with pytest.raises(
        IdentityMismatch, match=r"identity.encoder.version: found '1', expected '2'"
    ):
        run(config)
    with pytest.raises(ModelNotUsable, match="found version '2', the column was made with '1'"):
        load_vae(encoder, allow=[name])
    assert caplog.text.count("has changed since") == 3  # as long as the version is the same


def test_other_weights_are_another_column(folder: Path, tmp_path: Path) -> None:
    name = "tests.encode.adapters:Tokens"
    first = vae("Tokens", folder)
    tensors = load_file(folder / "weights.safetensors")
    tensors["basis"] = tensors["basis"] + 2**-20
    save_file(tensors, tmp_path / "weights.safetensors")
    assert vae("Tokens", tmp_path).weights != first.weights
    moved = first.identified().model_copy(update={"path": str(tmp_path / "weights.safetensors")})
    with pytest.raises(ModelNotUsable, match=f"the column was made with {first.weights[:16]}"):
        load_vae(moved, allow=[name])


def test_every_worker_checks_what_the_first_one_loaded(
    module: Callable[[str], str], tmp_path: Path
) -> None:
    """The code of another machine may be another."""
    name = module(MINE.format(factor=1))
    config = config_of(tmp_path / "root", "tars", {"class": name}, "latents")
    first = load_encoders(config.columns, config.engine)["own"]
    signatures = {"own": first.signature}
    load_encoders(config.columns, config.engine, signatures)
    module(MINE.format(factor=1.1))
    with pytest.raises(ModelNotUsable, match="it makes other values than when the column was made"):
        load_encoders(config.columns, config.engine, signatures)
    module(MINE.format(factor=1).replace('"1"', '"2"'))
    with pytest.raises(ModelNotUsable, match="found version '2'"):
        load_encoders(config.columns, config.engine, signatures)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"version": None}, "the column was made with None"),
        ({"outputs": 5}, "other values than when"),
        ({"outputs": {"resolution": 10**9, "figures": [[0.5]]}}, "other values than when"),
        ({"outputs": {"resolution": 32, "figures": "x"}}, "other values than when"),
        ({"weights": "0" * 64}, "the column was made with 0000000000000000"),
    ],
)
def test_an_identity_that_somebody_edited(
    change: dict[str, Any], message: str, folder: Path
) -> None:
    made = vae("Tokens", folder)
    record = {**made.identified().record(), **change}
    record = {k: v for k, v in record.items() if v is not None}
    with pytest.raises(ModelNotUsable, match=message):
        load_vae(record, allow=[made.cls])


RAY = """
import json, os, sys
from encode.__main__ import main
sys.argv = ["encode", "run", "encode.json"]
code = main()
print(json.dumps([code, sorted({"torch", "mine"} & set(sys.modules)), os.getpid()]))
"""


@pytest.mark.slow  # a cluster of its own
@pytest.mark.timeout(300)
def test_the_driver_of_a_cluster_imports_nothing(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(
        f"import os\nopen({str(tmp_path)!r} + f'/imported-{{os.getpid()}}', 'w').close()\n"
        + MINE.format(factor=1)
    )
    tars = write_source(tmp_path / "tars", 3, 4)
    config = config_of(
        tmp_path / "root", tars, {"class": "mine:Mine"}, "latents", executor="ray", workers=1
    )
    (tmp_path / "encode.json").write_text(config.model_dump_json(by_alias=True, exclude_unset=True))
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{tmp_path}"}
    result = subprocess.run(
        [sys.executable, "-c", RAY], cwd=tmp_path, env=environment, capture_output=True, text=True,
        timeout=250,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    code, imported, process = json.loads(result.stdout.splitlines()[-1])
    assert (code, imported) == (0, [])
    workers = [path.name for path in tmp_path.glob("imported-*")]
    assert workers
    assert f"imported-{process}" not in workers
    assert len(Column.open(tmp_path / "root/toy/own").valid_mask()) > 0


def test_fixed_pictures_never_change() -> None:
    noise, gradient = fixed_pictures(4)
    assert noise[0].tolist() == [[0, 158, 60], [218, 120, 23], [181, 83, 241], [143, 46, 204]]
    assert gradient[1].tolist() == [[0, 85, 255], [85, 85, 170], [170, 85, 85], [255, 85, 0]]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("class Mine:", "class Yours:"), "cannot be imported .*has no attribute 'Mine'"),
        (("class Mine:", "import nothing_of_this_name\nclass Mine:"), "No module named 'nothing_of"),
        (("class Mine:", "class Mine"), "cannot be imported .SyntaxError"),
        (("def decode", "def undo"), "it has no decode"),
        (('version = "1"', "version = 1"), "found version 1, expected a text"),
        (("norm = (0.0, 1.0)", ""), "the class has no norm, and the column neither.*say in the column"),
        (("norm = (0.0, 1.0)", "norm = (0.0, 0.0)"), "norm.scale: found .*none of them 0"),
        (("norm = (0.0, 1.0)", "norm = 3"), "no pair of shift and scale"),
        (("norm = (0.0, 1.0)", "norm = ([0.0] * 7, 1.0)"), "found 7 channels, expected 1 or the 3"),
        (('version = "1"', 'version = "1"; pixel_range = (1, 0)'), "expected two numbers, the lower"),
        (('version = "1"', 'version = "1"; posterior = True'), "Say kind: moments, not latents"),
        (("pixels[:, :, ::2, ::2]", "pixels[:, 0, 0]"), "encode gives shape .1, 32., expected a tensor"),
        (("pixels[:, :, ::2, ::2]", "pixels[:1, :, ::2, ::2]"), "expected 2 rows"),
        (("return pixels", "return None and pixels"), "unsupported operand|NoneType"),
        (("* 1\n", "* 1e6\n"), "no finite float16 numbers"),
        (("return latents.rep", "return latents[:, 0].rep"), "decode gives|cannot decode"),
        (("repeat_interleave(2, 3)", "repeat_interleave(4, 3)"), r"makes \(1, 3, 32, 64\) of the latents"),
        (("* 1\n", "+ __import__('torch').rand(1)\n"), "gives a picture other values each time"),
        (("* 1\n", "+ len(pixels)\n"), "other values in a batch than alone"),
    ],
)  # fmt: skip
def test_classes_that_cannot_serve(
    change: tuple[str, str], message: str, module: Callable[[str], str], tmp_path: Path
) -> None:
    """Before anything is written."""
    text = MINE.format(factor=1)
    assert change[0] in text
    name = module(text.replace(*change))
    tars = write_source(tmp_path / "tars", 1, 2)
    with pytest.raises(ModelNotUsable, match=message):
        run(config_of(tmp_path / "root", tars, {"class": name}, "latents"))
    assert not (tmp_path / "root").exists()


@pytest.mark.parametrize(
    ("encoder", "message"),
    [
        ({"class": "mine:Class", "subfolder": "vae"}, "leave subfolder out"),
        ({"class": "mine:"}, "class"),
        ({"class": "../mine:Class"}, "class"),
        ({"class": "AutoencoderKL"}, "path is missing"),
    ],
)
def test_configs_that_name_no_class(encoder: dict[str, str], message: str, tmp_path: Path) -> None:
    file = tmp_path / "encode.yaml"
    column = {"kind": "latents", "encoder": encoder, "resolution": 32}
    file.write_text(json.dumps({"root": "r", "sources": {"s": "t"}, "columns": {"own": column}}))
    with pytest.raises(configs.ConfigError, match=message):
        configs.load(EncodeConfig, file)


def test_a_class_of_ones_own_is_no_text_encoder(tmp_path: Path) -> None:
    column = {"kind": "tokens", "encoder": {"class": "mine:Class"}}
    config = EncodeConfig.model_validate(
        {"root": str(tmp_path / "r"), "sources": {"s": write_source(tmp_path / "t", 1, 1)},
         "columns": {"own": column}, "engine": {"executor": "inline"}}
    )  # fmt: skip
    with pytest.raises(ModelNotUsable, match="a class of your own encodes pictures"):
        run(config)


def test_tensors_of_a_plain_object_are_its_weights(folder: Path) -> None:
    made = vae("Representation", folder)
    assert list(made._parts) == ["kernel"]
    assert isinstance(made._object.kernel, Tensor)
    assert vae("Pixels", folder).weights != made.weights
