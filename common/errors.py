"""Errors that the user can mend: a script prints them as one line. Anything else is ours and shows its traceback."""


class UserError(ValueError):
    """Names the value, the place and the remedy."""
