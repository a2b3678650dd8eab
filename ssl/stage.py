"""What every stage opens before it starts, refusing early what is wrong: processes, run folder, shards, weights."""

import atexit
import os
import socket
import time
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from accelerate import Accelerator
from accelerate.utils import gather_object
from jaxtyping import Int

from .addresses import shown
from .augment import CenterCrop, RandomCrop
from .batches import Samples
from .config import DataConfig, RunConfig
from .errors import InputError
from .export import ModelSpec
from .fetching import Fetching
from .incidents import BAD_SAMPLES_ALLOWED, BAD_SAMPLES_FILE
from .index import ShardIndex, open_index, refuse_damage
from .log import append_jsonl
from .masking import MaskSampler
from .order import Order, build_order
from .processes import build_accelerator, from_main, on_all
from .runs import open_run
from .shard_names import sources
from .small_images import SmallImages, find_small_images
from .spec import encoder_spec
from .weights import Weights, read_weights

SEEN_WITHIN_S = 10.0  # what the main process has written in the run folder, by all others


@dataclass(frozen=True)
class Opened:
    """The surroundings of a stage."""

    accelerator: Accelerator
    run_dir: Path
    config: RunConfig
    train: ShardIndex
    val: ShardIndex | None  # None: data.val is not given
    weights: Weights | None  # None: initial ones
    spec: ModelSpec  # of the encoder
    fetching: Fetching
    small: dict[int, SmallImages | None]  # by id of the index

    def training_order(self, ids: Int[np.ndarray, " n"], batch_size: int, *, balanced: bool = False) -> Order:
        """Returns the order in which these samples of `train` are trained on, or all classes equally often.

        Raises InputError.
        """
        data, train = self.config.data, self.train
        return build_order(
            data,
            ids,
            shards=train.shard[ids],
            sources=train.source[ids],
            num_sources=len(sources(data.train)),
            seed=self.config.seed,
            batch_size=batch_size,
            remote=train.cache is not None,
            balanced=train.label[ids] if balanced else None,
        )

    def samples(
        self, index: ShardIndex, order: Order, transform: RandomCrop | CenterCrop, masks: MaskSampler | None = None
    ) -> Samples:
        """Returns what reads and crops the samples of `index` in this order."""
        small = self.small.get(id(index))
        return Samples(index, order, transform, self.config.seed, self.config.data.in_chans, masks, small)


def open_stage(
    config: RunConfig,
    init: str | None,
    *,
    untrained: bool = False,
    with_decoder: bool = False,
    weights: Weights | None = None,
) -> Opened:
    """Returns the surroundings that `config` names; `untrained` takes only the architecture from `init`.

    `with_decoder` takes the decoder of a run in `init`, too. `weights` are those in `init` where they have been read.

    Raises InputError for whatever cannot be used.
    """
    accelerator = build_accelerator(config.precision)
    run_dir = _open_shared_run(config, accelerator)
    data = config.data
    # before the shards, which may take long; on all machines alike, or those that have the file would wait
    weights, spec = on_all(lambda: _weights_and_spec(config, init, with_decoder, weights))
    if data.train_weights is not None and len(data.train_weights) != (count := len(sources(data.train))):
        raise InputError(
            f"data.train_weights has {len(data.train_weights)} numbers for {count} sources in data.train: give one each"
        )
    with accelerator.local_main_process_first():  # the first process writes the index, the others read it
        train = open_index(data.train, cache_dir=cache_folder(data))
        val = open_index(data.val, cache_dir=cache_folder(data)) if data.val is not None else None
        indexes = [index for index in (train, val) if index is not None]
        small = {id(index): find_small_images(index, data.in_chans, cache_folder(data)) for index in indexes}
    _check_damage(train, data.max_bad_share)
    if val is not None:
        refuse_damage(val)
    fetching = Fetching(int(data.cache_gb * 1e9), accelerator.is_local_main_process)
    fetching.share(indexes)
    atexit.register(fetching.close)
    for index in indexes:  # for now, what is asked for; each pass of a loader says what it reads
        fetching.follow(index)
    if accelerator.is_main_process:
        _report_defects(train, run_dir)
    return Opened(accelerator, run_dir, config, train, val, None if untrained else weights, spec, fetching, small)


def _open_shared_run(config: RunConfig, accelerator: Accelerator) -> Path:
    """Opens the run folder, by the main process, and makes sure that all processes see it. Raises InputError."""
    run_dir, mark, mistake = Path(config.run_dir), f".seen-{os.urandom(8).hex()}.partial", None
    if accelerator.is_main_process:
        try:
            open_run(config)
            (run_dir / mark).touch()
        except InputError as error:  # the others wait for an answer
            mistake = str(error)
    mark, mistake = from_main((mark, mistake))
    if mistake is not None:
        raise InputError(mistake)
    deadline = time.monotonic() + SEEN_WITHIN_S
    while not (seen := (run_dir / mark).exists()) and time.monotonic() < deadline:
        time.sleep(0.5)
    blind = [] if seen else [f"process {accelerator.process_index} ({socket.gethostname()})"]
    blind = gather_object(blind)
    if accelerator.is_main_process:
        (run_dir / mark).unlink()
    if blind:
        raise InputError(
            f"run_dir {run_dir}: {blind[0]} does not see what process 0 writes there: give a folder that all machines "
            "share, under the same path"
        )
    return run_dir


def _weights_and_spec(
    config: RunConfig, init: str | None, with_decoder: bool, weights: Weights | None
) -> tuple[Weights | None, ModelSpec]:
    if weights is None and init not in (None, "none"):
        weights = read_weights(init, with_decoder=with_decoder)
    if weights is not None:
        weights = replace(weights, allow_partial=config.allow_partial)
    return weights, encoder_spec(config.encoder, config.data, weights)


def cache_folder(data: DataConfig) -> Path:
    """Returns the folder for what is kept of remote shards, and for decoded images beside shards that are read-only."""
    if data.cache_dir is not None:
        return Path(data.cache_dir).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "quarterlight" / "shards"


def _check_damage(index: ShardIndex, max_bad_share: float) -> None:
    """Raises InputError when more of the tars is lost than samples may be unreadable."""
    lost = index.samples_lost()
    if lost > max(BAD_SAMPLES_ALLOWED, max_bad_share * (len(index) + lost)):
        raise InputError(
            f"about {lost} of {len(index) + lost} samples are lost in damaged shards (data.max_bad_share is "
            f"{max_bad_share}): fetch or write them again, raise data.max_bad_share, or leave out what is lost with "
            f"launch/shards.py repair; {'; '.join(index.describe_defects())}"
        )


def _report_defects(index: ShardIndex, run_dir: Path) -> None:
    """Says what is wrong with the shards, and lists it in bad_samples.jsonl, once a run."""
    if not index.defects:
        return
    lost = index.samples_lost()
    head = f"lost in damaged shards, about {lost} samples in all:" if lost > 1 else "noticed in the shards:"
    print("\n  ".join([head, *index.describe_defects()]), flush=True)
    if not (run_dir / BAD_SAMPLES_FILE).exists():
        records = [{"step": -1, **d._asdict(), "shard": shown(d.shard)} for d in index.defects]
        append_jsonl(run_dir / BAD_SAMPLES_FILE, records)
