"""timm's Swin transformers as encoders of visible units: linear layers on visible tokens only, attention in windows.

Tokens are kept unit by unit, inside a unit in the order in which patches merge, so merging is a reshape and units keep
their order through all stages. Only attention needs another arrangement: windows in groups (window_groups.py). A
query attends to the visible tokens of its own window, with timm's shift and relative-position bias, so this is timm's
model with masked tokens excluded as keys, and with nothing masked it is timm's model.

Agrees with "group window attention" (GreenMIM, Huang et al. 2022, arXiv:2205.13515). Differs from GreenMIM: every image
has a mask of its own, where there one serves a whole batch, and plans are made in the loader's workers by first fit.
"""

import math
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from timm.models.swin_transformer import SwinTransformer, SwinTransformerBlock
from timm.models.swin_transformer_v2 import SwinTransformerV2, SwinTransformerV2Block
from torch import Tensor, nn
from torch.nn import functional as F

from .attention import attend, relative_bias
from .encoder import Encoder
from .masking import Masking, MaskSampler, Packing
from .packing import WindowLayout, WindowPacker, unit_order
from .recompute import runner
from .tiling import check_windows
from .window_groups import Groups, LayoutTables, rearranged

TRIAL_UNITS = 50_000  # in the masks that choose the shapes of the groups: 1000 masks of 49 units
MISFITS = 0.08  # share of masks that may not fit, divided among the layouts that pack; they are drawn again


