"""Mistakes that the user can mend: collected, worded for a newcomer, reported once."""

from collections.abc import Sequence

EXIT_USER_ERROR = 2


class UserError(ValueError):
    """One or more mistakes in what the user gave us; the command line prints them and exits with 2.

    Each problem says what is wrong, where (file, key, row), and what to do.
    """

    def __init__(self, problems: str | Sequence[str]) -> None:
        self.problems: list[str] = [problems] if isinstance(problems, str) else list(problems)
        super().__init__("\n".join(self.problems))

    def __reduce__(self) -> tuple[type["UserError"], tuple[list[str]]]:
        return type(self), (self.problems,)


def raise_problems(problems: Sequence[str]) -> None:
    """Raise one `UserError` with every problem, or return when there is none."""
    if problems:
        raise UserError(problems)
