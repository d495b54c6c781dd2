"""The normalisation of latents that a VAE's config states, z = (latent - shift) * scale.

A config has latents_mean and latents_std, a number a channel, or shift_factor and scaling_factor, or
scaling_factor alone, where diffusers' pipelines take no shift. With the first two the reference leaves
scaling_factor out, and diffusers' pipelines multiply by it. Nothing is guessed: training with another
model's numbers looks well and is wrong.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from shards import Norm

from ..errors import ModelNotUsable

log = logging.getLogger(__name__)

SHIFTS = ("latents_mean", "shift_factor")  # may be zero or negative
Numbers = tuple[float, ...]


@dataclass(frozen=True, slots=True)
class ConfigNorm:
    """Shift and scale of a VAE's config, None where it has none. `factor` is a scaling factor beside a
    mean and a deviation. `defaults` is the same with the numbers that diffusers' class fills in, which
    are those of the first model of its kind. `unshifted`: scaling_factor is all that there is, and
    neither config nor class has a shift. `source`: which fields these are, or what else says them.
    """

    shift: Numbers | None
    scale: Numbers | None
    path: str
    factor: float = 1.0
    defaults: ConfigNorm | None = None
    unshifted: bool = False
    source: str = ""

    def own(self) -> Norm:
        """Returns the norm as the reference has it, of shift 0 for a scale that is `unshifted`;
        ModelNotUsable where a part is missing.
        """
        if self.unshifted and self.scale is not None:
            return self._norm((0.0,), self.scale)
        if self.shift is None or self.scale is None:
            raise self._missing()
        if self.factor != 1:
            log.warning(
                "%s: its config has latents_mean, latents_std and scaling_factor %g. The column is "
                "normalised by mean and deviation, as the reference does; diffusers' own pipelines "
                "multiply by scaling_factor too. To have theirs, write norm: %s",
                self.path, self.factor, as_yaml(self.shift, self._multiplied(self.scale)),
            )  # fmt: skip
        return self._norm(self.shift, self.scale)

    def agreed(self, norm: Norm) -> Norm:
        """Returns a column's own norm; ModelNotUsable if it contradicts the config in any number that
        this has, whatever else it leaves out.
        """
        if self.shift is not None and not equal(norm.shift, self.shift):
            raise self._contradiction("shift", norm, self.shift)
        if self.scale is None:
            return norm
        for scale in (self.scale, self._multiplied(self.scale)):
            if equal(norm.scale, scale):
                return norm if self.shift is None else self._norm(self.shift, scale)
        raise self._contradiction("scale", norm, self.scale)

    def published(self, scale: float, source: str) -> ConfigNorm:
        """Returns the norm of a registered model, a scale without a shift; ModelNotUsable if the config has
        another.
        """
        published = (("shift", self.shift, (0.0,)), ("scale", self.scale, (scale,)))
        for name, values, expected in published:
            if values is not None and not equal(values, expected):
                raise ModelNotUsable(
                    f"{self.path}: its config ({self.source}) normalises by {name} {list(values)}, the registry "
                    f"by {list(expected)} ({source}): these are not the files that were published. Take those, "
                    "or name a folder of these by class and path, whose own numbers count"
                )
        return ConfigNorm((0.0,), (scale,), self.path, source=f"registry: {source}")

    def _multiplied(self, scale: Numbers) -> Numbers:
        """Returns the scale of diffusers' pipelines."""
        return tuple(self.factor * value for value in scale)

    def _norm(self, shift: Numbers, scale: Numbers) -> Norm:
        try:
            return Norm(shift, scale)
        except ValueError as error:
            raise ModelNotUsable(f"{self.path}: its config makes a {error}. Correct it") from None

    def _contradiction(self, name: str, norm: Norm, values: Numbers) -> ModelNotUsable:
        advice = "Leave norm out of the column"
        if None in (self.shift, self.scale):
            advice = f"Say norm: {as_yaml(self.shift or norm.shift, self.scale or norm.scale)}"
        return ModelNotUsable(
            f"{self.path}: its config normalises by {name} {list(values)}, the column says "
            f"{list(getattr(norm, name))}. {advice}"
        )

    def _missing(self) -> ModelNotUsable:
        names = [name for name in ("shift", "scale") if getattr(self, name) is None]
        defaults = self.defaults or self
        guess = as_yaml(defaults.shift or (0.0,), defaults.scale or (1.0,))
        return ModelNotUsable(
            f"{self.path}: its config says no {' and no '.join(names)} of latents (neither "
            "latents_mean and latents_std nor shift_factor and scaling_factor; what the class would "
            "fill in is another model's). Training needs a normalisation: look it up where the model "
            f"was published and say it in the column, as norm: {guess} (a shift of 0 is a number too), "
            "or in its config.json"
        )


def config_norm(
    config: Mapping[str, Any], path: str, filled: Mapping[str, Any] | None = None
) -> ConfigNorm:
    """Returns the norm of a VAE's config: latents_mean and latents_std if one of them is set (the other
    is then missing, not replaced), else shift_factor and scaling_factor. `filled` is the config with
    the numbers that its class fills in. ModelNotUsable for what is no number.
    """
    mean, std = _numbers(config, "latents_mean", path), _numbers(config, "latents_std", path)
    shift, factor = _numbers(config, "shift_factor", path), _numbers(config, "scaling_factor", path)
    defaults = config_norm(filled, path) if filled is not None else None
    if mean is None and std is None:
        unshifted = defaults is not None and shift is defaults.shift is None
        source = _fields(shift_factor=shift, scaling_factor=factor)
        return ConfigNorm(
            shift, factor, path, defaults=defaults, unshifted=unshifted, source=source
        )
    # diffusers also multiplies by a factor that its class fills in
    multiplier = factor[0] if factor else defaults.factor if defaults else 1.0
    scale = None if std is None else tuple(1.0 / value for value in std)
    source = _fields(latents_mean=mean, latents_std=std)
    return ConfigNorm(mean, scale, path, multiplier, defaults, source=source)


def _fields(**values: Numbers | None) -> str:
    """Returns in words which of these a config has."""
    names = " and ".join(name for name, value in values.items() if value is not None)
    return f"{names} of the model's config" if names else ""


def _numbers(config: Mapping[str, Any], name: str, path: str) -> Numbers | None:
    """Returns a number or a list of them, however nested; None where the config has none."""
    if config.get(name) is None:
        return None
    try:
        values = tuple(np.array(config[name], np.float64).reshape(-1).tolist())
        valid = bool(np.isfinite(values).all()) and (name in SHIFTS or min(values) > 0)
    except (ValueError, TypeError):
        valid = False
    if not valid:
        raise ModelNotUsable(
            f"{path}: its config says {name}: {str(config[name])[:80]}, expected a finite number"
            f"{'' if name in SHIFTS else ' above 0'}, or one for each channel. Correct it"
        )
    return values


def equal(a: Numbers, b: Numbers) -> bool:
    """Returns whether two are equal for each channel but for rounding; one number is of all."""
    fits = len(a) == len(b) or 1 in (len(a), len(b))
    return fits and bool(np.allclose(a, b, rtol=1e-5, atol=0))


def as_yaml(shift: Numbers, scale: Numbers) -> str:
    """Returns a norm as a column's config has it."""
    return f"{{shift: {list(shift)}, scale: {list(scale)}}}"
