"""Training from shards on a web server: the same samples as from local files, whatever the server does meanwhile."""

import contextlib
import hashlib
import io
import json
import os
import shutil
import signal
import subprocess
import tarfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import loopback
import numpy as np
import pytest
from accelerate.state import AcceleratorState, GradientState, PartialState
from conftest import TINY, TINY_PRETRAIN, arguments, command, write_tars

from quarterlight.finetune.classify import finetune
from quarterlight.finetune.config import FinetuneConfig, LinearProbeConfig
from quarterlight.finetune.linear_probe import linear_probe
from quarterlight.ssl import remote
from quarterlight.ssl.augment import CenterCrop
from quarterlight.ssl.batches import Samples, refuse_bad
from quarterlight.ssl.command import parse_config, run_command
from quarterlight.ssl.config import PretrainConfig
from quarterlight.ssl.errors import InputError
from quarterlight.ssl.fetcher import Fetcher
from quarterlight.ssl.fetching import Fetching, ranks_of_machine, remote_shards
from quarterlight.ssl.index import ShardIndex, open_index, refuse_damage
from quarterlight.ssl.loader import build_loader
from quarterlight.ssl.order import FileOrder
from quarterlight.ssl.patience import Patience
from quarterlight.ssl.pretrain import pretrain
from quarterlight.ssl.shard_cache import is_held
from quarterlight.ssl.spans import EvalSpans

QUICK = Patience(attempts=3, first_wait_s=0.01, longest_wait_s=0.02, stall_s=20.0)
SHARDS, IN_SHARD, VAL_SHARDS = 12, 8, 3
MARK = "QUARTERLIGHT_TEST"  # an environment variable that tells the processes of a test from all others


@dataclass(frozen=True)
class Data:
    """Images of 66 pixels, too large for the array of decoded small images that only local shards have."""

    train: str
    val: str
    files: dict[str, bytes]  # with both indexes, by the path at the server

    @property
    def largest(self) -> int:
        return max(map(len, self.files.values()))


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Data:
    files, globs = {}, {}
    for name, shards in (("train", SHARDS), ("val", VAL_SHARDS)):
        folder = tmp_path_factory.mktemp("shards") / name
        globs[name] = write_tars(folder, name, shards * IN_SHARD, per_shard=IN_SHARD, size=66)
        open_index(globs[name])
        files |= {f"/{name}/{path.name}": path.read_bytes() for path in folder.iterdir()}
    assert len(files) == SHARDS + VAL_SHARDS + 2
    return Data(globs["train"], globs["val"], files)


@pytest.fixture
def web(data):
    with loopback.web_server() as server:
        server.files = dict(data.files)
        yield server


def addresses(web: loopback.WebServer, name: str) -> str:
    return f"{web.url}/{name}/{name}-{{0000..{(SHARDS if name == 'train' else VAL_SHARDS) - 1:04}}}.tar"


def fetches(web: loopback.WebServer, name: str = "train") -> Counter:
    """How often each shard was asked for."""
    paths = [request.partition(" ")[2] for request in list(web.requests)]
    return Counter(path for path in paths if path.startswith(f"/{name}/") and path.endswith(".tar"))


def train_options(train: str, run_dir: Path, **more: str) -> dict[str, str]:
    """Options of a run of one epoch in 12 steps, each of which reads up to four shards of the twelve."""
    return TINY_PRETRAIN | {
        "data.train": train, "run_dir": str(run_dir), "data.lanes": "2", "data.block_samples": "16",
        "record_samples": "true", "log_every_steps": "1",
    } | more  # fmt: skip


def remote_options(web: loopback.WebServer, data: Data, folder: Path, *, room: float = 7, **more: str):
    """The same run from the server, with a cache for `room` shards; the picture at its end is of local images."""
    cache = {"data.cache_dir": str(folder / "cache"), "data.cache_gb": f"{room * data.largest / 1e9:.9f}"}
    return train_options(addresses(web, "train"), folder / "run", **cache, **{"data.val": data.val}) | more


