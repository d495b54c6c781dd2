"""What a user can get wrong about columns. Each message says what was found, what was expected and
what to do.
"""


class ShardsError(Exception):
    """Base of the family; entry points print it as one message and leave with `exit_code`."""

    exit_code = 2


class NotAColumn(ShardsError, FileNotFoundError):
    """The path holds no column (or no source) of ours."""


class FormatVersion(ShardsError, ValueError):
    """A record of another format, or of a newer version of it."""


class IdentityMismatch(ShardsError, ValueError):
    """What stands was made by another encoder, preprocessing or source than what is asked for."""


class SourceMismatch(ShardsError, ValueError):
    """Columns of different sources, or of different readings of one source, cannot be joined."""


class SourceChanged(ShardsError, ValueError):
    """A tar no longer holds what the index recorded when it was first read."""


class IncompleteColumn(ShardsError, ValueError):
    """The column has no COMPLETE record: encoding has not finished."""


class CorruptColumn(ShardsError, ValueError):
    """An object or record of a column is damaged; the message names column, object, shard and
    rows.
    """


class OrderError(ShardsError, ValueError):
    """Position, batch, lanes and world size that do not fit together."""
