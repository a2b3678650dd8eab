"""From patterns to shards: globs, braces, lists, sources, timm's `_info.json`, addresses."""

import json
from pathlib import Path

import pytest

from quarterlight.ssl import shard_names
from quarterlight.ssl.errors import InputError
from quarterlight.ssl.shard_names import shard_paths, sources


def make(folder: Path, *names: str) -> list[str]:
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        (folder / name).touch()
    return [str(folder / name) for name in names]


TRAIN = ("train-000000.tar", "train-000001.tar", "train-000002.tar")


# Sources.


@pytest.mark.parametrize(
    ("patterns", "expected"),
    [
        ("a.tar", ["a.tar"]),
        ("a.tar::b-{0..3}.tar", ["a.tar", "b-{0..3}.tar"]),
        (["a.tar", "b.tar::c.tar"], ["a.tar", "b.tar", "c.tar"]),
        ("s3://bucket/a.tar::https://example.org/b.tar", ["s3://bucket/a.tar", "https://example.org/b.tar"]),
        ("x/_info.json:train::a.tar", ["x/_info.json:train", "a.tar"]),
        ("a.tar::", ["a.tar"]),
        ("http://[::1]:8000/a.tar", ["http://[::1]:8000/a.tar"]),
        ("http://[fe80::1]/a.tar::b-[0-9].tar::c.tar", ["http://[fe80::1]/a.tar", "b-[0-9].tar", "c.tar"]),
    ],
)
def test_a_list_and_double_colons_name_several_sources(patterns, expected):
    assert sources(patterns) == expected


@pytest.mark.parametrize("patterns", ["", [], "::", [""]])
def test_no_pattern_at_all_is_refused(patterns):
    with pytest.raises(InputError, match="no pattern"):
        sources(patterns)


def test_the_brackets_of_an_address_are_no_glob():
    assert shard_paths("http://[::1]:8000/a-{0..1}.tar") == [f"http://[::1]:8000/a-{i}.tar" for i in range(2)]


def test_passwords_and_signatures_stay_out_of_messages():
    for pattern in ("https://me:secret@h/?sig=secret", "https://me:secret@h/{a.tar?sig=secret"):
        with pytest.raises(InputError) as caught:
            shard_paths(pattern)
        assert "secret" not in str(caught.value)


# Paths.


def test_globs_braces_and_plain_paths_name_the_same_shards(tmp_path):
    paths = make(tmp_path, *TRAIN, "val-000000.tar", "train.txt")[:3]
    assert shard_paths(f"{tmp_path}/train-*.tar") == paths
    assert shard_paths(f"{tmp_path}/train-{{000000..000002}}.tar") == paths
    assert shard_paths(f"{tmp_path}/train-00000[0-2].tar") == paths
    assert [x for path in paths for x in shard_paths(path)] == paths


def test_braces_keep_their_order_and_name_each_shard_once(tmp_path):
    paths = make(tmp_path, *TRAIN)
    assert shard_paths(f"{tmp_path}/train-00000{{2,0}}.tar") == [paths[2], paths[0]]
    assert shard_paths(f"{tmp_path}/{{train-000002,train-*,train-000000}}.tar") == [paths[2], paths[0], paths[1]]


def test_braces_may_hold_many_shards_and_globs(tmp_path):
    paths = make(tmp_path, *(f"{i:06d}.tar" for i in range(147)))
    assert shard_paths(f"{tmp_path}/{{000000..000146}}.tar") == paths
    paths = make(tmp_path / "a", "x.tar") + make(tmp_path / "b", "y.tar", "z.tar")
    assert shard_paths(f"{tmp_path}/{{a,b}}/*.tar") == paths


def test_globs_are_sorted(tmp_path):
    paths = make(tmp_path, "b.tar", "c.tar", "a.tar")
    assert shard_paths(f"{tmp_path}/*.tar") == sorted(paths)


