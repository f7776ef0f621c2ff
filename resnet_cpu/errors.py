"""Define the errors that a user can meet, one class per exit code.

Each message is one line: what happened, where, and the remedy. The codes follow BSD's sysexits if one fits, so that
batch scripts can decide what to submit again: 75 always, 74 and 76 with a cap, the others never.
"""


def printable(text: str) -> str:
    """Return `text` on one line, with control characters escaped, as file names and variables may hold them."""
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


class UserError(Exception):
    """An error that is reported in one line, without a traceback; the process ends with its `exit_code`."""

    exit_code = 70

    def __init__(self, message: str, collective: bool = False) -> None:
        """Set the message; `collective`: all ranks raise this error, so they can synchronise before they exit."""
        super().__init__(message)
        self.collective = collective


class FlagError(UserError):
    """A flag, a phase or a combination of them is wrong."""

    exit_code = 64


class DataError(UserError):
    """The data set is missing, too small, damaged or does not fit the model."""

    exit_code = 65


class CheckpointError(UserError):
    """There is no usable checkpoint, or it belongs to another model or recipe."""

    exit_code = 66


class RunFolderError(UserError):
    """The run folder cannot be written or a live job uses it."""

    exit_code = 73


class OutputError(UserError):
    """Writing failed half-way: I/O error or disk full."""

    exit_code = 74


class StopRequested(UserError):
    """Stopped cleanly on request, with a checkpoint written: submit again."""

    exit_code = 75


class PeerLost(UserError):
    """A peer was lost, or no step was finished for too long."""

    exit_code = 76


class NotFinite(UserError):
    """The loss, or a weight, is not a finite number."""

    exit_code = 77


BY_CODE = {
    error.exit_code: error
    for error in (
        UserError,
        FlagError,
        DataError,
        CheckpointError,
        RunFolderError,
        OutputError,
        StopRequested,
        PeerLost,
        NotFinite,
    )
}
