import pytest
import torch
from torch import nn

from quarterlight.ssl.checkpoint import load_state, save_state, state_folders
from quarterlight.ssl.errors import InputError


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


def test_a_loaded_state_continues_with_the_same_bits(tmp_path):
    model, optimizer = trained(3)
    folder = save_state(tmp_path, model, optimizer, {"step": 3}, keep=1)
    resumed, its_optimizer = trained(0)
    assert load_state(folder, resumed, its_optimizer) == {"step": 3}
    for step in range(3, 6):
        step_once(model, optimizer, step)
        step_once(resumed, its_optimizer, step)
    for name, wanted in model.state_dict().items():
        assert torch.equal(resumed.state_dict()[name], wanted), name


def test_only_the_newest_states_stay(tmp_path):
    model, optimizer = trained(1)
    for step in (1, 2, 10, 9):
        save_state(tmp_path, model, optimizer, {"step": step}, keep=2)
    assert [folder.name for folder in state_folders(tmp_path)] == ["step-00000009", "step-00000010"]


def test_a_folder_without_progress_is_no_state(tmp_path):
    model, optimizer = trained(1)
    folder = save_state(tmp_path, model, optimizer, {"step": 1}, keep=2)
    (tmp_path / "state" / "step-00000002").mkdir()
    assert state_folders(tmp_path) == [folder]


def test_the_same_step_may_be_saved_again(tmp_path):
    model, optimizer = trained(1)
    for note in ("a", "b"):
        folder = save_state(tmp_path, model, optimizer, {"step": 1, "note": note}, keep=2)
    assert load_state(folder, model, optimizer)["note"] == "b"
    assert [path.name for path in (tmp_path / "state").iterdir()] == ["step-00000001"]


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.safetensors", "progress.json"])
@pytest.mark.parametrize("share", [0, 0.5])
def test_a_cut_off_file_is_refused_by_the_folders_name(tmp_path, name, share):
    model, optimizer = trained(1)
    folder = save_state(tmp_path, model, optimizer, {"step": 1}, keep=2)
    content = (folder / name).read_bytes()
    (folder / name).write_bytes(content[: int(len(content) * share)])
    with pytest.raises(InputError, match="step-00000001: this state cannot be loaded"):
        load_state(folder, model, optimizer)


def test_a_state_of_another_model_is_refused(tmp_path):
    model, optimizer = trained(1)
    folder = save_state(tmp_path, model, optimizer, {"step": 1}, keep=2)
    other = nn.Linear(4, 8)
    with pytest.raises(InputError, match="cannot be loaded"):
        load_state(folder, other, torch.optim.AdamW(other.parameters()))
