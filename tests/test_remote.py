"""Files behind URLs: whole or absent, one request a file, and one sentence when they cannot be had."""

import errno
import os
import subprocess
import sys
import textwrap
from dataclasses import replace
from pathlib import Path

import loopback
import pytest

from quarterlight.ssl import patience as patience_module
from quarterlight.ssl.addresses import folder_of, is_remote, shard_name, shown
from quarterlight.ssl.errors import InputError
from quarterlight.ssl.patience import Patience, persist
from quarterlight.ssl.remote import fetch, glob_remote, read_remote, remove_dead_partials, write_remote

pytest.importorskip("aiohttp")

QUICK = Patience(attempts=4, first_wait_s=0.01, longest_wait_s=0.02, stall_s=20.0)
HASTY = Patience(attempts=20, first_wait_s=0.01, longest_wait_s=0.02, stall_s=0.3)  # for a server that stands still
TAR = os.urandom(200_000)


@pytest.fixture
def web():
    with loopback.web_server() as server:
        server.files["/data/a.tar"] = TAR
        yield server


def left_over(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize(
    ("address", "folder", "name"),
    [
        ("https://me:pw@h/d/a.tar?sig=x/y", "https://me:pw@h/d", "a.tar"),
        ("https://h/d/a.tar", "https://h/d", "a.tar"),
        ("s3://b/d/a?.tar", "s3://b/d", "a?.tar"),
        ("/data/a?.tar", "/data", "a?.tar"),
        ("/a.tar", "/", "a.tar"),
    ],
)
def test_a_signature_is_no_part_of_the_folder_and_name_of_a_shard(address, folder, name):
    assert (folder_of(address), shard_name(address)) == (folder, name)


def test_a_query_that_names_the_shard_tells_it_from_others():
    names = [shard_name(f"https://h/get{query}") for query in ("?file=a", "?file=b", "")]
    assert len(set(names)) == 3 and all(name.startswith("get") and "?" not in name for name in names)


def test_what_is_shown():
    assert shown("https://me:pw@h/d/a.tar?sig=x") == "https://h/d/a.tar"
    assert shown("hf://datasets/me/photos@main/a.tar") == "hf://datasets/me/photos@main/a.tar"
    assert shown("/data/who@home/a?.tar") == "/data/who@home/a?.tar"


def test_is_remote():
    assert is_remote("s3://bucket/a.tar") and is_remote("https://host/a.tar")
    assert not is_remote("/data/a.tar") and not is_remote("train-{000..100}.tar")


@pytest.mark.parametrize("size", [None, len(TAR)])
def test_a_file_comes_whole_by_one_request(web, tmp_path, size):
    fetch(f"{web.url}/data/a.tar", tmp_path / "new" / "a.tar", size=size, patience=QUICK)
    assert (tmp_path / "new" / "a.tar").read_bytes() == TAR
    assert web.requests == ["GET /data/a.tar"]
    assert left_over(tmp_path / "new") == ["a.tar"]


@pytest.mark.parametrize("fault", ["reset", "short", "hold", "mute", "408", "429", "500", "503", "page", "endless"])
def test_what_may_pass_is_tried_again(web, tmp_path, fault):
    web.faults["/data/a.tar"] = [fault, fault, ""]
    stands_still = fault in ("hold", "mute")
    fetch(f"{web.url}/data/a.tar", tmp_path / "a.tar", size=len(TAR), patience=HASTY if stands_still else QUICK)
    assert (tmp_path / "a.tar").read_bytes() == TAR
    assert len(web.requests) == 3 or (stands_still and len(web.requests) > 3)
    assert left_over(tmp_path) == ["a.tar"]


@pytest.mark.parametrize("fault", ["reset", "short", "hold", "503"])
def test_what_does_not_pass_is_one_sentence(web, tmp_path, fault):
    web.faults["/data/a.tar"] = [fault]
    patience = replace(HASTY, attempts=4) if fault == "hold" else QUICK
    with pytest.raises(InputError) as caught:
        fetch(f"{web.url}/data/a.tar", tmp_path / "a.tar", patience=patience)  # the server's own length tells
    assert f"{web.url}/data/a.tar cannot be fetched, 4 times: " in str(caught.value)
    assert "\n" not in str(caught.value)
    assert left_over(tmp_path) == []
    reason = {"503": "answers 503", "hold": "no byte came for 0.3 s"}.get(fault, "")
    assert reason in str(caught.value)


@pytest.mark.parametrize(
    ("fault", "words"),
    [("404", "no such file"), ("410", "no such file"), ("403", "is refused (403)"), ("401", "refused"), ("418", "418")],
)
def test_what_will_not_pass_is_not_tried_again(web, tmp_path, fault, words):
    web.faults["/data/a.tar"] = [fault]
    with pytest.raises(InputError) as caught:
        fetch(f"{web.url}/data/a.tar", tmp_path / "a.tar", patience=QUICK)
    assert words in str(caught.value)
    assert web.requests == ["GET /data/a.tar"]
    assert left_over(tmp_path) == []


def test_a_shard_that_changed_since_its_index_is_named(web, tmp_path):
    with pytest.raises(
        InputError,
        match=r"http.*/data/a.tar cannot be fetched, 3 times: 200000 bytes came where the index says 7, so the shard "
        r"changed since its index was made; .*shards.py index makes a new one.*data.cache_dir/indexes: delete it",
    ):
        fetch(f"{web.url}/data/a.tar", tmp_path / "a.tar", size=7, patience=Patience(first_wait_s=0.01))
    assert len(web.requests) == 3  # the same wrong size each time: it is not the network
    assert left_over(tmp_path) == []


def test_a_web_page_in_place_of_a_shard_is_told(web, tmp_path):
    web.faults["/data/a.tar"] = ["page"]
    with pytest.raises(InputError, match="a web page in place of the shard"):
        fetch(f"{web.url}/data/a.tar", tmp_path / "a.tar", size=len(TAR), patience=QUICK)


@pytest.mark.parametrize("fault", ["to /data/a.tar", "gzip"])
@pytest.mark.parametrize("size", [None, len(TAR)])
def test_redirects_and_compressed_answers(web, tmp_path, fault, size):
    web.files["/b.tar"] = TAR
    web.faults["/b.tar"] = [fault]
    fetch(f"{web.url}/b.tar", tmp_path / "b.tar", size=size, patience=QUICK)
    assert (tmp_path / "b.tar").read_bytes() == TAR


def test_names_with_spaces_and_an_empty_file(web, tmp_path):
    web.files["/my data/ä 1.tar"] = b""
    fetch(f"{web.url}/my data/ä 1.tar", tmp_path / "x", size=0, patience=QUICK)
    assert (tmp_path / "x").read_bytes() == b""


def test_an_older_file_stays_when_a_newer_one_cannot_be_had(web, tmp_path):
    (tmp_path / "a.tar").write_bytes(b"old")
    with pytest.raises(InputError):
        fetch(f"{web.url}/none.tar", tmp_path / "a.tar", patience=QUICK)
    assert (tmp_path / "a.tar").read_bytes() == b"old"


def test_nobody_listens(tmp_path):
    with pytest.raises(
        InputError, match=r"http://127.0.0.1:1/a.tar cannot be fetched, 4 times: .*check the address and"
    ):
        fetch("http://127.0.0.1:1/a.tar", tmp_path / "a.tar", patience=QUICK)
    assert left_over(tmp_path) == []


@pytest.mark.parametrize(
    ("url", "words"), [("nope://x/a.tar", "Protocol not known"), ("http://host:99999/a.tar", "check the address")]
)
def test_addresses_that_are_none(tmp_path, url, words):
    with pytest.raises(InputError, match=words):
        fetch(url, tmp_path / "a.tar")


def test_a_missing_package_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "gcsfs", None)
    monkeypatch.setitem(sys.modules, "aiohttp", None)
    with pytest.raises(InputError, match=r"gs://b/a.tar cannot be fetched: a package.*quarterlight\[remote\]"):
        fetch("gs://b/a.tar", tmp_path / "a.tar")


