"""docs/encoders.md, from tiny random models of every class, tried. It is written by
`python -m tests.encode.models.encoders_page`.
"""

from __future__ import annotations

import importlib.metadata
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from encode.errors import ModelNotUsable
from encode.models.own import OwnVae
from encode.models.pixels import to_float16
from encode.models.vae import Vae, refuse_class
from encode.registry import ModelSpec
from tests.encode.adapters import ADAPTERS, own, plain_own, save_weights
from tests.encode.tiny_models import SIDE, VAES, Models

PAGE = Path(__file__).parents[3] / "docs/encoders.md"
WITHOUT_POSTERIOR = ("dc", "rae", "taesd", "vq")
FRAMES = ("qwen", "qwen21", "wan")
TINY = {cls: name for name, (cls, _) in reversed(VAES.items())}  # the first family of a class
ROUNDING = 2.0**-10  # of float16, to the largest value of a row
NAMES = {
    "latents_mean": "mean and deviation of the file", "shift_factor": "shift and scale of the file",
    "scaling_factor": "scale of the file",
}  # fmt: skip
TEXT = """# Every autoencoder

What columns can be made with: every autoencoder class of diffusers {version}, and classes of one's own. The test that
holds this page makes a tiny model of random weights of each class and puts pictures through it. Equal means: what a
column stores is what plain diffusers code gives, to the rounding of float16, and what is decoded from it is what plain
code decodes from the same.

| class | column | encodes and decodes | norm |
|---|---|---|---|
{classes}

The norm is that of the tiny model's file: its numbers are those of the file, never those that only a class fills in.
Where the file has a scale and neither file nor class has a shift, the shift is 0, as in diffusers' pipelines; else the
column says what is missing. A class that is in neither table is tried as AutoencoderKL is
called, before anything is written, and refused where that fails.

## Refused

| class | why |
|---|---|
{refused}

## Classes of one's own

`class: "package.module:Class"`, here the adapters of the tests (`tests/encode/adapters.py`), each of at most 40 lines,
compared with the class alone; see [encoding](encoding.md#an-autoencoder-of-your-own).

| adapter | column | encodes and decodes | norm |
|---|---|---|---|
{own}

This page is made by `python -m tests.encode.models.encoders_page`.
"""


@torch.no_grad()
def plain(name: str, model: ModelSpec, x: Tensor, latents: Tensor) -> tuple[Tensor, Tensor]:
    """What plain diffusers code makes of pixels, and of latents. Shapes, frame axis, fourth channel,
    patches and ranges are written out by hand for each class.
    """
    import diffusers
    from diffusers.pipelines.flux2.pipeline_flux2 import Flux2Pipeline

    reference = getattr(diffusers, model.cls).from_pretrained(model.path).eval()
    frames = name in FRAMES
    if name == "qwen21":  # an opaque picture in RGBA
        x = torch.cat([x, torch.ones_like(x[:, :1])], 1)
    if name == "rae":
        x = (x + 1) / 2
    output = reference.encode(x[:, :, None] if frames else x)
    if name in WITHOUT_POSTERIOR:
        rows = output.latents if name in ("taesd", "vq") else output.latent
    else:
        parts = [output.latent_dist.mean, output.latent_dist.logvar]
        if name == "flux2":
            parts = [Flux2Pipeline._patchify_latents(part) for part in parts]
        rows = torch.cat(parts, 1)
        rows = rows[:, :, 0] if frames else rows
    z = Flux2Pipeline._unpatchify_latents(latents) if name == "flux2" else latents
    pixels = reference.decode(z[:, :, None] if frames else z, return_dict=False)[0]
    pixels = pixels[:, :3, 0] if frames else pixels[:, :3]
    pixels = pixels * 2 - 1 if name == "rae" else pixels
    return rows, pixels.clamp(-1, 1)


def classes() -> list[str]:
    """Every autoencoder class that the installed diffusers has."""
    from diffusers.models import autoencoders

    return [name for name in dir(autoencoders) if isinstance(getattr(autoencoders, name), type)]


