"""The pictures of a run folder, small enough to be part of a page: PNG files, and what training gave to TensorBoard."""

import base64
import io
import logging
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from .run_folder import Run, is_run, read_json

ENDINGS = (".png", ".jpg", ".jpeg", ".webp")
NOT_SHOWN = ("state", "hub", "features")  # folders that hold no pictures
DEPTH = 3  # of folders in a run folder that are looked into
MOST_PICTURES = 60  # of one run
AS_IT_IS_KB = 200  # a file that is no larger, and not too wide, is taken byte by byte
STEP = re.compile(r"step[-_]?(\d+)")


@dataclass(frozen=True)
class Picture:
    """A picture as a page holds it."""

    title: str
    caption: str
    source: str  # data: address
    size: tuple[int, int]  # width and height in pixels


@dataclass(frozen=True)
class Pictures:
    """What there is to see of a run."""

    series: list[tuple[str, list[Picture]]]  # the same thing at several steps, by what it is
    single: list[Picture]
    left_out: int  # more than a page should hold
    problems: list[str]


def pictures_of(run: Run, *, series_pictures: int, width: int) -> Pictures:
    """Returns the pictures in a run folder and the folders in it that are no runs themselves.

    Files whose name has a step are a series, of which `series_pictures` are taken, the first and the newest among them;
    where there is none, the pictures in TensorBoard's files are. None is wider than `width` pixels. Titles and captions
    are those that a result.json beside the files has in its list `pictures`.
    """
    problems: list[str] = []
    by_step: dict[str, list[tuple[int, Path]]] = {}
    single: list[tuple[Path, str, str]] = []
    for folder in _folders(run.folder):
        told = _told(read_json(folder / "result.json", []))
        for path in sorted(x for x in folder.iterdir() if x.suffix.lower() in ENDINGS and x.is_file()):
            if (found := STEP.search(path.stem)) and path.name not in told:
                what = str((path.parent / STEP.sub("", path.stem).strip("-_ ")).relative_to(run.folder))
                by_step.setdefault("pictures" if what == "." else what, []).append((int(found[1]), path))
            else:
                title, caption = told.get(path.name, ("", ""))
                single.append((path, title or str(path.relative_to(run.folder)), caption))
    series = []
    for what, files in by_step.items():
        chosen = _spread(sorted(files), series_pictures)
        pictures = [_from_file(path, f"step {step:,}", "", width, problems) for step, path in chosen]
        series.append((what, [picture for picture in pictures if picture]))
    if not series:
        series = _from_tensorboard(run.folder, series_pictures, width, problems)
    shown = [_from_file(*told, width, problems) for told in single[:MOST_PICTURES]]
    return Pictures(
        [(what, pictures) for what, pictures in series if pictures],
        [picture for picture in shown if picture],
        max(0, len(single) - MOST_PICTURES),
        problems,
    )


def files_of(run: Run, ending: str) -> list[Path]:
    """Returns the files with this ending in a run folder and the folders in it, by name."""
    return [path for folder in _folders(run.folder) for path in sorted(folder.glob(f"*{ending}")) if path.is_file()]


def _folders(folder: Path) -> Iterator[Path]:
    """Yields a run folder and those below it, links to others left out."""
    for root, below, _ in os.walk(folder):
        here = Path(root)
        if here != folder and (here / "config.yaml").is_file() and is_run(here):  # another run
            below.clear()
            continue
        yield here
        deep = len(here.relative_to(folder).parts) >= DEPTH
        below[:] = [] if deep else sorted(name for name in below if name not in NOT_SHOWN and not name.startswith("."))


def _told(result: dict[str, Any]) -> dict[str, tuple[str, str]]:
    """Returns title and caption by file name, as a command that draws leaves them in its result.json."""
    listed = result.get("pictures")
    entries = [x for x in listed if isinstance(x, dict)] if isinstance(listed, list) else []
    return {str(x.get("file")): (str(x.get("title", "")), str(x.get("caption", ""))) for x in entries}


def _spread(items: list[Any], count: int) -> list[Any]:
    """Returns at most `count` of the items, evenly, the last one always."""
    if len(items) <= count:
        return items
    if count == 1:
        return items[-1:]
    return [items[i] for i in np.linspace(0, len(items) - 1, count).round().astype(int)]


def _from_file(path: Path, title: str, caption: str, width: int, problems: list[str]) -> Picture | None:
    try:
        return _picture(path.read_bytes(), title, caption, width)
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        problems.append(f"{path.name} is no readable picture ({' '.join(str(error).split())[:200]}).")
        return None


def _picture(content: bytes, title: str, caption: str, width: int) -> Picture:
    """Returns a picture no wider than `width`. Raises what PIL raises for what is none, or one cut short."""
    with Image.open(io.BytesIO(content)) as image:
        image.load()
        kind = Image.MIME.get(image.format or "", "")
        if image.width <= width and len(content) <= 1000 * AS_IT_IS_KB and kind:
            return Picture(title, caption, _address(content, kind), image.size)
        small = image.convert("RGBA" if image.has_transparency_data else "RGB")
    if small.width > width:
        small = small.resize((width, max(1, round(small.height * width / small.width))), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    small.save(buffer, format="WEBP", quality=88)
    return Picture(title, caption, _address(buffer.getvalue(), "image/webp"), small.size)


def _address(content: bytes, kind: str) -> str:
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"


def _from_tensorboard(folder: Path, count: int, width: int, problems: list[str]) -> list[tuple[str, list[Picture]]]:
    """Returns the pictures of every tag in TensorBoard's files; of steps that were done again, the new ones."""
    if not any(folder.glob("events.out.tfevents.*")):
        return []
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    logging.getLogger("tensorboard").setLevel(logging.ERROR)  # it warns of every restart of a run
    keep = {"images": 0, "scalars": 1, "histograms": 1, "tensors": 1, "compressedHistograms": 1, "audio": 1}  # 0: all
    series = []
    try:
        events = EventAccumulator(str(folder), size_guidance=keep).Reload()
        for tag in events.Tags()["images"]:
            chosen = _spread(sorted(events.Images(tag), key=lambda event: event.step), count)
            pictures = [_picture(x.encoded_image_string, f"step {x.step:,}", "", width) for x in chosen]
            series.append((tag, pictures))
    except Exception as error:  # a damaged file raises many kinds
        problems.append(f"pictures in TensorBoard's files cannot be read ({' '.join(str(error).split())[:200]}).")
    return series
