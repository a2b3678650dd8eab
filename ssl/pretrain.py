"""The pretraining stage: its task, its hooks, and the order in which they are put together."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from jaxtyping import Float
from torch import Tensor

from .augment import CenterCrop, Normalize, random_crop
from .config import PretrainConfig, steps_in
from .engine import Figures, Hooks, Task, train
from .errors import InputError
from .export import ENCODER_FILE, export_hub, export_weights, run_facts
from .files import write_json
from .index import ShardIndex
from .loader import Batch, Samples
from .log import RunLog
from .mae import MaskedAutoencoder, attach_decoder
from .masking import MaskSampler
from .optim import build_adamw, build_schedule, decay_groups
from .order import FileOrder, ShuffledOrder, labelled_subset
from .pictures import reconstruction_picture, save_png
from .released import load_encoder
from .runs import write_run_files
from .stage import open_stage

PICTURE_IMAGES = 16


class PretrainTask(Task):
    """What the engine trains: normalization and the masked autoencoder."""

    def __init__(self, autoencoder: MaskedAutoencoder, normalize: Normalize) -> None:
        super().__init__()
        self.autoencoder = autoencoder
        self.normalize = normalize

    @property
    def network(self) -> MaskedAutoencoder:
        """The masked autoencoder."""
        return self.autoencoder

    def forward(self, batch: Batch) -> tuple[Float[Tensor, ""], dict[str, Tensor]]:
        """Returns the training loss of a batch."""
        assert batch.masking is not None
        return self.autoencoder(self.normalize(batch.images), batch.masking).loss, {}


def pretrain(config: PretrainConfig) -> Figures:
    """Runs pretraining to its end and leaves weights, hub folder, picture and figures in the run folder."""
    opened = open_stage(config, config.init)
    accelerator, run_dir, spec = opened.accelerator, opened.run_dir, opened.spec
    torch.manual_seed(config.seed)
    encoder, report = load_encoder(spec, opened.weights)
    autoencoder = attach_decoder(encoder, decoder=config.decoder, target=config.target, in_chans=config.data.in_chans)
    masks = MaskSampler(encoder.num_units, config.mask.ratio, config.mask.strategy)
    if masks.num_keep == encoder.num_units:
        raise InputError(
            f"mask.ratio {config.mask.ratio} hides none of the {encoder.num_units} patches, so there is nothing to "
            f"predict: use at least {1 / encoder.num_units:.3f}"
        )
    ids = labelled_subset(opened.train.label, config.data.samples_per_class, config.seed)
    order, crop = ShuffledOrder(ids, config.seed), random_crop(config.data, encoder.img_size)
    samples = Samples(opened.train, order, crop, config.seed, config.data.in_chans, masks)
    total_steps = steps_in("the run", config.steps, config.epochs, samples=len(ids), batch_size=config.batch_size)
    schedule = build_schedule(config.optim, total_steps=total_steps, samples=len(ids), batch_size=config.batch_size)
    task = PretrainTask(autoencoder, Normalize(spec.mean, spec.std))
    optimizer = build_adamw(decay_groups(task, config.optim.weight_decay), config.optim)

    def export(progress: dict[str, Any]) -> None:
        facts = run_facts("pretraining", progress, config.seed)
        facts |= {"mask_ratio": config.mask.ratio, "target": config.target}
        export_weights(run_dir / ENCODER_FILE, encoder.timm, spec, facts)
        if progress["step"] == total_steps:
            title = f"{spec.name}, pretrained as a masked autoencoder"
            export_hub(run_dir / "hub", encoder.timm, spec, title=title, facts=facts | progress["figures"])

    if accelerator.is_main_process:
        write_run_files(run_dir, config, processes=accelerator.num_processes, train_samples=len(ids))
        print(f"{report}\n{len(ids)} images, {total_steps} steps of {config.batch_size}", flush=True)
    painter = Painter(config, task, masks, opened.val or opened.train, accelerator)
    hooks = Hooks(painter.draw, config.picture_every_steps, export)
    figures = train(task, optimizer, samples, schedule, config, accelerator, hooks, run_dir)
    if accelerator.is_main_process:
        write_json(run_dir / "result.json", {"command": "pretrain", "finished": True, "steps": total_steps, **figures})
        print(f"done: {run_dir / ENCODER_FILE}", flush=True)
    accelerator.end_training()
    return figures


class Painter:
    """Draws what the autoencoder makes of some fixed images under fixed masks, on the main process."""

    def __init__(
        self,
        config: PretrainConfig,
        task: PretrainTask,
        masks: MaskSampler,
        index: ShardIndex,
        accelerator: Accelerator,
    ) -> None:
        self.task, self.accelerator = task, accelerator
        self.png = Path(config.run_dir) / "reconstructions.png"
        picked = np.linspace(0, len(index) - 1, min(PICTURE_IMAGES, len(index))).astype(np.int64)  # from all shards
        crop = CenterCrop(task.autoencoder.encoder.img_size, config.data.crop_pct)
        samples = Samples(index, FileOrder(picked), crop, config.seed, config.data.in_chans, masks)
        self.batch = samples.__getitems__((0, len(picked))) if accelerator.is_main_process else None

    def draw(self, step: int, log: RunLog) -> Figures:
        """Writes reconstructions.png and the same picture to TensorBoard."""
        if self.batch is not None:
            autoencoder, normalize = self.task.autoencoder, self.task.normalize
            batch = self.batch.to(self.accelerator.device)
            assert batch.masking is not None
            autoencoder.eval()
            with torch.no_grad(), self.accelerator.autocast():
                images = normalize(batch.images)
                result = autoencoder(images, batch.masking)
            autoencoder.train()
            picture = reconstruction_picture(autoencoder, images, result, mean=normalize.mean, std=normalize.std)
            save_png(self.png, picture)
            log.picture(step, "reconstructions (masked, predicted, original)", picture)
        return {}
