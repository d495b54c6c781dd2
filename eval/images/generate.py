"""A checkpoint and prompts in, pictures out.

Each picture's noise is a function of (seed, benchmark, prompt id, number), and batches are cut from
the whole list of prompts, so any number of ranks, interrupted as often as may be, ends with the
same files, byte for byte on a CPU. Another batch size gives the same pictures but for rounding.

    the training behind the weights is recorded (`runs`)
    the prompts' text is encoded (`prompt_cache`), and the text encoder goes
    each of this rank's batches: noise and text -> latents -> pixels -> files, by threads
    whoever sees all files records the set (`imageset`)
"""

from __future__ import annotations

import hashlib
import logging
import os
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from importlib.metadata import version
from itertools import groupby, product
from math import isqrt
from pathlib import Path
from typing import Any

import torch

from encode.models import to_images
from shards.console import Bar
from shards.read import normal
from shards.signals import Stopped

from ..errors import BadRequest
from ..prompts.benchmarks import BENCHMARKS, find
from ..prompts.prompts import Prompts
from . import runs
from .checkpoint import check_ema
from .checks import MOST_PICTURES
from .flags import AXES, SAMPLED, plain
from .generator import Generator as Generator
from .generator import Request as Request
from .imageset import ImageSetWriter
from .layouts import LAYOUTS, File
from .prompt_cache import TextCache
from .ranks import Rank

Json = dict[str, Any]
log = logging.getLogger(__name__)
ALONE = Rank()
SAVERS = 4  # threads that write files while the next batch is sampled


def noise_number(benchmark: str, prompt: str, number: int) -> int:
    """Returns the number of a prompt's picture for `shards.read.randomness`."""
    key = f"{benchmark}\0{prompt}\0{number}".encode()
    return int.from_bytes(hashlib.sha256(key).digest()[:8], "little")


def requests_of(fields: Mapping[str, Any]) -> list[Request]:
    """Returns a request for each combination of the settings that are lists (of AXES).

    Where there are several, each set has a folder below `save_dir`, such as guidance_scale-1.5, or
    guidance_scale-1.5-shift-2, and all read the prompts' text from one. BadRequest where a value
    occurs twice.
    """
    axes = sorted(AXES, key=lambda name: name in SAMPLED)  # what is loaded changes least often
    lists = {name: fields[name] for name in axes if isinstance(fields.get(name), list | tuple)}
    for name, values in lists.items():
        _refuse_repeats(name, values)
    several = [name for name, values in lists.items() if len(values) > 1]
    requests = []
    for values in product(*lists.values()):
        setting = dict(zip(lists, values, strict=True))
        request = Request(**{**fields, **setting})
        if several:
            name = "-".join(f"{axis}-{plain(setting[axis])}" for axis in several)
            folder, text = request.save_dir, request.text_cache or request.save_dir / "text"
            request = replace(request, save_dir=folder / name, text_cache=text)
        requests.append(request)
    return requests


def _refuse_repeats(name: str, values: Sequence[float]) -> None:
    for i, value in enumerate(values):
        for former in values[:i]:
            if value == former:
                raise BadRequest(f"--{name}: found {plain(value)} twice, expected each value once")
            if name == "guidance_scale" and max(value, former) <= 1:
                raise BadRequest(
                    f"--{name}: found {plain(former)} and {plain(value)}, expected one of them: at 1 or below the "
                    "prompt alone is run, so their pictures are the same"
                )


def generate(
    request: Request,
    generator: Generator | None = None,
    rank: Rank = ALONE,
    signals: Sequence[int] = (),
) -> Json:
    """Makes the missing pictures of this rank.

    Returns the manifest, if no other rank's are missing then, or else {"complete": False,
    "missing": how many}. Raises Stopped before the next batch once `signals` has one; and
    BadPrompts, BadRequest, OtherImages, CheckpointError, EncoderMismatch or ModelNotUsable before
    anything is written.
    """
    if generator is not None:
        return _generate_alike([request], generator, rank, signals)[0]
    return generate_each([request], rank, signals)[0]


def generate_each(
    requests: Sequence[Request], rank: Rank = ALONE, signals: Sequence[int] = ()
) -> list[Json]:
    """Makes one set after another, of requests that `requests_of` returned, as `generate` makes each.

    Those that differ only in how is sampled share the models, and their folders are checked before
    the first picture is made.
    """
    manifests: list[Json] = []
    for request in requests:
        if request.ema is not None:
            check_ema(request.checkpoint, request.tag, request.ema)
    for _, members in groupby(requests, _loaded):
        alike = list(members)
        _check_layout(alike[0])
        # what speaks against guidance is said of the strongest
        generator = Generator.load(max(alike, key=lambda request: request.guidance_scale))
        manifests += _generate_alike(alike, generator, rank, signals)
        del generator  # before the next is loaded
    return manifests


