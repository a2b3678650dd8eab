"""The fetchers of a run's remote shards: one for each set, started by one process a node, told what will be read."""

import os
from collections.abc import Iterable
from dataclasses import dataclass, field

from .fetcher import Fetcher
from .index import ShardIndex
from .remote import is_remote


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
        fetcher = Fetcher(index.cache, plan, limit_bytes=self.limit_bytes)
        fetcher.start()
        self.fetchers[id(index)] = fetcher

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
