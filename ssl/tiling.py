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
    targets = _windows(swin)
    partition = bool(swin.layers[0].blocks[0].always_partition)
    bad = [
        (a, i) for a in (0, 1) if (i := _first_untiled(size[a], unit, [t[a] for t in targets], partition)) is not None
    ]
    if not bad:
        return
    axis, stage = bad[0]
    name = ("height", "width")[axis]
    if stage < 0:
        what = f"image {name} {size[axis]} is not a multiple of the {unit} pixels that end as one token"
    else:
        tokens = size[axis] * 2 ** (stages - 1 - stage) // unit
        what = (
            f"image {name} {size[axis]} makes {tokens} tokens in stage {stage + 1}, which windows of "
            f"{targets[stage][axis]} do not tile"
        )
    sides = [t[axis] for t in targets]
    fits = [
        x for x in range(unit, 3 * max(size[axis], unit), unit) if _first_untiled(x, unit, sides, partition) is None
    ]
    lower, upper = [x for x in fits if x < size[axis]][-1:], [x for x in fits if x > size[axis]][:1]
    ways = f"use {' or '.join(map(str, lower + upper))} pixels" if lower + upper else ""
    windows = [
        w
        for w in WINDOWS
        if all(_first_untiled(size[a], unit, [w] * stages, partition) is None for a in (0, 1))
        and w * unit <= 2 ** (stages - 1) * min(size)
    ]
    if windows:
        ways += f"{', or ' if ways else 'use '}encoder.args {{window_size: {windows[-1]}}}"
        ways += f" (or {', '.join(map(str, windows[:-1]))})" if windows[:-1] else ""
    raise InputError(f"{what}: {ways}" if ways else what)


def _windows(swin: Any) -> list[tuple[int, int]]:
    """Returns the window of every stage. Where timm shrank it to the grid, the largest before it is what was meant."""
    found: list[tuple[int, int]] = []
    for stage in swin.layers:
        block = stage.blocks[0]
        window = [int(side) for side in block.window_size]
        for axis in (0, 1):
            if window[axis] == block.input_resolution[axis]:
                window[axis] = max([window[axis], *(before[axis] for before in found)])
        found.append((window[0], window[1]))
    return found


def _first_untiled(size: int, unit: int, windows: list[int], always_partition: bool) -> int | None:
    """Returns the first stage that its windows do not tile along one side, -1 for the units themselves, or None.

    A window larger than the grid shrinks to it, as in timm, unless the model always partitions.
    """
    if size % unit:
        return -1
    for stage, window in enumerate(windows):
        tokens = size * 2 ** (len(windows) - 1 - stage) // unit
        if tokens % (window if always_partition else min(window, tokens)):
            return stage
    return None
