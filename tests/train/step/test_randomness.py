"""All randomness of a sample is a function of the seed and its number: whatever the ranks, the micro-batches and the
restarts; and no two samples of a batch share any."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from shards import JoinedColumns, Order
from shards.read.randomness import normal
from shards.read.stream import Stream, empty_caption
from tests.train.conftest import tiny_config, write_columns
from train.config import TrainConfig
from train.run import open_columns
from train.step.inputs import Inputs, cut, training_inputs

BATCH, LANES, ROUNDS = 32, 8, 3
Sample = tuple[int, int, list[torch.Tensor]]  # source, row, and what is drawn for it


@pytest.fixture(scope="module")
def opened(
    columns: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[TrainConfig, JoinedColumns, Order]:
    """Two sources whose row ids are the same numbers, of which one has two captions a row."""
    folder = tmp_path_factory.mktemp("other")
    write_columns(folder / "toy", "toy", 150, 9)
    write_columns(folder / "more", "more", 150, 10)
    data = {
        "latents": [str(columns / "toy/vae"), str(folder / "more/vae")],
        "text": [{str(columns / "toy/text"): 0.6, str(folder / "toy/text"): 0.4}, str(folder / "more/text")],
        "lanes": LANES, "caption_dropout": 0.3,
    }  # fmt: skip
    values = tiny_config(columns, columns / "runs", data=data, global_batch=BATCH, seed=5)
    config = TrainConfig.model_validate(values)
    sources = open_columns(config, None)
    return config, sources, sources.order(config.seed, LANES, 0)


def packed(x: Inputs) -> list[torch.Tensor]:
    """The caption of each sample, at its true length."""
    return list(torch.split(x.tokens, x.cu_seqlens.diff().tolist()))


def drawn(
    opened: tuple[TrainConfig, JoinedColumns, Order],
    world: int,
    micro: int,
    start: int = 0,
    batch: int = BATCH,
) -> dict[int, Sample]:
    """What each sample from `start` on is given, by its number."""
    config, sources, order = opened
    result: dict[int, Sample] = {}
    for rank in range(world):
        stream = Stream(sources, order, position=start, global_batch=batch, world=world, rank=rank)
        with stream:
            for _ in range((ROUNDS * BATCH - start) // batch):
                for part in cut(next(stream), micro):
                    result.update(_samples(config, sources, part))
    return result


def _samples(
    config: TrainConfig, sources: JoinedColumns, part: Any
) -> Iterator[tuple[int, Sample]]:
    x = training_inputs(
        part,
        sources.norm,
        empty_caption(sources),
        config.flow,
        config.data.caption_dropout,
        config.seed,
    )
    captions = packed(x)
    for i, sample in enumerate(part.samples.tolist()):
        values = [v[i].clone() for v in (x.latents, x.noise, x.sigma, x.timestep)]
        yield sample, (int(part.sources[i]), int(part.rows[i]), [*values, captions[i]])


def assert_same(one: dict[int, Sample], other: dict[int, Sample]) -> None:
    assert one.keys() == other.keys()
    for sample, (source, row, values) in one.items():
        assert (source, row) == other[sample][:2]
        assert all(torch.equal(a, b) for a, b in zip(values, other[sample][2], strict=True)), sample


@pytest.fixture(scope="module")
def alone(opened: tuple[TrainConfig, JoinedColumns, Order]) -> dict[int, Sample]:
    return drawn(opened, 1, BATCH)


@pytest.mark.parametrize(
    ("world", "micro"), [(1, 3), (2, 16), (2, 1), (4, 8), (4, 5), (8, 4), (8, 2)]
)
def test_any_world_and_any_micro_batch(
    opened: tuple[TrainConfig, JoinedColumns, Order],
    alone: dict[int, Sample],
    world: int,
    micro: int,
) -> None:
    assert list(sorted(alone)) == list(range(ROUNDS * BATCH))
    assert_same(drawn(opened, world, micro), alone)


@pytest.mark.parametrize(
    ("world", "start", "batch"), [(1, 32, 32), (4, 64, 32), (2, 40, 8), (8, 32, 64)]
)
def test_any_restart_and_any_batch(
    opened: tuple[TrainConfig, JoinedColumns, Order],
    alone: dict[int, Sample],
    world: int,
    start: int,
    batch: int,
) -> None:
    again = drawn(opened, world, 2, start, batch)
    assert_same(again, {sample: alone[sample] for sample in range(start, ROUNDS * BATCH)})


def test_captions_are_chosen_and_dropped_at_their_rates(
    opened: tuple[TrainConfig, JoinedColumns, Order], alone: dict[int, Sample]
) -> None:
    """So that the equalities above are of something."""
    _, sources, _ = opened
    empty = empty_caption(sources).float()
    dropped = [torch.equal(values[4].float(), empty) for _, _, values in alone.values()]
    assert 0.1 < sum(dropped) / len(dropped) < 0.5
    (first, second), chosen = sources.by_source[0].texts, [0, 0]
    for (source, row, values), drop in zip(alone.values(), dropped, strict=True):
        if source == 0 and not drop:
            for k, column in enumerate((first, second)):
                words = torch.from_numpy(column.decoded(column.read(np.array([row]))))
                chosen[k] += torch.equal(words.view(torch.bfloat16).float(), values[4].float())
    assert min(chosen) >= 5, chosen


def test_no_two_samples_share_noise_or_timestep(alone: dict[int, Sample]) -> None:
    """Nor a sample with itself in a later epoch; also not two sources whose rows have the same id."""
    for which in (1, 2):
        values = {values[which].numpy().tobytes() for _, _, values in alone.values()}
        share = len(values) / len(alone)
        assert share == 1 if which == 1 else share > 0.9  # of 1,000 timesteps some come twice
    assert len({(source, row) for source, row, _ in alone.values()}) > 90
    shared = {row for source, row, _ in alone.values() if source == 0}
    assert shared & {row for source, row, _ in alone.values() if source == 1}


def test_ranks_of_one_batch_draw_different_numbers(
    opened: tuple[TrainConfig, JoinedColumns, Order],
) -> None:
    """The reference seeds every rank alike, so that each draws the same noise."""
    _, sources, order = opened
    firsts = []
    for rank in range(8):
        with Stream(sources, order, position=0, global_batch=BATCH, world=8, rank=rank) as stream:
            firsts.append(next(stream).samples.tolist())
    flat = [sample for samples in firsts for sample in samples]
    assert sorted(flat) == list(range(BATCH))
    assert len({float(v) for v in normal(5, "timestep", flat, ())}) == BATCH


def test_purposes_and_seeds_are_independent() -> None:
    purposes = (
        "posterior",
        "flow",
        "timestep",
        "caption-drop",
        "validation-posterior",
        "validation-flow-0",
    )
    draws = {(p, s): normal(s, p, range(400), (4,)).flatten() for p in purposes for s in (0, 1)}
    for purpose, values in draws.items():
        for second, second_values in draws.items():
            if purpose < second:
                assert abs(float(torch.corrcoef(torch.stack([values, second_values]))[0, 1])) < 0.1
