import json
import math
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from quarterlight.ssl.batches import BadSample, Batch
from quarterlight.ssl.log import RunLog, append_jsonl
from quarterlight.ssl.meter import Meter


def records(run_dir: Path) -> list[dict]:
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def curve(run_dir: Path, name: str) -> list[tuple[int, float]]:
    events = EventAccumulator(str(run_dir))
    events.Reload()
    return [(event.step, event.value) for event in events.Scalars(name)]


def log_steps(run_dir: Path, first_step: int, last_step: int, *, offset: float = 0.0, total_steps: int = 100) -> None:
    log = RunLog(run_dir, first_step=first_step, total_steps=total_steps, enabled=True)
    for step in range(first_step + 1, last_step + 1):
        log.metrics(step, {"loss": step + offset, "lr": 0.1})
        log.advance()
    log.close()


def test_a_record_is_a_line_on_the_terminal_in_the_file_and_a_point_on_a_curve(tmp_path, capsys):
    log = RunLog(tmp_path, first_step=0, total_steps=50, enabled=True)
    log.metrics(20, {"loss": 0.123456789, "lr": 1.5e-4, "images_per_s": 1234.5, "data_wait_pct": 3.21}, eta_s=3661.4)
    log.close()
    out = capsys.readouterr().out
    assert out == "step 20/50  loss 0.1235  lr 1.50e-04  images_per_s 1234  data_wait_pct 3  eta 1:01:01\n"
    assert records(tmp_path) == [
        {"step": 20, "loss": 0.123456789, "lr": 1.5e-4, "images_per_s": 1234.5, "data_wait_pct": 3.21}
    ]
    assert curve(tmp_path, "loss") == [(20, pytest.approx(0.123456789))]


def test_only_the_main_process_writes_and_speaks(tmp_path, capsys):
    log = RunLog(tmp_path, first_step=0, total_steps=50, enabled=False)
    log.say("hello")
    log.advance()
    log.metrics(1, {"loss": 1.0})
    log.picture(1, "x", np.zeros((4, 4, 3), np.uint8))
    log.close()
    assert not list(tmp_path.iterdir())
    assert capsys.readouterr() == ("", "")


def test_resuming_drops_the_records_of_steps_that_are_done_again(tmp_path):
    log_steps(tmp_path, 0, 10)
    log_steps(tmp_path, 6, 8, offset=0.5)
    expected = [(step, float(step)) for step in range(1, 7)] + [(7, 7.5), (8, 8.5)]
    assert [(record["step"], record["loss"]) for record in records(tmp_path)] == expected
    assert curve(tmp_path, "loss") == expected


def test_starting_anew_drops_all_records(tmp_path):
    log_steps(tmp_path, 0, 5)
    time.sleep(1.1)  # TensorBoard reads a folder's files in the order of their names, which begin with whole seconds
    log_steps(tmp_path, 0, 2, offset=0.5)
    assert [record["loss"] for record in records(tmp_path)] == [1.5, 2.5]
    assert curve(tmp_path, "loss") == [(1, 1.5), (2, 2.5)]


def test_resuming_twice_at_the_same_step_keeps_what_came_before_it(tmp_path):
    log_steps(tmp_path, 0, 10)
    for _ in range(2):
        log_steps(tmp_path, 6, 6)
    assert [record["step"] for record in records(tmp_path)] == list(range(1, 7))


@pytest.mark.parametrize("cut", ['{"step": 7, "lo', "null\n", "[7]\n", '{"loss": 1}\n', "\n"])
def test_a_line_cut_short_by_a_kill_is_dropped(tmp_path, cut):
    log_steps(tmp_path, 0, 6)
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write(cut)
    log_steps(tmp_path, 6, 8)
    assert [record["step"] for record in records(tmp_path)] == list(range(1, 9))


def test_a_last_line_without_its_end_does_not_swallow_the_next_one(tmp_path):
    log_steps(tmp_path, 0, 6)
    path = tmp_path / "metrics.jsonl"
    path.write_text(path.read_text().rstrip("\n"))
    log_steps(tmp_path, 6, 7)
    assert [record["step"] for record in records(tmp_path)] == list(range(1, 8))


def test_a_picture_reaches_tensorboard_as_it_is(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (8, 12, 3), np.uint8)
    log = RunLog(tmp_path, first_step=0, total_steps=1, enabled=True)
    log.picture(1, "reconstructions", pixels)
    log.close()
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    (image,) = events.Images("reconstructions")
    assert (image.step, image.width, image.height) == (1, 12, 8)


APPEND = """
import sys
from pathlib import Path
from quarterlight.ssl.log import append_jsonl
for i in range(100):
    append_jsonl(Path(sys.argv[1]), [{"who": sys.argv[2], "i": i, "x": "y" * 200}] * 2)
"""


def test_processes_may_append_to_one_file(tmp_path):
    path = tmp_path / "x.jsonl"
    writers = [subprocess.Popen([sys.executable, "-c", APPEND, str(path), who]) for who in "ab"]
    assert [writer.wait() for writer in writers] == [0, 0]
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    for who in "ab":
        assert [line["i"] for line in lines if line["who"] == who] == [i for i in range(100) for _ in range(2)]


def test_appending_keeps_what_is_there_and_any_text(tmp_path):
    path = tmp_path / "x.jsonl"
    append_jsonl(path, [{"key": "größe\n"}])
    append_jsonl(path, [{"key": "caf\udce9"}, {"key": 2}])
    append_jsonl(path, [])
    assert [json.loads(line)["key"] for line in path.read_text().splitlines()] == ["größe\n", "caf\udce9", 2]


