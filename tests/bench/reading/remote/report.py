"""What the bench of object stores says: ratios within rounds, what is promised of them, a table."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from rich.table import Table

from shards.console import render
from shards.format.atomic import Json
from tests.bench.cost import median_interval, paired, promise

from ..samples import Samples

Rate = Callable[[Json], float]  # of a pass, bytes a second


def rate(figures: Json) -> float:
    """Without what opening took; where nothing is fetched, without the first batch, in which threads
    start and memory is touched for the first time.
    """
    if figures["epochs"] > 1:
        size = figures["bytes"] - figures["first_bytes"]
        return float(size / (figures["seconds"] - figures["first"]))
    return float(figures["bytes"] / (figures["seconds"] - figures["opening"]))


def rate_with_opening(figures: Json) -> float:
    return float(figures["bytes"] / figures["seconds"])


def summary(ways: Mapping[str, list[Json]], samples: Samples) -> Json:
    """Returns the figures of each way, with its rates over those of others of the same round. What
    plain requests fetch is known before: nothing is opened in their time.
    """

    def rates(name: str, of: Rate) -> list[float]:
        return [of(each) for each in ways[name]]

    def figures(name: str) -> Json:
        passes = ways[name]
        payload = samples.row_bytes(2) * passes[0]["epochs"]
        own = rates(name, rate)

        def median(key: str) -> float:
            return median_interval([each[key] for each in passes])[0]

        found: Json = {
            "mb_per_s": median_interval([each / 1e6 for each in own])[0],
            "first_s": median("first"),
            "opening_s": median("opening"),
            "requests_a_sample": median("requests") / samples.rows / passes[0]["epochs"],
            "bytes_a_byte": median("fetched") / payload,
            "cpu_s_a_gb": 1e9 * median("cpu") / median("bytes"),
            "over_plain_with_opening": paired(rates(name, rate_with_opening), rates("plain", rate)),
        }
        for key, other in OVER.items():
            if other in ways:
                found[key] = paired(own, rates(other, rate))
        return found | {"passes": passes}

    return {name: figures(name) for name in ways}


OVER = {
    "over_plain": "plain",
    "over_kept": "kept",
    "over_rows": "rows",
    "over_staged": "staged",
    "over_none": "none",
    "over_none_steady": "none, steady",
    **{
        f"over_{peer}_{state}": f"{peer}, {state}"
        for peer in ("mosaicml", "litdata")
        for state in ("cold", "warm")
    },
}
# Of ways that may be equal, which by chance have half of their medians below 1.
UPPER = ", upper end of 95 %"
# (network, way, key of its figures, bound); what is not measured, as peers that are not installed, has no line
BARS: tuple[tuple[str, str, str, str, float], ...] = (
    ("0 ms", "cold", "over_plain", ">=", 0.8),
    ("0 ms", "cold", "over_plain_with_opening", ">=", 0.8),
    ("0 ms", "cold", "over_kept", ">=", 0.8),
    ("0 ms", "cold", "bytes_a_byte", "<=", 1.05),
    ("0 ms", "cold", "over_mosaicml_cold", ">=", 1),
    ("0 ms", "cold", "over_litdata_cold", ">=", 1),
    ("0 ms", "warm", "over_mosaicml_warm", ">=", 1),
    ("0 ms", "warm", "over_litdata_warm", ">=", 1),
    ("0 ms", "warm", "over_staged", ">=", 0.9),
    ("0 ms", "small", f"over_none{UPPER}", ">=", 1),
    ("0 ms", "small, steady", f"over_none_steady{UPPER}", ">=", 1),
    ("1.2 GB/s", "cold", "over_plain", ">=", 0.8),
    ("1.2 GB/s", "cold", "over_plain_with_opening", ">=", 0.8),
    ("1.2 GB/s", "cold", "over_kept", ">=", 0.8),
    ("1.2 GB/s", "cold", "over_mosaicml_cold", ">=", 1),
    ("1.2 GB/s", "cold", "over_litdata_cold", ">=", 1),
    ("20 ms", "cold", "first_s", "<=", 1),
    ("20 ms", "small", "first_s", "<=", 1),
    ("20 ms", "none", "first_s", "<=", 1),
    ("20 ms", "cold", "over_plain", ">=", 0.8),
    ("20 ms", "small", f"over_none{UPPER}", ">=", 1),
    ("20 ms", "small, steady", f"over_none_steady{UPPER}", ">=", 1),
    ("20 ms", "small, steady", "over_rows", ">=", 0.8),
    ("20 ms", "none, steady", "over_rows", ">=", 0.8),
    ("20 ms", "cold", "over_mosaicml_cold", ">=", 1),
    ("20 ms", "cold", "over_litdata_cold", ">=", 1),
    ("20 ms", "warm", "over_mosaicml_warm", ">=", 1),
    ("20 ms", "warm", "over_litdata_warm", ">=", 1),
)


def promises(networks: Mapping[str, Json]) -> list[Json]:
    """What is promised of the medians, or of the upper ends of their intervals, and whether it holds."""
    made = []
    for network, way, key, sign, bound in BARS:
        found = networks.get(network, {}).get(way, {}).get(key.removesuffix(UPPER))
        if found is not None:
            end = "ratio_high" if key.endswith(UPPER) else "ratio"
            value = found[end] if isinstance(found, dict) else found
            made.append(promise(f"{network}, {way}, {key}", value, sign, bound))
    return made


def text(results: Json) -> str:
    """Returns a table for each network, and a line for each way that was not run."""
    parts: list[Table | str] = []
    figures = ("opening_s", "first_s", "requests_a_sample", "bytes_a_byte", "cpu_s_a_gb")
    for network, ways in results["networks"].items():
        shown = Table(
            "way", "MB/s", "over plain (95 %)", "with opening", "over kept", "opening, s", "first batch, s",
            "requests a sample", "bytes a byte", "CPU s a GB",
            title=f"{results['server']}, {network}: medians of {results['rounds']} rounds, "
            "and of ratios within them; rates without opening, later epochs' without their first batch",
        )  # fmt: skip
        for column in shown.columns[1:]:
            column.justify = "right"
        for name, each in ways.items():
            own = each["over_plain"]
            shown.add_row(
                name, f"{each['mb_per_s']:,.0f}",
                f"{own['ratio']:.2f} ({own['ratio_low']:.2f} to {own['ratio_high']:.2f})",
                f"{each['over_plain_with_opening']['ratio']:.2f}", f"{each['over_kept']['ratio']:.2f}",
                *(f"{each[key]:.2f}" for key in figures),
            )  # fmt: skip
        parts.append(shown)
    parts += [f"not run: {way}: {why}" for way, why in results["not_run"].items()]
    return render(*parts)