def pictures() -> Tensor:
    return torch.rand(2, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(0)) * 2 - 1


def verdict(stored: Tensor, rows: Tensor, decoded: Tensor, pixels: Tensor) -> str:
    """Whether stored rows are the rows but for the rounding of float16, and what is decoded of them is the
    pixels, which must not be one colour.
    """
    rounding = ROUNDING * float(rows.abs().max().clamp(min=1))
    same = [
        a.shape == b.shape and bool((a - b).abs().max() <= most)
        for a, b, most in ((stored, rows, rounding), (decoded, pixels, 2e-5))
    ]
    return "equal" if all(same) and pixels.std() > 0.01 else f"DIFFERS: {same}"


def stored_of(vae: Vae, x: Tensor) -> tuple[Tensor, Tensor]:
    """What a column stores of pixels, and the latents in it."""
    stored = torch.from_numpy(to_float16(vae.encode(x))).float()
    return stored, stored if vae.kind == "latents" else stored.chunk(2, 1)[0]


def of_class(cls: str, tiny: Models) -> str:
    """The row of a class that is usable."""
    name = TINY[cls]
    vae = Vae(ModelSpec.model_validate(tiny(name)))
    x = pictures()
    stored, latents = stored_of(vae, x)
    rows, pixels = plain(name, vae.model, x, latents)
    text = verdict(stored, rows, vae.decode(latents), pixels)
    return f"| `{cls}` | {vae.kind} | {text} | {norm_of(vae)} |"


def norm_of(vae: Vae) -> str:
    """Which norm is used, and where it comes from."""
    try:
        norm = vae.norm
    except ModelNotUsable:
        return "said in the column"
    if vae._adapter.patches:
        return "batch norm of the weights"
    if vae._adapter.own_norm:
        return "inside the class: the column's is 0 and 1"
    file = {name for name in NAMES if vae._module.config.get(name) is not None}
    source = next(text for name, text in NAMES.items() if name in file)
    return f"{source}, {'one for all channels' if len(norm.scale) == 1 else 'by channel'}"


def of_own(name: str, folder: Path) -> str:
    """The row of an adapter, compared with its class alone."""
    vae = OwnVae(ModelSpec.model_validate(own(name, folder)), resolution=SIDE)
    x = pictures()
    stored, latents = stored_of(vae, x)
    rows, pixels = plain_own(name, folder, x, latents)
    text = verdict(stored, rows, vae.decode(latents), pixels)
    shape = " x ".join(map(str, latents.shape[1:]))
    places = vae.norm.arrays[0].shape
    kind = "by channel" if places[0] > 1 else "one for all channels"
    kind += " and place" * (max(places[1:]) > 1)
    return f"| `{name}` | {vae.kind}, {shape} | {text} | of the class, {kind} |"


def refused() -> Iterator[str]:
    """The rows of what is refused, with the words of the refusal."""
    import diffusers

    for cls in classes():
        if cls not in TINY:
            try:
                refuse_class(
                    getattr(diffusers, cls), ModelSpec.model_validate({"class": cls, "path": "p"})
                )
            except ModelNotUsable as error:
                message = str(error).removeprefix(f"p: {cls} ").partition(". ")[0]
                reason = message.removeprefix("cannot make a column: ")
                yield f"| `{cls}` | {reason} |"
            else:
                yield f"| `{cls}` | UNKNOWN: neither tried nor refused |"


def page() -> str:
    with tempfile.TemporaryDirectory() as name:
        tiny, folder = Models(Path(name)), Path(name)
        save_weights(folder)
        return TEXT.format(
            version=importlib.metadata.version("diffusers"),
            classes="\n".join(of_class(cls, tiny) for cls in classes() if cls in TINY),
            refused="\n".join(refused()),
            own="\n".join(of_own(adapter, folder) for adapter in ADAPTERS),
        )


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
