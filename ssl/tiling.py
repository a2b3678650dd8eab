"""Which image and window sizes a hierarchical encoder can do without padding."""

from typing import Any

from .errors import InputError

WINDOWS = range(2, 33)  # tried when windows that would tile are to be named


def check_windows(swin: Any) -> None:
    """Raises InputError, with sizes that work, unless units tile the image and windows the grid of every stage."""
    patch = tuple(int(side) for side in swin.patch_embed.patch_size)
    if patch[0] != patch[1]:
        raise InputError(f"its patches are {patch[0]} x {patch[1]} pixels; only square ones are supported")
    stages = len(swin.layers)
    unit = patch[0] * 2 ** (stages - 1)
    size = tuple(int(side) for side in swin.patch_embed.img_size)
    windows = _windows(swin)
    partition = bool(swin.layers[0].blocks[0].always_partition)
    for axis, name in enumerate(("height", "width")):
        side, sides = size[axis], [window[axis] for window in windows]
        stage = _first_untiled(side, unit, sides, partition)
        if stage is None:
            continue
        what = f"is not a multiple of the {unit} pixels that end as one token"
        if stage >= 0:
            tokens = side * 2 ** (stages - 1 - stage) // unit
            what = f"makes {tokens} tokens in stage {stage + 1}, which windows of {sides[stage]} do not tile"
        far = max(3 * side, unit * max(sides))  # windows tile a unit of as many pixels as they have tokens
        fits = [x for x in range(unit, far + 1, unit) if _first_untiled(x, unit, sides, partition) is None]
        near = [x for x in fits if x < side][-1:] + [x for x in fits if x > side][:1]
        ways = [f"{' or '.join(map(str, near))} pixels"] if near else []
        others = _windows_that_tile(size, unit, stages, partition, wanted=sides[0])
        if others:
            more = f" (or {', '.join(map(str, others[1:]))})" if others[1:] else ""
            ways.append(f"--encoder.args.window_size {others[0]}{more}")
        raise InputError(f"image {name} {side} {what}" + (f": use {', or '.join(ways)}" if ways else ""))


def _windows_that_tile(size: tuple[int, ...], unit: int, stages: int, partition: bool, *, wanted: int) -> list[int]:
    """Returns the square windows, the same in all stages, that tile an image, those nearest to `wanted` first."""
    finest = min(size) * 2 ** (stages - 1) // unit  # tokens along the shorter side in the first stage
    tile = [
        window
        for window in WINDOWS
        if window <= finest and all(_first_untiled(x, unit, [window] * stages, partition) is None for x in size)
    ]
    return sorted(tile, key=lambda window: abs(window - wanted))


def _windows(swin: Any) -> list[tuple[int, int]]:
    """Returns the window of every stage. Where timm shrank it to the grid, the largest before it is what was meant."""
    found: list[tuple[int, int]] = []
    for stage in swin.layers:
        block = stage.blocks[0]
        window = [max(1, int(side)) for side in block.window_size]  # an image smaller than a patch leaves none
        for axis in (0, 1):
            if window[axis] == block.input_resolution[axis]:
                window[axis] = max([window[axis], *(before[axis] for before in found)])
        found.append((window[0], window[1]))
    return found


def _first_untiled(size: int, unit: int, windows: list[int], always_partition: bool) -> int | None:
    """Returns the first stage that its windows do not tile along one side, -1 for the units themselves, or None.

    A window larger than the grid shrinks to it, as in timm, unless the model always partitions.
    """
    if size % unit or size < unit:
        return -1
    for stage, window in enumerate(windows):
        tokens = size * 2 ** (len(windows) - 1 - stage) // unit
        if tokens % (window if always_partition else min(window, tokens)):
            return stage
    return None
