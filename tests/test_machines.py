"""A run over two machines, started as users start it: two network namespaces of this one stand for them."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT, TINY_PRETRAIN, arguments
from hosts import ADDRESSES, two_hosts, why_not

if reason := why_not():
    pytest.skip(reason, allow_module_level=True)

AUDIT = """
import os, sys

folder, root = os.environ["AUDIT_FOLDER"], os.environ["AUDIT_ROOT"]
CHANGES = ("os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.truncate", "os.link", "os.symlink", "os.chmod")


def hook(event, args):
    writes = event == "open" and args[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC)
    if (writes or event in CHANGES) and str(args[0]).startswith(root):
        with_rank = f"{os.environ.get('RANK')} {event} {args[0]}\\n"
        descriptor = os.open(f"{folder}/{os.getpid()}.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.write(descriptor, with_rank.encode())
        os.close(descriptor)


sys.addaudithook(hook)
"""  # sitecustomize.py: every Python process writes down what it changes below AUDIT_ROOT


def run_on_both(folder: Path, options: dict[str, str], *, hidden: Path | None = None, **environment: str):
    """Runs the documented command on both machines. Returns exit codes and what each said.

    On the second one the folder `hidden` is another, empty one.
    """
    config = ROOT / "configs" / "accelerate" / "nodes2_cpu.yaml"
    needed = {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true", "GLOO_SOCKET_IFNAME": "eth0"}
    with two_hosts(folder) as hosts:
        both = []
        for machine in (0, 1):
            words = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(config)]
            words += ["--num_machines", "2", "--num_processes", "4", "--machine_rank", str(machine)]
            words += ["--main_process_ip", ADDRESSES[0], str(ROOT / "launch" / "pretrain.py"), *arguments(options)]
            both.append(
                subprocess.Popen(
                    hosts.words(machine, words, hidden=hidden if machine else None),
                    env=os.environ | needed | environment,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.STDOUT,
                    text=True,
                )
            )
        said = [process.communicate(timeout=240)[0] for process in both]
    return [process.returncode for process in both], said


def seen(run_dir: Path) -> list[tuple]:
    lines = [json.loads(x) for file in run_dir.glob("samples-rank*.jsonl") for x in file.read_text().splitlines()]
    return sorted((x["step"], x["key"], x["pixels"], x["mask"]) for x in lines)


def losses(run_dir: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def test_two_machines_see_and_learn_the_same_as_one_process_and_only_the_first_writes(shards, tmp_path, launch):
    given = TINY_PRETRAIN | {"data.train": shards[0], "record_samples": "true"}
    launch("pretrain.py", given | {"run_dir": str(tmp_path / "one")})
    run_dir, audit = tmp_path / "two", tmp_path / "audit"
    audit.mkdir()
    (audit / "sitecustomize.py").write_text(AUDIT)
    watched = {"PYTHONPATH": str(audit), "AUDIT_FOLDER": str(audit), "AUDIT_ROOT": str(run_dir)}
    codes, said = run_on_both(tmp_path / "hosts", given | {"run_dir": str(run_dir)}, **watched)
    assert codes == [0, 0], "\n".join(said)
    assert seen(run_dir) == seen(tmp_path / "one") and len(seen(run_dir)) == 12 * 8
    assert losses(run_dir) == pytest.approx(losses(tmp_path / "one"), abs=1e-4)
    assert "step 12/12" in said[0] and "step" not in said[1]

    changes = [line.split(" ", 2) for file in audit.glob("*.txt") for line in file.read_text().splitlines()]
    by_rank = {rank: {path for r, _, path in changes if r == rank} for rank in "0123"}
    assert any("config.yaml" in path for path in by_rank["0"])
    for rank in "123":  # apart from the list that was asked for
        assert by_rank[rank] == {str(run_dir / f"samples-rank{rank}.jsonl")}


def test_a_machine_that_does_not_see_the_run_folder_is_refused(shards, tmp_path):
    runs = tmp_path / "runs"
    runs.mkdir()
    given = TINY_PRETRAIN | {"data.train": shards[0], "run_dir": str(runs / "run")}
    codes, said = run_on_both(tmp_path / "hosts", given, hidden=runs)
    assert codes == [1, 1]
    for one in said:
        assert f"run_dir {runs / 'run'}: process 2 (machine1) does not see what process 0 writes there: give a" in one
    assert [path.name for path in (runs / "run").iterdir()] == []