class SwinEncoder(Encoder):
    """A timm SwinTransformer or SwinTransformerV2 that can run on the kept units only.

    A unit is what ends as one token: 32 pixels for four stages over patches of 4. Raises InputError, with the sizes
    that work, when the windows do not tile the grid of every stage: timm then pads with tokens that act as keys.
    """

    def __init__(self, swin: SwinTransformer | SwinTransformerV2) -> None:
        super().__init__()
        check_windows(swin)
        patch_embed: Any = swin.patch_embed
        levels = len(swin.layers) - 1
        self.timm = swin
        self.unit_size = int(patch_embed.patch_size[0]) * 2**levels
        self.grid = (patch_embed.grid_size[0] >> levels, patch_embed.grid_size[1] >> levels)
        self.embed_dim = int(swin.num_features)
        self.num_prefix_tokens = 0
        self.mask_token_dim = int(patch_embed.proj.out_channels)
        self.stage_dims = [
            (_blocks(swin, s)[0].norm1.normalized_shape[0], 4 ** (levels - s)) for s in range(levels + 1)
        ]
        row, column = unit_order(levels)
        self.register_buffer("order_in_unit", torch.from_numpy(row * 2**levels + column), persistent=False)
        used = [[self._layout(stage, block) for block in _blocks(swin, stage)] for stage in range(levels + 1)]
        self.layouts = tuple(dict.fromkeys(layout for stage in used for layout in stage))
        self.layout_numbers = [[self.layouts.index(layout) for layout in stage] for stage in used]  # of every block
        self.tables = nn.ModuleList(LayoutTables(layout) for layout in self.layouts)
        self.samplers: dict[MaskSampler, MaskSampler] = {}  # without and with packings
        swin.head.requires_grad_(False)  # tokens do not pass it; DDP waits for every gradient

    @property
    def no_weight_decay(self) -> set[str]:
        """timm's: relative-position tables, and for the second version their networks and logit scales."""
        return set(self.timm.no_weight_decay())

    def _layout(self, stage: int, block: SwinTransformerBlock | SwinTransformerV2Block) -> WindowLayout:
        levels = len(self.stage_dims) - 1 - stage
        window, shift = block.window_size, block.shift_size
        return WindowLayout(self.grid, levels, (int(window[0]), int(window[1])), (int(shift[0]), int(shift[1])))

    def forward(
        self,
        images: Float[Tensor, "B C H W"],
        masking: Masking | None = None,
        mask_token: Float[Tensor, " T"] | None = None,
    ) -> Float[Tensor, "B K D"]:
        """Returns the tokens of all units in grid order, or of the kept ones in the order of `ids_keep`; normalized."""
        swin = self.timm
        self._check_size(images, masking)
        if masking is None:
            return swin.forward_features(images).flatten(1, 2)
        if mask_token is None:
            return self.stages(images, masking)[-1]
        side = 2 ** (len(self.stage_dims) - 1)
        hidden = masking.is_masked.view(-1, *self.grid).repeat_interleave(side, 1).repeat_interleave(side, 2)
        x = swin.patch_embed(images)  # [B, h, w, T]
        x = torch.where(hidden[:, :, :, None], mask_token.to(x.dtype), x)
        for stage in swin.layers:
            x = self._residual(stage.downsample(x), images)
            for block in stage.blocks:  # the second version's are no Sequential
                x = block(x)
        return swin.norm(x).flatten(1, 2)

    def stages(self, images: Float[Tensor, "B C H W"], masking: Masking) -> list[Float[Tensor, "B _ _"]]:
        """Returns the tokens of the kept units after every stage, those of a unit together; the last normalized."""
        swin = self.timm
        self._check_size(images, masking)
        groups = self._arrange(masking)
        x, found = self._embed(images, masking.ids_keep), []
        for number, stage in enumerate(swin.layers):
            if not isinstance(stage.downsample, nn.Identity):
                b, _, d = x.shape
                squares = x.reshape(-1, 2, 2, d).transpose(1, 2)  # columns come first in the order of a unit
                x = stage.downsample(squares).view(b, -1, 2 * d)
            x = self._residual(x, images)
            now: Groups | None = None  # the arrangement that x is in; None: the tokens' own order
            for block, layout in zip(stage.blocks, self.layout_numbers[number], strict=True):
                wanted = groups[layout]
                x = rearranged(x, now, wanted)
                x, now = runner(block, _run_block)(block, x, wanted), wanted
            x = rearranged(x, now, None)
            found.append(x)
        return [*found[:-1], swin.norm(found[-1])]

    @staticmethod
    def _residual(x: Tensor, images: Tensor) -> Tensor:
        """Returns `x` in full precision: on a CPU norms return bf16 in autocast, and sums over blocks would too."""
        return x.to(torch.promote_types(images.dtype, torch.float32))

    def _embed(self, images: Float[Tensor, "B C H W"], ids_keep: Int[Tensor, "B K"]) -> Float[Tensor, "B KT E"]:
        """Returns the patch embeddings of the kept units, which are embedded as small images."""
        patch_embed = self.timm.patch_embed
        (b, c), u, (h, w) = images.shape[:2], self.unit_size, self.grid
        units = images.reshape(b, c, h, u, w, u).permute(0, 2, 4, 1, 3, 5)  # [B, h, w, C, u, u]
        image = torch.arange(b, device=images.device)[:, None]
        kept = units[image, ids_keep // w, ids_keep % w].flatten(0, 1)  # [B*K, C, u, u]
        x = patch_embed.proj(kept).flatten(2).transpose(1, 2)[:, self.order_in_unit]  # [B*K, T, E]
        return patch_embed.norm(x).view(b, -1, x.shape[2])

    def _arrange(self, masking: Masking) -> list[Groups]:
        """Returns the groups of every layout."""
        packing = masking.packing
        if packing is None:
            packing = self._packing_of(masking)
        found, first = [], 0
        for tables, shape in zip(self.tables, packing.shapes, strict=True):
            assert isinstance(tables, LayoutTables)
            count = 0 if shape is None else tables.counts.shape[1]
            found.append(tables.arrange(masking.ids_keep, packing.starts[:, first : first + count], shape))
            first += count
        return found

    def _packing_of(self, masking: Masking) -> Packing:
        """Returns a packing for masks drawn elsewhere, in shapes that just hold them: waits for the device."""
        visible = ~masking.is_masked.cpu().numpy()
        packer = WindowPacker.for_masks(self.layouts, visible, misfits=0.0)
        starts = torch.from_numpy(packer.pack(visible)[0]).to(masking.is_masked.device)
        return Packing(starts, packer.shapes, torch.zeros(len(visible), dtype=torch.long))

    def _packed(self, plain: MaskSampler) -> MaskSampler:
        """Adds packings in shapes that hold some 95 or more of 100 masks; the others are redrawn."""
        if plain not in self.samplers:
            trials = min(1000, max(300, TRIAL_UNITS // plain.num_units))
            trials = trials if plain.num_keep < plain.num_units else 1  # with nothing hidden there is one mask
            visible = ~plain.sample(0, np.arange(trials)).is_masked.numpy()
            packer = WindowPacker.for_masks(self.layouts, visible, misfits=MISFITS)
            self.samplers[plain] = replace(plain, packer=packer)
        return self.samplers[plain]


def _blocks(swin: Any, stage: int) -> list[Any]:
    return list(swin.layers[stage].blocks)


def _run_block(block: Any, x: Float[Tensor, "B S E"], groups: Groups) -> Float[Tensor, "B S E"]:
    """timm's block on arranged tokens."""
    if isinstance(block, SwinTransformerV2Block):
        x = x + block.drop_path1(block.norm1(_attention(block.attn, x, groups)))
        return x + block.drop_path2(block.norm2(block.mlp(x)))
    x = x + block.drop_path1(_attention(block.attn, block.norm1(x), groups))
    return x + block.drop_path2(block.mlp(block.norm2(x)))


def _attention(attn: Any, x: Float[Tensor, "B S E"], groups: Groups) -> Float[Tensor, "B S E"]:
    """timm's WindowAttention of either version on arranged tokens."""
    is_v2, scale = hasattr(attn, "logit_scale"), 1.0
    if is_v2 and attn.q_bias is not None:
        qkv = F.linear(x, attn.qkv.weight, torch.cat([attn.q_bias, attn.k_bias, attn.v_bias]))
    else:
        qkv = attn.qkv(x)
    length = groups.places.shape[1]
    q, k, v = qkv.view(-1, length, 3, attn.num_heads, qkv.shape[2] // (3 * attn.num_heads)).permute(2, 0, 3, 1, 4)
    if is_v2:
        table = 16 * torch.sigmoid(attn.cpb_mlp(attn.relative_coords_table).view(-1, attn.num_heads))
        q = F.normalize(q, dim=-1) * attn.logit_scale.clamp(max=math.log(100.0)).exp()
        k = F.normalize(k, dim=-1)
        q, k = q.to(v.dtype), k.to(v.dtype)  # scales and norms are of full precision, the kernel is chosen by q's
    else:
        table, scale = attn.relative_position_bias_table, attn.scale
    bias = relative_bias(table, groups.pairs, groups.places, attn.relative_position_index, q.dtype)
    dropout = attn.attn_drop.p if attn.training else 0.0
    x = attend(q, k, v, bias, scale=scale, dropout=dropout).transpose(1, 2).reshape(*x.shape[:2], -1)
    return attn.proj_drop(attn.proj(x))
