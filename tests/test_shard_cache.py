"""The cache of remote shards and the process that fills it: bounded, in the plan's order, and clear when it cannot."""

import itertools
import json
import os
import pickle
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Iterator
from multiprocessing import get_context
from pathlib import Path

import loopback
import pytest

from quarterlight.ssl.errors import InputError
from quarterlight.ssl.fetcher import Fetcher
from quarterlight.ssl.look_ahead import LookAhead
from quarterlight.ssl.patience import Patience
from quarterlight.ssl.shard_cache import ShardCache, is_held

QUICK = Patience(attempts=2, first_wait_s=0.01, longest_wait_s=0.02, stall_s=20.0)
SIZE = 300_000  # bytes of a shard
NAMES = [f"train-{i:03}.tar" for i in range(8)]


class InTurns:
    """A plan without end: every ten positions the next of `count` shards, over and over."""

    def __init__(self, count: int) -> None:
        self.count = count

    def __iter__(self) -> Iterator[tuple[int, int]]:
        return ((10 * i, i % self.count) for i in itertools.count())


def body(shard: int) -> bytes:
    return bytes([shard]) * SIZE


@pytest.fixture
def web(monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent))  # the fetcher's process unpickles plans of this file
    with loopback.web_server() as server:
        server.files = {f"/data/{name}": body(i) for i, name in enumerate(NAMES)}
        yield server


@pytest.fixture
def cache(web, tmp_path) -> ShardCache:
    return shard_cache(web, tmp_path / "cache")


def shard_cache(web: loopback.WebServer, folder: Path, *, grace_s: float = 30.0) -> ShardCache:
    return ShardCache(folder, [f"{web.url}/data/{name}" for name in NAMES], [SIZE] * len(NAMES), grace_s=grace_s)


def fetcher(cache: ShardCache, plan, *, shards: float = 100, **more) -> Fetcher:
    return Fetcher(cache, plan, limit_bytes=int(shards * SIZE), patience=QUICK, **more)


def until(condition: Callable[[], object]) -> None:
    """Waits for what is bound to happen; the limit only keeps a failing test from hanging."""
    limit = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < limit, "it never happened"
        time.sleep(0.005)


def size(path: Path) -> int:
    """The size of a file, and 0 where there is none, or no longer."""
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return 0


def complete(cache: ShardCache) -> set[int]:
    return {i for i in range(len(NAMES)) if size(cache.path(i)) == SIZE}


def is_under_way(cache: ShardCache) -> bool:
    """Whether some bytes of a shard have come."""
    return any(size(path) for path in cache.folder.rglob("*.partial"))


def fetched(web: loopback.WebServer) -> list[int]:
    """The shards in the order in which they were asked for."""
    return [NAMES.index(request.rpartition("/")[2]) for request in list(web.requests)]


def read(cache: ShardCache, shard: int) -> bytes:
    descriptor = cache.open(shard)
    try:
        return os.pread(descriptor, 2 * SIZE, 0)
    finally:
        os.close(descriptor)


def all_files(cache: ShardCache) -> list[str]:
    return sorted(path.name for path in cache.folder.rglob("*") if path.is_file())


# Names


def test_a_shard_has_one_place_in_every_run(tmp_path):
    first = ShardCache(tmp_path, ["s3://b/x/a.tar", "s3://b/y/a.tar"], [1, 2])
    again = pickle.loads(pickle.dumps(ShardCache(tmp_path, ["s3://b/y/a.tar"], [2])))
    assert first.path(1) == again.path(0)
    assert first.path(0) != first.path(1)
    assert first.path(0).name.endswith("-a.tar")
    assert first.desk != again.desk


def test_another_state_of_a_shard_has_another_place(tmp_path):
    url = ["s3://b/x/a.tar"]
    caches = [ShardCache(tmp_path, url, [1]), ShardCache(tmp_path, url, [2])]
    caches += [ShardCache(tmp_path, url, [1], ["one"]), ShardCache(tmp_path, url, [1], ["other"])]
    assert len({cache.path(0) for cache in caches}) == len({cache.desk for cache in caches}) == 4


def test_names_that_differ_in_odd_characters_or_the_query_stay_apart(tmp_path):
    urls = [
        f"http://h/d/{name}" for name in ("a b.tar", "a_b.tar", "a/b.tar", "get?f=1", "get?f=2", "", "..", "x" * 300)
    ]
    cache = ShardCache(tmp_path, urls, range(len(urls)))
    paths = {cache.path(i) for i in range(len(urls))}
    assert len(paths) == len(urls)
    assert all(path.parent.parent == tmp_path and len(path.name) < 200 for path in paths)