def test_passwords_and_signatures_stay_out_of_messages(tmp_path):
    with pytest.raises(InputError) as caught:
        fetch("nope://me:secret@host/a.tar?signature=secret", tmp_path / "a.tar")
    assert "nope://host/a.tar " in str(caught.value)
    assert "secret" not in str(caught.value)


def test_a_folder_that_cannot_be_written(web, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match=r"file cannot be written .*data\.cache_dir.*data\.cache_gb"):
        fetch(f"{web.url}/data/a.tar", tmp_path / "file" / "a.tar", patience=QUICK)
    assert web.requests == []


def test_a_full_disk_is_no_matter_of_trying_again(tmp_path):
    calls = []

    def attempt():
        calls.append(1)
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(InputError, match=r"No space left on device.*data\.cache_gb"):
        persist("http://host/a.tar", "fetched", QUICK, attempt, tmp_path)
    assert len(calls) == 1


def test_waits_grow_and_stay_bounded(monkeypatch):
    waits: list[float] = []
    monkeypatch.setattr(patience_module.time, "sleep", waits.append)
    with pytest.raises(InputError, match="9 times"):
        persist("http://host/a", "fetched", Patience(attempts=9, longest_wait_s=4.0), lambda: 1 / 0)
    bounds = [0.5, 1, 2, 4, 4, 4, 4, 4]
    assert all(bound / 2 <= wait <= bound for wait, bound in zip(waits, bounds, strict=True))


