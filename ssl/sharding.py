"""Parameters in parts: FSDP2, as accelerate's own configuration asks for it (`distributed_type: FSDP`).

Each process holds a part of every parameter, its gradient and its moments, and gathers a block when it is computed.
What a single process does with a network, release, draw or evaluate it, it does with a whole copy.
"""

import copy
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Generic, TypeVar

from accelerate import Accelerator
from accelerate.state import PartialState
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin, parse_flag_from_env
from timm.utils import ModelEmaV3
from torch import Tensor, nn
from torch.distributed.fsdp import MixedPrecisionPolicy
from torch.distributed.tensor import DTensor

from .errors import InputError

Module = TypeVar("Module", bound=nn.Module)


def sharding_asked_for() -> FullyShardedDataParallelPlugin | None:
    """Returns accelerate's settings of FSDP2, read from its environment; None: FSDP is not asked for.

    The blocks that `Task.shards` names are gathered one by one, the rest at once.
    """
    if not parse_flag_from_env("ACCELERATE_USE_FSDP"):
        return None
    return FullyShardedDataParallelPlugin(
        fsdp_version=2, auto_wrap_policy="transformer_based_wrap", cpu_ram_efficient_loading=False
    )


def apply_sharding(accelerator: Accelerator, plugin: FullyShardedDataParallelPlugin | None) -> None:
    """Makes `accelerator.prepare` shard, on CPUs too, which accelerate refuses; autocast stays what it is without."""
    if plugin is None or accelerator.num_processes == 1:
        return
    # Weights stay in float32, as without FSDP: autocast casts them where they are used.
    plugin.mixed_precision_policy = MixedPrecisionPolicy()
    for shared in (PartialState._shared_state, accelerator.state._shared_state):
        shared["distributed_type"] = DistributedType.FSDP
    accelerator.state.fsdp_plugin = plugin


def is_sharded(accelerator: Accelerator) -> bool:
    """Returns whether processes hold parts of the parameters."""
    return accelerator.distributed_type == DistributedType.FSDP


class Whole(Generic[Module]):
    """A module as one process can use it alone: itself or, where it is sharded, a copy that follows it.

    With `ema_decay` it keeps the moving average of the module as well. To be made before `accelerator.prepare` shards
    the module. Raises InputError for an average of a sharded one.
    """

    def __init__(self, module: Module, accelerator: Accelerator, ema_decay: float | None = None) -> None:
        self._sharded = is_sharded(accelerator)
        if self._sharded and ema_decay is not None:
            raise InputError("ema_decay averages whole weights, and FSDP holds them in parts: leave one of them away")
        self.ema = None if ema_decay is None else ModelEmaV3(module, ema_decay)
        self._device = accelerator.device
        self.module = copy.deepcopy(module) if self._sharded else module

    @contextmanager
    def following(self, module: Module) -> Iterator[None]:
        """Has the copy be what `module` has become, on the device; all processes must enter it."""
        if not self._sharded:
            yield
            return
        self.take(gathered(module.state_dict().items()))
        self.module.to(self._device)
        yield
        self.module.cpu()  # the memory of a whole model is what sharding is to save

    @property
    def average(self) -> Module | None:
        """The moving average, a module like the other."""
        return None if self.ema is None else self.ema.module  # type: ignore[return-value]

    def take(self, tensors: dict[str, Tensor]) -> None:
        """Takes over the whole tensors of the module, in host memory; none are given to who does not keep them."""
        if self._sharded and tensors:
            self.module.load_state_dict(tensors)


def gathered(tensors: Iterable[tuple[str, Tensor]], *, keep: bool = True) -> dict[str, Tensor]:
    """Returns whole tensors: those that processes hold in parts in host memory, others as they are.

    The processes gather one after another, and those that do not `keep` them drop each.
    """
    found = {}
    for name, value in tensors:
        whole = value.full_tensor().cpu() if isinstance(value, DTensor) else value
        if keep:
            found[name] = whole.contiguous()
    return found


def block_names(module: nn.Module, classes: Iterable[type]) -> list[str]:
    """Returns the names of those `classes` of which there is an instance in `module`, as accelerate wants them."""
    present = {type(child) for child in module.modules()}
    return sorted({kind.__name__ for kind in classes if kind in present})
