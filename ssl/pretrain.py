"""The pretraining stage: its task, its hooks, and the order in which they are put together."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from jaxtyping import Float
from torch import Tensor, nn

from .augment import CenterCrop, Normalize, random_crop
from .config import PretrainConfig, steps_in
from .engine import Figures, Hooks, build_accelerator, train
from .export import ENCODER_FILE, export_hub, export_weights, run_facts
from .files import write_json
from .index import open_index
from .loader import Batch, Samples
from .log import RunLog
from .mae import MaskedAutoencoder, attach_decoder
from .masking import MaskSampler
from .optim import build_adamw, build_schedule, decay_groups
from .order import FileOrder, ShuffledOrder, labelled_subset
from .pictures import reconstruction_picture, save_png
from .released import encoder_spec, load_encoder, read_weights
from .runs import open_run, write_run_files

PICTURE_IMAGES = 16


class PretrainTask(nn.Module):
    """What the engine trains: normalization and the masked autoencoder."""

    def __init__(self, autoencoder: MaskedAutoencoder, normalize: Normalize) -> None:
        super().__init__()
        self.autoencoder = autoencoder
        self.normalize = normalize

    def forward(self, batch: Batch) -> tuple[Float[Tensor, ""], dict[str, Tensor]]:
        """Returns the training loss of a batch."""
        assert batch.masking is not None
        return self.autoencoder(self.normalize(batch.images), batch.masking).loss, {}


def pretrain(config: PretrainConfig) -> Figures:
    """Runs pretraining to its end and leaves weights, hub folder, picture and figures in the run folder."""
    accelerator = build_accelerator(config.precision)
    run_dir = open_run(config)
    with accelerator.local_main_process_first():  # the first process writes the index, the others read it
        index = open_index(config.data.train)
    weights = read_weights(config.init) if config.init is not None else None
    spec = encoder_spec(config.encoder, config.data, weights)
    torch.manual_seed(config.seed)
    encoder, report = load_encoder(spec, weights)
    autoencoder = attach_decoder(encoder, decoder=config.decoder, target=config.target, in_chans=config.data.in_chans)
    masks = MaskSampler(encoder.num_units, config.mask.ratio, config.mask.strategy)
    size = (encoder.grid[0] * encoder.unit_size, encoder.grid[1] * encoder.unit_size)
    ids = labelled_subset(index.label, config.data.samples_per_class, config.seed)
    samples = Samples(
        index, ShuffledOrder(ids, config.seed), random_crop(config.data, size), config.seed, config.data.in_chans, masks
    )
    total_steps = steps_in("the run", config.steps, config.epochs, samples=len(ids), batch_size=config.batch_size)
    schedule = build_schedule(config.optim, total_steps=total_steps, samples=len(ids), batch_size=config.batch_size)
    task = PretrainTask(autoencoder, Normalize(spec.mean, spec.std))
    optimizer = build_adamw(decay_groups(task, config.optim.weight_decay), config.optim)

    def export(progress: dict[str, Any]) -> None:
        facts = run_facts("pretraining", progress, config.seed) | {
            "mask_ratio": config.mask.ratio,
            "target": config.target,
        }
        export_weights(run_dir / ENCODER_FILE, encoder.timm, spec, facts)
        if progress["step"] == total_steps:
            title = f"{spec.name}, pretrained as a masked autoencoder"
            export_hub(run_dir / "hub", encoder.timm, spec, title=title, facts=facts | progress["figures"])

    hooks = Hooks(
        evaluate=Painter(config, autoencoder, task.normalize, accelerator, run_dir, size),
        evaluate_every_steps=config.picture_every_steps,
        export=export,
    )
    if accelerator.is_main_process:
        write_run_files(run_dir, config, processes=accelerator.num_processes, train_samples=len(ids))
        print(f"{report}\n{len(ids)} images, {total_steps} steps of {config.batch_size}", flush=True)
    figures = train(task, optimizer, samples, schedule, config, accelerator, hooks, run_dir)
    if accelerator.is_main_process:
        write_json(run_dir / "result.json", {"command": "pretrain", "finished": True, "steps": total_steps, **figures})
        print(f"done: {run_dir / ENCODER_FILE}", flush=True)
    return figures


class Painter:
    """Draws what the autoencoder makes of some fixed images under fixed masks: of data.val, else of data.train."""

    def __init__(
        self,
        config: PretrainConfig,
        autoencoder: MaskedAutoencoder,
        normalize: Normalize,
        accelerator: Accelerator,
        run_dir: Path,
        size: tuple[int, int],
    ) -> None:
        self.autoencoder, self.normalize, self.accelerator, self.run_dir = autoencoder, normalize, accelerator, run_dir
        self.batch: Batch | None = None
        self._read = lambda: _picture_batch(config, autoencoder, size)

    def __call__(self, step: int, log: RunLog) -> Figures:
        """Writes reconstructions.png and the same picture to TensorBoard, on the main process."""
        if self.accelerator.is_main_process:
            self.batch = self.batch or self._read()
            batch = self.batch.to(self.accelerator.device)
            self.autoencoder.eval()
            with torch.no_grad(), self.accelerator.autocast():
                images = self.normalize(batch.images)
                result = self.autoencoder(images, batch.masking)
            self.autoencoder.train()
            mean, std = self.normalize.mean, self.normalize.std
            picture = reconstruction_picture(self.autoencoder, images, result, mean=mean, std=std)
            save_png(self.run_dir / "reconstructions.png", picture)
            log.picture(step, "reconstructions (masked, predicted, original)", picture)
        return {}


def _picture_batch(config: PretrainConfig, autoencoder: MaskedAutoencoder, size: tuple[int, int]) -> Batch:
    index = open_index(config.data.val or config.data.train)
    masks = MaskSampler(autoencoder.encoder.num_units, config.mask.ratio, config.mask.strategy)
    crop = CenterCrop(size, config.data.crop_pct)
    picked = np.linspace(0, len(index) - 1, min(PICTURE_IMAGES, len(index))).astype(np.int64)  # spread over the shards
    samples = Samples(index, FileOrder(picked), crop, config.seed, config.data.in_chans, masks)
    return samples.__getitems__((0, len(picked)))