def _loaded(request: Request) -> Json:
    """Returns the fields that decide what is loaded."""
    return {key: value for key, value in vars(request).items() if key not in SAMPLED}


def _generate_alike(
    requests: Sequence[Request], generator: Generator, rank: Rank, signals: Sequence[int]
) -> list[Json]:
    """Makes the sets of requests that differ in SAMPLED fields only."""
    first = requests[0]
    prompts, layout, per_prompt = _check_layout(first)
    size = first.batch_size or BENCHMARKS[first.benchmark].batch_size
    texts = [prompt.text for prompt in prompts.items]
    text_folder = first.text_cache or first.save_dir / "text"
    cache = TextCache(text_folder, generator.texts.identity, texts, first.device)
    started = [(request.save_dir / "manifest.json").exists() for request in requests]
    number = {prompt.id: i for i, prompt in enumerate(prompts.items)}
    batches = rank.share(list(cut(LAYOUTS[layout].files(prompts, per_prompt), size)))
    own = [number[file.prompt.id] for batch in batches for file in batch]
    if own and not all(started) and cache.missing(own):
        generator.texts.load()  # its faults are reported before anything is written
    writers: dict[Path, ImageSetWriter] = {}
    # folders that hold a set come first: one of other settings is found before anything is written
    for _, request in sorted(zip(started, requests, strict=True), key=lambda pair: not pair[0]):
        settings = _settings(request, generator, size)
        writer = ImageSetWriter(request.save_dir, prompts, settings, layout, per_prompt)
        runs.put(request.save_dir, generator.run)
        writers[request.save_dir] = writer
    on_cpu = torch.device(first.device).type == "cpu"
    manifests = []
    for request in requests:
        images, start = writers[request.save_dir], time.monotonic()
        with threads(request.threads) if on_cpu else nullcontext():
            own_paths, pictures = make(
                request, generator, images, prompts, cache, size, rank, signals
            )
        seconds = time.monotonic() - start
        session = {  # of this rank, and of this attempt alone
            "checkpoint": str(request.checkpoint.absolute()), "device": request.device, "seconds": seconds,
            "pictures_per_second": pictures / seconds if pictures else None,
        }  # fmt: skip
        manifests.append(finish(images, own_paths, rank, session))
    return manifests


def _settings(request: Request, generator: Generator, batch_size: int) -> Json:
    """Returns what decides the pictures of a set, but for its prompts."""
    on_cpu = torch.device(request.device).type == "cpu"
    names = ("sampler", "num_inference_steps", "guidance_scale", "seed")
    settings = generator.identity | {name: getattr(request, name) for name in names}
    settings["guidance_interval"] = request.guidance_interval and list(request.guidance_interval)
    if (shift := generator.run.other_shift(request.shift)) is not None:
        settings["shift"] = shift  # the weights say the run's own
    if request.half:
        settings["half"] = request.half
    settings |= {"batch_size": batch_size, "precision": "fp32" if on_cpu else "bf16-autocast"}
    if on_cpu:  # where the number of threads decides the last bits
        settings["threads"] = request.threads
    return settings


def make(
    request: Request, generator: Generator, images: ImageSetWriter, prompts: Prompts, cache: TextCache,
    batch_size: int, rank: Rank, signals: Sequence[int],
) -> tuple[set[str], int]:  # fmt: skip
    """Verifies this rank's files that exist and makes the others.

    Returns the paths of its files, and how many pictures were made now.
    """
    batches = rank.share(list(cut(images.files, batch_size)))
    files = [file for batch in batches for file in batch]
    number = {prompt.id: i for i, prompt in enumerate(prompts.items)}
    existing = verified(images, files, rank)
    todo = [batch for batch in batches if any(file.path not in existing for file in batch)]
    total, rest = count(files), count(file for batch in todo for file in batch)
    if todo:
        needed = [number[file.prompt.id] for batch in todo for file in batch]
        encode(generator, cache, needed, images, rank)
        generator.model.to(request.device)
    saving: list[Future[None]] = []
    with progress(images, rank, total, "pictures") as bar, ThreadPoolExecutor(SAVERS) as savers:
        bar.skip(total - rest)
        for batch in todo:
            if signals:  # and what it raised was lost
                raise Stopped(signals[0])
            pairs = [(file.prompt.id, k) for file in batch for k in file.numbers]
            keys = [noise_number(prompts.benchmark, name, k) for name, k in pairs]
            noise = normal(request.seed, "generate", keys, generator.latent_shape)
            pixels = generator.pictures(
                cache.read([number[name] for name, _ in pairs]), cache.empty, noise.to(request.device),
                request.num_inference_steps, request.guidance_scale, request.sampler, request.guidance_interval,
                request.shift,
            )  # fmt: skip
            pictures = iter(to_images(pixels))
            tiles = [[next(pictures) for _ in file.numbers] for file in batch]
            for future in saving:
                future.result()
            saving = [
                savers.submit(images.save, file, pixels_of)
                for file, pixels_of in zip(batch, tiles, strict=True)
                if file.path not in existing
            ]
            bar.advance(count(batch))
        for future in saving:
            future.result()
    return {file.path for file in files}, count(f for f in files if f.path not in existing)


