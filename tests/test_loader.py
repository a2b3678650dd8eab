import hashlib
import io
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import webdataset
from PIL import Image

from quarterlight.ssl.augment import CenterCrop, RandomCrop
from quarterlight.ssl.batches import BadSample, Batch, Samples, refuse_bad, refuse_unlabelled
from quarterlight.ssl.errors import InputError
from quarterlight.ssl.index import ShardIndex, open_index
from quarterlight.ssl.loader import build_loader
from quarterlight.ssl.masking import MaskSampler
from quarterlight.ssl.order import FileOrder, LaneOrder, MixedOrder, Order, RepeatedOrder, ShuffledOrder
from quarterlight.ssl.spans import EvalSpans, Spans

COUNT, BATCH, STEPS = 22, 8, 9
DAMAGED = (3, 13)


def pixels_of(i: int, height: int = 24, width: int = 30) -> np.ndarray:
    return np.random.default_rng(i).integers(0, 256, (height, width, 3), np.uint8)


def encoded(i: int, format: str) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels_of(i)).save(buffer, format)
    return buffer.getvalue()


def write_shards(folder: Path, *, format: str = "JPEG", damaged: tuple[int, ...] = ()) -> str:
    """Returns the pattern of three shards; damaged images have a good header and a middle of zeros."""
    with webdataset.ShardWriter(f"{folder}/train-%06d.tar", maxcount=8, verbose=0) as writer:
        for i in range(COUNT):
            data = encoded(i, format)
            if i in damaged:
                data = data[: len(data) // 2] + bytes(len(data) - len(data) // 2)
            writer.write({"__key__": f"{i:02d}", "jpg" if format == "JPEG" else "png": data, "cls": i % 5})
    return str(folder / "train-*.tar")


MORE_WORKERS_THAN_CORES = pytest.mark.filterwarnings("ignore:This DataLoader will create 3 worker processes")


@pytest.fixture(scope="module")
def index(tmp_path_factory) -> ShardIndex:
    return open_index(write_shards(tmp_path_factory.mktemp("good")))


@pytest.fixture(scope="module")
def damaged_index(tmp_path_factory) -> ShardIndex:
    return open_index(write_shards(tmp_path_factory.mktemp("damaged"), damaged=DAMAGED))


def samples_of(index: ShardIndex, seed: int = 0, **changes) -> Samples:
    order = ShuffledOrder(np.arange(len(index)), seed)
    crop = RandomCrop((16, 16), (0.2, 1.0), (3 / 4, 4 / 3), 0.5)
    return Samples(
        **{"index": index, "order": order, "transform": crop, "seed": seed, "masks": MaskSampler((4, 4), 0.75)}
        | changes
    )


def batches_of(
    samples: Samples,
    steps: range,
    *,
    rank: int = 0,
    world_size: int = 1,
    micro: int | None = None,
    num_workers: int = 0,
) -> list[Batch]:
    micro = micro or BATCH // world_size
    spans = Spans(steps, batch_size=BATCH, micro_batch_size=micro, rank=rank, world_size=world_size)
    return list(build_loader(samples, spans, num_workers=num_workers))


def same(a: Batch, b: Batch) -> bool:
    masks = zip((a.masking or ())[:3], (b.masking or ())[:3], strict=True)  # a ViT's have no packing
    tensors = [(a.images, b.images), (a.labels, b.labels), *masks]
    return all(torch.equal(x, y) for x, y in tensors) and a.keys == b.keys and a.bad == b.bad


def joined(batches: list[Batch]) -> Batch:
    masks = zip(*(b.masking[:3] for b in batches), strict=True)
    masking = type(batches[0].masking)(*(torch.cat(parts) for parts in masks))
    return Batch(
        torch.cat([b.images for b in batches]),
        torch.cat([b.labels for b in batches]),
        masking,
        [key for b in batches for key in b.keys],
        [bad for b in batches for bad in b.bad],
    )


# Which positions.


@pytest.mark.parametrize("world_size", [1, 2, 3, 4, 6, 12])
def test_a_step_reads_the_same_positions_in_any_split(world_size):
    per_rank = 24 // world_size
    for micro in [m for m in range(1, per_rank + 1) if per_rank % m == 0]:
        ranks = [
            Spans(range(3, 6), batch_size=24, micro_batch_size=micro, rank=rank, world_size=world_size)
            for rank in range(world_size)
        ]
        spans = [list(rank) for rank in ranks]
        assert {len(rank) for rank in ranks} == {len(own) for own in spans} == {3 * per_rank // micro}
        passes = per_rank // micro
        for i, step in enumerate((3, 4, 5)):
            read = [p for own in spans for span in own[i * passes : (i + 1) * passes] for p in range(*span)]
            assert read == list(range(step * 24, (step + 1) * 24))


@pytest.mark.parametrize("world_size", [1, 2, 3, 4, 5])
@pytest.mark.parametrize("count", [0, 1, 4, 5, 22, 23])
@pytest.mark.parametrize("batch_size", [1, 4, 100])
def test_an_evaluation_reads_each_sample_once(world_size, count, batch_size):
    ranks = [EvalSpans(count, batch_size=batch_size, rank=rank, world_size=world_size) for rank in range(world_size)]
    spans = [list(rank) for rank in ranks]
    assert [p for own in spans for span in own for p in range(*span)] == list(range(count))
    assert [len(rank) for rank in ranks] == [len(own) for own in spans]
    assert all(0 < stop - start <= batch_size for own in spans for start, stop in own)
    sizes = [sum(stop - start for start, stop in own) for own in spans]
    assert max(sizes) - min(sizes) <= 1


@pytest.mark.parametrize("world_size", [1, 2, 3, 4, 5])
def test_an_evaluation_counts_each_image_once_over_all_ranks(index, world_size):
    samples = samples_of(index, order=FileOrder(np.arange(COUNT)), transform=CenterCrop((16, 16), 0.875), masks=None)
    keys = []
    for rank in range(world_size):
        spans = EvalSpans(COUNT, batch_size=4, rank=rank, world_size=world_size)
        keys += [key for batch in build_loader(samples, spans, num_workers=0) for key in batch.keys]
    assert keys == [f"{i:02d}" for i in range(COUNT)]


# The same batches, bit for bit.


@MORE_WORKERS_THAN_CORES
@pytest.mark.parametrize("num_workers", [1, 3])
def test_batches_do_not_depend_on_the_number_of_workers(index, num_workers):
    alone = batches_of(samples_of(index), range(STEPS))
    assert len(alone) == STEPS
    shared = batches_of(samples_of(index), range(STEPS), num_workers=num_workers)
    assert all(map(same, alone, shared))
    assert len(shared) == STEPS


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_run_may_start_at_any_step(index, num_workers):
    whole = batches_of(samples_of(index), range(STEPS))
    for first in range(STEPS) if num_workers == 0 else (1, 6):
        rest = batches_of(samples_of(index), range(first, STEPS), num_workers=num_workers)
        assert len(rest) == STEPS - first
        assert all(map(same, rest, whole[first:]))


@pytest.mark.parametrize(("world_size", "micro"), [(1, 2), (2, 4), (2, 2), (4, 1), (8, 1)])
def test_a_step_has_the_same_pixels_labels_and_masks_in_any_split(damaged_index, world_size, micro):
    samples = samples_of(damaged_index)
    whole = batches_of(samples, range(STEPS))
    ranks = [batches_of(samples, range(STEPS), rank=r, world_size=world_size, micro=micro) for r in range(world_size)]
    passes = BATCH // world_size // micro
    for step in range(STEPS):
        assert same(joined([b for own in ranks for b in own[step * passes : (step + 1) * passes]]), whole[step])


def test_workers_that_stay_give_the_same_second_pass(index):
    samples = samples_of(index, order=FileOrder(np.arange(COUNT)), transform=CenterCrop((16, 16), 0.875), masks=None)
    spans = EvalSpans(COUNT, batch_size=5, rank=0, world_size=1)
    loader = build_loader(samples, spans, num_workers=2, persistent=True)
    first, second = list(loader), list(loader)
    assert all(map(same, first, second))
    assert len(first) == len(second) == 5


def test_a_process_ends_while_its_loaders_are_in_use(index):
    """Python waits for workers that got one SIGTERM, and workers leave the first one to their process."""
    script = """
import sys
from multiprocessing import active_children
import numpy as np
from quarterlight.ssl.augment import CenterCrop
from quarterlight.ssl.batches import Samples
from quarterlight.ssl.index import open_index
from quarterlight.ssl.loader import build_loader
from quarterlight.ssl.order import FileOrder
from quarterlight.ssl.spans import EvalSpans

index = open_index(sys.argv[1])
samples = Samples(index, FileOrder(np.arange(len(index))), CenterCrop((16, 16), 1.0), 0, 3)
spans = EvalSpans(len(index), batch_size=4, rank=0, world_size=1)
kept = [iter(build_loader(samples, spans, num_workers=1, persistent=stays)) for stays in (True, False)]
print(*(len(next(batches).keys) for batches in kept), len(active_children()))
"""
    command = [sys.executable, "-c", script, str(Path(index.paths[0]).parent / "train-*.tar")]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert (ended.returncode, ended.stdout.split(), ended.stderr) == (0, ["4", "4", "2"], "")


def test_another_seed_or_epoch_gives_other_crops_masks_and_order(index):
    epochs = [joined(batches_of(samples_of(index, seed), range(11))) for seed in (0, 1)]  # 88 samples: four epochs
    for batch in epochs:
        assert sorted(batch.keys[:COUNT]) == sorted(batch.keys[COUNT : 2 * COUNT]) == [f"{i:02d}" for i in range(COUNT)]
        assert batch.keys[:COUNT] != batch.keys[COUNT : 2 * COUNT]
        of_one_sample = [i for i, key in enumerate(batch.keys) if key == "07"]
        assert len(of_one_sample) == 4
        assert len({batch.images[i].numpy().tobytes() for i in of_one_sample}) == 4
        assert len({batch.masking.ids_keep[i].numpy().tobytes() for i in of_one_sample}) == 4
    assert epochs[0].keys != epochs[1].keys


def test_the_first_batches_are_those_that_earlier_runs_have_seen(tmp_path):
    lossless = open_index(write_shards(tmp_path, format="PNG"))
    whole = RandomCrop((24, 30), (1.0, 1.0), (30 / 24, 30 / 24), 0.5)  # a flip and no resizing: the same on every CPU
    batch = joined(batches_of(samples_of(lossless, 42, transform=whole), range(5)))
    assert batch.keys[:BATCH] == ["17", "05", "00", "06", "16", "08", "18", "15"]
    assert batch.masking.ids_keep[:3].tolist() == [[11, 9, 7, 2], [10, 4, 14, 13], [4, 15, 12, 14]]
    assert hashlib.sha256("".join(batch.keys).encode()).hexdigest()[:16] == "9022353fe45f3b6f"
    assert hashlib.sha256(batch.images.numpy().tobytes()).hexdigest()[:16] == "3ddf5e60ab6e3fde"
    assert hashlib.sha256(batch.masking.ids_keep.numpy().astype("<i8").tobytes()).hexdigest()[:16] == "393ad32dbcf068f8"


# What is in a batch.


def test_a_batch_holds_what_its_shards_hold(index):
    samples = samples_of(index, order=FileOrder(np.arange(COUNT)), transform=CenterCrop((24, 30), 1.0), masks=None)
    batch = samples.batch(2, 20)
    assert batch.images.shape == (18, 24, 30, 3) and batch.images.dtype == torch.uint8
    assert batch.keys == [f"{i:02d}" for i in range(2, 20)]
    assert batch.labels.tolist() == [i % 5 for i in range(2, 20)]
    assert batch.masking is None and batch.bad == []
    for i in range(18):
        decoded = np.array(Image.open(io.BytesIO(encoded(2 + i, "JPEG"))))
        assert np.array_equal(batch.images[i], decoded)


def test_a_subset_is_read_and_nothing_else(index):
    batch = joined(batches_of(samples_of(index, order=ShuffledOrder(np.array([4, 9, 11]), 0)), range(3)))
    assert sorted(set(batch.keys)) == ["04", "09", "11"]
    assert [batch.keys.count(key) for key in ("04", "09", "11")] == [8, 8, 8]


def test_grey_batches_have_one_channel(index):
    batch = samples_of(index, in_chans=1).batch(0, 4)
    assert batch.images.shape == (4, 16, 16, 1)


def test_masks_keep_a_quarter_of_the_units(index):
    masking = samples_of(index).batch(0, 6).masking
    assert masking.ids_keep.shape == (6, 4)
    assert masking.is_masked.sum(1).tolist() == [12] * 6


def test_a_batch_moves_as_a_whole(index):
    batch = samples_of(index).batch(0, 2)
    assert same(batch.to(torch.device("cpu")), batch)
    moved = batch.to(torch.device("meta"))
    assert {x.device.type for x in (moved.images, moved.labels, *moved.masking[:3])} == {"meta"}


# Damage.


def test_a_damaged_image_is_replaced_and_listed(index, damaged_index):
    good = joined(batches_of(samples_of(index), range(STEPS)))
    batch = joined(batches_of(samples_of(damaged_index), range(STEPS)))
    wanted = [i for i, key in enumerate(good.keys) if int(key) in DAMAGED]
    assert len(wanted) >= 6
    assert len(batch.bad) >= len(wanted)
    assert {bad.key for bad in batch.bad} == {f"{i:02d}" for i in DAMAGED}
    assert {Path(bad.shard).name for bad in batch.bad} == {"train-000000.tar", "train-000001.tar"}
    assert all(bad.reason for bad in batch.bad)
    for i, key in enumerate(batch.keys):
        assert int(key) not in DAMAGED
        assert batch.labels[i] == int(key) % 5
        if i not in wanted:
            assert key == good.keys[i] and torch.equal(batch.images[i], good.images[i])
    assert len({batch.keys[i] for i in wanted}) > 1, "another replacement in another epoch"


@MORE_WORKERS_THAN_CORES
@pytest.mark.parametrize("num_workers", [1, 3])
def test_replacements_do_not_depend_on_the_number_of_workers(damaged_index, num_workers):
    alone = batches_of(samples_of(damaged_index), range(STEPS))
    assert all(map(same, alone, batches_of(samples_of(damaged_index), range(STEPS), num_workers=num_workers)))


@pytest.mark.parametrize("order", ["shuffled", "file"])
def test_reading_a_span_twice_replaces_and_lists_the_same(damaged_index, order):
    orders = {"shuffled": ShuffledOrder(np.arange(COUNT), 0), "file": FileOrder(np.arange(COUNT))}
    samples = samples_of(damaged_index, order=orders[order])
    first, second = (samples.batch(0, COUNT) for _ in range(2))
    assert len(first.bad) >= 2
    assert same(first, second)


def test_a_replacement_comes_from_the_chosen_subset(damaged_index):
    samples = samples_of(damaged_index, order=ShuffledOrder(np.array([3, 4, 5]), 0))
    assert set(samples.batch(0, 30).keys) == {"04", "05"}


def test_nothing_but_damage_still_gives_a_batch(damaged_index):
    samples = samples_of(damaged_index, order=ShuffledOrder(np.array(DAMAGED), 0))
    batch = samples.batch(0, 3)
    assert batch.images.shape == (3, 16, 16, 3)
    assert len(batch.bad) >= 3


@pytest.mark.parametrize("opened", [False, True])
def test_a_shard_that_shrinks_after_it_was_indexed_counts_as_damage(tmp_path, opened):
    pattern = write_shards(tmp_path)
    index = open_index(pattern)
    if opened:  # what is open already is read as far as it goes
        index.read(8)
    with Path(index.paths[1]).open("r+b") as file:
        file.truncate(int(index.offset[10]) + 40)
    batch = joined(batches_of(samples_of(index), range(3)))
    lost = {f"{i:02d}" for i in range(10 if opened else 8, 16)}
    assert {bad.key for bad in batch.bad} == lost
    assert {bad.shard for bad in batch.bad} == {index.paths[1]}
    assert all("replaced" in bad.reason for bad in batch.bad)
    assert len(batch.keys) == 24 and not set(batch.keys) & lost


def test_an_evaluation_says_how_to_leave_out_what_is_damaged():
    with pytest.raises(
        InputError, match=r"^a.tar: sample k cannot be read \(why\).*launch/shards.py repair leaves it out$"
    ):
        refuse_bad([BadSample("a.tar", "k", "why")])
    refuse_bad([])


def test_an_evaluation_refuses_damage_by_name(damaged_index):
    batch = samples_of(damaged_index).batch(0, COUNT)
    with pytest.raises(InputError, match=r"train-00000[01].tar: sample (03|13)"):
        refuse_bad(batch.bad)
    refuse_bad([])


def test_missing_labels_are_refused_with_what_is_known_of_them():
    labels = np.array([-1, 3])
    with pytest.raises(InputError, match=r"1 of 2 samples have no label \(no .cls or .json with a class number in the"):
        refuse_unlabelled(labels, "data.val")
    with pytest.raises(InputError, match=r"no label \(first; second\); write the shards from class folders, or with"):
        refuse_unlabelled(labels, "data.val", ["first", "second"])


def test_missing_labels_are_refused_with_their_number():
    with pytest.raises(InputError, match="data.val: 2 of 4 samples have no label"):
        refuse_unlabelled(np.array([0, -1, 3, -1]), "data.val")
    refuse_unlabelled(np.array([0, 3]), "data.val")


# The whole table: worlds times workers, whatever the order.

WIDE, WIDE_STEPS = 24, 7  # positions of a step: divisible by every world below


def wide_orders() -> dict[str, Order]:
    shards = np.arange(COUNT) // 8
    shuffled = ShuffledOrder(np.arange(COUNT), 0)
    halves = [ShuffledOrder(np.arange(10), 0), ShuffledOrder(np.arange(10, COUNT), 1)]
    weighted = MixedOrder(halves, [2.0, 0.5], 0)
    blocks = ShuffledOrder(np.arange(COUNT), 0, shards=shards, block_samples=9)
    return {
        "shuffled": shuffled,
        "repeats": RepeatedOrder(shuffled, 2),
        "lanes": LaneOrder(blocks, WIDE, 8),
        "weights": weighted,
        "all": LaneOrder(RepeatedOrder(weighted, 2), WIDE, 4),
    }


def record(batch: Batch) -> list[tuple[str, int, str]]:
    """The key and label of every sample, and a hash of its pixels and mask."""
    masks = [x for x in batch.masking[:3] if isinstance(x, torch.Tensor)]
    digests = [
        hashlib.sha256(b"".join(x[i].numpy().tobytes() for x in (batch.images, *masks))).hexdigest()
        for i in range(len(batch.keys))
    ]
    return list(zip(batch.keys, batch.labels.tolist(), digests, strict=True))


def wide_steps(
    samples: Samples, steps: range, *, world_size: int, num_workers: int = 0
) -> list[list[tuple[str, int, str]]]:
    """What each of `steps` holds when `world_size` ranks, one after another in this process, read their parts."""
    share = WIDE // world_size
    micro = share // 2 if share % 2 == 0 and world_size > 1 else share
    found: list[list[tuple[str, int, str]]] = [[] for _ in steps]
    for rank in range(world_size):
        spans = Spans(steps, batch_size=WIDE, micro_batch_size=micro, rank=rank, world_size=world_size)
        for number, batch in enumerate(build_loader(samples, spans, num_workers=num_workers)):
            found[number * micro // share] += record(batch)
    return found


@pytest.fixture(scope="module")
def wide_reference(damaged_index) -> dict[str, list[list[tuple[str, int, str]]]]:
    """One rank without workers, for every order."""
    return {
        name: wide_steps(samples_of(damaged_index, order=order), range(WIDE_STEPS), world_size=1)
        for name, order in wide_orders().items()
    }


@pytest.mark.parametrize("world_size", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("name", ["shuffled", "repeats", "lanes", "weights", "all"])
def test_every_world_sees_the_same_samples_pixels_and_masks(damaged_index, wide_reference, name, world_size):
    samples = samples_of(damaged_index, order=wide_orders()[name])
    assert wide_steps(samples, range(WIDE_STEPS), world_size=world_size) == wide_reference[name]


@pytest.mark.parametrize(("world_size", "num_workers"), [(1, 1), (1, 4), (2, 1), (2, 4)])
@pytest.mark.parametrize("name", ["shuffled", "all"])
def test_every_world_with_workers_sees_the_same(damaged_index, wide_reference, name, world_size, num_workers):
    samples = samples_of(damaged_index, order=wide_orders()[name])
    found = wide_steps(samples, range(WIDE_STEPS), world_size=world_size, num_workers=num_workers)
    assert found == wide_reference[name]


@pytest.mark.parametrize(
    ("name", "num_workers"),
    [("shuffled", 0), ("repeats", 0), ("lanes", 0), ("weights", 0), ("all", 0), ("shuffled", 2), ("all", 2)],
)
def test_a_run_goes_on_in_mid_epoch_with_another_number_of_ranks(damaged_index, wide_reference, name, num_workers):
    before = wide_steps(samples_of(damaged_index, order=wide_orders()[name]), range(5), world_size=2)
    again = samples_of(damaged_index, order=wide_orders()[name])
    after = wide_steps(again, range(5, WIDE_STEPS), world_size=3, num_workers=num_workers)
    assert before + after == wide_reference[name]


def test_an_epoch_over_all_ranks_has_every_good_sample_once(index):
    samples = samples_of(index, order=ShuffledOrder(np.arange(COUNT), 4))
    steps = wide_steps(samples, range(11), world_size=4)  # 264 positions: twelve epochs
    keys = [key for step in steps for key, _, _ in step]
    for epoch in range(12):
        assert sorted(keys[epoch * COUNT : (epoch + 1) * COUNT]) == [f"{i:02d}" for i in range(COUNT)]


# Several crops of one decoding.


def large_shards(folder: Path, damaged: tuple[int, ...] = ()) -> ShardIndex:
    """Photos that are large enough to be decoded at a smaller scale for some crops and not for others."""
    with webdataset.TarWriter(str(folder / "large-0.tar")) as tar:
        for i in range(6):
            y, x = np.mgrid[:400, :500]
            pixels = np.stack([np.sin(x / 9 + i) * 100 + 120, np.cos(y / 7) * 100 + 120, (x + y) % 256], -1)
            buffer = io.BytesIO()
            Image.fromarray(pixels.astype(np.uint8)).save(buffer, "JPEG")
            data = buffer.getvalue()
            if i in damaged:
                data = data[: len(data) // 2] + bytes(len(data) - len(data) // 2)
            tar.write({"__key__": f"{i}", "jpg": data, "cls": i})
    return open_index(str(folder / "large-0.tar"))


@pytest.mark.parametrize("damaged", [(), (2, 3)])
@pytest.mark.parametrize("size", [1, 2, 5])
def test_crops_of_one_decoding_do_not_depend_on_where_batches_are_cut(tmp_path, damaged, size):
    samples = samples_of(
        large_shards(tmp_path, damaged),
        order=RepeatedOrder(ShuffledOrder(np.arange(6), 0), 3),
        transform=RandomCrop((64, 64), (0.08, 1.0), (3 / 4, 4 / 3), 0.5),
        masks=None,
    )
    whole = samples.batch(0, 30)
    parts = [samples.batch(start, start + size) for start in range(0, 30, size)]
    assert torch.equal(whole.images, torch.cat([part.images for part in parts]))
    assert whole.keys == [key for part in parts for key in part.keys]
    assert whole.bad == [bad for part in parts for bad in part.bad]
    wanted = [i for i in samples.order.ids(np.arange(30)).tolist() if i in damaged]
    assert len(whole.bad) >= len(wanted), "once a position"
    assert all(len(set(whole.keys[i : i + 3])) == 1 for i in range(0, 6, 3)), "repeats show one image"


@pytest.mark.parametrize("order", [ShuffledOrder(np.array(DAMAGED), 0), FileOrder(np.array(DAMAGED * 2))])
def test_where_nothing_can_be_read_the_wanted_samples_stay(damaged_index, order):
    batch = samples_of(damaged_index, order=order).batch(0, 4)
    assert batch.keys == [f"{i:02d}" for i in order.ids(np.arange(4))]
    assert batch.images.max() == 0
    assert {bad.key for bad in batch.bad} == {"03", "13"}


# Two passes over one loader.


def long_loader(index: ShardIndex, *, persistent: bool):
    spans = Spans(range(24), batch_size=BATCH, micro_batch_size=BATCH, rank=0, world_size=1)
    return build_loader(samples_of(index), spans, num_workers=2, persistent=persistent)


def test_two_passes_at_once_are_both_right(index):
    expected = batches_of(samples_of(index), range(24))
    loader = long_loader(index, persistent=False)
    first = iter(loader)
    got = [next(first)]
    second = list(loader)
    got += list(first)
    assert len(got) == len(second) == 24
    assert all(map(same, got, expected)) and all(map(same, second, expected))


def test_a_pass_that_a_later_one_has_ended_says_so_instead_of_giving_other_pixels(index):
    expected = batches_of(samples_of(index), range(24))
    loader = long_loader(index, persistent=True)
    first = iter(loader)
    kept = [next(first), next(first)]
    second = iter(loader)
    assert same(next(second), expected[0])
    with pytest.raises(RuntimeError, match="a later pass over this loader has begun"):
        next(first)
    assert all(map(same, second, expected[1:])), "the later pass goes on"
    assert all(map(same, kept, expected[:2])), "what was given before stays as it was"
    assert all(map(same, loader, expected))
