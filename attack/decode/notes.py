"""What a person should know beside the figures: each thing once, with how often, and not endlessly many."""

from __future__ import annotations

MAX_NOTES = 200
"""A hostile capture can be wrong in a million ways; nobody reads more than this."""


class Notes:
    """Collects lines; the same line again only counts."""

    def __init__(self) -> None:
        self._lines: dict[str, int] = {}
        self._left_out = 0

    def add(self, line: str) -> None:
        """Notes a line."""
        if line in self._lines:
            self._lines[line] += 1
        elif len(self._lines) < MAX_NOTES:
            self._lines[line] = 1
        else:
            self._left_out += 1

    def lines(self) -> list[str]:
        """All of them, in the order in which they first came."""
        lines = [f"{line} ({count} times)" if count > 1 else line for line, count in self._lines.items()]
        return [*lines, f"and {self._left_out} more notes"] if self._left_out else lines

    def within(self, where: str) -> Notes:
        """These notes, where each line that is added begins with where it belongs; itself where that is empty."""
        return _Within(self, where) if where else self


class _Within(Notes):
    """Adds to other notes."""

    def __init__(self, notes: Notes, where: str) -> None:
        super().__init__()
        self._notes, self._where = notes, where

    def add(self, line: str) -> None:
        self._notes.add(f"{self._where}: {line}")

    def lines(self) -> list[str]:
        return self._notes.lines()
