"""The fetchers of a run's remote shards: one for each set, started by one process a node, told what will be read."""

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import groupby

from .addresses import is_remote
from .errors import InputError
from .fetcher import Fetcher
from .index import ShardIndex
from .shard_cache import ShardCache


@dataclass
class Fetching:
    """Keeps a fetcher running for every index with remote shards; does nothing for the others, or if not `enabled`."""

    limit_bytes: int
    enabled: bool  # in one process of a node
    fetchers: dict[int, Fetcher] = field(default_factory=dict)  # by id of the index
    limits: dict[int, int] = field(default_factory=dict)  # bytes, by id of the index

    def follow(self, index: ShardIndex, plan: Iterable[tuple[int, int]] = ()) -> None:
        """Fetches along `plan` (number of a batch, shard) from now on; without one, only what is asked for.

        Raises InputError when the cache's folder cannot be written or is too small for a shard, or for one batch.
        """
        if index.cache is None or not self.enabled:
            return
        if (before := self.fetchers.pop(id(index), None)) is not None:
            before.close()
        limit = self.limits.get(id(index), self.limit_bytes)
        _check_room(index.cache, plan, limit)
        fetcher = Fetcher(index.cache, plan, limit_bytes=limit)
        fetcher.start()
        self.fetchers[id(index)] = fetcher

    def share(self, indexes: Sequence[ShardIndex]) -> None:
        """Divides the limit among several sets: the later ones get their own size, at most half."""
        left, remote = self.limit_bytes, [index for index in indexes if index.cache is not None]
        for index in reversed(remote[1:]):
            size = sum(index.cache.sizes[shard] for shard in remote_shards(index)) if index.cache is not None else 0
            self.limits[id(index)] = min(size, left // 2)
            left -= self.limits[id(index)]
        self.limits |= {id(index): left for index in remote[:1]}

    def advance(self, index: ShardIndex, number: int) -> None:
        """Says that batch `number` of the plan is being read."""
        if fetcher := self.fetchers.get(id(index)):
            fetcher.advance(number)

    def close(self) -> None:
        """Ends the fetchers."""
        for fetcher in self.fetchers.values():
            fetcher.close()
        self.fetchers.clear()


def _check_room(cache: ShardCache, plan: Iterable[tuple[int, int]], limit_bytes: int) -> None:
    """Raises InputError when the shards of the plan's first batch do not fit the cache together."""
    _, first = next(groupby(plan, key=lambda item: item[0]), (0, ()))
    used = [shard for _, shard in first]
    size = sum(cache.sizes[shard] for shard in used)
    if size > limit_bytes:
        raise InputError(
            f"data.cache_gb is too little: {limit_bytes / 1e9:.3g} GB of it are for these shards, and one batch reads "
            f"{len(used)} of them, {size / 1e9:.3g} GB; give several times that, or lower data.lanes or "
            "data.block_samples"
        )


def remote_shards(index: ShardIndex) -> frozenset[int]:
    """Returns the numbers of the shards that have to be fetched."""
    return frozenset(i for i, path in enumerate(index.paths) if is_remote(path))


def ranks_of_machine(rank: int) -> range:
    """Returns the ranks of the processes that share this one's machine; they are next to each other."""
    first = rank - int(os.environ.get("LOCAL_RANK", "0"))
    return range(first, first + int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
