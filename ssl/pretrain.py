"""The pretraining stage: its task, its hooks, and the order in which they are put together."""

import copy
import math
from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from jaxtyping import Float, UInt8
from torch import Tensor, nn

from .augment import CenterCrop, Normalize, random_crop
from .batches import Batch, Samples
from .checkpoint import state_folders
from .config import PretrainConfig, steps_in
from .encoder import Encoder
from .engine import is_due, train
from .errors import InputError
from .export import ENCODER_EMA_FILE, ENCODER_FILE, ModelSpec, export_hub, export_weights, run_facts
from .hybrid import has_batch_norm, with_statistics_of
from .log import RunLog
from .mae import MaskedAutoencoder, attach_decoder
from .masking import MaskSampler
from .online_probe import OnlineProbe
from .optim import build_adamw, build_schedule, decay_groups
from .order import FileOrder, labelled_subset
from .pictures import filmstrip, reconstruction_picture, save_png, step_picture
from .processes import micro_batch_size
from .recompute import checkpoint_blocks
from .released import encoder_with_weights, load_decoder
from .runs import write_result, write_run_files
from .sharding import Whole, block_names
from .signals import StopSignals
from .stage import Opened, open_stage
from .targets import PCATarget
from .task import Figures, Hooks, Task

PICTURE_IMAGES = 16
PICTURE_PIXELS = 1_300_000  # of all panels of a picture: 8 images of 224 x 224
COMPONENT_IMAGES = 2048  # principal components are fitted to
STATISTICS_IMAGES = 512  # batch norms are measured on


class PretrainTask(Task):
    """What the engine trains: normalization and the masked autoencoder."""

    def __init__(self, autoencoder: MaskedAutoencoder, normalize: Normalize) -> None:
        super().__init__()
        self.autoencoder = autoencoder
        self.normalize = normalize
        # accelerate's name for what it shards one by one
        self._no_split_modules = block_names(self, autoencoder.sharded_blocks)

    @property
    def network(self) -> MaskedAutoencoder:
        """The masked autoencoder."""
        return self.autoencoder

    def forward(self, batch: Batch) -> tuple[Float[Tensor, ""], dict[str, Tensor]]:
        """Returns the training loss of a batch, and how often its masks were drawn again for the encoder's windows."""
        assert batch.masking is not None
        loss = self.autoencoder(self.normalize(batch.images), batch.masking, only_scored=True).loss
        packing = batch.masking.packing
        return loss, {} if packing is None else {"mask_redraws": packing.redraws.float().mean()}


