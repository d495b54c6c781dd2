"""Errors of encoding; those of the columns themselves are in shards.errors."""

from __future__ import annotations


class EncodeError(Exception):
    """Base of the family; printed as one message, ends the run with `exit_code`."""

    exit_code = 2


class ModelNotUsable(EncodeError, ValueError):
    """An encoder's class, folder, weights or config cannot be used: the message says which and why."""


class NoGpu(EncodeError, RuntimeError):
    """`engine.device=cuda` where there is no GPU."""


class MissingTar(EncodeError, FileNotFoundError):
    """A tar of the source is not where the config says."""


class NotASource(EncodeError, ValueError):
    """Tars that cannot be one source: none at all, two of one name, a place that cannot be read."""


class NoSuchSuffix(EncodeError, ValueError):
    """A column reads members of a suffix that the samples of its source do not have."""


class FetchFailed(EncodeError, OSError):
    """A tar could not be downloaded; the shard is tried again."""


class HubError(EncodeError, OSError):
    """The hub cannot be reached, has no such data set, or does not give it to this user."""


class BadTar(EncodeError, ValueError):
    """A file that is no tar, or too large; its shard is reported as failed and the others go on."""


class TarChanged(BadTar, OSError):
    """A tar changes while it is read, or is not that of its index; the shard is tried again."""


class NoWorkers(EncodeError, RuntimeError):
    """Every worker died again and again without finishing anything."""

    exit_code = 4


class NoCluster(EncodeError, RuntimeError):
    """Ray cannot be started on this machine, or its cluster not be reached."""


class RemoteDecodeFailed(EncodeError, RuntimeError):
    """Another node did not send the pictures that were asked for; the shard is tried again, here."""


class Aborted(EncodeError, RuntimeError):
    """A shard was given up between two batches because the run was told to stop at once."""
