"""Every tool of columns on a store, one after the other."""

from __future__ import annotations

from pathlib import Path

from shards.store.open import open_store
from shards.tools.convert import convert
from shards.tools.copy import copy, stage
from shards.tools.gc import collect
from shards.tools.info import information
from shards.tools.repair import repair
from shards.tools.verify import logical_digest, verify
from tests.shards.toy import ROWS, tokens_spec, write_column


def use_every_tool(root: str, folder: Path) -> None:
    """Copies, damages, repairs, collects, converts and stages a column below the url `root`, of which
    `folder` has the first and the last copy: what comes back is what was written.
    """
    near, far = write_column(folder / "near/toy/text", tokens_spec()), f"{root}/a/toy/text"
    copy(near, far)
    copy(near, far)  # all is there
    assert verify(far, processes=1) == []
    assert information(far)["rows"] == sum(ROWS)
    open_store(far).delete("tokens/c/2/0")
    repair(far, yes=True)
    garbage, _ = collect(far, yes=True, seconds=0, quarantine=True)
    assert garbage
    write_column(far, tokens_spec())  # type: ignore[arg-type]
    assert verify(far, processes=1) == []
    convert(far, f"{root}/b/toy/tar", backend="webdataset")
    copy(f"{root}/b/toy/tar", f"{root}/c/toy/tar")
    (staged,) = stage([f"{root}/c/toy/tar"], folder / "nvme")
    assert logical_digest(staged) == logical_digest(near)
    for column in ("a/toy/text", "b/toy/tar", "c/toy/tar"):
        assert open_store(f"{root}/{column}").stale_temporaries(0) == []
