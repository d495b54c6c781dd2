"""From a checkpoint and prompts to pictures on disk."""

from __future__ import annotations

import json
import re
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from encode.errors import ModelNotUsable
from eval.commands import main
from eval.errors import BadRequest, EncoderMismatch, OtherImages
from eval.images.checkpoint import TYPES
from eval.images.encoders import Text, vae_of
from eval.images.generate import Generator, Request, generate, noise_number
from eval.images.ranks import Rank
from eval.images.sampler import SAMPLERS
from eval.report.cost import cost_of
from eval.report.entries import open_one
from shards import seal
from shards.format.identity import ColumnIdentity
from shards.read.randomness import normal
from tests.eval.models import save_reference
from train.checkpoints.checkpoint import CheckpointError
from train.checkpoints.identity import PARTS

PROMPTS = [
    "a red cat",
    "the blue dog on a flag",
    "a",
    "dog",
    "the red flag on the blue flag on the cat",
]


@pytest.fixture
def request_(tmp_path: Path, run: Path) -> Request:
    (tmp_path / "flags.json").write_text(json.dumps(PROMPTS))
    return Request(
        checkpoint=run, prompts=tmp_path / "flags.json", save_dir=tmp_path / "out", num_inference_steps=3,
        batch_size=2,
    )  # fmt: skip


def changed(request: Request, **fields: object) -> Request:
    return Request(**(vars(request) | fields))  # type: ignore[arg-type]  # fields of Request


def pictures(request: Request) -> np.ndarray:
    files = sorted((request.save_dir / "images").iterdir())
    return np.stack([np.asarray(Image.open(path)) for path in files]).astype(int)


def test_latents_are_denormalised_before_decoding(request_: Request, vae_folder: Path) -> None:
    """With a velocity of 0 the latents are the noise, so the pictures are known from diffusers alone."""
    from diffusers import AutoencoderKL

    request = changed(request_, ema_weights=False)
    manifest = generate(request)
    assert list(manifest["files"]) == [f"{i:05d}.png" for i in range(5)]
    noise = normal(
        42, "generate", [noise_number("flags", f"{i:05d}", 0) for i in range(5)], (4, 4, 4)
    )
    with torch.no_grad():
        decoder = AutoencoderKL.from_pretrained(vae_folder).eval()
        right = decoder.decode(noise / 0.05 + 3.0).sample.clamp(-1, 1)
        forgotten = decoder.decode(noise).sample.clamp(-1, 1)
    expected = ((right + 1) * 127.5).permute(0, 2, 3, 1).numpy()
    actual = pictures(request)
    assert np.abs(actual - expected).max() < 0.51
    assert np.abs(actual - ((forgotten + 1) * 127.5).permute(0, 2, 3, 1).numpy()).max() > 2


def test_prompts_seeds_and_guidance_matter(request_: Request) -> None:
    generate(request_)
    base = pictures(request_)
    for i, fields in enumerate(({"guidance_scale": 1.0}, {"seed": 1}, {"ema_weights": False})):
        other = changed(request_, save_dir=request_.save_dir / f"../{i}", **fields)
        generate(other)
        assert np.abs(pictures(other) - base).max(axis=(1, 2, 3)).min() > 0, fields
    prompts = request_.prompts.parent / "other" / "flags.json"
    prompts.parent.mkdir()
    prompts.write_text(json.dumps(["dog", *PROMPTS[1:]]))
    other = changed(request_, save_dir=request_.save_dir / "../p", prompts=prompts)
    generate(other)
    differ = (np.abs(pictures(other) - base).max(axis=(1, 2, 3)) > 1).tolist()
    assert differ == [True, False, False, False, False]


def test_batch_size_changes_rounding_only(request_: Request) -> None:
    generate(request_)
    for size in (1, 5):
        other = changed(request_, batch_size=size, save_dir=request_.save_dir / f"../{size}")
        generate(other)
        assert np.abs(pictures(other) - pictures(request_)).max() <= 1


