"""What our HTML pages have in common: templates and embedded pictures."""

import base64
import io
from pathlib import Path
from typing import Any

import jinja2
from PIL import Image

EVAL = Path(__file__).parents[1]


def environment() -> jinja2.Environment:
    """Templates below eval/. Escapes everything it prints, fails on a name that is not there."""
    made = jinja2.Environment(
        loader=jinja2.FileSystemLoader(EVAL), autoescape=True, undefined=jinja2.StrictUndefined,
        trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    made.filters["interval"] = interval
    made.filters["megabytes"] = lambda n: f"{n / 1e6:.1f} MB"
    return made


def interval(value: Any, digits: int = 3) -> str:
    """{value, low, high} -> "0.512 [0.488, 0.536]"."""
    low, high = f"{value['low']:.{digits}f}", f"{value['high']:.{digits}f}"
    return f"{value['value']:.{digits}f} [{low}, {high}]"


def embed(image: Image.Image, kind: str = "PNG", **options: Any) -> str:
    """A picture as a data URI."""
    data = io.BytesIO()
    image.save(data, kind, **options)
    return f"data:image/{kind.lower()};base64," + base64.b64encode(data.getvalue()).decode()
