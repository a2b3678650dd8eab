"""launch/neighbors.py on real files; the search itself is in test_knn.py."""

import csv
import json
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from classifiers import ENVIRONMENT, classifier, images
from conftest import command, write_tars
from PIL import Image

from quarterlight.finetune.embed import embed
from quarterlight.finetune.neighbors import neighbors
from quarterlight.finetune.use_config import CropConfig, EmbedConfig, NeighborsConfig
from quarterlight.ssl.errors import InputError
from quarterlight.ssl.index import open_index


@pytest.fixture(scope="module")
def bank(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("bank")
    init, _ = classifier(folder, classes=0)
    glob = write_tars(folder / "shards", "val", 25, size=16)
    given = {"precision": "no", "num_workers": 0, "data": CropConfig(crop_pct=1.0)}
    embed([glob], EmbedConfig(init=str(init), out=str(folder / "e.safetensors"), **given))
    return folder / "e.safetensors"


def table(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_the_command_finds_an_image_by_itself_and_draws_it(bank, tmp_path):
    paths = images(tmp_path / "photos", 3)
    shard = open_index(str(bank.parent / "shards" / "val-*.tar"))
    (tmp_path / "photos" / "a copy $.png").write_bytes(shard.read(11))
    (tmp_path / "photos" / "broken.png").write_bytes(b"no image")
    given = {"embeddings": str(bank), "queries": str(tmp_path / "photos"), "out": str(tmp_path / "out")}
    line = command("neighbors.py", given | {"top_k": "3", "num_workers": "0"})
    done = subprocess.run(line, env=ENVIRONMENT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    rows = table(tmp_path / "out" / "neighbors.csv")
    assert [row["rank"] for row in rows] == ["1", "2", "3"] * (len(paths) + 1), "a broken image has no neighbors"
    first = next(row for row in rows if row["query_key"] == "a copy $.png")
    assert (first["key"], first["rank"], first["label"]) == ("val00011", "1", "3")
    assert float(first["similarity"]) == pytest.approx(1, abs=1e-5)
    with Image.open(tmp_path / "out" / "neighbors.png") as picture:
        assert picture.size[0] >= 600
    assert json.loads((tmp_path / "out" / "result.json").read_text())["queries"] == 5


def test_without_queries_every_image_looks_among_the_others(bank, tmp_path):
    result = neighbors(NeighborsConfig(embeddings=str(bank), out=str(tmp_path), top_k=2, pictures=0))
    rows = table(tmp_path / "neighbors.csv")
    assert len(rows) == 50 and all(row["query_key"] != row["key"] for row in rows)
    same = np.mean([row["query_label"] == row["label"] for row in rows])
    assert result["same_label_pct"] == pytest.approx(100 * same)
    assert not (tmp_path / "neighbors.png").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"embeddings": "nowhere.safetensors"}, "nowhere.safetensors: no such file"),
        ({"top_k": 25}, "top_k is 25, and there are 25 images in .*, the query among them"),
        ({"queries": "nowhere"}, "nowhere: no such file or folder"),
        ({"queries": ["a.safetensors", "b"]}, "2 are given, the first a file of embeddings: give that alone"),
        ({"queries": "nowhere", "init": "other"}, "init .*other.* holds other weights"),
        ({"embeddings": "weights"}, "is no file of embeddings, as launch/embed.py writes them"),
    ],
)
def test_what_is_wrong_is_named(bank, tmp_path, options, message):
    given = {"embeddings": str(bank), "out": str(tmp_path / "out"), "num_workers": 0} | options
    if given.get("init") == "other":
        torch.manual_seed(1)
        given["init"] = str(classifier(tmp_path / "other", classes=3)[0])
    if given["embeddings"] == "weights":
        given["embeddings"] = str(bank.parent / "encoder.safetensors")
    with pytest.raises(InputError, match=message):
        neighbors(NeighborsConfig(**given))
