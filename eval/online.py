"""Training with encoders in the step.

    torchrun -m eval train CONFIG [key=value ...]     `data.text` is ids: the text encoder runs in the step
    torchrun -m eval train CONFIG --tars DIR          pictures and captions are encoded in the step

The second is what the cache is compared with. Rows, their order and all randomness are those of the
columns that the config names, whose identities say which encoders ran and how.
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from itertools import count, islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import ValidationError
from torch import Tensor

import configs
from configs import ConfigError, explained
from encode.models import CaptionTokenizer, PackedText, Vae, load_tokenizer, load_vae, pixels_on
from encode.registry import TEXTS, ModelSpec, lookup
from shards import Batch, JoinedColumns, Order, Stream
from shards.launch import launched
from shards.printing import Lines
from shards.read import Prefetcher
from shards.signals import leave
from train import Batches, World
from train.config import TrainConfig, run_folder
from train.run import fit, from_columns, open_columns, open_run, order_of

from .images.layouts import Picture
from .images.originals import Originals

Ints = NDArray[np.int64]
THREADS = 4  # that decode pictures, one batch ahead


class Measured(Exception):
    """The steps that were to be measured are done: the run ends here, and saves nothing."""

    exit_code = 0


def train(
    path: Path,
    overrides: Sequence[str] = (),
    tars: Sequence[Path] = (),
    allow_class: Collection[str] = (),
    measure: int | None = None,
) -> int:
    """Trains, with the text encoder of a column of ids if the text is one; returns the exit code.

    Where `tars` names the folder of each source's tars, pictures and captions are encoded in the
    step. A run that is to `measure` some steps ends after them and saves nothing.
    """
    config = configs.load(TrainConfig, path, overrides)
    if measure is not None:
        config = _never_saved(config, measure)
    _log_rank_0()
    run = run_folder(config, path)
    sources, order = open_run(config, run)  # whose faults are reported before an encoder is loaded
    encoder = step_encoder(config, sources, _device()) if sources.ids else None
    batches = None
    if tars:
        check_tars(sources, tars)
        batches = online(config, tars, allow_class)
    if measure is not None:
        stream = partial(_Ending, batches=measure)
        batches = (
            _ending(batches, measure) if batches else from_columns(config, sources, order, stream)
        )
    try:
        return leave(fit(config, run, batches, encoder))
    except Measured:
        logging.getLogger("train").info("measured %s steps: nothing is saved", f"{measure:,}")
        return Measured.exit_code
    finally:
        sources.close()


def _never_saved(config: TrainConfig, steps: int) -> TrainConfig:
    """Returns a config that saves nothing in the first `steps` steps."""
    later = max(config.steps, steps + 1)
    return config.model_copy(update={"steps": later, "save_every": later, "save_at": ()})


class _Ending(Stream):
    """A stream of columns that ends in Measured after so many batches."""

    def __init__(self, *words: Any, batches: int, **options: Any) -> None:
        super().__init__(*words, **options)
        self._left = batches

    def __next__(self) -> Batch:
        if not self._left:
            raise Measured
        self._left -= 1
        return super().__next__()


def _ending(batches: Batches, count: int) -> Batches:
    """Returns batches that end in Measured after so many."""

    def some(position: int, world: World) -> Iterator[Batch]:
        yield from islice(batches(position, world), count)
        raise Measured

    return some


def check_tars(sources: JoinedColumns, tars: Sequence[Path]) -> None:
    """Raises ConfigError unless there is a folder for each source, MissingPictures unless each has
    all tars of its source.
    """
    if len(tars) != len(sources.by_source):
        raise ConfigError(
            f"found {len(tars)} folders of tars for {len(sources.by_source)} sources, expected one for each"
        )
    for join, folder in zip(sources.by_source, tars, strict=True):
        originals = Originals(join.latents, folder)
        for shard in range(len(originals.source.tars)):
            originals.check_tar(shard)


def step_encoder(config: TrainConfig, sources: JoinedColumns, device: str) -> PackedText:
    """Returns the encoder that makes tokens of ids; ModelNotUsable if their tokenizer is another's."""
    encoder, identity = config.data.encoder, sources.texts[0].identity
    try:
        spec = ModelSpec.model_validate(encoder) if isinstance(encoder, dict) else encoder
    except ValidationError as error:
        raise ConfigError(
            "\n".join(explained(ModelSpec, encoder, error, above="data.encoder"))
        ) from None
    model = None if spec is None else lookup(spec, TEXTS)
    return PackedText.of_ids(identity, model, config.data.hidden_state, device)


def _device() -> str:
    return f"cuda:{launched()[2]}" if torch.cuda.is_available() else "cpu"


