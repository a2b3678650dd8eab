"""The images that a command is given: folders, files or shards, read in their order, without one standing in for
another."""

import atexit
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Literal

import numpy as np
from accelerate import Accelerator
from accelerate.utils import gather_object

from quarterlight.ssl.addresses import is_remote, shown
from quarterlight.ssl.augment import CenterCrop
from quarterlight.ssl.batches import BadSample, Samples
from quarterlight.ssl.config import DataConfig
from quarterlight.ssl.errors import InputError
from quarterlight.ssl.fetching import Fetching
from quarterlight.ssl.index import ShardIndex, open_index
from quarterlight.ssl.loose_files import open_files
from quarterlight.ssl.order import FileOrder
from quarterlight.ssl.processes import on_all
from quarterlight.ssl.stage import cache_folder

from .use_config import CropConfig


class InputSamples(Samples):
    """The images of an index, once, in file order. One that cannot be read is black, and its place is in `bad`."""

    def __init__(self, index: ShardIndex, crop: CenterCrop, in_chans: Literal[1, 3]) -> None:
        super().__init__(index, FileOrder(np.arange(len(index))), crop, 0, in_chans)

    def _candidates(self, sample: int, epoch: int) -> Iterator[int]:
        """Yields the sample alone: what it shows must be in its own row."""
        del epoch
        yield sample

    def _bad(self, sample: int, reason: str) -> BadSample:
        """Returns the number of the sample in place of its key, which others may have as well."""
        return super()._bad(sample, reason)._replace(key=str(sample))


def open_images(given: Sequence[str], data: CropConfig, accelerator: Accelerator) -> tuple[ShardIndex, Fetching]:
    """Returns the images and what fetches remote shards; all processes must call it.

    What damaged shards have lost is said. Raises InputError, on all processes, when there is nothing or not the same.
    """
    cache = cache_folder(DataConfig(train="", cache_dir=data.cache_dir))
    index = on_all(lambda: _open(given, cache), accelerator.local_main_process_first())
    prints = gather_object([f"{len(index)} images ({index.fingerprint()})"])
    if odd := next((i for i, x in enumerate(prints) if x != prints[0]), 0):
        raise InputError(
            f"process {odd} sees {prints[odd]} where process 0 sees {prints[0]}: all machines must have the same images"
        )
    fetching = Fetching(int(data.cache_gb * 1e9), accelerator.is_local_main_process)
    fetching.share([index])
    atexit.register(fetching.close)
    if accelerator.is_main_process and (lost := index.samples_lost()):
        print(f"about {lost} images are lost in damaged shards, and have no rows:", file=sys.stderr)
        print("\n".join(f"  {line}" for line in index.describe_defects()), file=sys.stderr, flush=True)
    return index, fetching


def _open(given: Sequence[str], cache: Path) -> ShardIndex:
    shards = [name for name in given if _names_shards(name)]
    if not shards:
        return open_files(given)
    if len(shards) < len(given):
        other = next(name for name in given if name not in shards)
        raise InputError(f"{shown(shards[0])} is a shard and {other} is none: give the one or the other kind")
    return open_index(shards, cache_dir=cache)


def _names_shards(name: str) -> bool:
    path = Path(name).expanduser()
    if path.exists():
        return path.is_file() and path.suffix == ".tar"
    return is_remote(name) or ".tar" in name or "info.json:" in name
