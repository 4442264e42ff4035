"""A run, or several, as one HTML page that needs nothing else: no network, no other file."""

from fedpdm.reporting.page.html import render_report, write_report
from fedpdm.reporting.page.reading import RunFacts, read_run

__all__ = ["RunFacts", "read_run", "render_report", "write_report"]