def pretrain(config: PretrainConfig) -> Figures:
    """Runs pretraining to its end and leaves weights, hub folder, picture and figures in the run folder."""
    opened = open_stage(config, config.init, with_decoder=config.init_decoder)
    accelerator, run_dir = opened.accelerator, opened.run_dir
    autoencoder, spec, report = _build(config, opened)
    encoder = autoencoder.encoder
    masks = encoder.mask_sampler(
        config.mask.ratio,
        strategy=config.mask.strategy,
        mask_unit=config.mask.unit,
        encode_masked=config.encode_masked,
    )
    if masks.num_keep == encoder.num_units:
        raise InputError(
            f"mask.ratio {config.mask.ratio} hides none of the {encoder.num_units} units, so there is nothing to "
            f"predict: use at least {masks.block**2 / encoder.num_units:.3f}"
        )
    ids = labelled_subset(opened.train.label, config.data.samples_per_class, config.seed)
    order, crop = opened.training_order(ids, config.batch_size), random_crop(config.data, encoder.img_size)
    samples = opened.samples(opened.train, order, crop, masks)
    length = {"samples": len(order), "batch_size": config.batch_size}
    total_steps = steps_in("the run", config.steps, config.epochs, **length)
    schedule = build_schedule(config.optim, total_steps=total_steps, **length)
    if config.grad_checkpointing:
        checkpoint_blocks(autoencoder)
    task = PretrainTask(autoencoder, Normalize(spec.mean, spec.std))
    plain = {f"autoencoder.encoder.timm.{name}" for name in encoder.no_weight_decay}
    whole = Whole(task, accelerator, config.ema_decay)
    optimizer = build_adamw(decay_groups(task, config.optim.weight_decay, plain), config.optim)

    # Read once: every export measures the batch norms on the same images, and so does every probe, on all processes.
    statistics_images: list[Tensor] = []
    if has_batch_norm(encoder.timm) and (accelerator.is_main_process or config.probe.every_steps):
        statistics_images += _whole_images(samples, accelerator.device, STATISTICS_IMAGES)

    def measured(model: nn.Module) -> nn.Module:
        if not has_batch_norm(model):
            return model
        device = next(model.parameters()).device  # the host's, of the copy of a sharded one
        normalize = whole.module.normalize.to(device)
        return with_statistics_of(model, (normalize(images.to(device)) for images in statistics_images))

    def released(encoder: Encoder) -> Encoder:
        if has_batch_norm(encoder.timm):
            timm_model, encoder = measured(encoder.timm), copy.deepcopy(encoder)
            encoder.timm = timm_model
        return encoder

    probe = None
    if config.probe.every_steps:
        micro = micro_batch_size(config.batch_size, config.micro_batch_size, accelerator.num_processes)
        probe = OnlineProbe(opened, config, whole, released, micro_batch_size=micro)

    def export(progress: dict[str, Any]) -> None:
        facts = run_facts("pretraining", progress, config.seed)
        facts |= {"mask_ratio": config.mask.ratio, "target": config.target}
        model = measured(whole.module.autoencoder.encoder.timm)
        export_weights(run_dir / ENCODER_FILE, model, spec, facts)
        if whole.average is not None:
            average = measured(whole.average.autoencoder.encoder.timm)
            export_weights(run_dir / ENCODER_EMA_FILE, average, spec, facts | {"ema_decay": config.ema_decay})
        if progress["step"] == total_steps:
            title = f"{spec.name}, pretrained as a masked autoencoder"
            told = {"facts": facts | progress["figures"], "crop_pct": config.data.crop_pct}
            export_hub(run_dir / "hub", model, spec, title=title, **told)

    if accelerator.is_main_process:
        write_run_files(run_dir, config, processes=accelerator.num_processes, train_samples=len(ids))
        an_epoch = "" if len(order) == len(ids) else f", {len(order)} an epoch"
        print(f"{report}\n{len(ids)} images{an_epoch}, {total_steps} steps of {config.batch_size}", flush=True)
        if statistics_images:
            print(f"batch norms are measured on {STATISTICS_IMAGES} whole images before every export", flush=True)
        if probe is not None:
            print(f"every {config.probe.every_steps} steps {probe.images} whole images are probed", flush=True)
    if isinstance(autoencoder.target, PCATarget):
        _fit_components(autoencoder.target, run_dir / "pca.safetensors", samples, task.normalize, accelerator)
    painter = Painter(opened, whole, masks)

    def look(step: int, log: RunLog, signals: StopSignals) -> Figures:
        if step == total_steps or is_due(step, config.picture_every_steps):
            painter.draw(step, log)
        if probe is not None and (step == total_steps or is_due(step, config.probe.every_steps)):
            return probe.measure(step, log, signals)
        return {}

    every = math.gcd(config.picture_every_steps, config.probe.every_steps)  # with 0 it is the other
    hooks = Hooks("pretrain", look, every, export, whole, opened.fetching)
    figures = train(task, optimizer, samples, schedule, config, accelerator, hooks, run_dir)
    if accelerator.is_main_process:
        write_result(run_dir, "pretrain", finished=True, steps=total_steps, **figures)
        print(f"done: {run_dir / ENCODER_FILE}", flush=True)
    accelerator.end_training()
    return figures