def test_read_remote(web):
    assert read_remote(f"{web.url}/data/a.tar", patience=QUICK) == TAR
    assert read_remote(f"{web.url}/data/none", patience=QUICK) is None
    for refused in ("401", "403"):  # so do stores that one may not list answer for what is missing
        web.faults["/data/a.tar"] = [refused, ""]
        assert read_remote(f"{web.url}/data/a.tar", patience=QUICK) is None
    assert read_remote(f"{web.url}/data/a.tar", patience=QUICK) == TAR
    web.faults["/data/a.tar"] = ["503"]
    with pytest.raises(InputError, match="a.tar"):
        read_remote(f"{web.url}/data/a.tar", patience=QUICK)


def test_a_web_server_is_not_written_to(web):
    with pytest.raises(InputError, match="nothing can be written to a web server"):
        write_remote(f"{web.url}/data/index.npz", b"x")
    assert web.requests == []


def test_glob_over_http_reads_the_page_of_the_folder(web):
    web.files["/data/"] = b'<a href="b.tar">b</a> <a href="a.tar">a</a> <a href="index.npz">i</a> <a href="../">up</a>'
    assert glob_remote(f"{web.url}/data/*.tar", patience=QUICK) == [f"{web.url}/data/{x}.tar" for x in "ab"]
    assert glob_remote(f"{web.url}/nothing/*.tar", patience=QUICK) == []


def test_a_kill_leaves_only_a_partial_file_which_is_swept(web, tmp_path):
    web.faults["/data/a.tar"] = ["hold"]
    code = "from quarterlight.ssl.remote import *; import sys; fetch(sys.argv[1], Path(sys.argv[2]))"
    process = subprocess.Popen([sys.executable, "-c", code, f"{web.url}/data/a.tar", str(tmp_path / "a.tar")])
    partial = tmp_path / f".a.tar.{process.pid}.partial"
    while not (partial.exists() and partial.stat().st_size):
        assert process.poll() is None
    remove_dead_partials(tmp_path)  # it is not dead
    assert left_over(tmp_path) == [partial.name]
    process.kill()
    process.wait()
    assert left_over(tmp_path) == [partial.name]
    remove_dead_partials(tmp_path)
    assert left_over(tmp_path) == []


def test_fork_and_exit_after_reading_do_not_hang(web):
    script = """
        import os, sys
        from multiprocessing import get_context
        from quarterlight.ssl.remote import read_remote

        def work():
            pass

        assert read_remote(sys.argv[1])
        worker = get_context("fork").Process(target=work)  # as a loader's
        worker.start()
        worker.join()
        child = os.fork()
        if child == 0:
            sys.exit(0)  # with all that is done at a common exit
        assert os.waitpid(child, 0)[1] == 0 and worker.exitcode == 0
        assert read_remote(sys.argv[1])  # and the parent's connections are as they were
    """
    command = [sys.executable, "-W", "error", "-c", textwrap.dedent(script), f"{web.url}/data/a.tar"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


@pytest.fixture
def bucket(monkeypatch):
    """Gives a folder's URL on moto's server, a stand-in for S3: it speaks the protocol, but is not Amazon's."""
    server_module = pytest.importorskip("moto.server")
    pytest.importorskip("s3fs")
    import fsspec

    server = server_module.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    for name, value in {
        "AWS_ACCESS_KEY_ID": "key",
        "AWS_SECRET_ACCESS_KEY": "secret",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_ENDPOINT_URL": f"http://{host}:{port}",
    }.items():
        monkeypatch.setenv(name, value)
    fsspec.get_filesystem_class("s3").clear_instance_cache()
    fsspec.filesystem("s3").mkdir("bucket")
    yield "s3://bucket/data"
    fsspec.get_filesystem_class("s3").clear_instance_cache()
    server.stop()


def test_s3(bucket, tmp_path):
    assert glob_remote(f"{bucket}/*.tar", patience=QUICK) == []
    for name in ("b.tar", "a.tar", "index.npz"):
        write_remote(f"{bucket}/{name}", TAR + name.encode())
    assert glob_remote(f"{bucket}/*.tar", patience=QUICK) == [f"{bucket}/a.tar", f"{bucket}/b.tar"]
    assert read_remote(f"{bucket}/index.npz", patience=QUICK) == TAR + b"index.npz"
    assert read_remote(f"{bucket}/none", patience=QUICK) is None
    fetch(f"{bucket}/a.tar", tmp_path / "a.tar", size=len(TAR) + 5, patience=QUICK)
    assert (tmp_path / "a.tar").read_bytes() == TAR + b"a.tar"
    with pytest.raises(InputError, match="no such file"):
        fetch("s3://elsewhere/a.tar", tmp_path / "b.tar", patience=QUICK)
    with pytest.raises(InputError, match="s3://elsewhere/a cannot be written"):
        write_remote("s3://elsewhere/a", b"x", patience=QUICK)
    with pytest.raises(InputError, match=f"{bucket}/a.tar cannot .* changed since its index .* index makes a new one"):
        fetch(f"{bucket}/a.tar", tmp_path / "b.tar", size=3, patience=QUICK)
    assert left_over(tmp_path) == ["a.tar"]
