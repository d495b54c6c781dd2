"""What can go wrong while encoding, apart from the columns themselves."""


class EncodeError(Exception):
    """Base of the family; printed as one message, ends the run with `exit_code`."""

    exit_code = 2


class ModelNotUsable(EncodeError, ValueError):
    """An encoder's class, folder, weights or config cannot serve: the message says which and
    why.
    """


class MissingTar(EncodeError, FileNotFoundError):
    """A tar of the source is not where the config says."""


class BadTar(EncodeError, ValueError):
    """A file that is no tar, or one too large; its shard is reported as failed and the others go
    on.
    """


class NoWorkers(EncodeError, RuntimeError):
    """Every worker died again and again without finishing anything."""

    exit_code = 4
