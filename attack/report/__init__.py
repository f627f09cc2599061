"""An attack's answer and its evaluation -> one HTML file that opens offline. Reads files; measures and decides
nothing."""

from attack.report.chapter import Chapter
from attack.report.page import write_report

__all__ = ["Chapter", "write_report"]
