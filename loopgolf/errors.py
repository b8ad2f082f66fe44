"""What ends a run before its time: one line for whoever reads it, and an exit code for whatever started it.

0 good    1 crash or non-finite loss    2 bad input    3 does not fit    4 corrupt artifact, or a rule violated
"""


class Stop(Exception):
    """Ends the run with one line that names what is wrong and how to fix it."""

    exit_code = 2


class ConfigError(Stop):
    """A setting that cannot work."""


class DataError(Stop):
    """Data that cannot be used: the file, what is wrong with it and how to fix it."""


class TokenError(DataError):
    """A token that is not in the vocabulary."""


class DoesNotFit(Stop):
    """The model cannot be stored within the byte limit."""

    exit_code = 3


class ArtifactError(Stop):
    """An artifact that cannot be used."""

    exit_code = 4


class NonFiniteLoss(Stop):
    """Stops a run on all ranks, after a checkpoint is saved."""

    exit_code = 1


class Interrupted(Stop):
    """SIGTERM or Ctrl-C, after a checkpoint is saved."""

    exit_code = 1
