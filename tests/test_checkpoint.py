import hashlib
import json
import re
import shutil

import pytest
import torch
from torch import nn

from quarterlight.ssl.checkpoint import (
    Damaged,
    check_state,
    load_model,
    load_moments,
    load_progress,
    newest_state,
    save_state,
    state_folders,
    state_tensors,
)
from quarterlight.ssl.errors import InputError

FILES = ["model.safetensors", "optimizer.safetensors", "ema.safetensors", "progress.json"]


def trained(steps: int) -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Linear(8, 2))
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2, fused=True)
    for step in range(steps):
        step_once(model, optimizer, step)
    return model, optimizer


def step_once(model: nn.Module, optimizer: torch.optim.Optimizer, step: int) -> None:
    torch.manual_seed(step)
    model(torch.randn(16, 4)).square().mean().backward()
    optimizer.step()
    optimizer.zero_grad()


def save(run_dir, step=1, keep=9, **more):
    model, optimizer = trained(1)
    return save_state(run_dir, state_tensors(model, optimizer, model), {"step": step, **more}, keep=keep)


def test_a_loaded_state_continues_with_the_same_bits(tmp_path):
    model, optimizer = trained(3)
    folder = save_state(tmp_path, state_tensors(model, optimizer), {"step": 3, "lr": 0.1}, keep=1)
    resumed, its_optimizer = trained(0)
    load_model(folder, resumed)
    load_moments(folder, resumed, its_optimizer)
    assert load_progress(folder) == {"step": 3, "lr": 0.1}
    for step in range(3, 6):
        step_once(model, optimizer, step)
        step_once(resumed, its_optimizer, step)
    for name, wanted in model.state_dict().items():
        assert torch.equal(resumed.state_dict()[name], wanted), name


def test_only_the_newest_states_stay(tmp_path):
    for step in (1, 2, 10, 9):
        save(tmp_path, step, keep=2)
    assert [folder.name for folder in state_folders(tmp_path)] == ["step-00000009", "step-00000010"]
    assert len(list((tmp_path / "state").iterdir())) == 2


def test_the_same_step_may_be_saved_again(tmp_path):
    for note in ("a", "b"):
        folder = save(tmp_path, note=note)
    assert load_progress(folder)["note"] == "b"
    assert [path.name for path in (tmp_path / "state").iterdir()] == ["step-00000001"]


def test_checksums_are_those_of_any_other_tool(tmp_path):
    folder = save(tmp_path)
    listed = json.loads((folder / "progress.json").read_text())["sha256"]
    assert listed == {name: hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in FILES[:3]}


def flip(path, place):
    content = bytearray(path.read_bytes())
    content[int(place * (len(content) - 1))] ^= 1
    path.write_bytes(content)


def cut(path, share):
    path.write_bytes(path.read_bytes()[: int(share * path.stat().st_size)])


DAMAGE = {
    **{f"{p:g} flipped": lambda path, p=p: flip(path, p) for p in (0, 0.01, 0.3, 0.5, 0.8, 0.99, 1)},
    **{f"cut to {p:g}": lambda path, p=p: cut(path, p) for p in (0, 0.5)},
    "one byte short": lambda path: path.write_bytes(path.read_bytes()[:-1]),
    "one byte more": lambda path: path.write_bytes(path.read_bytes() + b"\n"),
    "removed": lambda path: path.unlink(),
    "a folder": lambda path: (path.unlink(), path.mkdir()),
}


@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize("name", FILES)
def test_a_damaged_state_is_passed_over_for_the_one_before_with_the_reason(tmp_path, name, damage):
    save(tmp_path, 1)
    save(tmp_path, 2)
    newest = save(tmp_path, 3)
    DAMAGE[damage](newest / name)
    folder, said = newest_state(tmp_path)
    assert folder is not None and folder.name == "step-00000002"
    assert len(said) == 1 and re.search(rf"step-00000003: {name} (is|cannot)", said[0])
    assert [path.name for path in state_folders(tmp_path)] == ["step-00000001", "step-00000002"]
    assert (tmp_path / "state" / "damaged-step-00000003").is_dir()
    assert "sha256" not in load_progress(folder)
    save(tmp_path, 3, keep=1)  # a damaged state is none that a rotation keeps
    assert load_progress(state_folders(tmp_path)[-1])["step"] == 3


def test_every_flipped_bit_of_progress_is_noticed(tmp_path):
    folder = save(tmp_path, figures={"loss": 0.123, "name": "ü"})
    path = folder / "progress.json"
    good = path.read_bytes()
    for i in range(len(good)):
        for bit in (1, 32, 128):
            path.write_bytes(good[:i] + bytes([good[i] ^ bit]) + good[i + 1 :])
            with pytest.raises(Damaged):
                check_state(folder)
    path.write_bytes(good)
    check_state(folder)


def test_what_killed_processes_have_left_half_written_goes_when_a_run_continues(tmp_path):
    save(tmp_path, 4)
    for name in (".step-00000003.partial", ".step-00000002.old", ".step-00000009.partial"):
        (tmp_path / "state" / name).mkdir()
        (tmp_path / "state" / name / FILES[0]).write_bytes(b"half")
    newest_state(tmp_path)
    assert [path.name for path in (tmp_path / "state").iterdir()] == ["step-00000004"]


def test_several_damaged_states_are_passed_over(tmp_path):
    for step in (1, 2, 3):
        save(tmp_path, step)
    flip(tmp_path / "state" / "step-00000003" / FILES[0], 0.5)
    shutil.rmtree(tmp_path / "state" / "step-00000002")
    (tmp_path / "state" / "step-00000002").mkdir()
    folder, said = newest_state(tmp_path)
    assert folder is not None and folder.name == "step-00000001" and len(said) == 2


def test_where_no_state_is_whole_the_run_does_not_begin_anew_by_itself(tmp_path):
    flip(save(tmp_path) / FILES[1], 0.5)
    with pytest.raises(
        InputError,
        match=r"no state of .* is whole .*optimizer.safetensors is damaged .* delete .*/state to start again",
    ):
        newest_state(tmp_path)
    assert state_folders(tmp_path)  # nothing was moved away


def test_without_states_there_is_nothing_to_say(tmp_path):
    assert newest_state(tmp_path) == (None, [])


def test_a_state_of_another_model_is_refused(tmp_path):
    folder = save(tmp_path)
    with pytest.raises(InputError, match="cannot be loaded"):
        load_model(folder, nn.Linear(4, 8))