def test_an_interrupted_set_goes_on_to_the_same_bytes(request_: Request) -> None:
    whole = generate(request_)["files"]
    again = changed(request_, save_dir=request_.save_dir / "../again")
    generator = Generator.load(again)
    generate(again, generator)
    shutil.rmtree(again.save_dir / "text")  # the prompts' text is made again, too
    images = again.save_dir / "images"
    manifest = again.save_dir / "manifest.json"
    # As a kill between two pictures of the second batch leaves it: no digests yet, one and a half batches done.
    state = json.loads(manifest.read_text())
    manifest.write_text(
        json.dumps({k: state[k] for k in ("format", "version", "settings")} | {"complete": False})
    )
    for name in ("00003", "00004"):
        (images / f"{name}.png").unlink()
    (again.save_dir / ".tmp-0123").write_bytes(b"half")
    kept = (images / "00002.png").stat().st_mtime_ns
    assert generate(again, generator)["files"] == whole
    assert (images / "00002.png").stat().st_mtime_ns == kept


def test_a_second_run_makes_nothing(request_: Request) -> None:
    first = generate(request_)
    times = [path.stat().st_mtime_ns for path in sorted((request_.save_dir / "images").iterdir())]
    assert generate(request_) == first
    assert [p.stat().st_mtime_ns for p in sorted((request_.save_dir / "images").iterdir())] == times


def test_other_settings_into_the_same_folder_are_refused(request_: Request) -> None:
    first = generate(request_)
    with pytest.raises(OtherImages, match=r"guidance_scale: found 6\.0, expected 2\.0"):
        generate(changed(request_, guidance_scale=2.0))
    assert generate(request_) == first


def test_a_step_by_tag_or_path_is_the_newest_of_its_run(request_: Request, run: Path) -> None:
    newest = generate(request_)["settings"]
    path = changed(request_, checkpoint=run / "checkpoints" / "step-00000020")
    assert generate(path)["settings"] == newest  # and therefore the same folder
    tag = changed(request_, tag=10, save_dir=request_.save_dir / "../tag")
    assert generate(tag)["settings"] == newest | {"step": 10}
    with pytest.raises(CheckpointError):
        generate(changed(request_, tag=11, save_dir=request_.save_dir / "../none"))
    assert not (request_.save_dir / "../none").exists()


def test_imported_weights_without_their_columns(
    request_: Request, run: Path, vae_folder: Path, text_folder: Path
) -> None:
    """They say nothing of a VAE, so it is asked for, and one that is named will do."""
    step = request_.save_dir.parent / "step-00000010"
    shutil.copytree(run / "checkpoints/step-00000010", step)
    record = json.loads((step / "manifest.json").read_bytes())
    del record["data"], record["digest"]
    (step / "manifest.json").write_bytes(seal(record))
    with pytest.raises(CheckpointError, match="Import them again and name the latent column"):
        generate(changed(request_, checkpoint=step))
    named = changed(request_, checkpoint=step, vae=str(vae_folder), text_encoder=str(text_folder))
    assert generate(changed(named, resolution=32))["settings"]["step"] == 10


def test_an_encoder_may_move_but_not_change(
    request_: Request, vae_folder: Path, tmp_path: Path
) -> None:
    shutil.copytree(vae_folder, tmp_path / "moved")
    here = Generator.load(changed(request_, vae=str(tmp_path / "moved")))
    assert here.vae.model.path == str(tmp_path / "moved")
    from diffusers import AutoencoderKL

    other = AutoencoderKL.from_pretrained(vae_folder)
    with torch.no_grad():
        other.decoder.conv_out.bias += 1e-6
    other.save_pretrained(tmp_path / "other")
    other_vae = changed(request_, vae=str(tmp_path / "other"))
    with pytest.raises(
        EncoderMismatch, match=r"not the VAE .*weights: found .*--allow-other-encoder"
    ):
        generate(other_vae)
    assert not request_.save_dir.exists()


def test_a_vae_of_another_precision_makes_another_set(request_: Request, vae_folder: Path) -> None:
    """A folder that is named alone is run in bf16, as the registry's; the column's was fp32."""
    manifest = generate(request_)
    assert manifest["settings"]["decoding"] == {"class": "AutoencoderKL", "precision": "fp32"}
    named = changed(request_, vae=str(vae_folder), allow_other_encoder=True)
    with pytest.raises(
        OtherImages, match=r"decoding.precision: found fp32, expected bf16-autocast"
    ):
        generate(named)
    assert generate(request_) == manifest


