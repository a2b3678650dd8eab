"""Batches in shared memory: the same as without workers, whatever is done with the loader, and nothing left behind."""

import gc
import io
import os
import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import webdataset
from PIL import Image
from torch.utils.data import DataLoader

from quarterlight.ssl import ring as ring_module
from quarterlight.ssl.augment import CenterCrop, RandomCrop
from quarterlight.ssl.batches import Batch, Samples
from quarterlight.ssl.errors import InputError
from quarterlight.ssl.index import ShardIndex, open_index
from quarterlight.ssl.loader import PREFETCHED, Loader, _as_it_is, _Numbered, _Reader, build_loader
from quarterlight.ssl.masking import MaskSampler
from quarterlight.ssl.order import FileOrder, ShuffledOrder
from quarterlight.ssl.ring import InRing, Ring
from quarterlight.ssl.spans import EvalSpans, Spans

COUNT, BATCH, STEPS = 23, 4, 17


@pytest.fixture(scope="module")
def index(tmp_path_factory) -> ShardIndex:
    folder = tmp_path_factory.mktemp("ring")
    with webdataset.ShardWriter(f"{folder}/train-%06d.tar", maxcount=9, verbose=0) as writer:
        for i in range(COUNT):
            buffer = io.BytesIO()
            pixels = np.random.default_rng(i).integers(0, 256, (20, 26, 3), np.uint8)
            Image.fromarray(pixels).save(buffer, "PNG")
            writer.write({"__key__": f"{i:02d}", "png": buffer.getvalue(), "cls": i % 5})
    return open_index(str(folder / "train-*.tar"))


def training(index: ShardIndex, seed: int = 0, size: int = 16) -> Samples:
    crop = RandomCrop((size, size), (0.2, 1.0), (3 / 4, 4 / 3), 0.5)
    return Samples(index, ShuffledOrder(np.arange(COUNT), seed), crop, seed, masks=MaskSampler((4, 4), 0.75))


def loader_of(samples: Samples, num_workers: int, *, steps: int = STEPS, persistent: bool = False) -> Loader:
    spans = Spans(range(steps), batch_size=BATCH, micro_batch_size=BATCH, rank=0, world_size=1)
    return build_loader(samples, spans, num_workers=num_workers, persistent=persistent)


def evaluating(index: ShardIndex, num_workers: int, *, persistent: bool = False) -> Loader:
    samples = Samples(index, FileOrder(np.arange(COUNT)), CenterCrop((16, 16), 0.875), 0)
    spans = EvalSpans(COUNT, batch_size=BATCH, rank=0, world_size=1)  # the last batch holds 3
    return build_loader(samples, spans, num_workers=num_workers, persistent=persistent)


def same(a: list[Batch], b: list[Batch]) -> bool:
    def equal(x: Batch, y: Batch) -> bool:
        masks = zip((x.masking or ())[:3], (y.masking or ())[:3], strict=True)
        tensors = [(x.images, y.images), (x.labels, y.labels), *masks]
        return all(torch.equal(s, t) for s, t in tensors) and (x.keys, x.bad) == (y.keys, y.bad)

    return len(a) == len(b) and all(map(equal, a, b))


# The same batches.


@pytest.mark.parametrize("persistent", [False, True])
@pytest.mark.parametrize("num_workers", [1, 2, 5])
def test_a_list_of_all_batches_is_the_one_without_workers(index, num_workers, persistent):
    batches = list(loader_of(training(index), num_workers, persistent=persistent))  # none overwrites an earlier one
    assert same(batches, list(loader_of(training(index), 0)))


def test_batches_may_be_changed_by_whoever_gets_them(index):
    expected = list(loader_of(training(index), 0))
    kept = []
    for batch in loader_of(training(index), 2):
        kept.append(batch._replace(images=batch.images.clone(), labels=batch.labels.clone()))
        batch.images.fill_(255)
        batch.labels.fill_(-7)
    assert same(kept, expected)


