"""Processes that die and hang: the others end soon, and say which it was. Real processes, stopped and killed."""

import os
import re
import signal
import socket
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import TINY, TINY_PRETRAIN
from ranks import LONG, PRETRAIN, Nursery, Rank, is_running, steps_logged, wait_until

from quarterlight.ssl.encoders import build_encoder
from quarterlight.ssl.export import ModelSpec, export_weights

HERE = re.escape(socket.gethostname())


@pytest.fixture(scope="module")
def nursery(tmp_path_factory) -> Iterator[Nursery]:
    nursery = Nursery(tmp_path_factory.mktemp("output"))
    yield nursery
    nursery.close()


@pytest.fixture
def running(nursery, shards, tmp_path):
    """Returns a function that starts the processes of a run that does not end by itself."""

    def run(count: int, **more: str):
        return nursery.run(count, LONG | {"data.train": shards[0], "run_dir": str(tmp_path / "run")} | more)

    return run


def wait_for_beats(run_dir: Path, ranks: list[Rank]) -> None:
    wait_until(lambda: steps_logged(run_dir) > 3, alive=ranks)
    time.sleep(3)  # each says more than once a second where it is
    reached = steps_logged(run_dir)
    wait_until(lambda: steps_logged(run_dir) > reached + 1, alive=ranks)


ELSEWHERE = """
if os.environ["RANK"] == "1":
    sys.argv = [word.replace("here.safetensors", "gone.safetensors") for word in sys.argv]
"""  # the other machine has no such file


def test_where_one_machine_lacks_the_weights_all_end_with_the_same_sentence(nursery, shards, tmp_path):
    args = {"img_size": 16, "patch_size": 4, "embed_dim": 24, "depth": 2, "num_heads": 2, "in_chans": 3}
    name = TINY_PRETRAIN["encoder.name"]
    model = build_encoder(name, **args).timm
    export_weights(tmp_path / "here.safetensors", model, ModelSpec(name, args, (0.5,) * 3, (0.5,) * 3), {})
    given = {key: value for key, value in LONG.items() if not key.startswith("encoder")}
    given |= {"data.train": shards[0], "run_dir": str(tmp_path / "run"), "init": str(tmp_path / "here.safetensors")}
    with nursery.run(2, given, code=ELSEWHERE + PRETRAIN) as ranks:
        assert [rank.ended() for rank in ranks] == [1, 1]
        (sentence,) = ranks[0].errors()  # of the one that speaks for its machine, and has the file
        assert "gone.safetensors: no such file" in sentence


def test_a_stopped_process_ends_the_run_by_name(running, tmp_path):
    with running(2) as (first, second):
        wait_for_beats(tmp_path / "run", [first, second])
        os.kill(second.pid, signal.SIGSTOP)
        assert first.ended() == 1
        (sentence,) = first.errors()
        assert re.search(
            rf"^error: process 0: process 1 \({HERE}, pid {second.pid}; last seen in step \d+, "
            r"(waiting for data|computing)\) has not been heard of for \d+ s; the same command "
            r"continues from the newest state$",
            sentence,
        )
        os.kill(second.pid, signal.SIGCONT)  # what was stopped goes the same way
        assert second.ended() == 1
        assert re.search("process 0", second.errors()[0])


def test_where_the_first_process_is_stopped_its_machine_is_named(running, tmp_path):
    with running(2) as (first, second):
        wait_for_beats(tmp_path / "run", [first, second])
        os.kill(first.pid, signal.SIGSTOP)
        assert second.ended() == 1
        (sentence,) = second.errors()
        assert re.search(rf"the machine of process 0 \({HERE}, 127.0.0.1\) has not answered for 3 s", sentence)


@pytest.mark.parametrize("dead", [0, 1])
def test_a_killed_process_ends_the_run_by_name(running, tmp_path, dead):
    with running(2) as both:
        wait_for_beats(tmp_path / "run", both)
        os.kill(both[dead].pid, signal.SIGKILL)
        left = both[1 - dead]
        assert left.ended() == 1
        (sentence,) = left.errors()
        assert sentence.startswith(f"error: process {1 - dead}: lost another process: ")
        named = (
            rf"process 1 \({HERE}, pid {both[1].pid}; last seen in step"
            if dead
            else rf"the machine of process 0 \({HERE}, "
        )
        assert re.search(named + r".* does not answer; the same command continues", sentence)
        assert "Traceback" not in left.said()