def count(files: Iterable[File]) -> int:
    """Returns the number of their pictures: a file may be a grid of several."""
    return sum(len(file.numbers) for file in files)


def verified(images: ImageSetWriter, files: Sequence[File], rank: Rank) -> set[str]:
    """Returns the paths of existing files; OtherImages if one is not of these settings."""
    paths = set()
    existing = [file for file in files if (images.images / file.path).exists()]
    if existing:
        with progress(images, rank, count(existing), "pictures verified") as bar:
            for file in existing:
                if images.has(file):
                    paths.add(file.path)
                bar.advance(count([file]))
    return paths


def encode(
    generator: Generator,
    cache: TextCache,
    needed: Sequence[int],
    images: ImageSetWriter,
    rank: Rank,
) -> None:
    """Encodes the prompts that the cache lacks; then the text encoder makes room for the model."""
    if missing := cache.missing(needed):
        with progress(images, rank, len(missing), "chunks of prompts") as bar:
            cache.fill(needed, generator.texts.load, rank.number, bar.advance)
    generator.texts.release()


def finish(images: ImageSetWriter, own_paths: set[str], rank: Rank, provenance: Json) -> Json:
    """Records the set if all its files exist, other ranks' verified; returns its manifest."""
    paths = {
        Path(at, name).relative_to(images.images).as_posix()  # a listing is fresh on NFS too
        for at, _, names in os.walk(images.images)
        for name in names
    }
    if absent := [file for file in images.files if file.path not in paths]:
        log.info(
            "rank %d: its part is done; %d files of other ranks are missing, and who makes the last records the set",
            rank.number, len(absent),
        )  # fmt: skip
        return {"complete": False, "missing": len(absent)}
    verified(images, [file for file in images.files if file.path not in own_paths], rank)
    packages = ("torch", "diffusers", "transformers", "pillow")
    versions = {name: version(name) for name in packages}
    return images.finish(versions | provenance | {"ranks": rank.size})


def _check_layout(request: Request) -> tuple[Prompts, str, int]:
    """Returns prompts, layout and pictures of a prompt; BadRequest where the layout cannot take so many
    pictures a prompt, or a set so many in all.
    """
    prompts, benchmark = find(request.benchmark, request.prompts), BENCHMARKS[request.benchmark]
    if request.half:
        if len(prompts.items) < 2:
            raise BadRequest("--half: found one prompt, expected several to divide")
        prompts = prompts.half(request.half)
    count = request.n_samples or benchmark.images_per_prompt
    if count * len(prompts.items) > MOST_PICTURES:
        raise BadRequest(
            f"--n_samples: found {count} pictures of {len(prompts.items)} prompts, expected at most {MOST_PICTURES} in "
            "a set"
        )
    tiles = len(LAYOUTS[benchmark.layout].files(prompts, count)[0].numbers)
    if isqrt(tiles) ** 2 != tiles:
        raise BadRequest(
            f"--n_samples: found {count}, expected a square number, as a grid takes it"
        )
    return prompts, benchmark.layout, count


def cut(files: Sequence[File], batch_size: int) -> Iterator[Sequence[File]]:
    """Yields batches of about so many pictures, whatever is left to do; a file is never divided."""
    size = max(1, batch_size // len(files[0].numbers))
    for start in range(0, len(files), size):
        yield files[start : start + size]


@contextmanager
def threads(count: int) -> Iterator[None]:
    """Sets the number of torch's threads, and sets it back afterwards."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def progress(images: ImageSetWriter, rank: Rank, total: int, unit: str) -> Bar:
    """Returns the bar of rank 0's own part."""
    part = f", rank 0 of {rank.size}" if rank.size > 1 else ""
    return Bar(f"{images.folder.name}{part}:", total, unit, shown=rank.number == 0)
