"""Accuracy of a classifier against the share of patches dropped and against shuffled tiles: curves, table, picture.

After Naseer et al. 2021 (arXiv:2105.10497). What is dropped or shuffled is a function of seed and position, batches are
the same for any number of processes, and every image is counted once.
"""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object

from quarterlight.ssl.attention import choose_attention
from quarterlight.ssl.augment import Normalize
from quarterlight.ssl.batches import BadSample, refuse_bad, refuse_unlabelled
from quarterlight.ssl.encoders import wrap
from quarterlight.ssl.errors import InputError
from quarterlight.ssl.export import ModelSpec
from quarterlight.ssl.files import write_text
from quarterlight.ssl.index import ShardIndex, refuse_damage
from quarterlight.ssl.loader import build_loader
from quarterlight.ssl.processes import build_accelerator, on_all
from quarterlight.ssl.runs import open_run, write_result, write_run_files
from quarterlight.ssl.shard_names import sources
from quarterlight.ssl.spans import ChunkSpans, chunks_of

from .damage import LEFT_OUT, Condition, Damage
from .heads import load_classifier
from .inputs import InputSamples, open_images
from .network import crop_of, in_chans, open_weights
from .robustness_picture import draw_robustness
from .tables import csv_text
from .use_config import RobustnessConfig


def robustness(config: RobustnessConfig) -> dict[str, Any]:
    """Measures the curves and leaves robustness.csv, robustness.png and result.json in the run folder.

    Returns what result.json holds: top1, that of whole images in percent, and `curves`, the rows of the table.
    Raises InputError.
    """
    accelerator = build_accelerator(config.precision)
    run_dir = Path(config.run_dir)
    on_all(lambda: open_run(config) if accelerator.is_main_process else None)
    damage, spec, said = on_all(lambda: _open(config, accelerator))
    index, fetching = open_images(sources(config.data.val), config.data, accelerator)
    on_all(lambda: _check(index, damage.classifier.num_classes))
    if accelerator.is_main_process:
        write_run_files(run_dir, config, processes=accelerator.num_processes)
        print(f"{said}\n{len(index)} images under {len(damage.conditions)} conditions", flush=True)
    samples = InputSamples(index, crop_of(damage.classifier, config.init, config.data), in_chans(spec))
    numbers = range(-(-len(index) // config.batch_size))
    rank, world_size = accelerator.process_index, accelerator.num_processes
    chunks = chunks_of(numbers, config.batch_size, len(index))
    spans = ChunkSpans(chunks, batch_size=config.batch_size, rank=rank, world_size=world_size)
    loader = build_loader(samples, spans, num_workers=config.num_workers, fetching=fetching)
    correct = count_correct(damage, Normalize(spec.mean, spec.std), zip(spans, loader, strict=True), index, accelerator)
    rows = [
        _row(damage, condition, int(n), len(index)) for condition, n in zip(damage.conditions, correct, strict=True)
    ]
    result = {"top1": rows[0]["top1"], "images": len(index), "patch": damage.patch, "curves": rows}
    if accelerator.is_main_process:
        _leave(run_dir, result, spec.name)
    accelerator.end_training()
    return result


def _open(config: RobustnessConfig, accelerator: Accelerator) -> tuple[Damage, ModelSpec, str]:
    weights, encoder_spec = open_weights(config.init, config.encoder, config.data)
    classifier, spec, said = load_classifier(encoder_spec, weights)
    choose_attention(classifier, accelerator.device, config.precision)  # before saliency asks for another kernel
    damage = Damage(config, classifier, wrap(classifier, spec.name), spec)
    return damage.to(accelerator.device), spec, said


def _check(index: ShardIndex, num_classes: int) -> None:
    refuse_damage(index)
    refuse_unlabelled(index.label, "data.val", index.label_defects())
    if (largest := int(index.label.max())) >= num_classes:
        raise InputError(
            f"data.val has labels up to {largest}, and the classifier has {num_classes} classes: give shards of the "
            "classes that it was trained on"
        )


@torch.inference_mode()
def count_correct(
    damage: Damage, normalize: Normalize, batches: Any, index: ShardIndex, accelerator: Accelerator
) -> list[int]:
    """Returns, by condition, how many images are classified right, over all processes; nothing waits for the device.

    `batches` gives ((start, stop), Batch). Raises InputError, on every process, when an image cannot be read.
    """
    device = accelerator.device
    normalize.to(device)
    correct = torch.zeros(len(damage.conditions), dtype=torch.int64, device=device)
    bad: list[BadSample] = []
    for (start, stop), batch in batches:
        bad += [x._replace(key=index.key(int(x.key))) for x in batch.bad]
        labels, positions = batch.labels.to(device, non_blocking=True), np.arange(start, stop)
        with accelerator.autocast():
            images = normalize(batch.images.to(device, non_blocking=True))
            ranks = damage.ranks(images, positions)
            for i, condition in enumerate(damage.conditions):
                logits = damage.logits(condition, images, positions, ranks)
                correct[i] += (logits.argmax(dim=1) == labels).sum()
    refuse_bad(gather_object(bad))
    total: Any = accelerator.reduce(correct, reduction="sum")
    return total.tolist()


def _row(damage: Damage, condition: Condition, correct: int, images: int) -> dict[str, Any]:
    share = condition.dropped / damage.num_patches
    return {
        "kind": condition.kind,
        "how": condition.how,
        "dropped_share": round(share, 6),
        "dropped_patches": condition.dropped,
        "patches": damage.num_patches,
        "tiles": condition.tiles,
        "images": images,
        "top1": 100 * correct / images,
    }


def _leave(run_dir: Path, result: dict[str, Any], name: str) -> None:
    rows = result["curves"]
    table = [list(rows[0]), *([row[name] for name in rows[0]] for row in rows)]
    write_text(run_dir / "robustness.csv", csv_text(table))
    draw_robustness(run_dir / "robustness.png", rows, f"{name}, {result['images']:,} images", result["patch"])
    write_result(run_dir, "evaluate", finished=True, **result)
    print("\n".join(_lines(rows)))
    print(f"done: top-1 {result['top1']:.2f} % of whole images, {run_dir / 'robustness.png'}", flush=True)


def _lines(rows: list[dict[str, Any]]) -> list[str]:
    """Returns a line for each kind of damage, with the accuracies of its curve."""
    found: dict[str, list[str]] = {}
    for row in rows[1:]:
        of = f"{row['tiles']} x {row['tiles']}" if row["kind"] == "shuffle" else f"{100 * row['dropped_share']:.0f} %"
        what = "left out" if row["how"] == LEFT_OUT else ""
        found.setdefault(f"{row['kind'].replace('_', '-')} {what}".strip(), []).append(f"{of} {row['top1']:.1f}")
    return [f"  {name:22}{'  '.join(values)}" for name, values in found.items()]
