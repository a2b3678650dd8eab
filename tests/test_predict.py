"""Predictions for folders, files and shards: what is in the file, in which order, and after kills."""

import csv
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch
from classifiers import ENVIRONMENT, MEAN, STD, SWIN, VIT, classifier, images, pixels, prepared
from conftest import KILLED_BEFORE, TINY, arguments, command, write_tars
from safetensors.torch import load_file
from timm.data import create_transform
from timm.models.vision_transformer import checkpoint_filter_fn

from quarterlight.finetune.embed import embed
from quarterlight.finetune.predict import predict
from quarterlight.finetune.rows import images_in_a_part
from quarterlight.finetune.use_config import CropConfig, EmbedConfig, PredictConfig
from quarterlight.ssl.errors import InputError

NAMES = ["ant", "bee", "cat", "dog"]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return classifier(tmp_path_factory.mktemp("model"), class_names=NAMES)


def config(init: Path, out: Path, **more) -> PredictConfig:
    given = {"precision": "no", "num_workers": 0, "data": CropConfig(crop_pct=1.0), "part_images": 3, "batch_size": 2}
    return PredictConfig(init=str(init), out=str(out), **(given | more))


def table(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_predictions_are_those_of_timms_model_with_torchvisions_preprocessing(model, tmp_path):
    paths = images(tmp_path / "images")
    assert predict([str(tmp_path / "images")], config(model[0], tmp_path / "out.csv", top_k=4)) == 0
    rows = table(tmp_path / "out.csv")
    with torch.no_grad():
        wanted = model[1](prepared(paths)).softmax(dim=1)
    assert [row["path"] for row in rows] == list(map(str, paths))
    assert [row["key"] for row in rows] == [str(path.relative_to(tmp_path / "images")) for path in paths]
    for row, probabilities in zip(rows, wanted, strict=True):
        order = probabilities.argsort(descending=True).tolist()
        assert [int(row[f"class_{k}"]) for k in (1, 2, 3, 4)] == order
        assert [row[f"name_{k}"] for k in (1, 2, 3, 4)] == [NAMES[i] for i in order]
        found = torch.tensor([float(row[f"prob_{k}"]) for k in (1, 2, 3, 4)])
        torch.testing.assert_close(found, probabilities[order], atol=1e-5, rtol=0)
        assert (row["error"], row["label"]) == ("", "")
    assert not list(tmp_path.glob("*.parts"))


def test_a_swin_and_another_image_size_are_those_of_timm_within_the_rounding_of_a_resize(tmp_path):

    file, swin = classifier(tmp_path, "swin_tiny_patch4_window7_224", SWIN)
    paths = images(tmp_path / "images", 4, side=90)
    predict([str(tmp_path / "images")], config(file, tmp_path / "out.csv", top_k=4, data=CropConfig(crop_pct=0.8)))
    transform = create_transform((3, 64, 64), mean=MEAN, std=STD, interpolation="bicubic", crop_pct=0.8)
    with torch.no_grad():
        wanted = swin(torch.stack([transform(pixels(path)) for path in paths])).softmax(dim=1)
    for row, probabilities in zip(table(tmp_path / "out.csv"), wanted, strict=True):
        found = {int(row[f"class_{k}"]): float(row[f"prob_{k}"]) for k in (1, 2, 3, 4)}
        assert found == pytest.approx(dict(enumerate(probabilities.tolist())), abs=0.02)


def test_images_that_cannot_be_read_have_a_row_that_says_why(model, tmp_path, capsys):
    paths = images(tmp_path / "images")
    paths[2].write_bytes(b"no image")
    paths[4].write_bytes(paths[4].read_bytes()[:60])
    given = [str(tmp_path / "images")]
    assert predict(given, config(model[0], tmp_path / "out.csv")) == 0
    said = capsys.readouterr().err
    assert "2 of 7 images could not be read" in said and paths[2].name in said
    rows = table(tmp_path / "out.csv")
    assert [bool(row["error"]) for row in rows] == [i in (2, 4) for i in range(7)]
    assert rows[2]["class_1"] == rows[2]["prob_1"] == rows[2]["name_1"] == "" and rows[3]["class_1"] != ""
    assert predict(given, config(model[0], tmp_path / "out.csv", strict=True)) == 1
    before = (tmp_path / "out.csv").read_bytes()
    with pytest.raises(InputError, match="none of 2 images could be read"):
        predict([str(paths[2]), str(paths[4])], config(model[0], tmp_path / "out.csv"))
    assert (tmp_path / "out.csv").read_bytes() == before, "a refusal overwrote what was there"


def test_files_are_read_in_the_order_given_and_parquet_says_the_same_as_csv(model, tmp_path):
    arrow = pytest.importorskip("pyarrow.parquet")
    paths = images(tmp_path / "images")
    given = [str(path) for path in (paths[3], paths[0], paths[6], paths[1])]
    for suffix in (".csv", ".parquet"):
        predict(given, config(model[0], tmp_path / f"out{suffix}"))
    rows = table(tmp_path / "out.csv")
    assert [row["path"] for row in rows] == given
    read = arrow.read_table(tmp_path / "out.parquet").to_pylist()
    assert [
        {k: "" if v is None else f"{v:.6g}" if isinstance(v, float) else str(v) for k, v in x.items()} for x in read
    ] == rows


def test_a_killed_command_goes_on_and_ends_with_the_same_bytes(model, tmp_path):
    glob = write_tars(tmp_path / "shards", "val", 50)
    predict([glob], config(model[0], tmp_path / "whole.csv"))
    code = f"""{KILLED_BEFORE}
from test_predict import config, predict
from pathlib import Path
import json
init, out = Path({str(model[0])!r}), Path({str(tmp_path / "out" / "x.csv")!r})
out.parent.mkdir()
left = []
for number in (1, 4, 6, 9, 3):
    kill = killed_before(number, {{"os.rename"}}, out.parent, lambda: predict([{glob!r}], config(init, out)))
    left.append((kill, out.exists(), len(list(out.parent.glob("x.csv.parts/0*")))))
print(json.dumps(left))
"""
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=Path(__file__).parent, env=ENVIRONMENT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    # Before the facts; behind 2, 5 and 8 more of the 17 parts; and before the table gets its name.
    found = json.loads(done.stdout.splitlines()[-1])
    assert found == [[True, False, parts] for parts in (0, 2, 7, 15, 17)]
    predict([glob], config(model[0], tmp_path / "out" / "x.csv"))
    assert (tmp_path / "out" / "x.csv").read_bytes() == (tmp_path / "whole.csv").read_bytes()
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["x.csv"]


def test_parts_are_small_enough_for_many_processes_to_share_them():
    assert [images_in_a_part(n, 8192) for n in (1, 16_384, 100_000, 10**7)] == [256, 256, 1563, 8192]
    assert images_in_a_part(100, 4) == 4


def test_parts_of_another_command_are_refused_and_kept(model, tmp_path):
    images(tmp_path / "images")
    parts = tmp_path / "out.csv.parts"
    parts.mkdir()
    (parts / "command.json").write_text(json.dumps({"command": "predict", "top_k": 1}))
    with pytest.raises(InputError, match=r"top_k was 1, is 4.*delete the folder"):
        predict([str(tmp_path / "images")], config(model[0], tmp_path / "out.csv"))
    assert (parts / "command.json").is_file()


def test_the_real_commands_of_one_and_two_processes_write_the_same_bytes(shards, tmp_path, launch):
    run, given = tmp_path / "run", {k: v for k, v in TINY.items()}
    given |= {"data.train": shards[0], "data.val": shards[1], "run_dir": str(run), "steps": "3", "batch_size": "12"}
    launch("finetune.py", given | {"optim.warmup_steps": "1", "data.crop_pct": "0.9"})

    def wrote(script: str, name: str, processes: int) -> bytes:
        given = {"init": str(run), "out": str(tmp_path / name), "precision": "no", "num_workers": "1"}
        given |= {"part_images": "4", "batch_size": "3"}
        line = command(script, given, processes=processes)
        at = line.index(f"--{next(iter(given))}")
        done = subprocess.run([*line[:at], shards[1], *line[at:]], env=ENVIRONMENT, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert "21 images, crop_pct 0.9" in done.stdout, "not the crop that the run was evaluated with"
        return (tmp_path / name).read_bytes()

    # In this process, and by the script as two of them and as one.
    same = {"init": str(run), "precision": "no", "num_workers": 0, "part_images": 4, "batch_size": 3}
    predict([shards[1]], PredictConfig(out=str(tmp_path / "one.csv"), **same))
    assert (tmp_path / "one.csv").read_bytes() == wrote("predict.py", "two.csv", 2)
    embed([shards[1]], EmbedConfig(out=str(tmp_path / "one.safetensors"), **same))
    assert (tmp_path / "one.safetensors").read_bytes() == wrote("embed.py", "two.safetensors", 1)
    rows = table(tmp_path / "one.csv")
    assert [row["key"] for row in rows] == [f"val{i:05d}" for i in range(21)]
    assert [int(row["label"]) for row in rows] == [i % 4 for i in range(21)]
    assert {Path(row["path"]).name for row in rows} == {"val-0000.tar", "val-0001.tar"}
    right = sum(row["class_1"] == row["label"] for row in rows)
    assert 100 * right / 21 == pytest.approx(json.loads((run / "result.json").read_text())["val_top1"], abs=0.01)


def wrong(tmp_path: Path) -> dict[str, tuple[list[str], dict, str]]:
    folder = str(tmp_path / "images")
    return {
        "missing": ([str(tmp_path / "nowhere.png")], {}, "nowhere.png: no such file or folder"),
        "empty": ([str(tmp_path / "empty")], {}, "empty: no image inside"),
        "tars": ([str(tmp_path / "tars")], {}, r"no image inside.*but tars: give '.*tars/\*.tar'"),
        "no shard": ([str(tmp_path / "tars" / "other-*.tar")], {}, "matches no file"),
        "mixed": ([str(tmp_path / "tars" / "a.tar"), folder], {}, "is a shard and .*images is none"),
        "text": ([str(tmp_path / "notes.txt")], {}, "no image by its name"),
        "ending": ([folder], {"out": str(tmp_path / "x.txt")}, r"ends in .txt: give a name in .csv or .parquet"),
        "bare": ([folder], {"out": str(tmp_path / "x")}, "ends in nothing"),
        "no folder": ([folder], {"out": str(tmp_path / "no" / "x.csv")}, "there is no folder .*no: make it"),
        "folder": ([folder], {"out": str(tmp_path / "dir.csv")}, "is a folder"),
        "top_k": ([folder], {"top_k": 5}, "top_k is 5, and the classifier has 4 classes: give 1 to 4"),
        "names": ([folder], {"class_names": str(tmp_path / "notes.txt")}, "has 1 lines, and the classifier 4 classes"),
        "no names": ([folder], {"class_names": "nowhere"}, "class_names nowhere cannot be read"),
        "size": (
            [folder],
            {"data": CropConfig(img_size=18)},
            "18 is not a multiple of the patch size 4: use 16",
        ),
    }


@pytest.mark.parametrize("case", wrong(Path()))
def test_what_is_wrong_is_named_with_the_way_out(model, tmp_path, case):
    images(tmp_path / "images", 2)
    (tmp_path / "empty").mkdir()
    (tmp_path / "dir.csv").mkdir()
    (tmp_path / "notes.txt").write_text("hello\n")
    write_tars(tmp_path / "tars", "a", 2)
    shutil.copy(next((tmp_path / "tars").glob("*.tar")), tmp_path / "tars" / "a.tar")
    given, options, message = wrong(tmp_path)[case]
    with pytest.raises(InputError, match=message):
        predict(given, config(model[0], Path(options.pop("out", tmp_path / "out.csv")), **options))
    assert not (tmp_path / "out.csv").exists()


def test_an_encoder_has_no_classes_to_predict(tmp_path):
    images(tmp_path / "images", 2)
    file, _ = classifier(tmp_path, classes=0)
    with pytest.raises(InputError, match="holds no classification head"):
        predict([str(tmp_path / "images")], config(file, tmp_path / "out.csv"))


def test_a_missing_pyarrow_is_said_before_anything_is_computed(model, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    images(tmp_path / "images", 2)
    with pytest.raises(InputError, match=r"needs pyarrow: pip install 'quarterlight\[parquet\]'"):
        predict([str(tmp_path / "images")], config(model[0], tmp_path / "out.parquet"))


def test_images_of_any_sizes_go_together(model, tmp_path):
    images(tmp_path / "images", 3)
    images(tmp_path / "images" / "large", 2, side=50)
    assert predict([str(tmp_path / "images")], config(model[0], tmp_path / "out.csv")) == 0
    assert len(table(tmp_path / "out.csv")) == 5


def test_mistakes_end_the_command_with_a_sentence_and_a_status(model, tmp_path):
    script = Path(__file__).parents[1] / "launch" / "predict.py"
    line = [sys.executable, str(script), str(tmp_path / "nowhere"), *arguments({"init": str(model[0]), "out": "x.csv"})]
    done = subprocess.run(line, cwd=tmp_path, env=ENVIRONMENT, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == f"error: {tmp_path / 'nowhere'}: no such file or folder\n"


def test_an_image_size_of_ones_own_resizes_positions(model, tmp_path):
    paths = images(tmp_path / "images", 2, side=32)
    predict(
        [str(tmp_path / "images")], config(model[0], tmp_path / "out.csv", data=CropConfig(img_size=32, crop_pct=1.0))
    )
    larger = timm.create_model("vit_tiny_patch16_224", num_classes=4, **(VIT | {"img_size": 32}))
    larger.load_state_dict(checkpoint_filter_fn(load_file(model[0]), larger))
    with torch.no_grad():
        wanted = larger.eval()(prepared(paths)).softmax(dim=1).amax(dim=1)
    assert [float(row["prob_1"]) for row in table(tmp_path / "out.csv")] == pytest.approx(wanted.tolist(), abs=1e-5)
