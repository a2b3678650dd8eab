"""The settings of launch/playground.py. Only the standard library is imported, for a quick `--help`."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class PlaygroundConfig:
    """A page on this machine to try a masked autoencoder by hand."""

    init: str
    """Folder of a pretraining run, which keeps its decoder."""
    images: str | list[str] | None = None
    """Images to choose from: folders, image files, digits, or local shards. null: the run's own, where they are still
    there."""
    num_images: int = 16
    """Images to choose from, evenly spaced over them."""
    host: str = "127.0.0.1"
    """Address to answer at; 0.0.0.0 lets other machines in, which may then send images to this process."""
    port: int | None = None
    """Port to answer at. null: the first free one from 7860."""
    open_browser: bool = False
    """Open the page in the default browser."""
