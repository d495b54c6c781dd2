"""What a user can get wrong in evaluation: found, expected, and what to do."""

from __future__ import annotations


class EvalError(Exception):
    """Base of the family; entry points print it as one message and leave with `exit_code`."""

    exit_code = 2


class BadPrompts(EvalError, ValueError):
    """A prompt file that is empty, unreadable or has ids that cannot name files."""


class OtherImages(EvalError, ValueError):
    """The folder holds images of other settings, or files that are none of ours."""


class EncoderMismatch(EvalError, ValueError):
    """A VAE or text encoder that is not the one the columns were made with."""


class MissingWeights(EvalError, FileNotFoundError):
    """A scorer's weights are not on this machine."""


class TooFewImages(EvalError, ValueError):
    """A folder with too few pictures to score."""


class MissingPictures(EvalError, FileNotFoundError):
    """The tars with the original pictures are absent, or not those of the column."""


class MissingImages(EvalError, FileNotFoundError):
    """A set of pictures that is not finished, or has lost some: nothing is scored."""


class BadScores(EvalError, ValueError):
    """A file of scores that is damaged or none of ours."""


class NotFetched(EvalError, OSError):
    """Prompts that could not be downloaded, or whose digest is another than expected."""


class BadReport(EvalError, ValueError):
    """Folders that cannot share a report, or a page that cannot be written to its path."""


class Watched(EvalError, RuntimeError):
    """Another process watches this run, or its scores are of other settings."""


class BadQuestions(EvalError, ValueError):
    """A benchmark's questions or skills that are absent, damaged, or of other prompts."""


class BadTextCache(EvalError, ValueError):
    """A file of encoded prompts that is damaged."""


class BadRequest(EvalError, ValueError):
    """Settings that the model, the VAE or the layout of the pictures cannot serve."""


class BadPicture(EvalError, ValueError):
    """A file that should be a picture and cannot be read as one."""


class NotFinite(EvalError, ValueError):
    """A model that answered with NaN or infinity: nothing follows from it."""


class BadReference(EvalError, ValueError):
    """Reference statistics that are damaged, or of another network or crop than the set's."""


class BadStudy(EvalError, ValueError):
    """A study whose entries, columns or folders do not go together; nothing was started."""


class StudyChanged(EvalError, ValueError):
    """Runs or sets of a study's folder that are not what its YAML says now."""


class OutputEdited(EvalError, ValueError):
    """A file that a command of a study made, and that somebody changed since."""


class StudyRunning(EvalError, RuntimeError):
    """A `study run` works in the folder."""


class WorkerDiffers(EvalError, ValueError):
    """A worker of another version of the project, or of another YAML, works in the study's folder."""


class StudyHalted(EvalError, RuntimeError):
    """What ended a study after some of its commands had begun, such as a full disk; what was made is kept."""

    exit_code = 3


class ClaimLost(EvalError, RuntimeError):
    """Another worker of a study has taken over what this one did, which can write nothing any more."""

    exit_code = 5


class NotPaired(EvalError, ValueError):
    """Two trainings of a study that differ in more than its YAML says."""


class NotMeasured(EvalError, RuntimeError):
    """A training that was to be timed, and failed."""


class NoSpace(EvalError, OSError):
    """A disk with less room than a study needs."""
