"""What a GPU does: `make bench-gpu`, in about ten minutes, each part with its own limit.

    python -m tests.bench.gpu --json bench/gpu.json
    python -m tests.bench.gpu --only train encode       # some parts
    python -m tests.bench.gpu --light                   # toy sizes on a CPU: that it runs

    tests       the tests marked `gpu`
    matmul      bf16 matrix products, TFLOP/s: what the other parts are compared with
    encode      pictures or captions a second through each encoder at real size with random weights: a bare
                loop over batches in memory, and the engine from a tar to a column
    train       a step of 0.70 B and 2.66 B parameters: samples/s, MFU, memory beside `train plan`, the
                optimizer's share, waiting for data
    generate    pictures a second of the 0.70 B model, 25 steps, guidance 6

Each part is a process; what fails or takes longer than its limit has a line that says so, and the others go on.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

import configs
from shards import exits
from shards.console import positive
from shards.format.atomic import Json
from shards.places import local_path
from tests.bench.cost import write_json

ROOT = Path(__file__).parents[2]
LIMITS = {"tests": 180, "matmul": 60, "encode": 300, "train": 420, "generate": 180}  # seconds
FAILED = 1  # exit code

# Families of the reference's encoders: class, and the config of their published weights.
VAES: dict[str, tuple[str, dict[str, Any]]] = {
    "FLUX, SD-3.5": (
        "AutoencoderKL",
        {
            "block_out_channels": [128, 256, 512, 512], "layers_per_block": 2, "latent_channels": 16,
            "down_block_types": ["DownEncoderBlock2D"] * 4, "up_block_types": ["UpDecoderBlock2D"] * 4,
            "use_quant_conv": False, "use_post_quant_conv": False, "shift_factor": 0.1159,
            "scaling_factor": 0.3611,
        },
    ),
    "Qwen-Image": ("AutoencoderKLQwenImage", {}),
}  # fmt: skip
GEMMA_2B = {
    "hidden_size": 2048, "intermediate_size": 16_384, "num_hidden_layers": 18, "num_attention_heads": 8,
    "num_key_value_heads": 1, "head_dim": 256,
}  # fmt: skip
TOY_VAE = {"block_out_channels": [8, 16, 16, 16], "layers_per_block": 1, "norm_num_groups": 4}
TOY_GEMMA = {
    "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 1,
    "num_key_value_heads": 1, "head_dim": 64,
}  # fmt: skip
CAPTION = (
    "a dog runs over the wet sand of a beach at low tide, " * 4
)  # about 200 bytes: as many tokens


# The parts -----------------------------------------------------------------------------------------


def gpu_tests(folder: Path, light: bool) -> list[Json]:
    """Runs the tests marked `gpu`; of a machine without one, those that are then skipped."""
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-n",
        "0",
        "-m",
        "gpu",
        "-p",
        "no:cacheprovider",
        "tests",
    ]
    if light:
        command += ["--collect-only"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    last = (result.stdout.strip() or result.stderr.strip()).splitlines()[-1]
    if result.returncode:
        raise RuntimeError(f"{last}\n{result.stdout[-2000:]}")
    return [{"what": "tests marked gpu", "result": last}]


def matmul(folder: Path, light: bool) -> list[Json]:
    """Measures square bf16 products; 2 n^3 FLOPs each."""
    import torch

    rows = []
    for n in (256,) if light else (4096, 8192, 16_384):
        a, b = (torch.randn(n, n, device=device(light), dtype=torch.bfloat16) for _ in range(2))
        seconds = best_of(lambda a=a, b=b: a @ b, light)  # type: ignore[misc]  # a lambda with a default
        rows.append({"what": f"{n} x {n}", "tflops": 2 * n**3 / seconds / 1e12})
    return rows


def encode(folder: Path, light: bool) -> list[Json]:
    """Measures each encoder by itself and within the engine."""
    rows = []
    for name, (cls, config) in VAES.items():
        if light and cls != "AutoencoderKL":
            continue
        column = {"kind": "moments", "resolution": 32 if light else 256,
                  "encoder": {"class": cls, "path": str(folder / "model")}}  # fmt: skip
        save_model(folder / "model", cls, config | TOY_VAE if light else config)
        rows.append({"what": name, **encoded(folder / name, column, light)})
    from tests.bench.encoding.synthetic import save_gemma

    save_gemma(folder / "gemma", TOY_GEMMA if light else GEMMA_2B)
    column = {"kind": "tokens", "max_tokens": 256,
              "encoder": {"class": "GemmaModel", "path": str(folder / "gemma")}}  # fmt: skip
    rows.append({"what": "Gemma-2B", **encoded(folder / "text", column, light)})
    return rows


def encoded(folder: Path, column: Json, light: bool) -> Json:
    """Returns rows a second of an encoder in a bare loop, and of the engine from a tar to a column."""
    import numpy as np
    import torch
    from pydantic import TypeAdapter

    from encode.config import ColumnConfig, EngineConfig
    from encode.models.load import load_encoder
    from encode.models.pixels import to_pixels
    from encode.run.local_worker import Done, InlineExecutor
    from shards import put_empty
    from tests.bench.encoding.synthetic import picture, tasks_of, write_tar

    config: Any = TypeAdapter(ColumnConfig).validate_python(
        column | {"encoder": column["encoder"] | {"precision": "bf16-autocast"}}
    )
    count, batch = (16, 4) if light else (1024, 32)
    encoder: Any = load_encoder(config, device(light))
    pictures = [picture(number, 320, 288) for number in range(16)]
    write_tar(folder / "0.tar", ((pictures[i % 16], CAPTION.encode()) for i in range(count)))
    engine = EngineConfig.model_validate(
        {
            "executor": "inline",
            "device": device(light),
            "batch": batch,
            "threads": 1 if light else 12,
        }
    )

    def bare() -> None:
        if config.kind == "moments":
            pixels = to_pixels(np.zeros((batch, config.resolution, config.resolution, 3), np.uint8))
            for _ in range(count // batch):
                encoder.encode(pixels.to(encoder.device))
        else:
            encoder.encode([CAPTION] * count)
        if not light:
            torch.cuda.synchronize()

    executor = InlineExecutor({"column": encoder}, engine)
    numbers = iter(range(100))

    def through_engine() -> None:
        root = folder / f"column-{next(numbers)}"
        (task,) = tasks_of(root, [folder / "0.tar"], {"column": encoder}, 1024)
        if config.kind == "tokens":
            target = task.targets["column"]
            put_empty(target.store, target.spec, *encoder.rows([""], engine.tokens))
        executor.submit(0, 0, task)
        while not (events := executor.events(60.0)):
            continue
        if not all(isinstance(event, Done) for event in events):
            raise RuntimeError(f"the engine did not end well: {events}")

    try:
        times = [(seconds_of(bare), seconds_of(through_engine)) for _ in range(1 if light else 4)]
    finally:
        executor.stop()
    fastest = [min(column) for column in zip(*times[-3:], strict=True)]  # the first warms up
    return {
        "rows_per_s_bare": count / fastest[0],
        "rows_per_s_engine": count / fastest[1],
        "engine_over_bare": fastest[1] / fastest[0],
    }


def train(folder: Path, light: bool) -> list[Json]:
    """Measures the trainer on columns of random numbers, a process a size."""
    from tests.bench.reading.readers import write_columns
    from tests.bench.reading.samples import Samples
    from tests.bench.training.runs import TOY, forked

    samples = TOY.samples if light else Samples(1024)
    (folder / "columns").mkdir()
    write_columns(folder / "columns", samples)
    sizes: dict[str, tuple[str, int, Json]] = {
        "0.70 B": ("gpu_256", 64, {}),
        "2.66 B": ("dit3b_256", 32, {}),
    }
    if light:
        toy = {f"model.{key}": value for key, value in TOY.model.items()}
        sizes = {"toy": ("cpu", 4, {"data.expect": "null", **toy})}
    rows = []
    for name, (config, batch, changes) in sizes.items():
        words = {
            "data.lanes": batch,
            "data.latents": folder / "columns/latents", "data.text": folder / "columns/text",
            "steps": 6 if light else 60, "log_every": 2 if light else 20, "save_every": 10**6,
            "validation.source": "null",
            "runs": folder / config, "global_batch": batch, "micro_batch": batch, **changes,
        }  # fmt: skip
        overrides = [f"{key}={value}" for key, value in words.items()]
        path = ROOT / f"configs/train/{config}.yaml"
        share = forked(lambda path=path, overrides=overrides: trained(path, overrides))  # type: ignore[misc]
        (metrics,) = (folder / config).glob("*/metrics.jsonl")
        lines = metrics.read_text().splitlines()
        record = [json.loads(line) for line in lines if "samples_per_second" in line][-1]
        rows.append({
            "what": name, "samples_per_s": record["samples_per_second"], "mfu": record["mfu"],
            "memory_gb": record["memory_gb"], "plan_gb": planned(path, overrides, folder / "plan.json"),
            "optimizer_share": share, "data_wait": record["data_wait"],
        })  # fmt: skip
    return rows


def trained(path: Path, overrides: list[str]) -> float:
    """Trains, and returns the share of the run's time in DeepSpeed's and the optimizer's step."""
    import deepspeed
    import torch

    from train.config import TrainConfig, run_folder
    from train.run import fit

    engine: Any = deepspeed.DeepSpeedEngine
    inner, spent = engine._take_model_step, []

    def timed(*arguments: Any, **options: Any) -> Any:
        wait = torch.cuda.synchronize if torch.cuda.is_available() else lambda: None
        wait()  # type: ignore[no-untyped-call, unused-ignore]  # torch's
        start = time.perf_counter()
        result = inner(*arguments, **options)
        wait()  # type: ignore[no-untyped-call, unused-ignore]  # torch's
        spent.append((start, time.perf_counter()))
        return result

    engine._take_model_step = timed
    config = configs.load(TrainConfig, path, overrides)
    if code := fit(config, run_folder(config, path)):
        raise SystemExit(code)
    late = spent[len(spent) // 2 :]  # compiled and warm by then
    return sum(end - start for start, end in late[1:]) / (late[-1][1] - late[0][1])


def planned(path: Path, overrides: list[str], out: Path) -> float:
    """Returns the GB that `train plan` says of a GPU."""
    command = [
        sys.executable,
        "-m",
        "train",
        "plan",
        str(path),
        *overrides,
        "--gpu",
        "h100",
        "--json",
        str(out),
    ]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    memory = json.loads(out.read_text())["memory_bytes"]
    return float(memory[max(memory)]["total"]) / 1e9


def generate(folder: Path, light: bool) -> list[Json]:
    """Measures pictures a second: sampling alone, without decoding and files."""
    import torch

    from eval.images.sampler import sample
    from tests.bench.training.runs import TOY
    from train.model.dit import DiT, DiTConfig

    fields: Json = {
        "hidden_size": 1152, "layers": 28, "heads": 9, "kv_heads": 3, "head_dim": 128, "mlp_size": 3584,
        "sample_size": 32,
    }  # fmt: skip
    width, batch, steps = (16, 2, 2) if light else (2048, 32, 25)
    shapes = {
        "in_channels": 4 if light else 16,
        "out_channels": 4 if light else 16,
        "text_width": width,
    }
    config = DiTConfig.model_validate((TOY.model if light else fields) | shapes)
    model = DiT(config).to(device(light)).eval()
    text = torch.randn(batch, 128, width, device=device(light))
    side = config.sample_size
    noise = torch.randn(batch, config.in_channels, side, side, device=device(light))
    with torch.inference_mode(), torch.autocast(device(light), torch.bfloat16):
        seconds = best_of(
            lambda: sample(model, list(text), text[0, :1], noise=noise, steps=steps), light
        )
    return [{"what": f"{steps} steps, guidance 6", "pictures_per_s": batch / seconds}]


PARTS: dict[str, Callable[[Path, bool], list[Json]]] = {
    "tests": gpu_tests, "matmul": matmul, "encode": encode, "train": train, "generate": generate,
}  # fmt: skip


# Helpers -------------------------------------------------------------------------------------------


def device(light: bool) -> str:
    return "cpu" if light else "cuda"


def save_model(folder: Path, cls: str, config: Json) -> None:
    """Saves a VAE of random weights."""
    import diffusers

    getattr(diffusers, cls)(**config).save_pretrained(folder)


def seconds_of(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def best_of(work: Callable[[], Any], light: bool) -> float:
    """Returns the seconds of the fastest of some calls, the device's work included."""
    import torch

    def whole() -> None:
        work()
        if not light:
            torch.cuda.synchronize()

    whole()
    return min(seconds_of(whole) for _ in range(1 if light else 5))


# The command ---------------------------------------------------------------------------------------


def machine(light: bool) -> Json:
    """Returns the card and the versions that the figures are of; ends the command without a GPU."""
    import torch

    if not light and not torch.cuda.is_available():
        raise SystemExit("error: no CUDA device is visible; --light runs toy sizes on a CPU")
    card = "CPU, toy sizes" if light else torch.cuda.get_device_name()
    return {
        "date": time.strftime("%Y-%m-%d"), "card": card, "torch": torch.__version__, "cuda": torch.version.cuda,
    }  # fmt: skip


def run_part(name: str, args: argparse.Namespace) -> Json:
    """Runs a part in a process of its own. Returns its rows, or its error."""
    limit = args.limit or LIMITS[name]
    print(f"{name}: at most {limit} s", file=sys.stderr, flush=True)
    start = time.perf_counter()
    with tempfile.TemporaryDirectory(dir=args.folder, prefix="latentbank-gpu-") as folder:
        out = Path(folder) / "rows.json"
        command = [
            sys.executable,
            "-m",
            "tests.bench.gpu",
            "--part",
            name,
            "--json",
            str(out),
            "--folder",
            folder,
        ]
        command += ["--light"] if args.light else []
        try:
            result = subprocess.run(
                command, cwd=ROOT, timeout=limit, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
            )  # fmt: skip
        except subprocess.TimeoutExpired:
            return {"error": f"took longer than {limit} s", "seconds": limit}
        seconds = round(time.perf_counter() - start, 1)
        if result.returncode or not out.exists():
            return {"error": result.stdout.strip()[-2000:], "seconds": seconds}
        return {"rows": json.loads(out.read_text()), "seconds": seconds}


def shown(results: Json) -> Table:
    """Returns a row for each measurement, and for each part that failed."""
    table = Table("part", "of", "figures", title=f"{results['card']}, {results['date']}")
    for name, part in results["parts"].items():
        if "error" in part:
            table.add_row(name, "FAILED", part["error"].splitlines()[-1][:200])
        for row in part.get("rows", ()):
            figures = {
                k: f"{v:.3g}" if isinstance(v, float) else v for k, v in row.items() if k != "what"
            }
            table.add_row(name, row["what"], ", ".join(f"{k} {v}" for k, v in figures.items()))
    return table


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", nargs="+", choices=PARTS, help="these parts (default: all)")
    parser.add_argument(
        "--json", type=local_path, metavar="FILE", help="also write all results there"
    )
    parser.add_argument(
        "--folder", type=local_path, help="where temporary files go (default: the system's)"
    )
    parser.add_argument("--limit", type=positive, help="seconds of each part (default: its own)")
    parser.add_argument(
        "--light", action="store_true", help="toy sizes on a CPU, to see that it runs"
    )
    parser.add_argument("--part", choices=PARTS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.part:
        folder = Path(args.folder) / args.part
        folder.mkdir()
        write_json(args.json, PARTS[args.part](folder, args.light))  # type: ignore[arg-type]
        return 0
    results: Json = {**machine(args.light), "parts": {}}
    for name in args.only or PARTS:
        results["parts"][name] = run_part(name, args)
        if args.json:
            write_json(args.json, results)  # what is measured survives what comes later
    Console().print(shown(results))
    return FAILED if any("error" in part for part in results["parts"].values()) else 0


if __name__ == "__main__":
    exits.run(main)
