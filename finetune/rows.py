"""A network applied to images, and a file with a row for each: what predict and embed share."""

import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from accelerate import Accelerator
from jaxtyping import Float
from torch import Tensor, nn

from quarterlight.ssl.addresses import shown
from quarterlight.ssl.attention import choose_attention
from quarterlight.ssl.augment import CenterCrop, Normalize
from quarterlight.ssl.entries import UNLABELLED
from quarterlight.ssl.export import ModelSpec
from quarterlight.ssl.index import ShardIndex
from quarterlight.ssl.loose_files import LooseFiles
from quarterlight.ssl.processes import from_main, on_all
from quarterlight.ssl.signals import StopSignals

from .inputs import InputSamples, open_images
from .network import hash_of, in_chans
from .parts import Parts, compute_parts
from .stopping import stoppable
from .use_config import OutConfig

Compute = Callable[[Float[Tensor, "B C H W"]], dict[str, Tensor]]  # from normalized images, a row for each
Write = Callable[[ShardIndex, Parts, Path], None]  # of the whole file, to a path

LEAST_IN_A_PART, PARTS = 256, 64  # images, and how many parts there are if that allows it


class Network(NamedTuple):
    """What is applied, and to what."""

    model: nn.Module
    spec: ModelSpec
    crop: CenterCrop
    said: str  # on the weights that were loaded

    def facts(self) -> dict[str, Any]:
        """Returns what its results depend on."""
        crop = {"img_size": list(self.crop.size), "crop_pct": self.crop.crop_pct}
        return {"weights": hash_of(self.model.state_dict()), **crop, "mean": self.spec.mean, "std": self.spec.std}


def write_rows(
    images: Sequence[str],
    config: OutConfig,
    out: Path,
    accelerator: Accelerator,
    network: Network,
    options: dict[str, Any],
    compute: Compute,
    write: Write,
) -> int:
    """Computes a row for each image and writes the file `out`; returns the exit status. All processes must call it.

    `options` are those that change the rows. Status 1 says that an image could not be read and `strict` asks for it.
    Raises InputError when there is nothing to read or to write, or parts of another command are in the way.
    """
    index, fetching = open_images(images, config.data, accelerator)
    if accelerator.is_main_process:
        print(f"{network.said}\n{len(index):,} images, crop_pct {network.crop.crop_pct:g}", flush=True)
    facts = {**options, **network.facts(), "inputs": index.fingerprint(), "precision": config.precision}
    parts = Parts(out, len(index), images_in_a_part(len(index), config.part_images), facts)
    normalize = Normalize(network.spec.mean, network.spec.std).to(accelerator.device)
    network.model.eval().to(accelerator.device)
    choose_attention(network.model, accelerator.device, config.precision)
    samples = InputSamples(index, network.crop, in_chans(network.spec))
    loading = {"batch_size": config.batch_size, "num_workers": config.num_workers}

    def leave(signals: StopSignals) -> None:
        print(f"stopped by {signals.received or 'a signal'}: {parts.folder} keeps what is done, ", end="")
        print("the same command goes on", flush=True)

    with stoppable(accelerator, leave) as signals:
        given = {**loading, "fetching": fetching, "signals": signals}
        compute_parts(parts, samples, lambda x: compute(normalize(x)), accelerator, **given)

    def join() -> dict[int, str]:
        return parts.join(lambda done, partial: write(index, done, partial)) if accelerator.is_main_process else {}

    unreadable = from_main(on_all(join))
    if accelerator.is_main_process:
        _report(unreadable, index)
        print(f"done: {out}", flush=True)
    accelerator.end_training()
    return 1 if unreadable and config.strict else 0


def images_in_a_part(images: int, most: int) -> int:
    """Returns a 64th of the images, so that many processes have work, but at least 256 (or `most`) and at most `most`.

    It depends on nothing else, so any number of processes goes on with the same parts.
    """
    return min(most, max(LEAST_IN_A_PART, -(-images // PARTS)))


def _report(unreadable: dict[int, str], index: ShardIndex) -> None:
    if unreadable:
        first = min(unreadable)
        print(
            f"{len(unreadable)} of {len(index)} images could not be read: their rows are empty, and the file says why "
            f"(the first: {location(index, first)}, {index.key(first)}: {unreadable[first]})",
            file=sys.stderr,
            flush=True,
        )


def location(index: ShardIndex, sample: int) -> str:
    """Returns where an image lies: the path of its file, or of the shard (or its address) that holds its key."""
    return str(index.path(sample)) if isinstance(index, LooseFiles) else shown(index.paths[int(index.shard[sample])])


def row_names(index: ShardIndex, sample: int) -> dict[str, Any]:
    """Returns the first columns of a row: where the image lies, and its label if it has one."""
    label = int(index.label[sample])
    return {
        "path": location(index, sample),
        "key": index.key(sample),
        "label": None if label == UNLABELLED else label,
    }


ROW_NAMES = {"path": "text", "key": "text", "label": "int"}
