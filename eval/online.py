"""Training with encoders in the step.

    torchrun -m eval train CONFIG [key=value ...]     `data.text` is ids: the text encoder runs in the step
    fit(config, run, batches=online(config, TARS))    pictures and captions are encoded in the step

The second is what the cache is compared with. Rows, their order and all randomness are those of the
columns that the config names, whose identities say which encoders ran and how.
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from itertools import count
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import ValidationError
from torch import Tensor

import configs
from configs import ConfigError
from encode.models import CaptionTokenizer, PackedText, Vae, load_tokenizer, load_vae, pixels_on
from encode.registry import TEXTS, ModelSpec, lookup
from shards import Batch, JoinedColumns, Order
from shards.launch import launched
from shards.printing import Lines
from shards.read import Prefetcher
from shards.signals import leave
from train import Batches, World
from train.config import TrainConfig, run_folder
from train.run import fit, open_columns, open_run, order_of

from .images.layouts import Picture
from .images.originals import Originals

Ints = NDArray[np.int64]
THREADS = 4  # that decode pictures, one batch ahead


def train(path: Path, overrides: Sequence[str] = ()) -> int:
    """Trains, with the text encoder of a column of ids if the text is one; returns the exit code."""
    config = configs.load(TrainConfig, path, overrides)
    _log_rank_0()
    run = run_folder(config, path)
    sources, _ = open_run(config, run)  # whose faults are reported before an encoder is loaded
    encoder = step_encoder(config, sources, _device()) if sources.ids else None
    sources.close()
    return leave(fit(config, run, text_encoder=encoder))


def step_encoder(config: TrainConfig, sources: JoinedColumns, device: str) -> PackedText:
    """Returns the encoder that makes tokens of ids; ModelNotUsable if their tokenizer is another's."""
    encoder, identity = config.data.encoder, sources.texts[0].identity
    try:
        spec = ModelSpec.model_validate(encoder) if isinstance(encoder, dict) else encoder
    except ValidationError as error:
        raise ConfigError(
            f"data.encoder: found {encoder!r}, expected a name of encode.registry.TEXTS or class and path: {error}"
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
        if len(tars) != len(sources.by_source):
            raise ConfigError(
                f"found {len(tars)} folders of tars for {len(sources.by_source)} sources, expected one for each"
            )
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