def start(
    given: dict[str, str], stage: Callable[..., Any] = pretrain, kind: type = PretrainConfig, patience=QUICK
) -> Path:
    """Runs a stage in this process, which saves the seconds of a start. Returns its run_dir."""
    made: list[Fetching] = []

    def fetching(*args: Any) -> Fetching:
        made.append(Fetching(*args))
        return made[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ACCELERATE_USE_CPU", "true")
        patch.setattr("quarterlight.ssl.stage.Fetching", fetching)
        patch.setattr("quarterlight.ssl.fetching.Fetcher", partial(Fetcher, patience=patience))
        patch.setattr("quarterlight.ssl.index_files.fetch", partial(remote.fetch, patience=patience))
        for module, name in (
            ("index_files", "read_remote"),
            ("shard_names", "read_remote"),
            ("shard_names", "glob_remote"),
        ):
            patch.setattr(f"quarterlight.ssl.{module}.{name}", partial(getattr(remote, name), patience=patience))
        try:
            stage(parse_config(kind, "", arguments(given)))
        finally:
            for state in (AcceleratorState, PartialState, GradientState):
                state._reset_state()
            for one in made:
                one.close()
    return Path(given["run_dir"])


def refusal(capsys, given: dict[str, str], **more: Any) -> str:
    """Returns the one sentence that a run ends with."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as ended:
        run_command(lambda: None, lambda _: start(given, **more))
    assert ended.value.code == 1
    printed = capsys.readouterr().err
    assert printed.startswith("error: ") and len(printed.splitlines()) == 1, printed
    return printed.strip()


def records(run_dir: Path) -> list[dict[str, Any]]:
    lines = [json.loads(x) for file in run_dir.glob("samples-rank*.jsonl") for x in file.read_text().splitlines()]
    return sorted(lines, key=lambda x: (x["step"], x["key"]))


def shard_of(record: dict[str, Any]) -> str:
    number = int(record["key"].removeprefix("train")) // IN_SHARD
    return f"/train/train-{number:04}.tar"


def logged_steps(run_dir: Path) -> list[int]:
    file = run_dir / "metrics.jsonl"
    text = file.read_text() if file.exists() else ""
    return [json.loads(line)["step"] for line in text.splitlines(keepends=True) if line.endswith("\n")]


def cached_bytes(folder: Path) -> int:
    sizes = []
    for path in folder.glob("shards-*/*.tar"):
        with contextlib.suppress(FileNotFoundError):  # it makes room for another one at this moment
            sizes.append(path.stat().st_size)
    return sum(sizes)


def until(condition: Callable[[], object], process: subprocess.Popen | None = None) -> None:
    """Waits for what is bound to happen; the limit only keeps a failing test from hanging."""
    limit = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < limit, "it never happened"
        assert process is None or process.poll() is None, "the process ended before"
        time.sleep(0.005)


def marked_processes(mark: str) -> list[str]:
    """The command lines of the processes that inherited this mark."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if f"{MARK}={mark}".encode() in (folder / "environ").read_bytes().split(b"\0"):
                found.append((folder / "cmdline").read_text().replace("\0", " "))
        except OSError:
            continue  # it ended, or is somebody else's
    return found


@pytest.fixture(scope="module")
def local(data, tmp_path_factory) -> Path:
    """A run of one process from local shards."""
    return start(train_options(data.train, tmp_path_factory.mktemp("runs") / "local"))


@pytest.fixture(scope="module")
def last_shard(local) -> tuple[str, int]:
    """The shard that a run needs last, by its path at the server, and the first step that needs it."""
    first_steps: dict[str, int] = {}
    for record in records(local):
        first_steps.setdefault(shard_of(record), record["step"])
    assert len(first_steps) == SHARDS
    path, step = max(first_steps.items(), key=lambda item: item[1])
    assert step > 4
    return path, step


# The same as from local shards


def test_two_processes_see_remotely_what_one_sees_locally(web, data, local, tmp_path, launch, monkeypatch):
    monkeypatch.setenv(MARK, str(tmp_path))
    room, sizes = 7.0, []
    web.before = lambda path: sizes.append(cached_bytes(tmp_path / "cache"))
    given = remote_options(web, data, tmp_path, room=room, num_workers="1")
    done = launch("pretrain.py", given, processes=2)
    assert not marked_processes(str(tmp_path))
    assert records(tmp_path / "run") == records(local)
    counts = fetches(web)
    assert set(counts) == {f"/train/train-{i:04}.tar" for i in range(SHARDS)}
    assert max(counts.values()) <= 3 and counts.total() < 2 * SHARDS  # which two that fetch would come to
    assert max([*sizes, cached_bytes(tmp_path / "cache")]) <= room * data.largest
    assert not list((tmp_path / "cache").rglob("*.partial"))
    assert done.stdout.count("step 12/12") == 1
    assert "fetching" not in done.stdout


def test_workers_that_read_ahead_need_no_more_than_the_cache_holds(web, data, local, tmp_path):
    given = remote_options(web, data, tmp_path, room=4.5, num_workers="2")
    assert records(start(given)) == records(local)
    assert cached_bytes(tmp_path / "cache") <= 4.5 * data.largest


def test_a_probe_of_remote_shards_finds_the_figures_of_local_ones(web, data, tmp_path):
    def figures(train: str, val: str, name: str) -> dict[str, Any]:
        given = TINY | {
            "data.train": train, "data.val": val, "run_dir": str(tmp_path / name), "epochs": "3", "batch_size": "16",
            "neighbors": "[5]", "extract_batch_size": "16", "data.cache_dir": str(tmp_path / "cache"),
            "data.cache_gb": f"{5.2 * data.largest / 1e9:.9f}",  # a batch reads two shards, and val has half
        }  # fmt: skip
        return json.loads((start(given, linear_probe, LinearProbeConfig) / "result.json").read_text())

    found = figures(addresses(web, "train"), addresses(web, "val"), "remote")
    assert found == figures(data.train, data.val, "local")
    assert (found["train_images"], found["val_images"]) == (SHARDS * IN_SHARD, VAL_SHARDS * IN_SHARD)
    assert len(fetches(web)) == SHARDS and len(fetches(web, "val")) == VAL_SHARDS
    assert figures(addresses(web, "train"), addresses(web, "val"), "remote") == found  # again, from the kept features


@pytest.mark.parametrize("workers", ["0", "2"])
def test_fine_tuning_evaluates_on_remote_shards_that_the_cache_cannot_hold(web, data, tmp_path, workers):
    def figures(val: str, name: str) -> dict[str, Any]:
        given = TINY | {
            "data.train": data.train, "data.val": val, "run_dir": str(tmp_path / name), "batch_size": "8",
            "steps": "4", "optim.warmup_steps": "1", "evaluate_every_steps": "2", "num_workers": workers,
            "data.cache_dir": str(tmp_path / "cache"), "data.cache_gb": f"{1.5 * data.largest / 1e9:.9f}",
        }  # fmt: skip
        run_dir = start(given, finetune, FinetuneConfig)
        lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
        return {f"{x['step']} {key}": x[key] for x in lines for key in x if key.startswith("val_")}

    found = figures(addresses(web, "val"), "remote")
    assert found == figures(data.val, "local")
    assert found["2 val_images"] == found["4 val_images"] == VAL_SHARDS * IN_SHARD
    assert len(fetches(web, "val")) == VAL_SHARDS and not fetches(web)


def test_a_local_and_a_remote_source_are_mixed_by_their_weights(web, data, tmp_path):
    given = remote_options(web, data, tmp_path, **{"data.train_weights": "[0.5,2]", "data.lanes": "1"})
    given |= {"data.train": f"{data.train}::{addresses(web, 'val')}"}
    seen = Counter(record["key"] for record in records(start(given)))
    own = [count for key, count in seen.items() if key.startswith("train")]
    others = [count for key, count in seen.items() if key.startswith("val")]
    assert (len(own), sum(own)) == (SHARDS * IN_SHARD // 2, SHARDS * IN_SHARD // 2)  # 96 positions are an epoch
    assert len(others) == VAL_SHARDS * IN_SHARD and set(others) == {2}
    assert max(fetches(web, "val").values()) <= 3 and not fetches(web)


def test_left_to_themselves_remote_shards_come_in_blocks_and_eight_lanes(web, data, tmp_path):
    given = remote_options(web, data, tmp_path, room=SHARDS + 1, **{"data.lanes": "null", "data.block_samples": "null"})
    same = {"data.lanes": "8", "data.block_samples": "16384"}
    assert records(start(given)) == records(start(train_options(data.train, tmp_path / "local", **same)))


@pytest.mark.parametrize("lanes", ["null", "2"])
def test_a_run_that_began_with_local_shards_goes_on_with_the_same_samples_or_is_refused(web, data, tmp_path, lanes):
    order = {"data.lanes": lanes, "data.block_samples": "16"}
    run_dir = start(train_options(data.train, tmp_path / "run", **order))
    wanted = records(run_dir)
    shutil.rmtree(run_dir / "state" / "step-00000012")
    (run_dir / "result.json").unlink()
    again = remote_options(web, data, tmp_path, room=SHARDS + 1, **order, **{"data.val": "null"})
    if lanes == "null":  # none for local shards, eight for remote ones
        with pytest.raises(InputError, match="lanes"):
            start(again)
    else:
        start(again)
    assert records(run_dir) == wanted


# The index of what is remote


def test_with_an_index_beside_the_shards_only_what_is_read_is_fetched(web, data, local, tmp_path):
    run_dir = start(remote_options(web, data, tmp_path, steps="1", **{"optim.warmup_steps": "0"}))
    first = [record for record in records(local) if record["step"] == 0]
    assert [(x["key"], x["pixels"]) for x in records(run_dir)] == [(x["key"], x["pixels"]) for x in first]
    assert fetches(web) == Counter({shard_of(record) for record in first})


def test_without_one_each_shard_is_fetched_once_for_it_and_never_again(web, data, local, tmp_path, capsys):
    del web.files["/train/index.npz"]
    short = {"steps": "2", "optim.warmup_steps": "0"}
    start(remote_options(web, data, tmp_path, **short))
    said = capsys.readouterr().out
    assert f"{web.url}/train: no index.npz lists train-0000.tar; fetching {SHARDS} shards once to make one" in said
    used = {shard_of(record) for record in records(local) if record["step"] < 2}
    assert fetches(web) == Counter({f"/train/train-{i:04}.tar": 1 for i in range(SHARDS)}) + Counter(used)
    assert not [path for path in (tmp_path / "cache").iterdir() if path.name.startswith("tmp")]
    web.requests.clear()
    start(remote_options(web, data, tmp_path, run_dir=str(tmp_path / "next"), **short))
    assert not fetches(web)
    assert records(tmp_path / "next") == records(tmp_path / "run")
    assert "fetching" not in capsys.readouterr().out


def written_by_an_older_version(index: bytes, folder: Path) -> bytes:
    file = folder / "old.npz"
    file.write_bytes(index)
    with np.load(file) as columns:
        np.savez(file, **{**columns, "version": np.array(1)})
    return file.read_bytes()


@pytest.mark.parametrize("state", ["an older version", "half", "a web page", "empty"])
def test_an_index_that_cannot_be_used_is_as_none(web, data, tmp_path, state):
    whole = web.files["/train/index.npz"]
    web.files["/train/index.npz"] = {
        "an older version": written_by_an_older_version(whole, tmp_path),
        "half": whole[: len(whole) // 2],
        "a web page": loopback.PAGE,
        "empty": b"",
    }[state]
    index = open_index(f"{web.url}/train/train-{{0000..0002}}.tar", cache_dir=tmp_path / "cache")
    assert index.fingerprint() == open_index(str(Path(data.train).parent / "train-000[012].tar")).fingerprint()
    assert fetches(web) == Counter(f"/train/train-{i:04}.tar" for i in range(3))


def test_only_what_the_index_does_not_list_is_fetched_for_it(web, tmp_path):
    listed = tmp_path / "listed"
    listed.mkdir()
    for i in range(2):
        (listed / f"train-{i:04}.tar").write_bytes(web.files[f"/train/train-{i:04}.tar"])
    open_index(str(listed / "*.tar"))
    web.files["/train/index.npz"] = (listed / "index.npz").read_bytes()
    index = open_index(f"{web.url}/train/train-{{0000..0002}}.tar", cache_dir=tmp_path / "cache")
    assert len(index) == 3 * IN_SHARD
    assert list(fetches(web)) == ["/train/train-0002.tar"]


def seen(web: loopback.WebServer, cache_dir: Path) -> list[tuple[int, str]]:
    """Label and picture of the samples of one shard as they come through the cache."""
    index = open_index(f"{web.url}/one/train-0000.tar", cache_dir=cache_dir)
    fetching = Fetching(10**9, enabled=True)
    fetching.follow(index, [(0, 0)])
    try:
        return [(int(index.label[i]), hashlib.sha256(index.read(i)).hexdigest()) for i in range(len(index))]
    finally:
        fetching.close()


def rewritten_at(web: loopback.WebServer, folder: Path, *, backwards: bool) -> list[tuple[int, str]]:
    """Puts a shard on the server, or the same with its images backwards; returns label and picture of its samples.

    Both are of the same size: a tar is filled up to a multiple of 10,240 bytes.
    """
    folder.mkdir()
    file = folder / "train-0000.tar"
    images = [bytes([value]) * 700 for value in range(4)][:: -1 if backwards else 1]
    with tarfile.open(file, "w") as tar:
        for i, data in enumerate(images):
            for name, content in ((f"{i}.jpg", data), (f"{i}.cls", str(data[0]).encode())):
                member = tarfile.TarInfo(name)
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
    open_index(str(file))
    web.files |= {f"/one/{path.name}": path.read_bytes() for path in folder.iterdir()}
    return [(data[0], hashlib.sha256(data).hexdigest()) for data in images]


def test_a_shard_written_anew_with_the_same_size_is_fetched_anew(web, tmp_path):
    before = rewritten_at(web, tmp_path / "before", backwards=False)
    assert seen(web, tmp_path / "cache") == before
    size = len(web.files["/one/train-0000.tar"])
    after = rewritten_at(web, tmp_path / "after", backwards=True)
    assert size == len(web.files["/one/train-0000.tar"])
    assert seen(web, tmp_path / "cache") == after


@pytest.mark.parametrize("where", ["beside the shards", "in the cache"])
def test_a_shard_written_anew_is_not_read_by_its_old_index(web, tmp_path, monkeypatch, where):
    monkeypatch.setattr("quarterlight.ssl.fetching.Fetcher", partial(Fetcher, patience=QUICK))
    before = rewritten_at(web, tmp_path / "before", backwards=False)
    index = web.files["/one/index.npz"]
    if where == "in the cache":
        del web.files["/one/index.npz"]
        assert seen(web, tmp_path / "cache") == before
        for path in (tmp_path / "cache").glob("shards-*/*.tar"):
            path.unlink()
    rewritten_at(web, tmp_path / "after", backwards=True)
    web.files["/one/index.npz"] = index
    if where == "in the cache":
        del web.files["/one/index.npz"]
    with pytest.raises(InputError, match=r"train-0000.tar cannot be fetched.*other samples came than the index lists"):
        seen(web, tmp_path / "cache")


# Addresses with a signature


def signed(web: loopback.WebServer, signature: str, *, password: str = "") -> str:
    """The shard `one` at an address as stores sign it, longer than a file may be called."""
    address = f"{web.url.replace('://', f'://{password}')}/one/train-0000.tar?X-Signature={signature}/{'b' * 300}"
    path = unquote(address.partition("/one")[2])
    web.files[f"/one{path}"] = web.files["/one/train-0000.tar"]
    return address


@pytest.mark.parametrize("has_index", [True, False])
def test_a_signed_address_is_read_and_signed_anew_it_is_the_same(web, tmp_path, has_index, capsys):
    there = rewritten_at(web, tmp_path / "shards", backwards=False)
    if not has_index:
        del web.files["/one/index.npz"]
    fingerprints = set()
    for signature in ("secret1", "secret2"):
        index = open_index(signed(web, signature), cache_dir=tmp_path / "cache")
        fetching = Fetching(10**9, enabled=True)
        fetching.follow(index, [(0, 0)])
        try:
            assert [hashlib.sha256(index.read(i)).hexdigest() for i in range(4)] == [x for _, x in there]
        finally:
            fetching.close()
        fingerprints.add(index.fingerprint())
    assert fingerprints == {open_index(str(tmp_path / "shards" / "train-0000.tar")).fingerprint()}
    assert sum("/train-0000.tar" in request for request in web.requests) == (1 if has_index else 2)
    assert "secret" not in capsys.readouterr().out


def test_passwords_and_signatures_stay_out_of_what_is_told_of_samples(web, tmp_path):
    rewritten_at(web, tmp_path / "shards", backwards=False)
    web.files["/one/train-0000.tar"] = web.files["/one/train-0000.tar"][:5000]  # the last sample is cut
    del web.files["/one/index.npz"]
    index = open_index(signed(web, "secret", password="me:secret@"), cache_dir=tmp_path / "cache")
    fetching = Fetching(10**9, enabled=True)
    fetching.follow(index, [(0, 0)])
    samples = Samples(index, FileOrder(np.arange(len(index))), CenterCrop((16, 16), 1.0), 0)
    try:
        bad = samples.batch(0, 1).bad
    finally:
        fetching.close()
    told = [*bad, *index.defects, *index.describe_defects(), *index.label_defects()]
    for refuse in (lambda: refuse_bad(bad), lambda: refuse_damage(index)):
        with pytest.raises(InputError) as caught:
            refuse()
        told.append(str(caught.value))
    assert len(told) > 4 and all("/one/train-0000.tar" in str(x) and "secret" not in str(x) for x in told)


# A run that is stopped


def test_a_killed_run_continues_exactly_and_fetches_nothing_twice(web, data, local, last_shard, tmp_path):
    path, step = last_shard
    web.faults = {path: ["mute"]}  # so the run waits at a step that is known, with all other shards at hand
    given = remote_options(web, data, tmp_path, room=SHARDS + 1, save_every_steps="1")
    environment = os.environ | {"OMP_NUM_THREADS": "1", MARK: str(tmp_path), "ACCELERATE_USE_CPU": "true"}
    with subprocess.Popen(
        command("pretrain.py", given), env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    ) as process:
        until(lambda: logged_steps(tmp_path / "run")[-1:] == [step] and len(fetches(web)) == SHARDS, process)
        until(lambda: len(list((tmp_path / "cache").glob("shards-*/*.tar"))) == SHARDS - 1, process)
        assert any("quarterlight.ssl.fetcher" in line for line in marked_processes(str(tmp_path)))
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
    until(lambda: not marked_processes(str(tmp_path)))
    web.release()
    web.requests.clear()
    start(given)
    assert fetches(web) == Counter([path])
    assert records(tmp_path / "run") == records(local)
    assert logged_steps(tmp_path / "run") == list(range(1, 13))
    web.requests.clear()
    assert records(start(given | {"run_dir": str(tmp_path / "again")})) == records(local)
    assert not fetches(web)


# A server that fails in the middle of a run


def test_a_server_that_fails_for_a_while_delays_the_run_and_changes_nothing(web, data, local, tmp_path):
    late = [path for path in web.files if path.endswith(".tar") and path.startswith("/train/")][::2]
    web.faults = {path: ["503", "reset", ""] for path in late}
    start(remote_options(web, data, tmp_path, num_workers="1"))
    assert records(tmp_path / "run") == records(local)
    assert all(fetches(web)[path] >= 3 for path in late)


def test_a_shard_that_is_gone_ends_the_run_with_its_address_and_back_again_it_goes_on(
    web, data, local, last_shard, tmp_path, launch, monkeypatch
):
    monkeypatch.setenv(MARK, str(tmp_path))
    path, step = last_shard
    web.faults = {path: ["404"]}
    given = remote_options(web, data, tmp_path, num_workers="1", save_every_steps="1")
    done = launch("pretrain.py", given, check=False)
    assert done.returncode == 1
    assert done.stderr == f"error: {web.url}{path} cannot be fetched: there is no such file; check the address\n"
    assert not marked_processes(str(tmp_path))
    assert logged_steps(tmp_path / "run")[-1] == step
    assert not (tmp_path / "run" / "result.json").exists()
    web.faults.clear()
    start(given)
    assert records(tmp_path / "run") == records(local)


def test_a_shard_that_only_the_second_process_needs_is_named_all_the_same(web, data, local, tmp_path, launch):
    in_order = [json.loads(line) for line in (local / "samples-rank0.jsonl").read_text().splitlines()]
    first, second = ({shard_of(x) for i, x in enumerate(in_order) if i // 4 % 2 == half} for half in (0, 1))
    missing = min(second - first)
    web.faults = {missing: ["404"]}
    given = remote_options(web, data, tmp_path)
    done = launch("pretrain.py", given, processes=2, check=False)
    assert done.returncode
    assert done.stderr.count(f"{web.url}{missing} cannot be fetched: there is no such file; check the address\n") == 1


def test_a_server_that_is_gone_ends_the_run_with_the_address(web, data, last_shard, tmp_path, capsys):
    path, step = last_shard
    gone: list[str] = []

    def leave(asked: str) -> None:
        if asked == path:
            gone.append(asked)
            web.close()
            raise ConnectionAbortedError

    web.before = leave
    said = refusal(capsys, remote_options(web, data, tmp_path, room=4.5))
    assert gone == [path]
    assert f"{web.url}/train/train-" in said and "cannot be fetched, 3 times: " in said and "network" in said
    assert logged_steps(tmp_path / "run")


def test_a_shard_that_changed_since_its_index_ends_the_run_with_what_to_do(web, data, last_shard, tmp_path, capsys):
    path, _ = last_shard
    web.files[path] += bytes(512)
    said = refusal(capsys, remote_options(web, data, tmp_path))
    assert said.startswith(f"error: {web.url}{path} cannot be fetched") and "since its index was made" in said
    assert "launch/shards.py index makes a new one" in said


def test_a_shard_that_is_never_read_may_be_missing(web, data, tmp_path, last_shard):
    path, step = last_shard
    web.faults = {path: ["404"]}
    run_dir = start(remote_options(web, data, tmp_path, room=SHARDS + 1, steps=str(step)))
    assert logged_steps(run_dir)[-1] == step


# What is wrong from the start


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"data.cache_gb": "0.0000001"}, "data.cache_gb is too little: 1e-07 GB of it are for these shards, and http"),
        ({"data.cache_gb": "0"}, "data.cache_gb is 0.0: it must be above 0"),
        ({"data.train": "WEB/train/train-0*.pkl"}, "matches nothing; most web servers list no files: use braces"),
        ({"data.train": "WEB/nowhere/train-*.tar"}, "matches nothing; most web servers list no files: use braces"),
        ({"data.train": "WEB/train/train-0099.tar"}, "/train/train-0099.tar cannot be fetched: there is no such file"),
        ({"data.train": "https://nowhere.invalid/train-0.tar"}, "https://nowhere.invalid/"),
        ({"data.train": "nonsense://host/train-0.tar"}, "nonsense://host/"),
        ({"data.train": "s3://quarterlight-test/train-0.tar"}, "for a public bucket set FSSPEC_S3_ANON=true"),
        ({"data.val": "WEB/val/val-0099.tar"}, "/val/val-0099.tar cannot be fetched: there is no such file"),
        ({"data.train_weights": "[1,2]"}, "data.train_weights has 2 numbers for 1 sources"),
        ({"data.lanes": "3"}, "data.lanes 3 does not divide batch_size 8: use 1, 2, 4"),
    ],
    ids=lambda x: next(iter(x.items()))[1] if isinstance(x, dict) else "",
)
def test_what_cannot_be_had_is_refused_in_one_sentence(web, data, tmp_path, capsys, monkeypatch, change, said):
    for name in [name for name in os.environ if name.startswith(("AWS_", "FSSPEC_"))]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "none"))
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))
    web.files["/train/"] = b'<a href="train-0000.tar">one</a>'
    change = {key: value.replace("WEB", web.url) for key, value in change.items()}
    with pytest.raises(SystemExit) as ended:
        run_command(lambda: None, lambda _: start(remote_options(web, data, tmp_path) | change))
    printed = capsys.readouterr().err
    assert ended.value.code in (1, 2)
    assert printed.startswith("error: ") and said in printed and len(printed.splitlines()) == 1, printed


