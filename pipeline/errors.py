"""What is said to a user who made a mistake: one line, what is wrong, where, and how to mend it."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from difflib import get_close_matches


class UserError(ValueError):
    """A mistake that the user can mend. The command line prints it as one line and exits with 2.

    `parameter` is the dotted name of the one in params.yaml that is to blame, where the message does not say.
    """

    def __init__(self, message: str, *, parameter: str = "") -> None:
        super().__init__(message)
        self.parameter = parameter


class ValueAtError(ValueError):
    """A wrong value inside a parameter: `at` names the keys below it, so that the file's right line can be shown."""

    def __init__(self, message: str, *at: str) -> None:
        super().__init__(message)
        self.at = at


@contextmanager
def blaming(parameter: str) -> Iterator[None]:
    """Mistakes that come to light in the block are those of a parameter in params.yaml."""
    try:
        yield
    except UserError as error:
        raise UserError(str(error), parameter=error.parameter or parameter) from None


def nearest(word: str, choices: Iterable[str]) -> str:
    """The known names closest to a misspelt one, as the end of an error's line (empty when none is near)."""
    known = sorted(set(choices))
    close = get_close_matches(word, known, n=3, cutoff=0.6)
    if close:
        return f"; did you mean {' or '.join(close)}?"
    return f"; known: {', '.join(known)}" if len(known) <= 20 else ""