def _build(config: PretrainConfig, opened: Opened) -> tuple[MaskedAutoencoder, ModelSpec, str]:
    """Returns the autoencoder, the spec that builds its encoder again, and a sentence on the weights loaded."""
    torch.manual_seed(config.seed)
    spec = opened.spec
    if config.positions == "none":
        spec = replace(spec, args=spec.args | {"pos_embed": "none"})
    try:
        encoder, report = encoder_with_weights(spec, opened.weights)
    except InputError as error:
        if config.positions == "none" and "pos_embed" in str(error):
            raise InputError(f"positions none: {spec.name} has no absolute positions to leave out") from error
        raise
    if config.positions == "learned" and config.train_positions is False:
        raise InputError("positions learned with train_positions false would stay random: leave train_positions null")
    if config.positions in ("sincos", "learned"):
        encoder.set_positions(config.positions)
    trained = config.positions == "learned" if config.train_positions is None else config.train_positions
    encoder.train_positions(trained)
    autoencoder = attach_decoder(
        encoder,
        in_chans=config.data.in_chans,
        decoder=config.decoder,
        target=config.target,
        pca_components=config.pca_components,
        loss=config.loss,
        pred_share=config.pred_share,
        encode_masked=config.encode_masked,
    )
    if config.init_decoder:
        if opened.weights is None:
            raise InputError("init_decoder takes the decoder from --init, which is not given")
        report = f"{report}\n{load_decoder(autoencoder, opened.weights)}"
        known = opened.weights.decoder
        if known is not None and not known.notes and (known.target, known.loss) != (config.target, config.loss):
            report = f"{report}; trained for target {known.target} and loss {known.loss}, which are now others"
    return autoencoder, spec, report


def _whole_images(samples: Samples, device: torch.device, count: int) -> Iterator[UInt8[Tensor, "B H W C"]]:
    """Yields the crops of the run's first `count` positions.

    In batches of at most 64 and as good as equal size, since averages over batches count each batch once.
    """
    plain = replace(samples, masks=None)
    count = min(count, len(samples.order))
    bounds = np.linspace(0, count, -(-count // 64) + 1).round().astype(int).tolist()
    for first, last in pairwise(bounds):
        yield plain.batch(first, last).images.to(device)


def _fit_components(
    target: PCATarget, path: Path, samples: Samples, normalize: Normalize, accelerator: Accelerator
) -> None:
    """Fits principal components once a run; every process, and the run when it is continued, reads the same.

    What is left of an attempt that saved no state is of other options, and is fitted anew.
    """
    with accelerator.main_process_first():
        if accelerator.is_main_process and not (path.exists() and state_folders(path.parent)):
            target.fit(map(normalize, _whole_images(samples, torch.device("cpu"), COMPONENT_IMAGES)))
            target.save(path)
        target.load(path)


class Painter:
    """Draws what the autoencoder makes of some fixed images under fixed masks, on the main process."""

    def __init__(self, opened: Opened, whole: Whole[PretrainTask], masks: MaskSampler) -> None:
        self.whole, self.accelerator, self.run_dir = whole, opened.accelerator, opened.run_dir
        self.size = whole.module.autoencoder.encoder.img_size
        index = opened.val or opened.train
        near = index.cache is not None  # from all shards, unless each of them would have to be fetched
        last = int((index.shard == index.shard[0]).sum() if near else len(index)) - 1
        fitting = max(4, PICTURE_PIXELS // (3 * self.size[0] * self.size[1]))
        picked = np.linspace(0, last, min(PICTURE_IMAGES, fitting, last + 1)).astype(np.int64)
        samples = opened.samples(index, FileOrder(picked), CenterCrop(self.size, opened.config.data.crop_pct), masks)
        self.batch = samples.batch(0, len(picked)) if self.accelerator.is_main_process else None

    def draw(self, step: int, log: RunLog) -> None:
        """Writes the newest picture, also under its step below pictures/, and to TensorBoard; at the end, a filmstrip.

        A disk that refuses one ends no run.
        """
        if self.batch is not None:
            autoencoder, normalize = self.whole.module.autoencoder, self.whole.module.normalize
            batch = self.batch.to(self.accelerator.device)
            assert batch.masking is not None
            autoencoder.eval()
            with torch.no_grad(), self.accelerator.autocast():
                images = normalize(batch.images)
                result = autoencoder.forward(images, batch.masking)  # not compiled: it is of another size, for once
            autoencoder.train()
            picture = reconstruction_picture(autoencoder, images, result, mean=normalize.mean, std=normalize.std)
            log.picture(step, "reconstructions (masked, predicted, original)", picture)
            folder = self.run_dir / "pictures"
            with log.spared():
                save_png(step_picture(folder, step), picture)
                save_png(self.run_dir / "reconstructions.png", picture)
                if step == log.total_steps and (film := filmstrip(folder, self.size, step)) is not None:
                    save_png(folder / "filmstrip.png", film)
                    log.picture(step, "filmstrip (masked, predicted after so many steps, original)", film)