def test_a_shard_named_twice_is_refused(tmp_path):
    with pytest.raises(InputError, match="s3://b/a.tar is named twice"):
        ShardCache(tmp_path, ["s3://b/a.tar"] * 2, [1, 1])
    with pytest.raises(InputError, match="http://h/a.tar is named twice"):
        ShardCache(tmp_path, ["http://h/a.tar?sig=1", "http://h/a.tar?sig=2"], [1, 1])


def test_an_address_that_is_signed_anew_is_the_same_shard(tmp_path):
    signed = [ShardCache(tmp_path, [f"https://{who}h/d/a.tar?sig={x}"], [1]) for who, x in (("", 1), ("me:pw@", 2))]
    assert signed[0].path(0) == signed[1].path(0)


# The plan


def test_look_ahead_knows_the_next_use_of_each_shard():
    ahead = LookAhead([(0, 3), (0, 1), (10, 3), (20, 2), (30, 1)], [1] * 5, 100)
    assert ahead.extend()
    assert list(ahead.next_uses()) == [3, 1, 2]
    ahead.position = 9
    assert list(ahead.next_uses()) == [3, 1, 2]  # the shards of position 0 are in use until position 10
    assert ahead.turn == 10
    ahead.position = 10
    assert list(ahead.next_uses()) == [3, 2, 1]
    ahead.position = 25
    assert list(ahead.next_uses()) == [2, 1]
    ahead.position = 1000
    assert list(ahead.next_uses()) == [1]


def test_look_ahead_starts_anywhere_in_a_plan_without_end_and_stays_bounded(monkeypatch):
    monkeypatch.setattr("quarterlight.ssl.look_ahead.LONGEST", 5000)
    ahead = LookAhead(InTurns(1000), [1] * 1000, limit_bytes=10)
    ahead.position = 43_219
    while not ahead.extend():
        pass
    assert next(iter(ahead.next_uses())) == 4_321 % 1000
    assert len(ahead.next_uses()) == 41
    few = LookAhead(InTurns(3), [1] * 1000, limit_bytes=10)  # shards that this run never uses do not keep it looking
    assert not few.extend() and not few.extend() and few.extend()
    assert list(few.next_uses()) == [0, 1, 2]


# Fetching ahead


def test_the_plan_is_fetched_in_its_order_and_read(web, cache):
    plan = [(0, 5), (0, 2), (10, 7), (20, 5), (30, 0)]
    with fetcher(cache, plan, parallel=1) as running:
        until(lambda: complete(cache) == {5, 2, 7, 0})
        assert fetched(web) == [5, 2, 7, 0]
        assert all(read(cache, shard) == body(shard) for shard in (5, 2, 7, 0))
        counts = running.close()
    assert (counts.fetched, counts.evicted, counts.fetched_bytes) == (4, 0, 4 * SIZE)
    assert not [name for name in all_files(cache) if name.endswith((".partial", ".wanted", ".failed"))]


def test_the_cache_stays_within_its_bound_and_follows_the_run(web, cache):
    with fetcher(cache, InTurns(8), shards=3.5, parallel=1) as running:
        for turn in range(20):
            running.advance(10 * turn)
            soon = {shard % 8 for shard in range(turn, turn + 3)}
            until(lambda soon=soon: complete(cache) == soon)
            assert sum(size(path) for path in cache.folder.rglob("*.tar")) <= 3.5 * SIZE
        until(lambda: len(web.requests) == 22)
    assert fetched(web) == [shard % 8 for shard in range(22)]


def test_what_is_needed_sooner_is_not_deleted_for_what_comes_later(web, cache):
    with fetcher(cache, [(0, 0), (10, 1), (20, 2), (30, 0), (40, 3)], shards=3, parallel=1) as running:
        until(lambda: complete(cache) == {0, 1, 2})
        running.advance(10)  # shard 0 is needed again before shard 3
        running.advance(20)  # and shard 1 is not
        until(lambda: complete(cache) == {0, 2, 3})
        counts = running.close()
    assert fetched(web) == [0, 1, 2, 3]
    assert counts.evicted == 1


def test_several_at_a_time(web, cache):
    web.faults = {f"/data/{name}": ["hold"] for name in NAMES}
    with fetcher(cache, enumerate(range(8)), parallel=3):
        until(lambda: len(web.requests) == 3)
        web.release()
        until(lambda: complete(cache) == set(range(8)))


