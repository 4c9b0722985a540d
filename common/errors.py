"""Errors that the user can correct: scripts print them as one line. Other errors are bugs and show a traceback."""

STOPPED = 75  # exit code (EX_TEMPFAIL) of a run that was stopped by a signal: saved, and continued by the same command


class UserError(ValueError):
    """An error of input or settings. The message names the wrong value, where it comes from and what to do."""


class DataError(UserError):
    """Data that are not what the arguments say. The message names the place, what was found and what to do."""


class FormatError(UserError):
    """Weights that cannot be read, are of an unknown format or do not fit. The message says which, and what to do."""


def listed(names):
    """Write names as "2 (a, b)": their number, and the first ten of them."""
    shown = ", ".join([str(name) for name in names][:10]) + (", ..." if len(names) > 10 else "")
    return f"{len(names)} ({shown})" if names else "0"
