"""The fetchers of a run's remote shards: one for each set, started by one process a node, told what will be read."""

import os
from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import groupby

from .errors import InputError
from .fetcher import Fetcher
from .index import ShardIndex
from .remote import is_remote
from .shard_cache import ShardCache


@dataclass
class Fetching:
    """Keeps a fetcher running for every index with remote shards; does nothing for the others, or if not `enabled`."""

    limit_bytes: int
    enabled: bool  # in one process of a node
    fetchers: dict[int, Fetcher] = field(default_factory=dict)  # by id of the index

    def follow(self, index: ShardIndex, plan: Iterable[tuple[int, int]] | None = None) -> None:
        """Fetches along `plan` from now on; None: shard after shard, as an evaluation reads them.

        Raises InputError when the cache's folder cannot be written or is too small for a shard.
        """
        if index.cache is None or not self.enabled:
            return
        if (before := self.fetchers.pop(id(index), None)) is not None:
            before.close()
        plan = list(enumerate(sorted(remote_shards(index)))) if plan is None else plan
        self._check_room(index.cache, plan)
        fetcher = Fetcher(index.cache, plan, limit_bytes=self.limit_bytes)
        fetcher.start()
        self.fetchers[id(index)] = fetcher

    def _check_room(self, cache: ShardCache, plan: Iterable[tuple[int, int]]) -> None:
        """Raises InputError when the shards of the plan's first position do not fit the cache together."""
        _, first = next(groupby(plan, key=lambda item: item[0]), (0, ()))
        used = [shard for _, shard in first]
        size = sum(cache.sizes[shard] for shard in used)
        if size > self.limit_bytes:
            raise InputError(
                f"data.cache_gb {self.limit_bytes / 1e9:g} is too little: one step reads {len(used)} shards of "
                f"{size / 1e9:.3g} GB; give several times that, or lower data.lanes or data.block_samples"
            )

    def advance(self, index: ShardIndex, position: int) -> None:
        """Says that the run has reached `position` of the plan."""
        if fetcher := self.fetchers.get(id(index)):
            fetcher.advance(position)

    def close(self) -> None:
        """Ends the fetchers."""
        for fetcher in self.fetchers.values():
            fetcher.close()
        self.fetchers.clear()


def remote_shards(index: ShardIndex) -> frozenset[int]:
    """Returns the numbers of the shards that have to be fetched."""
    return frozenset(i for i, path in enumerate(index.paths) if is_remote(path))


def places_of_node(per_rank: int, rank: int, local_rank: int) -> tuple[int, int]:
    """Returns which places of every batch this node reads, first and stop, ranks of a node being next to each other."""
    first = (rank - local_rank) * per_rank
    return first, first + int(os.environ.get("LOCAL_WORLD_SIZE", "1")) * per_rank