@pytest.mark.parametrize("num_workers", [0, 1, 3])
def test_a_short_last_batch_has_only_its_own_images(index, num_workers):
    batches = list(evaluating(index, num_workers))
    assert [len(batch.images) for batch in batches] == [4, 4, 4, 4, 4, 3]
    assert [key for batch in batches for key in batch.keys] == [f"{i:02d}" for i in range(COUNT)]
    assert same(batches, list(evaluating(index, 0)))


def test_fewer_batches_than_the_ring_holds_and_none_at_all(index):
    for steps in (0, 1, 2):
        loader = loader_of(training(index), 3, steps=steps)
        assert len(loader) == steps
        assert same(list(loader), list(loader_of(training(index), 0, steps=steps)))
    spans = EvalSpans(0, batch_size=BATCH, rank=0, world_size=1)
    assert list(build_loader(training(index), spans, num_workers=2)) == []


# Several passes.


@pytest.mark.parametrize("persistent", [False, True])
def test_passes_one_after_the_other_are_all_right(index, persistent):
    expected, loader = list(evaluating(index, 0)), evaluating(index, 2, persistent=persistent)
    assert all(same(list(loader), expected) for _ in range(4))


def test_workers_that_stay_are_the_same_processes_in_the_next_pass(index):
    loader = evaluating(index, 2, persistent=True)
    pids = []
    for _ in range(2):
        list(loader)
        pids.append([worker.pid for worker in loader._kept._iterator._workers])
    assert pids[0] == pids[1]


@pytest.mark.parametrize("persistent", [False, True])
@pytest.mark.parametrize("taken", [0, 1, 2, 9])
def test_a_pass_may_be_given_up_and_another_begun(index, taken, persistent):
    expected, loader = list(loader_of(training(index), 0)), loader_of(training(index), 2, persistent=persistent)
    for _ in range(3):
        given_up = iter(loader)
        assert same([next(given_up) for _ in range(taken)], expected[:taken])
        assert same(list(loader), expected)
    del given_up


def test_two_loaders_at_once_do_not_touch_each_others_batches(index):
    expected = [list(loader_of(training(index, seed), 0)) for seed in (0, 1)]
    both = list(zip(loader_of(training(index, 0), 2), loader_of(training(index, 1), 1), strict=True))
    assert same([first for first, _ in both], expected[0])
    assert same([second for _, second in both], expected[1])


def test_loaders_with_images_of_other_sizes_work_at_once(index):
    train, val = loader_of(training(index, size=32), 2), evaluating(index, 2, persistent=True)
    expected = list(evaluating(index, 0))
    got = []
    for step, batch in enumerate(train):
        got.append(batch)
        if step in (3, 9):  # an evaluation in the midst of training
            assert same(list(val), expected)
    assert same(got, list(loader_of(training(index, size=32), 0)))


# How workers start.


def test_workers_from_a_server_process_write_into_the_same_memory(index):
    samples = training(index)
    spans = Spans(range(STEPS), batch_size=BATCH, micro_batch_size=BATCH, rank=0, world_size=1)
    ring = Ring(PREFETCHED + 2, BATCH, samples.shape)
    loader = DataLoader(
        _Reader(samples, ring),
        batch_sampler=_Numbered(spans),
        collate_fn=_as_it_is,
        num_workers=1,
        prefetch_factor=PREFETCHED,
        multiprocessing_context="forkserver",
    )
    got = []
    for batch in loader:
        assert ring.images.data_ptr() <= batch.images.data_ptr() < ring.images.data_ptr() + ring.images.numel()
        got.append(batch._replace(images=batch.images.clone()))
    assert same(got, list(loader_of(samples, 0)))


# What travels.


def test_only_a_few_bytes_of_a_batch_are_sent():
    ring = Ring(3, 8, (64, 64, 3))
    images = ring.slot(4, 8)
    images.copy_(torch.randint(0, 256, images.shape, dtype=torch.uint8))
    masking = MaskSampler((8, 8), 0.75).sample(0, np.arange(8))
    batch = Batch(images, torch.arange(8), masking, [f"{i}" for i in range(8)], [])
    sent = pickle.dumps(InRing(ring, 4, batch))
    assert len(sent) < 20_000 < images.numel()
    arrived = pickle.loads(sent)
    assert arrived.images.data_ptr() == images.data_ptr() == ring.images[1].data_ptr()
    assert same([arrived], [batch]) and type(arrived) is Batch and type(arrived.masking) is type(masking)


