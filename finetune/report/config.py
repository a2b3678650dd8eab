"""The settings of launch/report.py. Only the standard library is imported, for a quick `--help`."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class ReportConfig:
    """One HTML page about one run or several."""

    out: str = "report.html"
    """File to write, ending in .html; one that is there is replaced."""
    title: str | None = None
    """Heading of the page. null: the names of the runs."""
    series_pictures: int = 12
    """Pictures shown of those that were made during training, evenly over the run."""
    picture_width: int = 1200
    """Pixels; wider pictures are made smaller, so that the page stays one that can be sent."""