def _log_rank_0() -> None:
    """Shows the trainer's lines of rank 0."""
    level = logging.INFO if launched(meet=True)[0] == 0 else logging.WARNING
    logging.basicConfig(level=logging.WARNING, format="%(message)s", handlers=[Lines()])
    logging.getLogger("train").setLevel(level)


# Without columns ----------------------------------------------------------------------------------


def online(
    config: TrainConfig, tars: Path | Sequence[Path], allow_class: Collection[str] = ()
) -> Batches:
    """Returns what `fit` takes as `batches`: the columns', but encoded in the step.

    `tars`: the folder of the source's tars, or a folder for each source. Where the text is ids, so
    are the batches: hand in the encoder too. `allow_class`: those of the user that a latent column may
    name as its encoder.
    """
    folders = [tars] if isinstance(tars, Path) else list(tars)
    if config.data.partial:
        raise ConfigError(
            "data.partial: found true, expected finished columns: their rows are the same at any time"
        )

    def batches(position: int, world: World) -> Iterator[Batch]:
        sources = open_columns(config, None)
        encoders = Online.load(config, sources, folders, str(world.device), allow_class)
        return encoders.batches(position, world)

    return batches


@dataclass(frozen=True)
class Online:
    """The encoders of some columns, and the tars that these were made of."""

    config: TrainConfig
    sources: JoinedColumns
    order: Order
    originals: Sequence[Originals]
    vae: Vae
    tokenize: CaptionTokenizer
    text: PackedText | None  # None: the text is ids

    @classmethod
    def load(
        cls,
        config: TrainConfig,
        sources: JoinedColumns,
        tars: Sequence[Path],
        device: str,
        allow_class: Collection[str] = (),
    ) -> Online:
        check_tars(sources, tars)
        vae, text = (c.identity for c in (sources.by_source[0].latents, sources.texts[0]))
        encoder = None if sources.ids else PackedText.of_tokens(text, device)
        return cls(
            config, sources, order_of(config, sources),
            [Originals(join.latents, folder) for join, folder in zip(sources.by_source, tars, strict=True)],
            load_vae(vae.encoder, device, allow_class),
            encoder.text.tokenizer if encoder else load_tokenizer(text), encoder,
        )  # fmt: skip

    def batches(self, position: int, world: World) -> Iterator[Batch]:
        """Yields this rank's batches from `position` on, for ever, decoded ahead in threads."""
        step = self.config.global_batch
        places = self.order.places(step, world.size, world.rank)
        with ThreadPoolExecutor(THREADS) as pool:
            inputs = (self._inputs(pool, start, places) for start in count(position, step))
            with closing(Prefetcher(inputs, 1, "pictures")) as prefetched:
                yield from map(self._encoded, prefetched)

    def _inputs(self, pool: ThreadPoolExecutor, position: int, places: Ints) -> _Inputs:
        samples = position + places
        sources, rows = self.sources.locate(*self.order.at(samples))
        crops, captions = [], []
        for sample, s, row in zip(samples, sources.tolist(), rows.tolist(), strict=True):
            join, source = self.sources.by_source[s], self.originals[s]
            crops.append(pool.submit(source.crop, row, join.latents.identity.picture))
            column = join.texts[int(self.order.choose(sample[None], join.rates)[0])]
            captions.append(source.caption(row, column.identity.text.caption or ""))
        images = np.stack([crop.result() for crop in crops])
        return _Inputs(position, samples, rows, sources, images, captions)

    def _encoded(self, inputs: _Inputs) -> Batch:
        size = self.config.micro_batch
        moments = [
            self.vae.encode(pixels_on(self.vae.device, inputs.images[i : i + size])).cpu()
            for i in range(0, len(inputs.images), size)
        ]
        tokens, cu_seqlens = self._text(inputs.captions)
        return Batch(
            inputs.position, torch.from_numpy(inputs.samples), torch.from_numpy(inputs.rows),
            torch.cat(moments), tokens, cu_seqlens, torch.from_numpy(inputs.sources),
        )  # fmt: skip

    def _text(self, captions: Sequence[str]) -> tuple[Tensor, Tensor]:
        ids = self.tokenize(captions)
        ends = torch.tensor([0, *map(len, ids)]).cumsum(0, dtype=torch.int32)
        packed = torch.tensor([token for row in ids for token in row], dtype=torch.int32)
        return self.text(packed, ends) if self.text else packed, ends


@dataclass(frozen=True)
class _Inputs:
    """A batch before it is encoded: pictures (B, R, R, 3) uint8, and a caption of each."""

    position: int
    samples: Ints
    rows: Ints
    sources: Ints
    images: Picture
    captions: Sequence[str]