def test_a_request_overtakes(web, cache):
    web.faults = {"/data/train-000.tar": ["hold"]}
    with fetcher(cache, enumerate(range(8)), parallel=1):
        until(lambda: web.requests)
        assert read(cache, 6) == body(6)  # while shard 0, in whose place nothing else is fetched ahead, stands still
        assert fetched(web) == [0, 6]
        assert not cache.wanted(6).exists()


class Long:
    """A plan that does not come to where the run is until the file `answered` is there."""

    def __init__(self, answered: Path) -> None:
        self.answered = answered

    def __iter__(self) -> Iterator[tuple[int, int]]:
        position = 0
        while not self.answered.exists():
            yield position, 0
            position += 1
        yield FAR, 1


FAR = 10**9


def test_a_request_does_not_wait_for_the_plan(web, cache, tmp_path):
    with fetcher(cache, Long(tmp_path / "answered")) as running:
        running.advance(FAR)
        assert read(cache, 3) == body(3)
        assert complete(cache) == {3}
        (tmp_path / "answered").touch()
        until(lambda: complete(cache) == {1, 3})


def test_a_request_takes_the_room_of_what_is_needed_last(web, cache):
    with fetcher(cache, enumerate(range(4)), shards=3, parallel=1):
        until(lambda: complete(cache) == {0, 1, 2})
        assert read(cache, 7) == body(7)
        until(lambda: complete(cache) == {0, 1, 2})  # and 7, which the plan does not know, makes room again
    assert fetched(web) == [0, 1, 2, 7, 2]


def test_two_requests_for_the_room_of_one(web, cache):
    with fetcher(cache, [], shards=1.5):
        results: dict[int, bytes] = {}
        readers = [threading.Thread(target=lambda i=i: results.update({i: read(cache, i)})) for i in (3, 4, 5)]
        for reader in readers:
            reader.start()
        for reader in readers:
            reader.join()
    assert results == {i: body(i) for i in (3, 4, 5)}


def read_in_worker(cache: ShardCache, shards: list[int]) -> bool:
    return all(read(cache, shard) == body(shard) for shard in shards)


@pytest.mark.parametrize("start", ["fork", "spawn"])
def test_readers_in_processes(web, cache, start):
    with fetcher(cache, enumerate(range(8)), shards=3), get_context(start).Pool(2) as pool:
        orders = [[0, 1, 2, 3, 4, 5, 6, 7], [7, 3, 3, 1, 5, 0, 2, 6]]
        assert pool.starmap(read_in_worker, [(cache, order) for order in orders], chunksize=1) == [True, True]


def test_the_descriptor_of_a_deleted_shard_still_reads(web, cache):
    with fetcher(cache, enumerate(range(8)), shards=1) as running:
        descriptor = cache.open(0)
        assert not cache.evicted(descriptor)
        running.advance(1)
        until(lambda: complete(cache) == {1})
        assert cache.evicted(descriptor)
        assert os.pread(descriptor, 2 * SIZE, 0) == body(0)
        os.close(descriptor)


# What is there already


def test_a_second_run_starts_warm(web, cache):
    for _ in range(2):
        with fetcher(cache, enumerate(range(4))):
            until(lambda: complete(cache) == {0, 1, 2, 3})
    with fetcher(cache, [(0, 4)]):
        until(lambda: 4 in complete(cache))
    assert sorted(fetched(web)) == [0, 1, 2, 3, 4]


def test_without_a_fetcher_what_is_there_is_read_at_once(web, cache):
    cache.path(2).parent.mkdir(parents=True)
    cache.path(2).write_bytes(body(2))
    assert read(cache, 2) == body(2)


def test_leftovers_and_files_of_a_wrong_size_go(web, cache):
    folder = cache.path(0).parent
    folder.mkdir(parents=True)
    cache.path(0).write_bytes(b"short")
    cache.path(1).write_bytes(body(1) + b"long")
    (folder / ".train-002.tar.1.partial").write_bytes(b"x")
    cache.desk.mkdir()
    cache.failed(5).write_text("an old reason")
    cache.wanted(6).touch()
    with fetcher(cache, [(0, 0)]):
        until(lambda: complete(cache) == {0} and not cache.path(1).exists())
        assert read(cache, 5) == body(5)
    assert all_files(cache) == sorted(["fetcher.lock", "names", cache.path(0).name, cache.path(5).name])


