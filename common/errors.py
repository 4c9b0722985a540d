"""Errors that the user can mend: a script prints them as one line. Anything else is ours and shows its traceback."""


STOPPED = 75  # exit code after a signal (EX_TEMPFAIL): a run is saved, the same command goes on


class UserError(ValueError):
    """Names the value, the place and the remedy."""
