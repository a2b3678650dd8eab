"""A launcher that is asked to end, or is killed: its processes save their state and end, and the command continues."""

from signal import SIGINT, SIGKILL, SIGTERM, SIGUSR1

import pytest
from launchers import LAUNCHERS, saved_step, signalled
from ranks import LONG, steps_logged


@pytest.mark.parametrize(
    ("launcher", "signals"),
    [
        ("accelerate, 1 process", (SIGTERM, SIGKILL)),  # it tells its process nothing
        ("accelerate, 2 processes", (SIGUSR1, SIGTERM)),
        ("torchrun, 2 processes", (SIGINT,)),
    ],
    ids=lambda value: value if isinstance(value, str) else "-".join(x.name for x in value),
)
def test_processes_save_and_end_with_their_launcher(shards, tmp_path, launcher, signals):
    assert launcher in LAUNCHERS
    run_dir = tmp_path / "run"
    given = LONG | {"data.train": shards[0], "run_dir": str(run_dir)}
    saved = 0
    for i, number in enumerate(signals):
        outcome = signalled(launcher, number, given, run_dir, tmp_path / f"output-{i}.txt")
        if saved:
            assert f"continuing from step {saved} of" in outcome.said
        assert outcome.code != 0  # so that no script takes the run for finished
        saved = saved_step(run_dir)
        assert saved == steps_logged(run_dir) > outcome.began_at  # the last step that was done
        assert f"stopped behind step {saved} of" in outcome.said