def test_the_shards_of_a_living_run_with_an_older_index_stay(web, tmp_path):
    older = shard_cache(web, tmp_path)
    with fetcher(older, enumerate(range(8))):
        until(lambda: complete(older) == set(range(8)))
        web.files |= {path: data + b"more" for path, data in web.files.items()}
        newer = ShardCache(tmp_path, older.urls, [SIZE + 4] * 8)
        with fetcher(newer, enumerate(range(8))):
            until(lambda: all(size(newer.path(i)) == SIZE + 4 for i in range(8)))
            assert read(older, 3) == body(3) and read(newer, 3) == body(3) + b"more"
            assert complete(older) == set(range(8))


def test_shards_of_ended_runs_make_room_and_those_of_living_ones_stay(web, tmp_path):
    def data(name: str) -> ShardCache:
        web.files |= {f"/{name}/{i}.tar": body(i) for i in range(3)}
        return ShardCache(tmp_path, [f"{web.url}/{name}/{i}.tar" for i in range(3)], [SIZE] * 3)

    def is_full(cache: ShardCache) -> bool:
        return all(cache.path(i).exists() for i in range(3))

    ended, living, new = data("ended"), data("living"), data("new")
    mine = tmp_path / "notes" / "of-the-user.tar"
    mine.parent.mkdir()
    mine.write_bytes(body(0))
    with fetcher(ended, enumerate(range(3))):
        until(lambda: is_full(ended))
    with fetcher(living, enumerate(range(3)), shards=6):
        until(lambda: is_full(living))
        with fetcher(new, enumerate(range(3)), shards=4):
            until(lambda: is_full(new))
            assert is_full(living)
            assert sum(ended.path(i).exists() for i in range(3)) == 1
    assert mine.exists()


def test_two_fetchers_of_the_same_shards(web, tmp_path):
    caches = [shard_cache(web, tmp_path) for _ in range(2)]
    with fetcher(caches[0], InTurns(8), shards=3), fetcher(caches[1], InTurns(8), shards=3):
        for shard in (0, 4, 1, 7, 2, 2, 5):
            assert read(caches[0], shard) == read(caches[1], shard) == body(shard)


# What goes wrong


def test_a_request_that_cannot_be_had_ends_with_the_reason(web, cache):
    web.faults = {"/data/train-003.tar": ["404"]}
    with fetcher(cache, []):
        with pytest.raises(InputError, match=r"data/train-003.tar cannot be fetched: there is no such file"):
            cache.open(3)
        assert not cache.wanted(3).exists()
        del web.faults["/data/train-003.tar"]
        assert read(cache, 3) == body(3)  # an older verdict does not count
        until(lambda: not cache.failed(3).exists())


def test_a_failure_ahead_of_the_run_is_not_fatal(web, cache):
    web.faults = {"/data/train-001.tar": ["403"]}
    with fetcher(cache, enumerate(range(4)), parallel=1):
        until(lambda: complete(cache) == {0, 2, 3})
        del web.faults["/data/train-001.tar"]
        assert read(cache, 1) == body(1)
    assert not cache.failed(1).exists()


def test_a_shard_that_changed_since_its_index(web, cache):
    web.files["/data/train-001.tar"] = b"new"
    with fetcher(cache, [(0, 0)]):
        with pytest.raises(InputError, match="changed since its index was made; python launch/shards.py index"):
            cache.open(1)
        assert read(cache, 0) == body(0)
    assert not cache.path(1).exists()


def test_an_unreachable_host(tmp_path):
    cache = ShardCache(tmp_path, ["http://127.0.0.1:1/a.tar"], [SIZE])
    with fetcher(cache, [(0, 0)]), pytest.raises(InputError, match="127.0.0.1:1/a.tar cannot be fetched, 2 times"):
        cache.open(0)


def test_a_folder_that_cannot_be_written(web, tmp_path):
    (tmp_path / "file").write_text("")
    cache = shard_cache(web, tmp_path / "file")
    with pytest.raises(InputError, match=r"file cannot be written .*data\.cache_dir"):
        fetcher(cache, []).start()
    with pytest.raises(InputError, match=r"data\.cache_dir"):
        cache.open(0)


def test_a_cache_smaller_than_a_shard(cache):
    with pytest.raises(InputError, match=r"data\.cache_gb is too little: 0\.00015 GB .*http.*tar alone has 0\.0003 GB"):
        fetcher(cache, [], shards=0.5)


