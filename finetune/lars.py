"""LARS (You et al. 2017) as MAE's linear probe uses it, by timm, and the other optimizers of a head."""

from typing import Any

import torch
from timm.optim import Lars
from torch import nn

from .probe_config import ProbeOptimConfig


class _Skipping:
    """Leaves everything as it is where `found_inf` is 1, as torch's fused AdamW does.

    So a step whose loss is not finite is skipped without the host waiting for the device. It costs copies of what is
    trained, which is only a head. (torch's fused SGD would keep momentum of a first step that it skips.)
    """

    found_inf: torch.Tensor | None = None
    param_groups: list[dict[str, Any]]
    state: Any

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """Performs a step, or none."""
        if self.found_inf is None:
            return super().step(closure)  # type: ignore[misc]
        parameters = [p for group in self.param_groups for p in group["params"] if p.grad is not None]
        before = [(p.clone(), self.state[p].get("momentum_buffer")) for p in parameters]
        before = [(p, None if buffer is None else buffer.clone()) for p, buffer in before]
        skipped, self.found_inf = self.found_inf > 0.5, None  # torch's SGD refuses to know of it
        loss = super().step(closure)  # type: ignore[misc]
        for p, (value, buffer) in zip(parameters, before, strict=True):
            p.copy_(torch.where(skipped, value, p))
            if (now := self.state[p].get("momentum_buffer")) is not None:
                now.copy_(torch.where(skipped, torch.zeros_like(now) if buffer is None else buffer, now))
        return loss


class SkippingLars(_Skipping, Lars):
    """timm's LARS."""


class SkippingSGD(_Skipping, torch.optim.SGD):
    """torch's SGD."""


def build_head_optimizer(head: nn.Module, config: ProbeOptimConfig) -> torch.optim.Optimizer:
    """Returns the optimizer of a head's parameters, at rate 0.

    Parameters of one dimension are not decayed and, with LARS, take plain steps, as in MAE (its `util/lars.py`); all
    others take steps in proportion to their own length, `trust_coeff * |w| / |gradient|`, without weight decay as well.
    """
    parameters = [p for p in head.parameters() if p.requires_grad]
    weights, others = [p for p in parameters if p.ndim > 1], [p for p in parameters if p.ndim <= 1]
    groups = [
        {"params": weights, "weight_decay": config.weight_decay, "always_adapt": True},
        {"params": others, "weight_decay": 0.0, "always_adapt": False},
    ]
    if config.name == "lars":
        given: dict[str, Any] = {"momentum": config.momentum, "trust_coeff": config.trust_coeff}
        return SkippingLars(groups, lr=0.0, **given)
    groups = [{key: value for key, value in group.items() if key != "always_adapt"} for group in groups]
    if config.name == "sgd":
        return SkippingSGD(groups, lr=0.0, momentum=config.momentum)
    return torch.optim.AdamW(groups, lr=0.0, betas=config.betas, fused=True)
