"""Suffixes of a config: whether a source has them, which of them a sample is read from, what is lost."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

import configs
from encode.config import EncodeConfig
from encode.errors import NoSuchSuffix
from encode.plan import plan
from encode.report import status
from encode.run import job
from eval.errors import MissingPictures
from eval.images.originals import Originals
from shards import Column, Status, seal
from shards.tools.verify import check_source, examine
from tests.encode import light
from tests.encode.toy import files_of, jpeg, picture, tar_bytes
from tests.encode.web import serving

Run = Callable[..., Any]

# Sources ------------------------------------------------------------------------------------------


def members(
    numbers: range, image: str = "jpg", text: str = "txt", data: bytes = jpeg(1)
) -> list[tuple[str, bytes]]:
    return [
        member
        for n in numbers
        for member in ((f"{n:03d}.{image}", data), (f"{n:03d}.{text}", f"row {n}".encode()))
    ]


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> Run:
    """Run a command of `encode` over some tars with encoders that load in no time."""
    monkeypatch.setenv("COLUMNS", "400")  # sentences on one line
    monkeypatch.setattr(job, "load_encoders", light.load_encoders)
    monkeypatch.setattr(plan, "load_encoders", light.load_encoders)

    def command(
        tars: dict[str, bytes] | list[str], image: str | list[str] | None = "jpg",
        caption: str | list[str] = "txt",
        what: str = "run", source: str = "toy",
        more: dict[str, list[str]] | None = None,
    ) -> tuple[int, str]:  # fmt: skip
        if isinstance(tars, dict):
            for name, data in tars.items():
                (tmp_path / name).write_bytes(data)
            tars = [str(tmp_path / name) for name in tars]
        columns = {
            "vae": {"kind": "moments", "encoder": "0", "resolution": 32}
            | ({"image": image} if image else {}),
            "ids": {"kind": "ids", "encoder": "0", "caption": caption},
        }
        path = tmp_path / "c.yaml"
        path.write_text(yaml.safe_dump({
            "root": str(tmp_path / "cache"), "sources": {source: tars, **(more or {})}, "columns": columns,
            "shard_rows": 1024, "engine": {"executor": "inline", "batch": 8},
        }))  # fmt: skip
        config = configs.load(EncodeConfig, path)
        if what in ("run", "retry-failed"):
            code = job.run(config, job.Options(retry=what != "run"))
        else:
            parser = argparse.ArgumentParser()
            module: Any = {"plan": plan, "status": status}[what]
            module.add_options(parser)
            options = ["--seconds", "0"] if what == "plan" else []
            code = getattr(module, f"run_{what}")(parser.parse_args([str(path), *options]))
        return code, capsys.readouterr().out

    return command


def test_of_several_suffixes_the_first_that_a_row_has_is_read(run: Run, tmp_path: Path) -> None:
    rows = [
        {"jpg": jpeg(0), "txt": b"text"},
        {"png": jpeg(1), "json": b'{"en": "in English", "caption": "not read"}'},
        {"png": jpeg(2), "jpg": jpeg(9), "json": b'{"caption": "second field"}', "txt": b"first"},
        {"webp": jpeg(3), "json": b"{}"},
        {"jpg": jpeg(4), "json": b'{"caption": "second field"}'},
    ]
    tar = tar_bytes((f"{i}.{s}", data) for i, row in enumerate(rows) for s, data in row.items())
    code, out = run(
        {"0.tar": tar}, image=["PNG", ".jpg"], caption=["txt", "json:en", "json:caption"]
    )
    assert code == 0
    vae, ids = (Column.open(tmp_path / f"cache/toy/{name}") for name in ("vae", "ids"))
    assert vae.identity.picture.image == "png|jpg"
    assert vae.status(np.arange(5)).tolist() == [0, 0, 0, Status.IMAGE_MISSING, 0]
    assert ids.status(np.arange(5)).tolist() == [0, 0, 0, Status.CAPTION_MISSING, 0]
    # the same values as a source in which these members alone are
    alone = tmp_path / "alone"
    alone.mkdir()
    plain = [m for i in (0, 1, 2, 4) for m in ((f"{i}.jpg", jpeg(i)), (f"{i}.txt", b"x"))]
    run({"alone/0.tar": tar_bytes(plain)}, source="alone")
    expected = Column.open(tmp_path / "cache/alone/vae").read(np.arange(4))
    assert np.array_equal(vae.read(np.array([0, 1, 2, 4])), expected)
    captions = ["text", "in English", "first", "second field"]
    originals = Originals(ids, tmp_path)
    for row, caption in zip([0, 1, 2, 4], captions, strict=True):
        assert (
            originals.caption(row, ids.identity.text.caption or "txt|json:en|json:caption")
            == caption
        )
    examination = examine(tmp_path / "cache/toy/vae")
    assert check_source(examination, [tmp_path]) == 1  # a shard
    assert examination.faults == []
    line = "toy/vae: 1 of 5 rows has no picture (png, jpg). It has 'webp' of 1 row. "
    assert f"{line}A new column may read these, too: image: [png, jpg, webp]" in out
    assert "toy/ids: 1 of 5 rows has no caption (txt), nor anything in its place" in out


def test_without_a_suffix_a_column_reads_the_pictures_that_are_there(
    run: Run, tmp_path: Path
) -> None:
    """A source of jpg alone has the same column as by `image: jpg`, whatever else its rows hold."""
    masks = [(f"{n:03d}.{s}", jpeg(n)) for n in range(3) for s in ("jpg", "png", "seg.webp")]
    captions = [(f"{n:03d}.txt", b"x") for n in range(3)]
    tars = {"0.tar": tar_bytes(sorted(masks + captions)), "1.tar": tar_bytes(members(range(3)))}
    assert run(tars, image=None)[0] == 0
    files = files_of(tmp_path / "cache/toy/vae")
    assert run(tars, image="jpg") == run(tars, image=None)
    assert files_of(tmp_path / "cache/toy/vae") == files
    mixed = {
        f"{i}.tar": tar_bytes(members(range(4), suffix))
        for i, suffix in enumerate(["JPEG", "webp", "jpg", "png"])
    }
    for verb in ("plan", "run"):  # the second tar is not looked at: its rows are missing, and said
        code, out = run(mixed, image=None, source="mixed", what=verb)
        assert code == 0
    column = Column.open(tmp_path / "cache/mixed/vae")
    assert column.identity.picture.image == "jpg|jpeg|png"
    assert "4 of 16 rows have no picture (jpg, jpeg, png). They have 'webp' of 4 rows" in out
    # a column that exists goes on as it was begun
    assert run(mixed, image="jpg", source="begun")[0] == 3
    code, out = run(mixed, image=None, source="begun")
    assert (code, "every shard is committed already" in out) == (3, True)


def test_each_source_of_a_run_has_its_own_pictures(run: Run, tmp_path: Path) -> None:
    (tmp_path / "webp.tar").write_bytes(tar_bytes(members(range(3), "webp")))
    tars = {"0.tar": tar_bytes(members(range(3)))}
    for what in ("plan", "run"):
        code, _ = run(tars, image=None, what=what, more={"other": [str(tmp_path / "webp.tar")]})
        assert code == 0
    columns = [Column.open(tmp_path / f"cache/{name}/vae") for name in ("toy", "other")]
    assert [column.identity.picture.image for column in columns] == ["jpg", "webp"]
    values = [column.read(np.arange(3)) for column in columns]
    assert np.array_equal(*values)


@pytest.mark.parametrize("lost", [2, 3])
def test_a_source_that_loses_most_rows_ends_with_3(run: Run, lost: int) -> None:
    tar = tar_bytes(members(range(5 - lost)) + members(range(5 - lost, 5), "jpeg"))
    for what in ("run", "status"):
        code, out = run({"0.tar": tar}, what=what)
        assert code == (3 if lost == 3 else 0)
        assert ("MOST ROWS ARE LOST" in out) == (lost == 3)


@pytest.mark.parametrize("what", ["run", "plan", "retry-failed"])
@pytest.mark.parametrize(
    ("suffixes", "key"),
    [
        ({"image": "jpeg"}, "columns.vae.image"),
        ({"image": "seg.jpg"}, "columns.vae.image"),
        ({"caption": "caption"}, "columns.ids.caption"),
        ({"caption": "json:caption"}, "columns.ids.caption"),
    ],
)
def test_a_suffix_that_no_sample_has(
    run: Run, tmp_path: Path, what: str, suffixes: dict[str, str], key: str
) -> None:
    tars = {f"{i}.tar": tar_bytes(members(range(i, i + 3))) for i in range(12)}
    with pytest.raises(NoSuchSuffix) as caught:
        run(tars, what=what, **suffixes)
    assert caught.type.exit_code == 2
    message = str(caught.value)
    assert message.startswith(f"{key}: no sample of source 'toy' has a member with the suffix ")
    assert "in 8 of 12 tars" in message
    assert "Suffixes there, with their rows: 'jpg' (24), 'txt' (24). " in message
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize("image", [".JPG", "*.jpg", " Jpg "])
def test_one_suffix_in_other_letters_is_one_column(run: Run, tmp_path: Path, image: str) -> None:
    tars = {"0.tar": tar_bytes(members(range(3), "JPG", "Txt"))}
    assert run(tars)[0] == 0
    files = files_of(tmp_path / "cache/toy")
    code, out = run(tars, image=image, caption=".TXT")
    assert code == 0
    assert "every shard is committed already" in out
    assert files_of(tmp_path / "cache/toy") == files


def test_several_tars_are_looked_at(run: Run, tmp_path: Path) -> None:
    """The first hold no rows, or only captions; one that cannot be read is reported in its turn."""
    texts = [(f"{n}.txt", b"alone") for n in range(3)]
    tars = {"0.tar": b"no tar" * 99, "1.tar": bytes(10_240), "2.tar": tar_bytes(texts)}
    code, out = run(tars | {"3.tar": tar_bytes(members(range(3)))})
    assert code == 3
    assert "FAILED toy/00000" in out
    assert "vae: NOT complete, 2 shards failed; 3 ok, 3 image_missing" in out


def test_half_of_a_source_has_another_suffix(run: Run) -> None:
    tars = {
        f"{i:02d}.tar": tar_bytes(members(range(2), "jpg" if i < 20 else "png")) for i in range(24)
    }
    code, out = run(tars, image="png")
    assert code == 3
    assert "vae: complete, but MOST ROWS ARE LOST, 48 rows: 8 ok, 40 image_missing" in out


def test_the_index_serves_where_tars_are_gone(run: Run, tmp_path: Path) -> None:
    tars = {"0.tar": tar_bytes(members(range(3)))}
    assert run(tars)[0] == 0
    (tmp_path / "0.tar").unlink()
    gone = [str(tmp_path / "0.tar")]
    assert run(gone, what="plan")[0] == 0
    with pytest.raises(NoSuchSuffix, match=r"'jpg' \(3\), 'txt' \(3\)"):
        run(gone, what="plan", image="png")


def test_tars_of_a_web_server(run: Run, tmp_path: Path) -> None:
    with serving(**{"0.tar": tar_bytes(members(range(3)))}) as web:
        for verb in ("run", "plan"):
            with pytest.raises(NoSuchSuffix, match="'jpeg', in 1 of 1 tar "):
                run([f"{web.url}/0.tar"], image="jpeg", what=verb)
        assert not (tmp_path / "cache").exists()
        assert run([f"{web.url}/0.tar"])[0] == 0
        whole = web.gets("/0.tar")
        assert run([f"{web.url}/0.tar"])[0] == 0  # known from the index
        assert web.gets("/0.tar") == whole


# The end of a run ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("broken", "reason"), [(b"no picture", "3 image_undecodable"), (b"", "3 image_undecodable")]
)
def test_a_column_without_a_usable_row_does_not_end_like_a_good_one(
    run: Run, broken: bytes, reason: str
) -> None:
    tars = {"0.tar": tar_bytes(members(range(3), data=broken))}
    for verb in ("run", "run", "retry-failed"):
        code, out = run(tars, what=verb)
        assert code == 3
        assert f"vae: complete, but NO ROW IS USABLE, 3 rows: {reason}" in out
        assert "ids: complete, 3 rows: 3 ok" in out
    code, out = run(tars, what="status")
    assert code == 3
    assert "NO ROW IS USABLE" in out


def test_captions_without_a_usable_row(run: Run) -> None:
    tars = {"0.tar": tar_bytes([*members(range(3), text="json"), ("9.txt", b"caf\xe9")])}
    code, out = run(tars, caption="txt")
    assert code == 3
    assert "ids: complete, but NO ROW IS USABLE, 4 rows: 3 caption_missing, 1 caption_und" in out


def test_one_usable_row_is_enough(run: Run) -> None:
    cut = jpeg(2)[:-150]
    tars = {"0.tar": tar_bytes([*members(range(2), data=cut), ("9.json", b"{}")])}
    code, out = run(tars)
    assert code == 0
    assert "vae: complete, 3 rows: 2 truncated, 1 image_missing" in out


def test_what_was_passed_over_is_said(run: Run, tmp_path: Path) -> None:
    tars = {
        "0.tar": tar_bytes(members(range(3)) + members(range(3, 7), "png", "caption")),
        "1.tar": tar_bytes(members(range(2), "webp") + members(range(2, 4), "png")),
        "2.tar": tar_bytes(members(range(5))),
    }
    code, out = run(tars)
    assert code == 0
    words = (
        "toy/vae: 8 of 16 rows have no picture (jpg). They have 'png' of 6 rows, 'webp' of 2 rows. "
    )
    assert f"{words}A new column may read these, too: image: [jpg, png]" in out
    assert "toy/ids: 4 of 16 rows have no caption (txt). They have 'caption' of 4 rows. " in out
    report = json.loads((tmp_path / "cache/report.json").read_text())
    assert {k.rpartition("/")[2]: v["passed_over"] for k, v in report.items()} == {
        "vae": {"png": 6, "webp": 2}, "ids": {"caption": 4}
    }  # fmt: skip
    assert words in run(tars)[1]  # nothing to do, and said again
    planned = run(tars, what="plan")[1]
    assert (
        "toy/vae: without a member that the column reads, of the rows looked at; they have: 'png' of 6 rows"
        in planned
    )


def test_shards_of_an_older_program_are_not_counted(run: Run, tmp_path: Path) -> None:
    half = tar_bytes(members(range(3)) + members(range(3, 7), "png"))
    tars = {"0.tar": half, "1.tar": half, "2.tar": tar_bytes(members(range(3)))}
    assert run(tars)[0] == 0
    for shard in (0, 2):
        name = tmp_path / f"cache/toy/vae/commits/{shard:05d}.json"
        record = json.loads(name.read_text())
        del record["provenance"]["passed_over"], record["digest"]
        name.write_bytes(seal(record))
    code, out = run(tars)
    assert code == 0
    assert "'png' of 4 rows (without 1 older shard)" in out


def test_captions_in_json(run: Run, tmp_path: Path) -> None:
    members = [b'{"en": {"long": "a cat"}}', b'{"en": {}}', b'{"en": {"long": 3}}', b"no JSON"]
    tar = tar_bytes(
        m
        for i, data in enumerate(members)
        for m in ((f"{i}.jpg", jpeg(i)), (f"{i}.json", data), (f"{i}.txt", b"other"))
    )
    for verb in ("plan", "run"):
        code, out = run({"0.tar": tar}, caption=".JSON:en.long", what=verb)
        assert code == 0
    assert "ids: complete, 4 rows: 1 ok, 1 caption_missing, 2 caption_undecodable" in out
    ids = Column.open(tmp_path / "cache/toy/ids")
    assert ids.read(np.array([0])).tolist() == [2, *map(ord, "a cat")]
    originals = Originals(ids, tmp_path)
    for field, caption in (("json:en.long", "a cat"), ("txt", "other")):
        assert originals.caption(0, field) == caption
    with pytest.raises(MissingPictures, match="1 was a caption"):
        originals.caption(1, "json:en.long")


def test_pictures_of_odd_names(run: Run) -> None:
    """Compound suffixes are suffixes like others."""
    assert picture(1).size == (48, 40)
    tars = {"0.tar": tar_bytes(members(range(3), "view.jpg", "short.txt"))}
    code, out = run(tars, image="View.JPG", caption="short.txt")
    assert code == 0
    assert "vae: complete, 3 rows: 3 ok" in out
