"""What every stage opens before it starts, refusing early what is wrong: processes, run folder, shards, weights."""

from dataclasses import dataclass
from pathlib import Path

from accelerate import Accelerator

from .config import RunConfig
from .engine import build_accelerator
from .export import ModelSpec
from .index import ShardIndex, open_index
from .released import Weights, encoder_spec, read_weights
from .runs import open_run


@dataclass(frozen=True)
class Opened:
    """The surroundings of a stage."""

    accelerator: Accelerator
    run_dir: Path
    train: ShardIndex
    val: ShardIndex | None  # None: data.val is not given
    weights: Weights | None  # None: initial ones
    spec: ModelSpec  # of the encoder


def open_stage(config: RunConfig, init: str | None, *, untrained: bool = False) -> Opened:
    """Returns the surroundings that `config` names; `untrained` takes only the architecture from `init`.

    Raises InputError for whatever cannot be used.
    """
    accelerator = build_accelerator(config.precision)
    run_dir = open_run(config)
    with accelerator.local_main_process_first():  # the first process writes the index, the others read it
        train = open_index(config.data.train)
        val = open_index(config.data.val) if config.data.val is not None else None
    weights = read_weights(init) if init is not None else None
    spec = encoder_spec(config.encoder, config.data, weights)
    return Opened(accelerator, run_dir, train, val, None if untrained else weights, spec)