def test_without_a_fetcher_a_reader_does_not_wait_for_ever(web, tmp_path):
    cache = shard_cache(web, tmp_path, grace_s=0.1)
    with pytest.raises(InputError, match=r"train-000.tar is not in .* the process that fetches shards died"):
        cache.open(0)
    assert not cache.wanted(0).exists()


def test_a_killed_fetcher_leaves_nothing_half_written_and_readers_learn_of_it(web, tmp_path):
    cache = shard_cache(web, tmp_path / "cache", grace_s=1.0)
    web.faults = {"/data/train-000.tar": ["hold", ""]}
    with fetcher(cache, [(0, 0)]) as running:
        until(lambda: is_under_way(cache))
        running.process.kill()
        running.process.wait()
        assert not cache.path(0).exists()
        with pytest.raises(InputError, match="the process that fetches shards died"):
            cache.open(0)
        running.advance(7)  # which is no error here: the readers tell
        assert running.close().fetched == 0
    cache = shard_cache(web, tmp_path / "cache")
    with fetcher(cache, [(0, 0)]):
        assert read(cache, 0) == body(0)
    assert not list(cache.folder.rglob("*.partial"))


def test_close_in_mid_download_leaves_nothing(web, cache):
    web.faults = {"/data/train-000.tar": ["hold"]}
    with fetcher(cache, [(0, 0)]):
        until(lambda: is_under_way(cache))
    assert not list(cache.folder.rglob("*.partial"))


@pytest.mark.parametrize("way", [signal.SIGKILL, signal.SIGINT])
def test_the_fetcher_ends_with_its_parent(web, cache, tmp_path, way):
    web.faults = {"/data/train-000.tar": ["hold"]}
    (tmp_path / "cache.pickle").write_bytes(pickle.dumps(cache))
    script = """
        import os, pickle, sys, time
        from quarterlight.ssl.fetcher import Fetcher
        fetcher = Fetcher(pickle.load(open(sys.argv[1], "rb")), [(0, 0), (1, 1)], limit_bytes=10**9)
        fetcher.start()
        if os.fork() == 0:  # as a loader's worker, which holds the pipe to the fetcher too
            os.close(1)
            for _ in range(3000):
                time.sleep(0 if os.path.exists(sys.argv[1] + ".done") else 0.01)
            os._exit(0)
        print("started", flush=True)
        time.sleep(60)
    """
    command = [sys.executable, "-c", textwrap.dedent(script), str(tmp_path / "cache.pickle")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as parent:
        assert parent.stdout and parent.stdout.readline() == b"started\n"
        until(lambda: is_under_way(cache))
        assert is_held(cache.lock)
        parent.send_signal(way)
        parent.wait()
        until(lambda: not is_held(cache.lock))
        (tmp_path / "cache.pickle.done").touch()
    assert not list(cache.folder.rglob("*.partial"))
    assert complete(cache) <= {1}


def test_ctrl_c_is_the_parents_business(web, cache, capfd):
    web.faults = {"/data/train-000.tar": ["hold"]}
    with fetcher(cache, enumerate(range(3)), parallel=1) as running:
        until(lambda: web.requests)
        running.process.send_signal(signal.SIGINT)
        web.release()
        until(lambda: complete(cache) == {0, 1, 2})
        assert running.close().fetched == 3
    assert capfd.readouterr() == ("", "")


class Broken:
    """A plan that fails in the fetcher's process."""

    def __iter__(self) -> Iterator[tuple[int, int]]:
        raise RuntimeError("a plan that fails")


def test_an_error_that_nobody_foresaw_is_printed_and_ends_the_fetcher(web, tmp_path, capfd):
    cache = shard_cache(web, tmp_path, grace_s=0.5)
    with fetcher(cache, Broken()) as running:
        running.process.wait()
        with pytest.raises(InputError, match="its last words stand above"):
            cache.open(0)
    assert "a plan that fails" in capfd.readouterr().err


def test_positions_are_never_waited_for(web, cache):
    with fetcher(cache, [(0, 0)]) as running:
        until(lambda: complete(cache) == {0})
        os.kill(running.process.pid, signal.SIGSTOP)
        for position in range(20_000):  # more than a pipe holds
            running.advance(position)
        os.kill(running.process.pid, signal.SIGCONT)


def test_nothing_heavy_is_imported():
    code = "import quarterlight.ssl.fetcher, sys, json; print(json.dumps(sorted(sys.modules)))"
    found = json.loads(subprocess.run([sys.executable, "-c", code], capture_output=True, check=True).stdout)
    assert not {"torch", "numpy", "fsspec", "aiohttp"} & set(found)
