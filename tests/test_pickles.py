"""Pickles of others: data comes out, code does not run."""

import argparse
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from quarterlight.ssl.errors import InputError
from quarterlight.ssl.pickles import read_pickled


class Planted:
    """What a pickle would call."""

    def __init__(self, function: Any, *args: Any) -> None:
        self.call = function, args

    def __reduce__(self) -> tuple[Any, Any]:
        return self.call


def saved(path: Path, content: Any) -> Path:
    torch.save(content, path)
    return path


def test_arguments_beside_the_tensors_are_data(tmp_path):
    args = argparse.Namespace(norm_pix_loss=True, output_dir=Path("/x"), lr=1e-3)
    others = {"epoch": 3, "max_accuracy": np.float64(3), "best": np.int64(4), "scaler": {"scale": 65536.0}}
    tensors, said = read_pickled(saved(tmp_path / "x.pth", {"model": {"a": torch.ones(2)}, "args": args, **others}))
    assert torch.equal(tensors["a"], torch.ones(2))
    assert said["norm_pix_loss"] is True and said["place"] == "model"


@pytest.mark.parametrize(
    ("content", "place"),
    [
        ({"a": torch.ones(1)}, None),
        ({"teacher": {"a": torch.ones(1)}, "student": {"a": torch.zeros(1)}}, "teacher"),
        ({"state_dict": {"model": {"a": torch.ones(1)}}}, "state_dict.model"),
        ({"model": {}, "state_dict": {"a": torch.ones(1)}}, "state_dict"),
        ({"model": {"a": torch.zeros(1)}, "model_ema": {"a": torch.ones(1)}}, "model_ema"),
        ({"model": {"a": torch.zeros(1)}, "model_ema": None, "state_dict_ema": {"a": torch.ones(1)}}, "state_dict_ema"),
        ({"model": torch.nn.ParameterDict({"a": torch.nn.Parameter(torch.ones(1))}).state_dict()}, "model"),
    ],
)
def test_state_dicts_are_found_where_they_lie(tmp_path, content, place):
    tensors, said = read_pickled(saved(tmp_path / "x.pth", content))
    assert torch.equal(tensors["a"], torch.ones(1)) and not tensors["a"].requires_grad
    assert said.get("place") == place


def test_what_lies_beside_the_model_is_not_read_into_memory(tmp_path, monkeypatch):
    """Of an archive; files in the format of before torch 1.6 are read as they were."""
    content = {"model": {"a": torch.arange(3.0)}, "optimizer": {"b": torch.zeros(1000)}}
    load, mapped = torch.load, []
    monkeypatch.setattr(torch, "load", lambda *args, **how: mapped.append(how["mmap"]) or load(*args, **how))
    torch.save(content, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    for path in (saved(tmp_path / "x.pth", content), tmp_path / "old.pth"):
        assert torch.equal(read_pickled(path)[0]["a"], torch.arange(3.0))
    assert mapped == [True, False]


def test_code_is_named_and_does_not_run(tmp_path):
    proof = tmp_path / "ran"
    planted = {
        "posix.system|os": Planted(os.system, f"touch {proof}"),
        "builtins.eval|eval": Planted(eval, f"open({str(proof)!r}, 'w')"),
        "getattr": Planted(Path.touch, proof),
        "numpy.load": Planted(np.load, str(proof)),
    }
    for said, code in planted.items():
        for content in ({"model": {"a": torch.ones(1)}, "args": code}, code):
            with pytest.raises(InputError, match=f"it names .*({said}).*, which is code and was not run"):
                read_pickled(saved(tmp_path / "x.pth", content))
    assert not proof.exists()


def test_names_that_are_let_through_do_nothing_either(tmp_path):
    """A pickle may call what stands for numpy's scalars and paths with anything."""
    import pathlib

    kept = Planted(pathlib.PosixPath, str(tmp_path / "ran"))
    tensors, _ = read_pickled(saved(tmp_path / "x.pth", {"model": {"a": torch.ones(1)}, "args": {"x": kept}}))
    assert tensors.keys() == {"a"} and not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ({"optimizer": {"state": {}, "param_groups": []}}, "no tensors by name, but an optimizer's state"),
        ({"state": {0: {"step": torch.ones(1)}}, "param_groups": []}, "no tensors by name, but an optimizer's state"),
        ({0: torch.ones(1)}, "no tensors by name$"),
        ([torch.ones(1)], "no tensors by name$"),
    ],
)
def test_files_without_tensors_by_name_are_refused(tmp_path, content, said):
    with pytest.raises(InputError, match=said):
        read_pickled(saved(tmp_path / "x.pth", content))


def test_files_that_are_no_pickles_are_refused(tmp_path):
    whole = saved(tmp_path / "x.pth", {"a": torch.ones(1000)}).read_bytes()
    for content in (b"", b"text", whole[:-200], b"\x80\x02}q\x00."):
        (tmp_path / "y.pth").write_bytes(content)
        with pytest.raises(InputError, match="y.pth: (not a .safetensors file|holds no tensors)"):
            read_pickled(tmp_path / "y.pth")