@pytest.mark.parametrize("count", [1, 2])
def test_a_data_worker_that_hangs_ends_the_run_and_names_its_sample(running, tmp_path, count):
    with running(count, num_workers="1") as ours:
        wait_until(lambda: steps_logged(tmp_path / "run") > 3, alive=ours)
        hung = ours[-1]
        (worker,) = hung.workers()
        os.kill(worker, signal.SIGSTOP)  # as one that reads from a server which is gone
        assert [one.ended() for one in ours] == [1] * count
        waits = "; 1 other waits" if count == 2 else ""
        wanted = re.compile(
            rf"nothing has moved for \d+ s \(stall_timeout_s 6\): process {count - 1} \({HERE}, pid {hung.pid}; in "
            r"step \d+, waiting for data: worker 0: .*/train-000\d\.tar, sample train000\d\d\) hangs there"
            rf"{waits}; the same command"
        )
        assert len(ours[0].errors()) == 1 and wanted.search(ours[0].said())
        assert "File " in hung.said()  # where its main thread stands
        wait_until(lambda: not is_running(worker))


def test_a_killed_data_worker_ends_the_run_and_names_its_sample(running, tmp_path):
    with running(2, num_workers="1") as both:
        wait_until(lambda: steps_logged(tmp_path / "run") > 3, alive=both)
        (worker,) = both[1].workers()
        os.kill(worker, signal.SIGKILL)
        assert [rank.ended() for rank in both] == [1, 1]
        dead = (
            rf"DataLoader worker \(pid.* {worker}\).*, reading worker 0: .*/train-000\d\.tar, sample train000\d\d: if"
        )
        for rank in both:
            assert len(rank.errors()) == 1 and re.search(dead, rank.said())
            assert "Traceback" not in rank.said()
        assert f"process 1 ({socket.gethostname()}, pid {both[1].pid}) ended: DataLoader" in both[0].said()


def test_a_run_stopped_as_a_whole_goes_on(running, tmp_path):
    with running(2, num_workers="1") as both:
        wait_until(lambda: steps_logged(tmp_path / "run") > 3, alive=both)
        for number in (signal.SIGSTOP, signal.SIGCONT):  # Ctrl-Z, fg
            for one in both:
                os.killpg(one.pid, number)
            time.sleep(9 if number == signal.SIGSTOP else 0)
        reached = steps_logged(tmp_path / "run")
        wait_until(lambda: steps_logged(tmp_path / "run") > reached + 3, alive=both)
        time.sleep(7)  # another timeout
        wait_until(lambda: steps_logged(tmp_path / "run") > reached + 6, alive=both)


LONG_SAVE = """
import time
import torch.distributed as dist
from quarterlight.ssl.watch import Watch

dist.init_process_group("gloo")
rank = dist.get_rank()
with Watch(rank, 2, 6.0, lambda: "") as watch:
    watch.move(3, "computing")
    with watch.during("saving"):
        time.sleep(4.5 if rank == 0 else 0)  # longer than a process may be silent, and shorter than the timeout
        dist.barrier()
    watch.move(4, "computing")
    time.sleep(4 if rank == 0 else 0)  # the other has left, and is not missed
dist.destroy_process_group()
"""


def test_a_long_save_of_the_main_process_is_waited_for(nursery):
    with nursery.run(2, {}, code=LONG_SAVE) as both:
        assert [rank.ended() for rank in both] == [0, 0], both[0].said() + both[1].said()


SLOW_EVALUATION = """
import time
from quarterlight.ssl.augment import CenterCrop
from quarterlight.ssl.batches import Samples
from quarterlight.ssl.command import parse_config, run_command
from quarterlight.finetune.classify import finetune
from quarterlight.finetune.config import FinetuneConfig

read = Samples.batch
def slow(self, *args):
    if isinstance(self.transform, CenterCrop):
        time.sleep(2)
    return read(self, *args)
Samples.batch = slow
run_command(lambda: parse_config(FinetuneConfig, ""), finetune)
"""


def test_an_evaluation_may_take_longer_than_the_timeout_while_it_moves(nursery, shards, tmp_path):
    given = TINY | {
        "data.train": shards[0], "data.val": shards[1], "run_dir": str(tmp_path / "run"), "batch_size": "8",
        "steps": "1", "stall_timeout_s": "4",
    }  # fmt: skip
    begun = time.monotonic()
    with nursery.run(1, given, code=SLOW_EVALUATION) as (rank,):
        assert rank.ended() == 0, rank.said()
    assert time.monotonic() - begun > 6
