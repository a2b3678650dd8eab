"""What the loop trains, and what a stage adds to the loop."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import nn

from .fetching import Fetching
from .log import RunLog
from .sharding import Whole
from .signals import StopSignals

Figures = dict[str, float]


class Task(nn.Module):
    """What the loop trains: `task(batch)` returns its loss and a dictionary of other scalars, means over the batch.

    The loss is `forward` and not a method of its own because DDP works through `forward`.
    """

    @property
    def network(self) -> nn.Module:
        """The part that torch.compile gets; the rest handles keys and random choices."""
        return self


@dataclass(frozen=True)
class Hooks:
    """What a stage adds to the loop."""

    command: str  # for result.json
    evaluate: Callable[
        [int, RunLog, StopSignals], Figures
    ]  # all processes: figures after `step` steps. May raise Stopped
    evaluate_every_steps: int  # 0: at the end only
    export: Callable[[dict[str, Any]], None]  # main process, with the progress: writes the released weights
    whole: Whole[Any]  # of the task: what `evaluate` and `export` use
    fetching: Fetching | None = None  # of remote shards; None: there are none
