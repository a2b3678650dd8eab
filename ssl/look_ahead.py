"""The plan of a run's shards from the run's position on, as far as it is worth knowing; a plan may have no end."""

from collections import Counter, deque
from collections.abc import Iterable, Sequence

LONGEST = 100_000  # entries
AT_ONCE = 2000  # entries: some 50 ms
CACHES_AHEAD = 4  # so many times what the cache holds: to delete the right shard takes more foresight than to fetch


class LookAhead:
    """The next uses of shards in a plan of (position, shard), positions never falling.

    A shard is in use from its position until the run has reached the next greater position in the plan.
    """

    def __init__(self, plan: Iterable[tuple[int, int]], sizes: Sequence[int], limit_bytes: int) -> None:
        self.position = float("-inf")  # of the run
        self.turn = float("-inf")  # the position from which on `next_uses` may be another
        self._plan = iter(plan)
        self._sizes = sizes
        self._limit_bytes = limit_bytes
        self._entries: deque[tuple[int, int]] = deque()
        self._uses: Counter[int] = Counter()  # of each shard, in `_entries`
        self._total_bytes = 0  # of these shards, each once

    def next_uses(self) -> dict[int, int]:
        """Returns the shards that are in use or will be, soonest first, with their place in this order.

        It knows of those that `extend` has come to.
        """
        reached = None
        for position, _ in self._entries:
            if position > self.position:
                break
            reached = position
        self._drop_before(reached)
        self.turn = next((position for position, _ in self._entries if position > self.position), float("inf"))
        return {shard: place for place, shard in enumerate(dict.fromkeys(shard for _, shard in self._entries))}

    def extend(self) -> bool:
        """Reads on in the plan, a bounded part of it; returns whether all that is worth knowing is known."""
        for _ in range(AT_ONCE):
            if not self._is_short() or (entry := next(self._plan, None)) is None:
                return True
            position, shard = int(entry[0]), int(entry[1])
            self._total_bytes += 0 if shard in self._uses else self._sizes[shard]
            self._uses[shard] += 1
            self._entries.append((position, shard))
            if position <= self.position:
                self._drop_before(position)
        return False

    def _is_short(self) -> bool:
        return (
            self._total_bytes <= CACHES_AHEAD * self._limit_bytes
            and len(self._entries) < LONGEST
            and len(self._uses) < len(self._sizes)  # once all are there, later uses change nothing
        )

    def _drop_before(self, position: int | None) -> None:
        while position is not None and self._entries[0][0] < position:
            _, shard = self._entries.popleft()
            self._uses[shard] -= 1
            if not self._uses[shard]:
                del self._uses[shard]
                self._total_bytes -= self._sizes[shard]
