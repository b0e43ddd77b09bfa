"""The one exception that means "the user can fix this", and the words that its messages share.

Tools turn a `UserError` into one line on standard error and exit status 2. Every other exception is a defect
of this project and keeps its traceback. The file stands below all packages, so that each of them may import it.
"""

import difflib
from collections.abc import Iterable


class UserError(ValueError):
    """Something that the user gave is wrong; the message says what, the value, what is allowed and what to do."""

    status = 2  # exit status of a tool that ends with it


class RunError(UserError):
    """The machine failed under a run, not what the user gave; the message says what happened and what to do."""

    status = 1


def nearest(name: str, choices: Iterable[str]) -> str:
    """Return `"; did you mean 'X'?"` for the closest of `choices`, or an empty string when none is close."""
    by_lower = {choice.lower(): choice for choice in choices}
    close = difflib.get_close_matches(str(name).lower(), by_lower, n=1, cutoff=0.6)
    return f"; did you mean '{by_lower[close[0]]}'?" if close else ""


def pick(table: dict, name: str, what: str):
    """Return `table[name]`; an unknown name raises `UserError` that lists the choices and the nearest one."""
    if name in table:
        return table[name]
    raise UserError(f"{what}: {name!r} is not one of {', '.join(map(str, table))}{nearest(name, table)}")
