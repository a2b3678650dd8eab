import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import KILLED_BEFORE

from quarterlight.ssl.files import remove_leftovers, replace_file, replace_folder, write_json, write_text


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_text_and_json_come_back_as_they_were(tmp_path):
    write_text(tmp_path / "a.txt", "größe\n漢字\n")
    assert (tmp_path / "a.txt").read_bytes() == "größe\n漢字\n".encode()
    write_json(tmp_path / "a.json", {"a": [1, None], "b": "ü"})
    assert json.loads((tmp_path / "a.json").read_text()) == {"a": [1, None], "b": "ü"}
    assert names(tmp_path) == ["a.json", "a.txt"]


def test_a_file_is_replaced_and_its_folder_made(tmp_path):
    path = tmp_path / "new" / "deep" / "x"
    for text in ("one", "two"):
        write_text(path, text)
        assert path.read_text() == text
    assert names(path.parent) == ["x"]


def test_the_old_file_is_there_until_the_new_one_is_written(tmp_path):
    path = tmp_path / "x"
    write_text(path, "old")

    def write(partial: Path) -> None:
        partial.write_text("half")
        assert path.read_text() == "old"
        assert partial.parent == tmp_path, "a rename must not cross file systems"

    replace_file(path, write)
    assert path.read_text() == "half"


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / "x"
    write_text(path, "old")

    def fail(partial: Path) -> None:
        partial.write_text("half")
        raise RuntimeError("no more")

    with pytest.raises(RuntimeError, match="no more"):
        replace_file(path, fail)
    assert names(tmp_path) == ["x"]
    assert path.read_text() == "old"


def test_what_is_left_of_a_killed_process_does_not_match_the_pattern_of_the_file(tmp_path):
    seen = []
    replace_file(tmp_path / "train-000000.tar", lambda partial: (partial.touch(), seen.append(partial)))
    assert not seen[0].match("*.tar")
    assert seen[0].name.startswith(".")


@pytest.mark.parametrize(("name", "gone"), [("", "abc"), ("a", "a"), ("b.tar", "b"), ("c", "")])
def test_left_overs_of_one_file_or_of_all_are_deleted(tmp_path, name, gone):
    left = {"a": ".a.1f.partial", "b": ".b.tar.2e.partial", "c": ".ca.3d.partial"}
    others = ["a", "a.partial", ".a.txt", "b.tar"]
    for file in [*left.values(), *others]:
        (tmp_path / file).touch()
    (tmp_path / ".a.folder.partial").mkdir()
    remove_leftovers(tmp_path, name)
    stay = [file for key, file in left.items() if key not in gone]
    assert names(tmp_path) == sorted([*stay, *others, ".a.folder.partial"])


def fill_with(text: str):
    def fill(partial: Path) -> None:
        for name in "abc":
            (partial / name).write_text(text)

    return fill


def read_folder(path: Path) -> dict[str, str]:
    return {file.name: file.read_text() for file in path.iterdir()}


def test_a_folder_is_replaced_as_a_whole(tmp_path):
    path = tmp_path / "new" / "state"
    for text in ("one", "two"):
        replace_folder(path, fill_with(text))
        assert read_folder(path) == dict.fromkeys("abc", text)
        (path / "extra").write_text("not in the next one")
    assert names(path.parent) == ["state"]


def test_a_failed_fill_leaves_the_old_folder_and_nothing_else(tmp_path):
    path = tmp_path / "state"
    replace_folder(path, fill_with("old"))

    def fail(partial: Path) -> None:
        (partial / "a").write_text("half")
        raise RuntimeError("no more")

    with pytest.raises(RuntimeError, match="no more"):
        replace_folder(path, fail)
    assert read_folder(path) == dict.fromkeys("abc", "old")
    assert names(tmp_path) == ["state"]


def test_what_a_killed_process_left_is_not_mixed_into_the_new_folder(tmp_path):
    seen = []
    replace_folder(tmp_path / "state", lambda partial: seen.append(partial))
    seen[0].mkdir()
    (seen[0] / "stale").write_text("half")
    replace_folder(tmp_path / "state", fill_with("new"))
    assert read_folder(tmp_path / "state") == dict.fromkeys("abc", "new")
    assert names(tmp_path) == ["state"]


KILLED_EVERYWHERE = """
import json, os, shutil, signal, sys
from pathlib import Path
from quarterlight.ssl.files import remove_leftovers, replace_file, replace_folder

kind, root = sys.argv[1], Path(sys.argv[2])
EVENTS = {"open", "os.rename", "os.remove", "os.rmdir", "os.mkdir"}


def fill(text):
    def write(partial):
        for name in "abc":
            (partial / name).write_text(text)
    return write


def replace(text):
    if kind == "file":
        replace_file(root / "x", lambda partial: partial.write_text(text))
    else:
        replace_folder(root / "x", fill(text))


def state():
    path = root / "x"
    if path.is_dir():
        return sorted((file.name, file.read_text()) for file in path.iterdir())
    return path.read_text() if path.exists() else None


after_kill, after_retry, number, killed = [], [], 0, True
while killed:
    number += 1
    shutil.rmtree(root, ignore_errors=True)
    root.mkdir()
    replace("old")
    killed = killed_before(number, EVENTS, root, lambda: replace("new"))
    after_kill.append(state())
    replace("newer")
    after_retry.append([state(), sorted(os.listdir(root))])
print(json.dumps([after_kill, after_retry]))
"""


def kill_everywhere(kind: str, root: Path) -> tuple[list, list]:
    """What is there after a SIGKILL before each change on disk, and after another try; the last one is not killed."""
    command = [sys.executable, "-c", KILLED_BEFORE + KILLED_EVERYWHERE, kind, str(root)]
    done = subprocess.run(
        command, capture_output=True, text=True, check=True, env={**os.environ, "PYTHONWARNINGS": "error"}
    )
    after_kill, after_retry = json.loads(done.stdout)
    assert len(after_kill) >= 4
    return after_kill, after_retry


def test_a_kill_at_any_moment_leaves_the_old_file_or_the_new_one(tmp_path):
    after_kill, after_retry = kill_everywhere("file", tmp_path / "root")
    assert after_kill[0] == "old" and after_kill[-1] == "new"
    assert set(after_kill) == {"old", "new"}
    assert all(content == "newer" for content, _ in after_retry)


def test_a_kill_at_any_moment_leaves_no_half_folder_and_the_next_try_cleans_up(tmp_path):
    after_kill, after_retry = kill_everywhere("folder", tmp_path / "root")
    old, new, newer = ([[name, text] for name in "abc"] for text in ("old", "new", "newer"))
    assert after_kill[0] == old and after_kill[-1] == new
    assert all(state in (old, new, None) for state in after_kill)
    assert after_kill.count(None) <= 1, "only between two renames"
    assert all(outcome == [newer, ["x"]] for outcome in after_retry)


def test_files_have_the_usual_permissions_whoever_wrote_them(tmp_path):
    def private(path):
        path.touch(mode=0o600)

    replace_file(tmp_path / "file", private)
    replace_folder(tmp_path / "folder", lambda folder: private(folder / "file"))
    (tmp_path / "usual").touch()
    usual = (tmp_path / "usual").stat().st_mode
    assert (tmp_path / "file").stat().st_mode == (tmp_path / "folder" / "file").stat().st_mode == usual
