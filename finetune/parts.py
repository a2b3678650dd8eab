"""Results of many images, block by block: each block is written whole, so that a killed command goes on behind it."""

import json
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from jaxtyping import UInt8
from safetensors import SafetensorError, safe_open
from torch import Tensor

from quarterlight.ssl.errors import InputError
from quarterlight.ssl.fetching import Fetching
from quarterlight.ssl.files import remove_leftovers, replace_file, write_json, write_tensors
from quarterlight.ssl.loader import build_loader
from quarterlight.ssl.processes import from_main, on_all, until_stopped
from quarterlight.ssl.signals import StopSignals
from quarterlight.ssl.spans import ChunkSpans, chunks_of

from .inputs import InputSamples

FACTS_FILE = "command.json"
SAID_EVERY_S = 10.0

Compute = Callable[[UInt8[Tensor, "B H W C"]], dict[str, Tensor]]  # first dimension B, on the device


class Part(NamedTuple):
    """The results of images start, ..., start + rows - 1."""

    start: int
    tensors: dict[str, Tensor]
    unreadable: dict[int, str]  # why, by number of the image; what the tensors hold there means nothing


@dataclass(frozen=True)
class Parts:
    """The folder OUT.parts beside a file that is being made: a .safetensors for each block that is done."""

    out: Path
    num_images: int
    block: int  # images in one
    facts: dict[str, Any] = field(default_factory=dict)  # on which the results depend

    @property
    def folder(self) -> Path:
        """Where they lie."""
        return self.out.with_name(f"{self.out.name}.parts")

    def __len__(self) -> int:
        return -(-self.num_images // self.block)

    def file(self, number: int) -> Path:
        """Returns the path of a block's file."""
        return self.folder / f"{number:08d}.safetensors"

    def open(self) -> list[int]:
        """Returns the blocks that are still to be done; only the main process calls it.

        Raises InputError when the folder holds the parts of another command.
        """
        mine = json.loads(json.dumps(self.facts | {"images": self.num_images, "part_images": self.block}))
        try:
            before = json.loads((self.folder / FACTS_FILE).read_text())
        except (OSError, ValueError):  # there are none, or a kill came first
            before = mine
            write_json(self.folder / FACTS_FILE, mine)
        if changed := [key for key in mine.keys() | before.keys() if mine.get(key) != before.get(key)]:
            key = min(changed, key=[*mine, *before].index)
            raise InputError(
                f"{self.folder} holds unfinished results of another command ({key} was {before.get(key)}, is "
                f"{mine.get(key)}): give the same options to finish them, or delete the folder"
            )
        remove_leftovers(self.folder)
        remove_leftovers(self.out.parent, self.out.name)
        return [number for number in range(len(self)) if not self.file(number).is_file()]

    def write(self, part: Part) -> None:
        """Writes a block whole."""
        notes = {"unreadable": json.dumps(part.unreadable)}
        tensors = {name: x.contiguous() for name, x in part.tensors.items()}
        replace_file(self.file(part.start // self.block), lambda partial: write_tensors(partial, tensors, notes))

    def __iter__(self) -> Iterator[Part]:
        """Yields all blocks in order. Raises InputError when one is not there, or damaged."""
        for number in range(len(self)):
            with self._opened(number) as file:
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  # no dictionary
                yield Part(number * self.block, tensors, _unreadable_in(file))

    def unreadable(self) -> dict[int, str]:
        """Returns why each image that could not be read could not, by its number. Raises InputError."""
        found: dict[int, str] = {}
        for number in range(len(self)):
            with self._opened(number) as file:
                found |= _unreadable_in(file)
        return found

    def width(self, name: str) -> int:
        """Returns the numbers a row of a tensor. Raises InputError."""
        with self._opened(0) as file:
            return int(file.get_slice(name).get_shape()[1])

    @contextmanager
    def _opened(self, number: int) -> Iterator[Any]:
        try:
            with safe_open(self.file(number), framework="pt") as file:
                yield file
        except (SafetensorError, OSError, KeyError, ValueError) as error:
            raise InputError(
                f"{self.file(number)} cannot be read ({error}): all machines must share this folder; if it is damaged, "
                "delete it and start the same command again"
            ) from error

    def join(self, write: Callable[["Parts", Path], None]) -> dict[int, str]:
        """Has `write(parts, partial)` write the whole file, and deletes the parts.

        Returns why each image that could not be read, by its number. Raises InputError when none could.
        """
        unreadable = self.unreadable()
        if len(unreadable) == self.num_images:
            shutil.rmtree(self.folder)  # nothing in it is worth keeping, and mended images are other ones
            raise InputError(f"none of {self.num_images} images could be read (the first: {unreadable[0]})")
        replace_file(self.out, lambda partial: write(self, partial))
        shutil.rmtree(self.folder)
        return unreadable


def _unreadable_in(file: Any) -> dict[int, str]:
    return {int(row): reason for row, reason in json.loads(file.metadata()["unreadable"]).items()}


@torch.inference_mode()
def compute_parts(
    parts: Parts,
    samples: InputSamples,
    compute: Compute,
    accelerator: Accelerator,
    *,
    batch_size: int,
    num_workers: int,
    fetching: Fetching,
    signals: StopSignals,
) -> None:
    """Computes what is missing, shared among the processes; all of them must call it.

    Results stay on the device until their block is complete. Raises InputError for parts of another command and
    for what float16 does not hold, and Stopped on all processes when one got a signal.
    """
    left = from_main(on_all(lambda: parts.open() if accelerator.is_main_process else []))
    rank, world_size = accelerator.process_index, accelerator.num_processes
    chunks = chunks_of(left, parts.block, parts.num_images)
    spans = ChunkSpans(chunks, batch_size=batch_size, rank=rank, world_size=world_size)
    if accelerator.is_main_process and len(left) < len(parts):
        print(f"{len(parts) - len(left)} of {len(parts)} parts were there already ({parts.folder})", flush=True)
    collected: list[dict[str, Tensor]] = []
    unreadable: dict[int, str] = {}
    started_s = said_s = time.monotonic()
    done = 0
    loader = build_loader(samples, spans, num_workers=num_workers, fetching=fetching)
    too_large: list[str] = []
    batches = until_stopped(loader, signals, accelerator, failed=lambda: bool(too_large))
    # Batches come first: a process with fewer of them answers the others until all are done. And there are fewer than
    # spans when a process failed.
    for batch, (_, stop) in zip(batches, spans, strict=False):
        with accelerator.autocast():
            collected.append(compute(batch.images.to(accelerator.device, non_blocking=True)))
        unreadable |= {int(bad.key): bad.reason for bad in batch.bad}
        done += len(batch.images)
        if stop == parts.num_images or stop % parts.block == 0:
            tensors = {name: torch.cat([x[name] for x in collected]).cpu() for name in collected[0]}
            part = Part((stop - 1) // parts.block * parts.block, tensors, unreadable)
            collected, unreadable = [], {}
            if too_large := beyond_float16(part):
                continue
            parts.write(part)
        if accelerator.is_main_process and (now_s := time.monotonic()) - said_s > SAID_EVERY_S:
            said_s = now_s
            speed = done * world_size / (now_s - started_s)
            print(f"{done * world_size:,} of {len(left) * parts.block:,} images  {speed:.0f} images/s", flush=True)
    if names := gather_object(too_large):  # also waits until all parts are written
        raise InputError(f"dtype float16: {names[0]} goes beyond its range (65504): use float32")


def beyond_float16(part: Part) -> list[str]:
    """Returns the names of float16 tensors that hold something not finite of an image that could be read."""
    found = []
    for name, x in part.tensors.items():
        if x.dtype == torch.float16:
            finite = torch.isfinite(x).all(dim=1)
            finite[[image - part.start for image in part.unreadable]] = True
            found += [] if finite.all() else [name]
    return found
