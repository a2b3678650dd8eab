"""Operations of matrix products that a pretraining step needs, by formula, and what devices can do.

Two for a multiplication; a step is three forward passes. What a kernel computes beyond need (keys of other windows,
empty slots) does not count, so that MFU tells how far the device is used for what was asked.
"""

from models import MASK_RATIO, SIMMIM_MASK_RATIO, Model, Swin, Vit, num_units

from quarterlight.ssl.masking import num_keep

# TFLOP/s of dense matrix products in bf16, as the makers state them; what a large product really reaches is less.
NOMINAL_TFLOPS = {"H200 NVL": 835, "H200": 989, "H100 PCIe": 756, "H100 NVL": 835, "H100": 989, "A100": 312, "L4": 121}


def nominal_tflops(device_name: str, precision: str = "bf16") -> float | None:
    """Returns the nominal dense rate of a device in bf16, or None where it is not known, as in any other precision."""
    words = device_name.replace("-", " ").split()
    if precision != "bf16" or "MIG" in words:  # a MIG device is a slice of the card that its name begins with
        return None
    for name, tflops in NOMINAL_TFLOPS.items():
        if all(part in words for part in name.split()):
            return tflops
    return None


def block_flops(queries: float, keys: float, width: int) -> float:
    """Returns operations of a transformer block: 2 * 12 C^2 a token, and 4 C for every key of a query."""
    return queries * (24 * width**2 + 4 * keys * width)


def vit_flops(vit: Vit, tokens: int) -> float:
    """Returns operations of a ViT's encoder; `tokens` is the number of patches seen, of all that are embedded."""
    embedding = 2 * 3 * vit.patch**2 * vit.width * num_units(vit)
    return embedding + vit.depth * block_flops(tokens + 1, tokens + 1, vit.width)


def swin_flops(swin: Swin, share: float) -> float:
    """Returns operations of a Swin's encoder that sees this share of every window."""
    patches = swin.side // 4
    total = 2 * 3 * 4**2 * swin.width * share * patches**2
    for stage, depth in enumerate(swin.depths):
        tokens, d = share * (patches >> stage) ** 2, swin.width << stage
        keys = share * min(swin.window, patches >> stage) ** 2
        total += depth * block_flops(tokens, keys, d) + (2 * 4 * (d // 2) * d * tokens if stage else 0)
    return total


def encoder_width(model: Model) -> int:
    """Returns the width of the encoder's tokens."""
    return model.width if isinstance(model, Vit) else model.width << (len(model.depths) - 1)


def decoder_flops(model: Model, kept: int, hidden: int, *, tail: bool) -> float:
    """Returns operations of MAE's decoder; with `tail` its end is computed for hidden units only."""
    width, depth, _ = model.decoder
    everything = kept + hidden
    ends = hidden if tail else everything
    total = 2 * encoder_width(model) * width * kept + (depth - 1) * block_flops(everything, everything, width)
    # Of the last block keys and values (a sixth of the linear layers' work) are those of all tokens either way.
    total += block_flops(ends, everything, width) + 4 * width**2 * (everything - ends)
    return total + 2 * width * 3 * model.unit**2 * ends


def cross_flops(model: Model, kept: int, predicted: int) -> float:
    """Returns operations of the cross decoder: queries look at the kept tokens, of which keys and values are made."""
    width, depth, _ = model.decoder
    total = 2 * encoder_width(model) * width * kept + 2 * width * 3 * model.unit**2 * predicted
    return total + depth * (predicted * (20 * width**2 + 4 * kept * width) + 4 * width**2 * kept)


def forward_flops(model: Model, contestant: str) -> float:
    """Returns operations of a forward pass for one image: of `ours`, `cross`, `simmim`, `hf` or `dense`."""
    units = num_units(model)
    kept = num_keep(units, MASK_RATIO)
    if isinstance(model, Vit):
        if contestant == "dense":
            return vit_flops(model, units)
        visible, hidden = vit_flops(model, kept), units - kept
        if contestant == "cross":
            return visible + cross_flops(model, kept + 1, max(1, round(hidden / 3)))
        return visible + decoder_flops(model, kept + 1, hidden, tail=contestant == "ours")
    if contestant == "ours":
        return swin_flops(model, kept / units) + decoder_flops(model, kept, units - kept, tail=True)
    predicted = {"dense": 0, "hf": units, "simmim": units - num_keep(units, SIMMIM_MASK_RATIO)}[contestant]
    return swin_flops(model, 1) + 2 * encoder_width(model) * 3 * model.unit**2 * predicted
