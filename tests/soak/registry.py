"""Every sweep there is. A stage adds its own by a line here."""

from __future__ import annotations

from tests.encode import faults, interrupts
from tests.eval import faults as generating
from tests.eval.study import kills
from tests.proxy import sweep as stores
from tests.shards import hostile, properties, sweeps
from tests.soak import kernels, panel, seeds
from tests.soak.drawn import properties as drawn
from tests.soak.sweep import Sweep
from tests.train import faults as training
from tests.train import saves

SWEEPS: dict[str, Sweep] = {
    sweep.name: sweep
    for sweep in [
        *sweeps.SWEEPS,
        *hostile.SWEEPS,
        stores.SWEEP,
        faults.SWEEP,
        interrupts.SWEEP,
        saves.SWEEP,
        training.SWEEP,
        generating.SWEEP,
        kernels.SWEEP,
        seeds.SWEEP,
        *kills.SWEEPS,
        panel.SWEEP,
        drawn("order", properties.PROPERTIES, seeds=60),
    ]
}
