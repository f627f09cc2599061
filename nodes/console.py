"""Where people read: progress and logs on standard error, so that standard output stays for the result."""

from __future__ import annotations

from rich.console import Console

console = Console(stderr=True, highlight=False, soft_wrap=True)