def test_a_server_that_lists_its_files_is_asked_for_those_that_match(web, data, tmp_path):
    names = [f"train-{i:04}.tar" for i in range(SHARDS)]
    web.files["/train/"] = "".join(f'<a href="{name}">{name}</a>' for name in [*names, "val.tar"]).encode()
    found = open_index(f"{web.url}/train/train-*.tar", cache_dir=tmp_path)
    assert found.paths == [f"{web.url}/train/{name}" for name in names]
    assert found.fingerprint() == open_index(data.train).fingerprint()


def test_a_cache_too_small_for_one_step_is_refused_with_the_size_it_takes(web, data, tmp_path, capsys):
    said = refusal(capsys, remote_options(web, data, tmp_path, room=1.5))
    assert (
        "data.cache_gb is too little: " in said
        and "one batch reads" in said
        and "lower data.lanes or data.block_samples" in said
    )
    assert not fetches(web)


@pytest.mark.parametrize("index", ["with an index", "without"])
def test_a_cache_folder_that_is_a_file_is_refused(web, data, tmp_path, capsys, index):
    (tmp_path / "cache").write_text("")
    if index == "without":
        del web.files["/train/index.npz"]
    said = refusal(capsys, remote_options(web, data, tmp_path))
    assert f"{tmp_path / 'cache'}" in said and "data.cache_dir" in said