def test_relative_paths_and_the_home_folder_are_understood(tmp_path, monkeypatch):
    paths = make(tmp_path / "shards", *TRAIN)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert (
        shard_paths("shards/*.tar") == shard_paths("~/shards/*.tar") == shard_paths("./shards/../shards/*.tar") == paths
    )


@pytest.mark.parametrize("name", ["photos [2024]", "what?", "a*b", "größe 漢字", "with\nnewline", "{one}"])
def test_a_plain_path_may_hold_any_character(tmp_path, name):
    paths = make(tmp_path / name, *TRAIN)
    assert shard_paths(paths[0]) == paths[:1]


def test_a_link_is_named_as_it_is(tmp_path):
    make(tmp_path / "real", "x.tar")
    (tmp_path / "shards").symlink_to("real")
    assert shard_paths(f"{tmp_path}/shards/*.tar") == [f"{tmp_path}/shards/x.tar"]


@pytest.mark.parametrize("name", ["none-*.tar", "none.tar", "{train-000000,none}.tar", "none-{000..002}.tar"])
def test_a_pattern_that_matches_nothing_is_named(tmp_path, name):
    make(tmp_path, *TRAIN)
    with pytest.raises(InputError, match="none.*(matches no file|does not exist)"):
        shard_paths(f"{tmp_path}/{name}")


@pytest.mark.parametrize("name", ["train-{000..009.tar", "train-000..009}.tar", "{a,{b}.tar"])
def test_a_brace_that_is_not_closed_is_refused(tmp_path, name):
    with pytest.raises(InputError, match="braces"):
        shard_paths(f"{tmp_path}/{name}")


def test_a_folder_instead_of_tars_is_refused_with_a_pattern_that_works(tmp_path):
    make(tmp_path / "shards", *TRAIN)
    for pattern in (f"{tmp_path}/shards", f"{tmp_path}/*"):
        with pytest.raises(InputError, match=r"shards is a folder.*shards/train-\*\.tar"):
            shard_paths(pattern)


# timm's index of a data set.


def write_info(folder: Path, filenames: object, name: str = "_info.json") -> None:
    split = {"name": "train", "filenames": filenames, "shard_lengths": [2, 2, 1], "num_samples": 5}
    info = {"splits": {"train": split, "validation": {"name": "validation", "filenames": ["val-000000.tar"]}}}
    (folder / name).write_text(json.dumps(info))


@pytest.mark.parametrize("filenames", [list(TRAIN), "train-{000000..000002}.tar", ["train-{000000..000002}.tar"]])
@pytest.mark.parametrize("name", ["_info.json", "info.json"])
def test_the_splits_of_timms_index_are_understood(tmp_path, filenames, name):
    paths = make(tmp_path, *TRAIN, "val-000000.tar")
    write_info(tmp_path, filenames, name)
    assert shard_paths(f"{tmp_path}/{name}:train") == paths[:3]
    assert shard_paths(f"{tmp_path}/{name}:validation") == paths[3:]
    assert shard_paths(f"{tmp_path}/{name}:{{train,validation}}") == paths


def test_timms_index_is_found_below_the_working_folder(tmp_path, monkeypatch):
    paths = make(tmp_path, *TRAIN)
    write_info(tmp_path, list(TRAIN))
    monkeypatch.chdir(tmp_path)
    assert shard_paths("_info.json:train") == paths


def test_the_shards_of_timms_index_may_lie_in_other_folders(tmp_path):
    make(tmp_path / "sub", "x.tar")
    write_info(tmp_path, ["sub/x.tar"])
    assert shard_paths(f"{tmp_path}/_info.json:train") == [str(tmp_path / "sub" / "x.tar")]


@pytest.mark.parametrize("split", ["", ":", ":test"])
def test_a_split_that_is_not_there_is_refused_with_those_that_are(tmp_path, split):
    make(tmp_path, *TRAIN)
    write_info(tmp_path, list(TRAIN))
    with pytest.raises(InputError, match="train, validation"):
        shard_paths(f"{tmp_path}/_info.json{split}")