@pytest.fixture(scope="module")
def accelerator() -> Iterator[Accelerator]:
    AcceleratorState._reset_state(reset_partial_state=True)  # other tests choose another precision
    yield Accelerator(cpu=True)
    AcceleratorState._reset_state(reset_partial_state=True)


def batch(num_bad: int = 0) -> Batch:
    bad = [BadSample("shard", "key", "reason")] * num_bad
    return Batch(torch.zeros(2, 4, 4, 3, dtype=torch.uint8), torch.zeros(2, dtype=torch.long), None, ["a", "b"], bad)


class Clock:
    """A perf_counter that only moves when told to: no test depends on how fast the machine is."""

    def __init__(self, monkeypatch):
        self.now = 100.0
        monkeypatch.setattr("quarterlight.ssl.meter.time.perf_counter", lambda: self.now)

    def batches(self, seconds: float) -> Iterator[Batch]:
        while True:
            self.now += seconds
            yield batch()


def end_step(meter: Meter, norm: float = 1.0, *, skipped: bool = False) -> None:
    meter.end_step(torch.tensor(norm), torch.tensor(float(skipped)))


def test_means_are_over_the_forward_passes_of_an_interval(accelerator):
    meter = Meter(accelerator, 8)
    for loss, accuracy in ((1.0, 0.5), (2.0, 0.7), (6.0, 0.0)):
        meter.add(torch.tensor(loss), {"accuracy": torch.tensor(accuracy)})
    assert float(meter.step_loss()) == pytest.approx(3.0)
    end_step(meter)
    first = meter.read()
    meter.start()
    meter.add(torch.tensor(10.0, dtype=torch.bfloat16), {})
    end_step(meter)
    second = meter.read()
    assert (first["loss"], first["accuracy"]) == (pytest.approx(3.0), pytest.approx(0.4))
    assert second["loss"] == 10.0 and "accuracy" not in second


def test_a_skipped_step_is_in_no_mean_and_a_spike_shows_in_the_largest_norm(accelerator):
    meter = Meter(accelerator, 8)
    for loss, norm, skipped in ((1.0, 2.0, False), (float("nan"), float("inf"), True), (3.0, 40.0, False)):
        meter.add(torch.tensor(loss), {"x": torch.tensor(loss)})
        end_step(meter, norm, skipped=skipped)
    figures = meter.read()
    assert (figures["loss"], figures["x"]) == (2.0, 2.0)
    assert (figures["grad_norm"], figures["grad_norm_max"]) == (21.0, 40.0)
    meter.start()
    meter.add(torch.tensor(float("nan")), {})
    end_step(meter, skipped=True)
    assert math.isnan(meter.read()["loss"])


def test_losses_are_summed_in_float32_and_without_their_graph(accelerator):
    meter = Meter(accelerator, 8)
    weight = torch.ones((), requires_grad=True)
    for _ in range(300):
        meter.add((weight * 1.0).to(torch.bfloat16), {})
        end_step(meter)
    assert not meter.sums["loss"].requires_grad
    assert meter.read()["loss"] == 1.0


def test_bad_samples_are_counted_since_the_start_of_the_process(accelerator):
    meter = Meter(accelerator, 8)
    loader = iter([batch(2), batch(0), batch(3)])
    meter.next_batch(loader)
    meter.add(torch.tensor(1.0), {})
    end_step(meter)
    assert meter.read()["bad_samples"] == 2
    meter.start()
    for _ in range(2):
        meter.next_batch(loader)
        meter.add(torch.tensor(1.0), {})
        end_step(meter)
    assert meter.read()["bad_samples"] == 5


def test_rates_leave_pauses_out_and_count_the_wait_for_data(accelerator, monkeypatch):
    clock = Clock(monkeypatch)
    meter, loader = Meter(accelerator, 10), clock.batches(0.5)
    for _ in range(3):
        meter.next_batch(loader)
        meter.add(torch.tensor(1.0), {})
        clock.now += 1.5
        end_step(meter)
    paused_at = clock.now
    clock.now += 4
    meter.pause(paused_at)
    figures, remaining_s = meter.read(), meter.seconds_for(30)
    assert figures["images_per_s"] == pytest.approx(30 / 6)
    assert figures["data_wait_pct"] == pytest.approx(100 * 1.5 / 6)
    assert remaining_s == pytest.approx(60)
    assert figures["memory_gb"] > 0.05


IN_TWO_PROCESSES = """
import json, sys
import torch
from accelerate import Accelerator
from quarterlight.ssl.batches import BadSample, Batch
from quarterlight.ssl.meter import Meter

accelerator = Accelerator(cpu=True)
rank = accelerator.process_index
bad = [BadSample("s", "k", "r")] * (rank + 1)
batch = Batch(torch.zeros(1, 2, 2, 3, dtype=torch.uint8), torch.zeros(1, dtype=torch.long), None, ["a"], bad)
meter = Meter(accelerator, 8)
meter.next_batch(iter([batch]))
meter.add(torch.tensor(float(1 + 2 * rank)), {})
meter.end_step(torch.tensor(1.0), torch.tensor(0.0))
figures = meter.read()
print(json.dumps([accelerator.num_processes, figures["loss"], figures["bad_samples"]]))
accelerator.end_training()
"""


def test_processes_agree_on_the_mean_loss_and_on_all_bad_samples():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    common = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    common |= {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", IN_TWO_PROCESSES],
            env={**os.environ, **common, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    outputs = [rank.communicate(timeout=60) for rank in ranks]
    assert [json.loads(out) for out, _ in outputs if out] == [[2, 2.0, 3]] * 2, outputs
