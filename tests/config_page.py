"""docs/config.md, from the models and the comments at their fields: `python -m tests.config_page` writes it."""

from __future__ import annotations

from pathlib import Path

from configs.keys import table
from encode.config import EncodeConfig
from train.config import TrainConfig

PAGE = Path(__file__).parents[1] / "docs/config.md"
TEXT = """# Every key

A config is a YAML file, and `a.b=value` behind it on the command line sets a key. Keys that are left out have the
default. `base: other.yaml` takes the values of another file, by its path from this one, and the keys beside it change
some of them. A shipped config is found from any folder by its name, `configs:train/flux-256`.

    python -m train config configs:train/flux-256             # every key of a config: its own, its base's, the defaults
    python -m train config --schema > train.schema.json       # for editors
    python -m encode config --schema > encode.schema.json

With `# yaml-language-server: $schema=train.schema.json` as its first line, an editor completes and checks a YAML.

This page is made of the models and of the comments at their fields: `python -m tests.config_page`.

## Training

`python -m train CONFIG`; see [training](training.md).

{train}

## Encoding

`python -m encode run CONFIG`; see [encoding](encoding.md).

{encode}
"""


def page() -> str:
    return TEXT.format(train=table(TrainConfig), encode=table(EncodeConfig))


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