def test_a_slot_holds_as_many_images_as_the_batch():
    ring = Ring(3, 8, (4, 5, 1))
    assert ring.slot(5, 3).shape == (3, 4, 5, 1)
    assert ring.slot(5, 3).data_ptr() == ring.images[2].data_ptr()
    assert ring.images.is_shared()


# Shared memory.


HAS_FOLDER = os.path.isdir("/dev/shm")


def left_behind(process: int) -> list[str]:
    """The names in shared memory that a process has made."""
    return [name for name in os.listdir("/dev/shm") if str(process) in name.split("_")] if HAS_FOLDER else []


def test_nothing_is_left_in_shared_memory_by_a_process_that_is_killed(index, tmp_path):
    script = tmp_path / "read.py"
    script.write_text(
        "import sys, os, signal\n"
        "sys.path.insert(0, sys.argv[1])\n"
        "import test_ring as t\n"
        "index = t.open_index(sys.argv[2:])\n"
        "given_up = iter(t.loader_of(t.training(index), 2, persistent=True))\n"
        "next(given_up)\n"
        "print(os.getpid(), len(list(t.evaluating(index, 2))), flush=True)\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    words = [sys.executable, str(script), str(Path(__file__).parent), *index.paths]
    with (tmp_path / "output").open("w+") as output:  # no pipe: the workers would keep it open until they notice
        done = subprocess.run(words, stdout=output, stderr=output, timeout=120)
        output.seek(0)
        text = output.read()
    assert done.returncode == -9, text
    process, batches = text.split()
    assert batches == "6" and left_behind(int(process)) == []


def test_a_loaders_memory_is_given_back_with_it(index):
    before = len(ring_module._rings)
    loader = loader_of(training(index), 1, persistent=True)
    list(loader)
    assert len(ring_module._rings) == before + 1
    del loader
    gc.collect()
    assert len(ring_module._rings) == before
    assert left_behind(os.getpid()) == []


@pytest.mark.parametrize("num_workers", [1, 4])
def test_too_little_shared_memory_is_refused_in_one_sentence(index, monkeypatch, num_workers):
    monkeypatch.setattr(ring_module, "_free_bytes", lambda: 3000)
    with pytest.raises(InputError, match="MB of shared memory") as caught:
        next(iter(loader_of(training(index), num_workers)))
    slots = num_workers * PREFETCHED + 2
    assert f"({slots} batches of {BATCH} images)" in str(caught.value)
    assert "lower num_workers or micro_batch_size" in str(caught.value) and "\n" not in str(caught.value)
    assert len(list(loader_of(training(index), 0))) == STEPS, "without workers none is needed"


def test_enough_shared_memory_or_none_to_ask_for_is_no_refusal(monkeypatch):
    for free in (6 * 8 * 16 * 16 * 3, None):
        monkeypatch.setattr(ring_module, "_free_bytes", lambda free=free: free)
        assert Ring(6, 8, (16, 16, 3)).images.shape == (6, 8, 16, 16, 3)


def test_free_shared_memory_is_measured(monkeypatch):
    monkeypatch.setattr(ring_module, "SHARED_MEMORY", "/")
    assert ring_module._free_bytes() > 0
    monkeypatch.setattr(ring_module, "SHARED_MEMORY", "/no such folder")
    assert ring_module._free_bytes() is None


# Errors.


class _GoneShards(ShardIndex):
    """An index whose shards cannot be had, as when a server is down for good."""

    def read(self, sample: int) -> bytes:
        raise InputError(f"{self.paths[0]}: cannot be fetched; try again later")


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("persistent", [False, True])
def test_a_workers_input_error_arrives_as_its_one_sentence(index, num_workers, persistent):
    gone = _GoneShards.__new__(_GoneShards)
    gone.__dict__.update(index.__dict__)
    loader = loader_of(training(gone), num_workers, persistent=persistent)
    for _ in range(2):
        with pytest.raises(InputError) as caught:
            list(loader)
        assert str(caught.value) == f"{index.paths[0]}: cannot be fetched; try again later"
