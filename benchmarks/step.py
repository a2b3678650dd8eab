"""A pretraining step as the trainer does it, for benchmarks."""

from typing import Any, NamedTuple

import torch
from contestants import Contestant
from torch import Tensor, nn

from quarterlight.ssl.attention import choose_attention
from quarterlight.ssl.augment import Normalize
from quarterlight.ssl.batches import Batch
from quarterlight.ssl.config import OptimConfig
from quarterlight.ssl.mae import MaskedAutoencoder
from quarterlight.ssl.optim import build_adamw, decay_groups, set_lr
from quarterlight.ssl.pretrain import PretrainTask

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # ImageNet's


class OtherMasks(NamedTuple):
    """In a batch, masks in another library's form."""

    masks: Tensor

    def to(self, device: torch.device, *, non_blocking: bool = False) -> "OtherMasks":
        return OtherMasks(self.masks.to(device, non_blocking=non_blocking))


class OtherTask(nn.Module):
    """What `PretrainTask` is for ours, for a contestant of others: its batches hold `OtherMasks`."""

    def __init__(self, contestant: Contestant) -> None:
        super().__init__()
        self.network = contestant.model
        self.normalize = Normalize(MEAN, STD)
        self.loss = contestant.loss

    def forward(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        return self.loss(self.normalize(batch.images), batch.masking.masks), {}  # type: ignore[union-attr]


def task_of(contestant: Contestant) -> PretrainTask | OtherTask:
    """Returns what the engine would train."""
    if isinstance(contestant.model, MaskedAutoencoder):
        return PretrainTask(contestant.model, Normalize(MEAN, STD))
    return OtherTask(contestant)


class Step:
    """Autocast, loss, backward pass, norm of the gradients and fused AdamW, as `engine.py` puts them together."""

    def __init__(
        self,
        task: PretrainTask | OtherTask,
        device: torch.device,
        precision: str,
        compile_args: dict[str, Any] | None = None,
    ) -> None:
        """With `compile_args` the network is compiled as `--compile true` does it, with these arguments."""
        self.task, self.device, self.precision = task.to(device).train(), device, precision
        choose_attention(task, device, precision)
        self.has_graphs = compile_args is not None and compile_args.get("mode") == "reduce-overhead"
        if compile_args is not None:
            task.network.compile(**compile_args)
        config = OptimConfig()
        self.optimizer = build_adamw(decay_groups(task, config.weight_decay), config)
        set_lr(self.optimizer, config.base_lr)

    def __call__(self, batch: Batch) -> None:
        if self.has_graphs:  # the results of the step before may be overwritten
            torch.compiler.cudagraph_mark_step_begin()
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.precision == "bf16"):
            loss, _ = self.task(batch.to(self.device))
        loss.backward()
        norm = torch.nn.utils.get_total_norm([p.grad for p in self.task.parameters() if p.grad is not None])
        self.optimizer.found_inf = 1.0 - (torch.isfinite(norm) & torch.isfinite(loss.detach())).float()  # type: ignore[attr-defined]
        self.optimizer.step()
        self.optimizer.zero_grad()


class Arrival:
    """In a step's place: batches arrive on the device, and nothing is done with them."""

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def __call__(self, batch: Batch) -> None:
        batch.to(self.device)
