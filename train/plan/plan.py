"""`python -m train plan CONFIG`: what a run needs, in FLOPs, memory, bytes, hours and money, before
it starts.

The model is built on the meta device. Where there are no columns yet, `data.expect` says what they
will be.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from rich.table import Column, Table

import configs
from shards.console import config_words, counted, number, positive, render, say_next, size_text
from shards.places import local_path, place

from ..config import TrainConfig
from ..model.flops import GPUS, Gpu, in_tera
from ..report.start import latent_lines
from .caching_speedup import PADDED, Efficiency

if TYPE_CHECKING:
    from .estimate import RunPlan
    from .survey import DataSummary, Source

NODE = 8  # GPUs


# For a reader --------------------------------------------------------------------------------------------------------


def as_text(plan: RunPlan) -> str:
    """Returns the plan for a reader."""
    data, shape = plan.data, plan.data.shape
    forward, padded = (in_tera(plan.forward.of(1, tokens)) for tokens in (data.tokens, PADDED))
    return render(
        f"model: {sum(plan.parameters.values()):,} parameters "
        f"({', '.join(f'{part} {n / 1e6:,.1f} M' for part, n in plan.parameters.items())})",
        f"data: latents {shape.channels} x {shape.height} x {shape.width}, text width {shape.text_width}, "
        f"{data.tokens:.0f} tokens a caption, {size_text(data.sample_bytes)} a sample "
        f"({size_text(data.latent_bytes)} latents)",
        *latent_lines(plan.flow, plan.tokens),
        *(f"  {note}" for note in data.notes),
        f"mix: {', '.join(_source(s) for s in data.sources)}",
        f"FLOPs a sample: {forward} forward, {in_tera(plan.flops)} forward and backward "
        f"(captions padded to {PADDED}: {padded}, {in_tera(plan.train.of(1, PADDED))})",
        f"batch: {plan.global_batch:,} samples = {counted(plan.setting.gpus, 'GPU')} x "
        f"{counted(plan.accumulation, 'micro-batch', 'micro-batches')} x {plan.micro_batch}",
        "",
        _memory_table(plan),
        _disk_line(plan),
        "",
        *_time_lines(plan),
        "",
        *_saving_lines(plan),
    )  # fmt: skip


def _memory_table(plan: RunPlan) -> Table:
    heads = {0: "the reference", 1: "ZeRO 1", 2: "ZeRO 2"}
    heads[plan.stage] += ", this config"
    sums = [sum(parts.values()) for parts in plan.memory.values()]
    unit, size = ("GB", 1e9) if sums[plan.stage] > 1e9 else ("MB", 1e6)
    table = _table(f"{unit} on each GPU", *heads.values())
    for part in plan.memory[0]:
        table.add_row(part, *(f"{parts[part] / size:,.1f}" for parts in plan.memory.values()))
    table.add_section()
    table.add_row("total, without CUDA's own", *(f"{n / size:,.1f}" for n in sums))
    return table


def _disk_line(plan: RunPlan) -> str:
    text = f"disk: a checkpoint is {size_text(plan.checkpoint_bytes)}"
    if plan.snapshot_bytes:
        text += f"; the snapshots of ema.power are {size_text(plan.snapshot_bytes)} in all"
    return text


def _time_lines(plan: RunPlan) -> list[str]:
    data, setting, rate = plan.data, plan.setting, plan.samples_per_second
    lines = [f"run: {counted(plan.steps, 'step')}, {counted(plan.samples, 'sample')}"]
    lines += [
        f"epoch of {name}: {steps:,.0f} steps; {epochs:,.2f} epochs in the run"
        for name, (steps, epochs) in plan.epochs().items()
    ]
    if not plan.epochs():
        lines.append("epochs: the number of rows is not known yet: give --samples")
    if rate is None or plan.gpu_hours is None or setting.gpu is None:
        return [
            *lines,
            "time: no GPU is named: give --gpu, one of " + ", ".join(GPUS) + ", or --peak-tflops",
        ]
    read = rate * data.sample_bytes
    return [
        *lines,
        f"time on {setting.gpus} {setting.gpu.name} at {setting.efficiency.dit:.0%} of {setting.gpu.peak / 1e12:,.0f} "
        f"TFLOP/s (assumed): {rate:,.0f} samples/s, {plan.global_batch / rate:.3f} s a step, "
        f"{plan.gpu_hours / setting.gpus / 24:,.2f} days, {plan.gpu_hours:,.0f} GPU hours",
        f"storage: {size_text(read)}/s in all, {size_text(read / setting.gpus * NODE)}/s a node of {NODE}; "
        f"{size_text(plan.samples * data.sample_bytes)} in the run"
        + (f"; the columns are {size_text(data.rows * data.sample_bytes)}" if data.rows else ""),
        "money: "
        + (f"{plan.gpu_hours * setting.price:,.0f}" if setting.price else "give --price-per-gpu-hour"),
    ]  # fmt: skip


def _saving_lines(plan: RunPlan) -> list[str | Table]:
    e = plan.setting.efficiency
    if not plan.savings:
        return [
            "cached against online: the encoders' FLOPs are not known for pictures of this size"
        ]
    table = _table(
        "if these ran in each step", "of its FLOPs", "cached is faster by FLOPs", "by time, assumed"
    )
    for s in plan.savings:
        text = f"padded to {PADDED}" if s.tokens == PADDED else f"on {s.tokens:.0f} tokens"
        name = f"{s.vae}; Gemma-2B {text}"
        table.add_row(name, f"{s.share:.1%}", f"{s.by_flops:.2f}x", f"{s.by_time:.2f}x")
    return [
        table,
        f"by time: the DiT at {e.dit:.0%} of the peak, Gemma at {e.llm:.0%}, the VAE at {e.vae:.0%}; decoding pictures "
        "in each step is not counted",
    ]  # fmt: skip


def _table(first: str, *numbers: str) -> Table:
    return Table(first, *(Column(name, justify="right") for name in numbers))


def _source(source: Source) -> str:
    share = "" if source.share is None else f" {source.share:.3f}"
    return source.name + share + (f" ({source.rows:,.0f} rows)" if source.rows else "")


# The command ---------------------------------------------------------------------------------------------------------


def add_options(parser: argparse.ArgumentParser) -> None:
    """Adds the options of `python -m train plan`."""
    config_words(parser)
    add_setting_options(parser)
    several = "several in the place of the config's: what follows each, side by side"
    parser.add_argument("--latents", nargs="+", metavar="COLUMN", type=place, help=several)
    share = number(1e-6, 1)
    parser.add_argument(
        "--llm-efficiency", type=share, default=Efficiency.llm, help="of Gemma, if online"
    )  # fmt: skip


def add_setting_options(parser: argparse.ArgumentParser) -> None:
    """Adds the options that say what is assumed of the machines and of columns that are missing."""
    share, add = number(1e-6, 1), parser.add_argument
    add("--gpus", type=positive, default=1, help="of the run")
    add("--gpu", choices=sorted(GPUS), help="which, for time and money")
    add("--peak-tflops", type=number(1e-3), metavar="P", help="dense bf16 peak of another GPU")
    add("--price-per-gpu-hour", type=number(), metavar="P", help="in any currency")
    add(
        "--mfu",
        type=share,
        default=Efficiency.dit,
        help="share of the peak that is reached",
    )
    add(
        "--vae-efficiency",
        type=share,
        default=Efficiency.vae,
        help="of the VAE's encoder",
    )
    add("--samples", type=_numbers, metavar="N[,N]", help="rows of each source, without columns")
    add("--tokens", type=number(), metavar="T", help="tokens a caption, not those found or assumed")
    add("--json", type=local_path, metavar="FILE", help="also write the plan there")


def _numbers(text: str) -> list[float]:
    return [number(1)(part) for part in text.split(",")]


def gpu_named(name: str | None, peak_tflops: float | None) -> Gpu | None:
    """Returns the GPU of --gpu or --peak-tflops, which comes first; None where neither names one, and
    ConfigError for a name that is not known.
    """
    if peak_tflops:
        return Gpu("GPUs", peak_tflops * 1e12, "")
    if name and name not in GPUS:
        raise configs.ConfigError(
            f"gpu: found {name!r}, expected one of {', '.join(GPUS)}; or give --peak-tflops"
        )
    return GPUS[name] if name else None


def data_summary(
    config: TrainConfig, samples: Sequence[float] | None, tokens: float | None
) -> DataSummary:
    """Returns what is known of the data, by --samples where columns do not say it, and --tokens."""
    from .survey import summarise, with_rows

    data = summarise(config)
    if tokens:
        notes = tuple(n for n in data.notes if "tokens a caption" not in n)
        data = replace(data, tokens=tokens, notes=notes)
    if samples and data.rows is not None:
        note = "--samples is left aside, for the columns say how many rows they have"
        return replace(data, notes=(*data.notes, note))
    return with_rows(data, samples) if samples else data


def run_plan(args: argparse.Namespace) -> int:
    """Runs `python -m train plan`; returns 2 where one of the latents would be refused."""
    if args.latents:
        return _run_latents(args)
    from .estimate import Setting, as_record, make_plan  # loads torch, of which help has no need

    config = configs.load(TrainConfig, args.config, args.overrides)
    gpu = gpu_named(args.gpu, args.peak_tflops)
    efficiency = Efficiency(args.mfu, args.llm_efficiency, args.vae_efficiency)
    data = data_summary(config, args.samples, args.tokens)
    plan = make_plan(config, data, Setting(args.gpus, gpu, efficiency, args.price_per_gpu_hour))
    print(as_text(plan))
    if data.ids is not None:
        note = "on several GPUs by torchrun: `python -m train --help`" if args.gpus > 1 else ""
        stage = ["eval", "train"] if data.ids else ["train"]
        say_next(*stage, args.config, *args.overrides, note=note)
    if args.json:
        args.json.write_text(json.dumps(as_record(plan), indent=1) + "\n")
    return 0


def _run_latents(args: argparse.Namespace) -> int:
    from . import latents  # loads torch

    plans = [
        latents.plan_latents(args.config, args.overrides, column, args.tokens)
        for column in args.latents
    ]
    print(latents.as_text(plans))
    if args.json:
        args.json.write_text(json.dumps(latents.as_records(plans), indent=1) + "\n")
    return 2 if any(plan.refused for plan in plans) else 0