NO_SPLITS = [b"", b"{", b"[]", b"3", b"{}", b"\xff", b'{"splits": []}']
NO_SPLITS += [b'{"splits": {"train": %s}}' % x for x in (b"{}", b"3", b"null")]
NO_SPLITS += [b'{"splits": {"train": {"filenames": %s}}}' % x for x in (b"3", b"null", b"[3]", b'"{a"')]


@pytest.mark.parametrize("content", NO_SPLITS)
def test_an_index_of_another_kind_is_refused(tmp_path, content):
    (tmp_path / "_info.json").write_bytes(content)
    with pytest.raises(InputError, match="_info.json lists no splits"):
        shard_paths(f"{tmp_path}/_info.json:train")


def test_an_index_that_is_not_there_or_names_missing_shards_is_refused(tmp_path):
    with pytest.raises(InputError, match="_info.json does not exist"):
        shard_paths(f"{tmp_path}/_info.json:train")
    write_info(tmp_path, list(TRAIN))
    with pytest.raises(InputError, match="train-000000.tar does not exist"):
        shard_paths(f"{tmp_path}/_info.json:train")


def test_a_split_without_shards_is_refused(tmp_path):
    write_info(tmp_path, [])
    with pytest.raises(InputError, match="train"):
        shard_paths(f"{tmp_path}/_info.json:train")


# Addresses.


@pytest.mark.parametrize("start", ["https://example.org/data", "s3://bucket", "gs://bucket/a", "hf://datasets/a/b"])
def test_braces_in_an_address_are_expanded_without_asking_the_server(start, monkeypatch):
    monkeypatch.setattr(shard_names, "glob_remote", None)
    monkeypatch.setattr(shard_names, "read_remote", None)
    expected = [f"{start}/{i:03d}.tar" for i in range(147)]
    assert shard_paths(f"{start}/{{000..146}}.tar") == expected
    assert shard_paths(expected[5]) == expected[5:6]


@pytest.mark.parametrize("address", ["http://host", "http://host/", "https://h/?a=b", "s3://bucket", "s3://bucket/a/"])
def test_an_address_without_a_tars_name_is_refused_at_once(address, monkeypatch):
    monkeypatch.setattr(shard_names, "glob_remote", None)
    monkeypatch.setattr(shard_names, "read_remote", None)
    with pytest.raises(InputError, match=r"names no tar; write .*/train-\{000\.\.146\}\.tar") as caught:
        shard_paths(address)
    said = str(caught.value)
    assert address.partition("?")[0] in said and "\n" not in said and "//train" not in said


def test_a_query_in_an_address_is_no_glob(monkeypatch):
    monkeypatch.setattr(shard_names, "glob_remote", None)
    address = "https://example.org/0.tar?signature=a*b[c]"
    assert shard_paths(address) == [address]


def test_a_glob_in_an_address_asks_the_server(monkeypatch):
    found = {"s3://b/*.tar": ["s3://b/0.tar", "s3://b/1.tar"]}
    monkeypatch.setattr(shard_names, "glob_remote", lambda pattern: found.get(pattern, []))
    assert shard_paths("s3://b/*.tar") == found["s3://b/*.tar"]
    with pytest.raises(InputError, match="https://example.org.*use braces"):
        shard_paths("https://example.org/*.tar")


def test_timms_index_is_read_from_an_address(monkeypatch):
    info = {"splits": {"train": {"filenames": "t-{0..2}.tar"}}}
    files = {"hf://datasets/a/b/_info.json": json.dumps(info).encode()}
    monkeypatch.setattr(shard_names, "read_remote", files.get)
    expected = [f"hf://datasets/a/b/t-{i}.tar" for i in range(3)]
    assert shard_paths("hf://datasets/a/b/_info.json:train") == expected
    with pytest.raises(InputError, match="does not exist"):
        shard_paths("hf://datasets/a/c/_info.json:train")
