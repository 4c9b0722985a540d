"""Errors that the user can fix: scripts print them as one line. Any other error is a bug and shows its traceback."""


STOPPED = 75  # exit code (EX_TEMPFAIL) of a run that a signal stopped: it is saved, the same command continues it


class UserError(ValueError):
    """An error of input or settings. The message names the wrong value, where it comes from and the remedy."""


class DataError(UserError):
    """The data are not what the arguments say. The message names the place, what was found and the remedy."""


class FormatError(UserError):
    """Weights that cannot be read, are not understood or do not fit: says which, and what to do."""


def listed(names):
    """`2 (a, b)`: how many, and the first ten by name."""
    shown = ", ".join([str(name) for name in names][:10]) + (", ..." if len(names) > 10 else "")
    return f"{len(names)} ({shown})" if names else "0"