@pytest.mark.parametrize(
    ("flag", "value"),
    [
        ("--batch_size", "0"),
        ("--num_inference_steps", "x"),
        ("--seed", "-1"),
        ("--guidance_scale", "nan"),
    ],
)
def test_numbers_that_make_no_sense(
    flag: str, value: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [
        "generate",
        "--checkpoint",
        "x",
        "--prompts",
        "x",
        "--save_dir",
        "x",
        f"{flag}={value}",
    ]
    monkeypatch.setattr(sys, "argv", ["eval", *words])
    with pytest.raises(SystemExit) as error:
        main()
    assert error.value.code == 2
    assert f"argument {flag}: found" in capsys.readouterr().err


def test_long_prompts_and_other_scripts(request_: Request) -> None:
    """An id names a file, in any script; a caption is cut to the encoder's tokens, in whatever it is written."""
    prompts = request_.save_dir.parent / "long.json"
    listed = {"ä東": "a red cat " * 1000, "b": "東京 🦊 " * 2000}
    prompts.write_text(json.dumps(listed), encoding="utf-8")
    manifest = generate(changed(request_, prompts=prompts))
    assert set(manifest["files"]) == {"ä東.png", "b.png"}
    stored = json.loads((request_.save_dir / "prompts.json").read_bytes())
    assert [item["text"] for item in stored] == list(listed.values())


# Settings ------------------------------------------------------------------------------------------------------------


def test_another_solver_and_guidance_within_an_interval(request_: Request) -> None:
    """Each is another set, and its settings say so."""
    request_ = changed(request_, num_inference_steps=5)
    generator = Generator.load(request_)
    base = generate(request_, generator)["settings"]
    options = ({"sampler": "dpmpp-2m"}, {"guidance_interval": (0.3, 0.9)})
    for i, fields in enumerate(options):
        other = changed(request_, save_dir=request_.save_dir / f"../{i}", **fields)
        settings = json.loads(json.dumps(generate(other, generator)["settings"]))
        different = {k: settings[k] for k in settings if settings[k] != base[k]}
        assert different == {k: list(v) if isinstance(v, tuple) else v for k, v in fields.items()}
        assert np.abs(pictures(other) - pictures(request_)).max() > 2
        with pytest.raises(OtherImages, match=next(iter(fields))):
            generate(changed(other, save_dir=request_.save_dir), generator)


def test_manifest_names_all_that_made_the_pictures(
    request_: Request, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = shutil.copytree(run, tmp_path / "run")
    log = {"step": 20, "position": 640, "samples_per_second": 32.0}
    (run / "metrics.jsonl").write_text(json.dumps(log) + "\n")
    with monkeypatch.context() as here:
        here.chdir(tmp_path)
        manifest = generate(changed(request_, checkpoint=Path("run")))
    settings = manifest["settings"]
    step = run / "checkpoints/step-00000020"
    record = json.loads((step / "manifest.json").read_bytes())
    assert settings["weights"] == record["files"]["ema.safetensors"]["sha256"]
    encoders = {name: record["data"][name]["identity"]["encoder"] for name in ("latents", "text")}
    assert settings["vae"] == encoders["latents"]["weights"]
    assert settings["text_encoder"] == encoders["text"]["weights"]
    assert settings["norm"] == {"shift": [3.0], "scale": [0.05]}
    question = {
        "type": "latentbank", "step": 20, "ema": True, "resolution": 32, "sampler": "euler", "num_inference_steps": 3,
        "guidance_scale": 6.0, "guidance_interval": None, "batch_size": 2, "seed": 42, "precision": "fp32",
        "benchmark": "flags", "images_per_prompt": 1,
    }  # fmt: skip
    assert {name: settings[name] for name in question} == question
    provenance = manifest["provenance"]
    assert {"torch", "diffusers", "transformers", "pillow"} <= provenance.keys()
    assert provenance["checkpoint"] == str(run)
    assert provenance["pictures_per_second"] == pytest.approx(5 / provenance["seconds"])
    cost = cost_of(open_one(request_.save_dir))  # finds the run by that
    assert (cost["training"]["seconds"], cost["training"]["step"]) == (20.0, 20)
    assert cost["generation"]["pictures_per_second"] == provenance["pictures_per_second"]


def of_a_run(run: Path, **changes: Any) -> Path:
    """The checkpoints of `run` as the trainer writes them: with the run's config and what follows from it."""
    for path in run.glob("checkpoints/step-*/manifest.json"):
        record = json.loads(path.read_bytes())
        del record["digest"]
        config = {
            "optim": {"lr": 1e-3, "schedule": "constant"},
            "ema": {"decay": 0.5},
            "flow": {},
            "deepspeed": {},
            "global_batch": 8,
            "steps": 20,
            "seed": 0,
            "data": {"caption_dropout": 0.1},
        }
        step = record["step"]
        order = {"lanes": 8, "window": 0, "weights": None, "valid": ["0" * 64], "seed": 0}
        whole = {
            "config": config,
            "position": 8 * step,
            "order": order,
            "init": None,
            "optimizer": {"step": step},
        }
        path.write_bytes(
            seal(record | whole | changes | {"config": config | changes.get("config", {})})
        )
    return run


@pytest.mark.parametrize("own", [3.0, 2.0])
def test_the_shift_is_the_runs_unless_another_is_asked_for(
    request_: Request, run: Path, tmp_path: Path, own: float
) -> None:
    """It is among the settings where it is not the run's: sets of releases without it stay what they are."""
    folder = of_a_run(
        Path(shutil.copytree(run, tmp_path / "run")), config={"flow": {} if own == 3 else {"shift": own}}
    )  # fmt: skip
    made, settings = [], []
    for shift in (None, own, 1.0):
        request = changed(
            request_, checkpoint=folder, shift=shift, save_dir=request_.save_dir / f"../{own} {shift}"
        )  # fmt: skip
        settings.append(generate(request)["settings"])
        made.append(pictures(request))
    assert settings[0] == settings[1]
    assert "shift" not in settings[0]
    assert settings[2] == {**settings[0], "shift": 1.0}
    assert (made[0] == made[1]).all()
    assert np.abs(made[2] - made[0]).max() > 0
    with pytest.raises(OtherImages, match=r"shift: found None, expected 1\.0"):
        generate(
            changed(
                request_,
                checkpoint=folder,
                shift=1.0,
                save_dir=request_.save_dir / f"../{own} None",
            )
        )
    if own != 3:
        of_a_run(folder, config={"flow": {}})
        other = changed(request_, checkpoint=folder, save_dir=request_.save_dir / "../of three")
        generate(other)
        assert np.abs(pictures(other) - made[0]).max() > 0
        again = changed(other, shift=own, save_dir=request_.save_dir / "../of two")
        assert generate(again)["settings"]["shift"] == own
        assert (pictures(again) == made[0]).all()


def test_a_model_of_latents_is_sampled_as_one(request_: Request, run: Path, tmp_path: Path) -> None:
    """Weights whose output is 0 say the latent 0, which is what is left at the end."""
    copy = Path(shutil.copytree(run, tmp_path / "run"))
    folder = of_a_run(copy, config={"flow": {"prediction": "latent"}})
    request = changed(request_, checkpoint=folder, ema_weights=False)
    generate(request)
    made = pictures(request)
    assert np.abs(made - made[:1]).max() <= 1  # whatever the noise


@pytest.mark.parametrize(
    "flow", [[], 3, {"shift": 0}, {"shift": "auto"}, {"prediction": "x"}, {"unknown": 1}]
)
def test_a_flow_that_is_none_is_no_checkpoint(
    request_: Request, run: Path, tmp_path: Path, flow: object
) -> None:
    folder = of_a_run(Path(shutil.copytree(run, tmp_path / "run")), config={"flow": flow})
    with pytest.raises(CheckpointError, match="is damaged: its manifest: flow"):
        generate(changed(request_, checkpoint=folder))
    assert not request_.save_dir.exists()


@pytest.mark.parametrize("shift", [0.0, -1.0, float("nan"), float("inf")])
def test_a_shift_that_is_none_is_refused(request_: Request, shift: float) -> None:
    with pytest.raises(BadRequest, match="--shift: found"):
        changed(request_, shift=shift)


def output(caplog: pytest.LogCaptureFixture) -> str:
    return " ".join(
        record.getMessage() for record in caplog.records if record.levelname == "WARNING"
    )


def test_the_training_is_recorded_beside_the_settings(
    request_: Request, run: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Outside of stamps and settings: a set that was begun without it goes on, and its pictures are the same."""
    before = generate(request_)
    expected = open_one(request_.save_dir).trained
    assert expected is not None
    assert "optim" not in expected.training  # this checkpoint does not say it
    full = of_a_run(shutil.copytree(run, tmp_path / "run"))
    resumed = changed(request_, checkpoint=full)
    (request_.save_dir / "run.json").unlink()  # as sets of before
    (request_.save_dir / "images/00003.png").unlink()
    assert open_one(request_.save_dir, partial=True).trained is None
    assert generate(resumed) == before
    actual = open_one(request_.save_dir).trained
    assert actual is not None
    assert actual.training["optim"]["lr"] == 1e-3
    assert actual.training["order"]["valid_rows"] == ["0" * 64]
    assert set(actual.training) >= set(PARTS)
    assert actual.initial_share == 0.5**20
    assert actual.weights == before["settings"]["weights"]
    kept = (request_.save_dir / "run.json").read_bytes()
    assert generate(request_) == before  # and by a checkpoint that says less, nothing is lost
    assert (request_.save_dir / "run.json").read_bytes() == kept
    assert not output(caplog)


def test_imported_weights_and_the_references_say_what_they_know(
    request_: Request, vae_folder: Path, text_folder: Path, tmp_path: Path
) -> None:
    theirs = changed(
        request_,
        type="baseline-dit",
        checkpoint=save_reference(tmp_path / "theirs"),
        vae=str(vae_folder),
        text_encoder=str(text_folder),
        resolution=32,
    )
    generate(theirs)
    actual = open_one(theirs.save_dir).trained
    assert actual is not None
    assert (set(actual.training), actual.initial_share) == ({"model", "step"}, None)


def test_a_young_average_is_warned_of(
    request_: Request, run: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Above 5 % of initial weights, whether the manifest says the share or it follows from decay and updates."""
    cases: list[tuple[dict[str, Any], bool, str | None]] = [
        ({"config": {"ema": {"decay": 0.99}}}, True, "81.8% of the averaged weights"),  # 0.99 ** 20
        ({"config": {"ema": {"decay": 0.85}}}, True, None),  # 3.9 %
        (
            {"average": {"initial_share": 0.98}},
            True,
            "98.0% of the averaged weights .* which are noise",
        ),
        (
            {"average": {"initial_share": 0.98}, "init": {"path": "/runs/first"}},
            True,
            "/runs/first",
        ),
        ({"average": {"initial_share": 0.98}}, False, None),  # the weights themselves
    ]
    for i, (changes, ema, expected) in enumerate(cases):
        caplog.clear()
        at = of_a_run(shutil.copytree(run, tmp_path / f"{i}"), **changes)
        where = tmp_path / f"out-{i}"
        generate(
            changed(request_, checkpoint=at, ema_weights=ema, save_dir=where, guidance_scale=1.0)
        )
        notes = open_one(where).notes
        if expected is None:
            assert (output(caplog), notes) == ("", ())
        else:
            assert re.search(expected, output(caplog))
            assert re.search(expected, notes[0])


def test_guidance_without_dropped_captions_is_warned_of(
    request_: Request, run: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    at = of_a_run(shutil.copytree(run, tmp_path / "run"), config={"data": {"caption_dropout": 0.0}})
    for scale, warned in ((6.0, True), (1.5, True), (1.0, False)):
        caplog.clear()
        request = changed(
            request_, checkpoint=at, guidance_scale=scale, save_dir=tmp_path / f"{scale}"
        )
        Generator.load(request)
        assert ("trained without dropped captions" in output(caplog)) is warned
    assert not (tmp_path / "6.0").exists()


@pytest.mark.parametrize("scale", ["-1", "-0.001", "nan", "inf", "-inf", "six"])
@pytest.mark.parametrize("verb", ["generate", "watch"])
def test_a_guidance_that_cannot_be_is_refused(
    request_: Request, verb: str, scale: str, capsys: pytest.CaptureFixture[str]
) -> None:
    words = {
        "generate": [
            "--checkpoint",
            str(request_.checkpoint),
            "--save_dir",
            str(request_.save_dir),
        ],
        "watch": [str(request_.checkpoint)],
    }[verb]
    with pytest.raises(SystemExit) as left:
        main([verb, *words, "--prompts", str(request_.prompts), f"--guidance_scale={scale}"])
    assert left.value.code == 2
    assert "--guidance_scale: found" in capsys.readouterr().err
    assert not request_.save_dir.exists()
    if scale != "six":
        with pytest.raises(
            BadRequest, match=r"--guidance_scale: found .*, expected a finite number"
        ):
            changed(request_, guidance_scale=float(scale))
        assert BadRequest.exit_code == 2


def test_pictures_per_second_are_of_those_that_this_session_made(request_: Request) -> None:
    generate(request_)
    manifest = request_.save_dir / "manifest.json"
    record = json.loads(manifest.read_text())
    del record["files"], record["provenance"]
    manifest.write_text(json.dumps({**record, "complete": False}))
    (request_.save_dir / "images" / "00003.png").unlink()
    provenance = generate(request_)["provenance"]
    assert provenance["pictures_per_second"] == pytest.approx(1 / provenance["seconds"])


def test_another_resolution_where_the_table_of_positions_has_room(request_: Request) -> None:
    small = changed(request_, resolution=16, save_dir=request_.save_dir / "../small")
    assert generate(small)["settings"]["resolution"] == 16
    assert pictures(small).shape[1:] == (16, 16, 3)
    wide = changed(request_, resolution=256, save_dir=request_.save_dir / "../wide")
    assert Generator.load(wide).latent_shape == (4, 32, 32)
    with pytest.raises(BadRequest, match=r"34 x 34, expected at most 32, .* 16 x 16 patches"):
        generate(changed(wide, resolution=272))
    with pytest.raises(BadRequest, match=r"3 x 3, expected multiples of 2"):
        generate(changed(wide, resolution=24))
    for rest in (33, 39):
        with pytest.raises(BadRequest, match=f"--resolution {rest}: .* pictures of 32 x 32 pixels"):
            generate(changed(wide, resolution=rest))
    assert not wide.save_dir.exists()


def test_pictures_of_a_prompt(request_: Request) -> None:
    """Each has noise of its own, by its number; the first is the same, however many there are."""
    generate(request_)
    several = changed(request_, n_samples=2, save_dir=request_.save_dir / "../several")
    assert generate(several)["settings"]["images_per_prompt"] == 2
    both = pictures(several).reshape(5, 2, 32, 32, 3)
    assert np.abs(both[:, 0] - pictures(request_)).max() <= 1
    assert np.abs(both[:, 0] - both[:, 1]).max(axis=(1, 2, 3)).min() > 0
    named = request_.prompts.parent / "named.json"  # type: ignore[union-attr]
    named.write_text(json.dumps({"a": "a red cat"}))
    grids = changed(request_, benchmark="dpgbench", n_samples=3, prompts=named)
    with pytest.raises(BadRequest, match="--n_samples: found 3, expected a square number"):
        generate(grids)
    with pytest.raises(BadRequest, match="--n_samples: found 1000000000 pictures"):
        generate(changed(grids, n_samples=10**9))


def test_an_interval_that_is_none(request_: Request) -> None:
    words = ["generate", "--checkpoint", "x", "--prompts", "x", "--save_dir", "x"]
    for low, high in (("0.9", "0.2"), ("0.5", "1.5"), ("-0.1", "1")):
        with pytest.raises(BadRequest, match="expected 0 <= LOW < HIGH <= 1"):
            main([*words, "--guidance_interval", low, high])


@pytest.mark.parametrize(
    ("flag", "value"), [("--seed", str(2**64)), ("--device", "cuda:99"), ("--device", "gpu")]
)
def test_what_cannot_be_served_writes_nothing(request_: Request, flag: str, value: str) -> None:
    words = [
        "generate",
        "--checkpoint",
        str(request_.checkpoint),
        "--prompts",
        str(request_.prompts),
    ]
    error, message = (SystemExit, "2") if flag == "--seed" else (BadRequest, f"{flag}.*: found")
    with pytest.raises(error, match=message):
        main([*words, "--save_dir", str(request_.save_dir), flag, value])
    assert not request_.save_dir.exists()


def test_flags_know_all_samplers_and_types(capsys: pytest.CaptureFixture[str]) -> None:
    for flag, expected in (("--sampler", SAMPLERS), ("--type", TYPES)):
        with pytest.raises(SystemExit):
            main(["generate", flag, "none"])
        output = capsys.readouterr().err
        assert all(name in output.partition("choose from")[2] for name in expected)


@pytest.mark.gpu
def test_on_a_gpu(request_: Request) -> None:
    """bf16 autocast moves a picture a little, and two ranks make the files of one."""
    generate(request_)
    gpu = changed(request_, device="cuda", save_dir=request_.save_dir / "../gpu")
    manifest = generate(gpu)
    assert manifest["settings"]["precision"] == "bf16-autocast"
    assert np.abs(pictures(gpu) - pictures(request_)).mean() < 4
    ranks = changed(gpu, save_dir=request_.save_dir / "../ranks")
    assert not generate(ranks, rank=Rank(1, 2))["complete"]
    assert generate(ranks, rank=Rank(0, 2))["files"] == manifest["files"]


def test_benchmarks_bring_their_pictures_a_prompt_and_layout(request_: Request) -> None:
    """Each picture of a GenEval prompt has noise of its own; DPG-Bench's four are tiles of one file."""
    official = request_.prompts.parent / "geneval.jsonl"  # type: ignore[union-attr]
    lines = [
        {"tag": "single_object", "include": [{"class": "cat", "count": 1}], "prompt": "a red cat"},
        {"tag": "single_object", "include": [{"class": "dog", "count": 1}], "prompt": "a blue dog"},
    ]
    official.write_text("".join(json.dumps(line) + "\n" for line in lines))
    geneval = changed(
        request_, benchmark="geneval", prompts=official, batch_size=None,
        save_dir=request_.save_dir / "../geneval",
    )  # fmt: skip
    manifest = generate(geneval)
    assert (manifest["settings"]["batch_size"], manifest["settings"]["images_per_prompt"]) == (4, 4)
    files = [f"{i:05d}/samples/{k:05d}.png" for i in range(2) for k in range(4)]
    assert sorted(manifest["files"]) == files
    assert len(set(manifest["files"].values())) == 8
    named = official.with_name("dpg.json")
    named.write_text(json.dumps({"a": "a red cat", "b": "a blue dog"}))
    grids = changed(
        geneval, benchmark="dpgbench", prompts=named, save_dir=request_.save_dir / "../grids"
    )
    assert sorted(generate(grids)["files"]) == ["a.png", "b.png"]
    tiles = pictures(grids)[0].reshape(2, 32, 2, 32, 3).swapaxes(1, 2).reshape(4, 32, 32, 3)
    assert len({tile.tobytes() for tile in tiles}) == 4


def test_a_model_that_is_not_where_the_columns_say(run: Path) -> None:
    """It is said how to name the place where it is now; a place that was named is the user's own affair."""
    columns = json.loads((run / "checkpoints/step-00000020/manifest.json").read_bytes())["data"]
    latents, text = (columns[name]["identity"] for name in ("latents", "text"))
    for column in (latents, text):
        column["encoder"] |= {"path": "configs/demo/gone"}
    latents, text = map(ColumnIdentity.of, (latents, text))
    with pytest.raises(ModelNotUsable, match=r"configs/demo/gone: no such folder.*with --vae"):
        vae_of(latents, None, "cpu", False)
    with pytest.raises(
        ModelNotUsable, match=r"configs/demo/gone: no such folder.*with --text-encoder"
    ):
        Text(text, None, "cpu").load()
    with pytest.raises(ModelNotUsable) as named:
        vae_of(latents, "/nowhere", "cpu", False)
    assert "--vae" not in str(named.value)


def test_encoded_prompts_serve_several_sets(request_: Request, tmp_path: Path) -> None:
    """The second does not load the text encoder, which is no longer there."""
    first = changed(request_, text_cache=tmp_path / "cache")
    generate(first)
    assert not (request_.save_dir / "text").exists()
    gone = {"text_encoder": str(tmp_path / "gone"), "save_dir": request_.save_dir / "../second"}
    generate(changed(first, **gone))
    assert np.array_equal(pictures(changed(first, **gone)), pictures(first))
    with pytest.raises(ModelNotUsable, match="gone: no such folder"):
        generate(changed(first, **gone | {"save_dir": tmp_path / "x"}, text_cache=None))
    assert not (tmp_path / "x").exists()