# The fetchers of a run


@pytest.fixture
def index(web, tmp_path) -> ShardIndex:
    return open_index(addresses(web, "train"), cache_dir=tmp_path / "cache")


def test_each_set_has_one_fetcher_that_follows_the_latest_plan(web, data, index):
    fetching = Fetching(10**9, enabled=True)
    try:
        fetching.follow(index, [])
        assert index.cache is not None and is_held_soon(index)
        first = fetching.fetchers[id(index)]
        fetching.follow(index, [(0, 3), (8, 5)])
        (second,) = fetching.fetchers.values()
        assert first.process is None and second.process is not None
        until(lambda: len(list(index.cache.folder.glob("shards-*/*.tar"))) == 2)
        assert set(fetches(web)) == {"/train/train-0003.tar", "/train/train-0005.tar"}
    finally:
        fetching.close()
    assert not fetching.fetchers and second.process is None and not is_held(index.cache.lock)
    fetching.close()
    fetching.advance(index, 3)


def is_held_soon(index: ShardIndex) -> bool:
    until(lambda: is_held(index.cache.lock))  # type: ignore[union-attr]
    return True


def test_without_a_plan_only_what_is_asked_for_is_fetched(web, index):
    fetching = Fetching(10**9, enabled=True)
    try:
        fetching.follow(index)
        for sample in (5 * IN_SHARD, 2 * IN_SHARD, 5 * IN_SHARD + 1):
            index.read(sample)
        assert fetches(web) == Counter(["/train/train-0005.tar", "/train/train-0002.tar"])
    finally:
        fetching.close()


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("persistent", [False, True])
def test_an_evaluation_over_more_than_the_cache_holds_fetches_every_shard_once(web, data, index, workers, persistent):
    room = 4 * data.largest
    fetching = Fetching(room, enabled=True)
    sizes = []
    web.before = lambda path: sizes.append(cached_bytes(index.cache.folder))
    samples = Samples(index, FileOrder(np.arange(len(index))), CenterCrop((16, 16), 1.0), 0)
    spans = EvalSpans(len(index), batch_size=5, rank=0, world_size=1)
    try:
        loader = build_loader(samples, spans, num_workers=workers, persistent=persistent, fetching=fetching)
        for turn in range(2):
            web.requests.clear()
            keys = [key for batch in loader for key in batch.keys]
            assert keys == [index.key(i) for i in range(SHARDS * IN_SHARD)]
            counts = fetches(web)
            assert set(counts.values()) == {1}
            if not turn:  # a second pass finds the last ones there
                assert len(counts) == SHARDS
        assert max([*sizes, cached_bytes(index.cache.folder)]) <= room
    finally:
        fetching.close()


