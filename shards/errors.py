"""What a user can get wrong about columns. Each message says what was found, what was expected and
what to do.
"""

from __future__ import annotations


class ShardsError(Exception):
    """Base of the family; entry points print it as one message and leave with `exit_code`."""

    exit_code = 2


class NotAColumn(ShardsError, FileNotFoundError):
    """The path holds no column (or no source) of ours."""


class FormatVersion(ShardsError, ValueError):
    """A record of another format, or of a newer version of it. It is no damage: whoever gets this
    error leaves the record, and what it speaks of, as they are.
    """

    sound = True  # whether its digest fits: else a flipped bit may have made it look so
    newer = False  # whether it is of the format, and of a higher version


class Unreadable(ShardsError, OSError):
    """A pipe, a device or a folder in the place of a file, or a file larger than any of its kind."""


class IdentityMismatch(ShardsError, ValueError):
    """A column or source was made by another encoder, preprocessing or source than the one expected."""


class SourceMismatch(ShardsError, ValueError):
    """Columns of different sources, or of different readings of one source, cannot be joined."""


class SourceChanged(ShardsError, ValueError):
    """A tar no longer holds what the index recorded when it was first read."""


class BadRows(ShardsError, ValueError):
    """Rows that are not ok in every column, where the user has asked for none; or no word that says
    what is to become of them.
    """


class BadMask(ShardsError, ValueError):
    """A file that is no mask of rows, or keys of which no mask can be made."""


class BadStatistics(ShardsError, ValueError):
    """A column of which no norm can be measured, or a measured norm that it does not have."""


class IncompleteColumn(ShardsError, ValueError):
    """The column has no COMPLETE record: encoding has not finished."""


class NotARecord(ShardsError, ValueError):
    """What was to be written down is nothing that a reader takes."""


class CorruptColumn(ShardsError, ValueError):
    """An object or record of a column is damaged; the message names column, object, shard and
    rows.
    """


class ObjectsMissing(CorruptColumn):
    """Objects that commits name are missing or of another size: a column copied in part."""


class StoreError(ShardsError, OSError):
    """An object store refuses, cannot be reached, or cannot do what is needed; or its local cache
    cannot be used.
    """


class OrderError(ShardsError, ValueError):
    """Position, batch, lanes and world size that do not fit together."""


class LeaseHeld(ShardsError, RuntimeError):
    """Another command works on the column, or took the lease away while this one did."""

    exit_code = 5


class NoRoom(ShardsError, OSError):
    """The disk has less room than what is to be written."""


class BadRanks(ShardsError, ValueError):
    """RANK, WORLD_SIZE and the like in the environment that are missing in part or make no sense."""


class WorkerDied(ShardsError, RuntimeError):
    """A process that read for a stream, or worked for a command, has ended before its time."""


class ConversionFailed(ShardsError, ValueError):
    """What was written does not have the digest of what was read."""