@pytest.mark.parametrize("rank", [0, 1])
def test_a_pass_fetches_what_all_processes_of_its_machine_read(web, data, index, monkeypatch, rank):
    plans = []
    monkeypatch.setenv("LOCAL_RANK", str(rank))
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    fetching = Fetching(10**9, enabled=True)
    monkeypatch.setattr(fetching, "follow", lambda index, plan=(): plans.append(list(plan)))
    samples = Samples(index, FileOrder(np.arange(len(index))), CenterCrop((16, 16), 1.0), 0)
    spans = EvalSpans(len(index), batch_size=IN_SHARD, rank=rank, world_size=4)  # three shards a process
    iter(build_loader(samples, spans, num_workers=0, fetching=fetching))
    assert plans == [[(0, 0), (0, 3), (1, 1), (1, 4), (2, 2), (2, 5)]]


def test_sets_share_the_room_and_later_ones_get_no_more_than_their_size(web, data, index, tmp_path):
    val = open_index(addresses(web, "val"), cache_dir=tmp_path / "cache")
    size = sum(val.cache.sizes)
    for limit, its in ((10 * size, size), (2 * size, size), (size, size // 2)):
        fetching = Fetching(limit, enabled=True)
        fetching.share([index, val])
        assert fetching.limits == {id(index): limit - its, id(val): its}
    fetching.share([index])
    assert fetching.limits[id(index)] == size
    here = open_index(data.val, cache_dir=tmp_path / "cache")
    fetching.share([index, here])  # local shards need none
    assert fetching.limits[id(index)] == size and id(here) not in fetching.limits
    fetching.share([here, val])
    assert fetching.limits[id(val)] == size, "nor do they when they come first"


def test_no_fetcher_for_local_shards_nor_in_other_processes(data, index, tmp_path):
    fetching = Fetching(10**9, enabled=True)
    fetching.follow(open_index(data.train, cache_dir=tmp_path / "cache"))
    assert not fetching.fetchers
    other = Fetching(1, enabled=False)
    other.follow(index)  # too small, which the one process that fetches says
    other.advance(index, 8)
    assert not other.fetchers and not (tmp_path / "cache").exists()


def test_the_room_that_is_asked_for_is_that_of_the_first_step(index):
    largest = max(index.cache.sizes)
    fetching = Fetching(int(2.5 * largest), enabled=True)
    try:
        with pytest.raises(
            InputError, match=r"data.cache_gb is too little: .* GB .*one batch reads 3 of them, .* GB; give several"
        ):
            fetching.follow(index, [(0, 1), (0, 2), (0, 3), (1, 4)])
        assert not fetching.fetchers
        fetching.follow(index, [(0, 1), (0, 2), (1, 3)])
    finally:
        fetching.close()


def test_which_shards_have_to_be_fetched(web, data, tmp_path):
    mixed = open_index([data.val, addresses(web, "train")], cache_dir=tmp_path)
    assert remote_shards(mixed) == frozenset(range(VAL_SHARDS, VAL_SHARDS + SHARDS))
    assert remote_shards(open_index(data.val)) == frozenset()


@pytest.mark.parametrize(
    ("rank", "local_rank", "on_node", "ranks"),
    [
        (0, None, None, [0]),
        (1, "1", "2", [0, 1]),
        (5, "1", "4", [4, 5, 6, 7]),
        (7, "3", "4", [4, 5, 6, 7]),
        (3, "0", "1", [3]),
    ],
)
def test_the_processes_of_a_machine_are_next_to_each_other(monkeypatch, rank, local_rank, on_node, ranks):
    for name, value in (("LOCAL_RANK", local_rank), ("LOCAL_WORLD_SIZE", on_node)):
        monkeypatch.delenv(name, raising=False)
        if value is not None:
            monkeypatch.setenv(name, value)
    assert list(ranks_of_machine(rank)) == ranks
