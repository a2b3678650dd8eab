"""Dropped and shuffled patches: what is done to images, who is asked what is salient, and the command."""

import csv
import io
import json
import math
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from classifiers import MEAN, STD, SWIN, VIT, classifier
from conftest import write_tars
from PIL import Image
from timm.models.swin_transformer import window_partition

from quarterlight.finetune.occlusion import (
    Saliency,
    drop_patches,
    drop_ranks,
    leave_out,
    on_patches,
    shuffle_sizes,
    shuffle_tiles,
)
from quarterlight.finetune.robustness import robustness
from quarterlight.finetune.use_config import LabelledConfig, RobustnessConfig
from quarterlight.ssl.encoders import wrap
from quarterlight.ssl.errors import InputError

GENERATOR = torch.Generator().manual_seed(0)
SWIN_NAME = "swin_tiny_patch4_window7_224"


def test_ranks_order_by_score_and_ties_by_place():
    assert drop_ranks(torch.tensor([[0.1, 0.9, 0.5, 0.9]])).tolist() == [[3, 0, 2, 1]]


def test_patches_are_painted_as_a_slow_loop_does():
    images, fill = torch.randn(3, 3, 12, 8, generator=GENERATOR), torch.tensor([1.0, 2.0, 3.0])
    dropped = torch.rand(3, 6, generator=GENERATOR) < 0.5
    found, wanted = drop_patches(images, dropped, 4, fill), images.clone()
    for b in range(3):
        for n in range(6):
            if dropped[b, n]:
                y, x = divmod(n, 2)
                wanted[b, :, 4 * y : 4 * y + 4, 4 * x : 4 * x + 4] = fill[:, None, None]
    assert torch.equal(found, wanted)


def test_tiles_are_permuted_by_position_alone():
    images = torch.randn(4, 3, 8, 12, generator=GENERATOR)
    shuffled = shuffle_tiles(images, 4, seed=3, positions=np.arange(10, 14))
    for image, other in zip(images, shuffled, strict=True):
        tiles = [x.unfold(1, 2, 2).unfold(2, 3, 3).flatten(1, 2).transpose(0, 1).flatten(1) for x in (image, other)]
        places = [int((tiles[0] == tile).all(dim=1).nonzero()) for tile in tiles[1]]
        assert sorted(places) == list(range(16)) and places != list(range(16))
    alone = shuffle_tiles(images[2:3], 4, seed=3, positions=np.array([12]))
    assert torch.equal(alone[0], shuffled[2])
    assert not torch.equal(shuffle_tiles(images, 4, seed=4, positions=np.arange(10, 14)), shuffled)


def test_tile_grids_stop_at_the_patch_and_divide_the_image():
    assert shuffle_sizes((224, 224), 16) == (2, 4, 8)
    assert shuffle_sizes((32, 32), 4) == (2, 4, 8)
    assert shuffle_sizes((24, 24), 4) == (2, 4)


@pytest.mark.parametrize("by_class_token", [True, False])
def test_saliency_of_a_vit_is_the_attention_of_its_last_block(tmp_path, by_class_token):
    _, vit = classifier(tmp_path)
    images = torch.randn(2, 3, 16, 16, generator=GENERATOR)
    given: list[torch.Tensor] = []
    vit.blocks[-1].attn.register_forward_pre_hook(lambda _, x: given.append(x[0]))
    with torch.no_grad():
        found = Saliency(wrap(vit, ""), by_class_token=by_class_token)(images)
    x, attn = given[0].double(), vit.blocks[-1].attn
    q, k, _ = (x @ attn.qkv.weight.double().T + attn.qkv.bias.double()).view(2, 17, 3, 2, 12).permute(2, 0, 3, 1, 4)
    attention = (q @ k.transpose(2, 3) / math.sqrt(12)).softmax(dim=3).mean(dim=1)  # [B, 17, 17]
    wanted = attention[:, 0, 1:] if by_class_token else attention[:, 1:, 1:].mean(dim=1)
    torch.testing.assert_close(found.flatten(1).double(), wanted, atol=1e-5, rtol=1e-4)


def test_saliency_of_shifted_windows_lies_where_the_tokens_do(tmp_path):
    _, swin = classifier(tmp_path, SWIN_NAME, SWIN | {"img_size": 128})
    saliency = Saliency(wrap(swin, ""), by_class_token=False)
    assert tuple(saliency.block.shift_size) == (1, 1) and saliency.encoder.grid == (4, 4)
    grid = torch.arange(32.0).view(2, 4, 4)
    windows = window_partition(torch.roll(grid[..., None], (-1, -1), dims=(1, 2)), (2, 2)).flatten(1)
    assert torch.equal(saliency._of_windows(windows, 2), grid)
    with torch.no_grad():
        found = saliency(torch.randn(2, 3, 128, 128, generator=GENERATOR))
    assert found.shape == (2, 4, 4)
    assert found.sum(dim=(1, 2)).tolist() == pytest.approx([4.0, 4.0], abs=1e-4), "attention of a window sums to one"


def test_scores_of_tokens_become_scores_of_larger_and_smaller_patches():
    scores = torch.arange(16.0).view(1, 4, 4)
    assert on_patches(scores, (2, 2)).tolist() == [[2.5, 4.5, 10.5, 12.5]]
    assert torch.equal(on_patches(scores, (8, 8)).view(8, 8)[::2, ::2], scores[0])


@pytest.mark.parametrize(("name", "args"), [("vit_tiny_patch16_224", VIT), (SWIN_NAME, SWIN)])
def test_left_out_patches_reach_nothing_and_none_left_out_is_timms_model(tmp_path, name, args):
    _, model = classifier(tmp_path, name, args)
    encoder, side = wrap(model, name), args["img_size"]
    images = torch.randn(3, 3, side, side, generator=GENERATOR)
    count = encoder.num_units
    with torch.no_grad():
        whole = leave_out(encoder, model, images, torch.zeros(3, count, dtype=torch.bool), encoder.unit_size, 0)
        torch.testing.assert_close(whole, model(images), atol=1e-4, rtol=1e-4)
        dropped = drop_ranks(torch.rand(3, count, generator=GENERATOR)) < count // 2
        other = drop_patches(images, dropped, encoder.unit_size, torch.tensor([5.0, -3.0, 1.0]))
        found, again = (leave_out(encoder, model, x, dropped, encoder.unit_size, count // 2) for x in (images, other))
    torch.testing.assert_close(found, again, atol=1e-6, rtol=0)
    assert not torch.allclose(found, whole, atol=1e-2)


def test_a_vit_with_left_out_patches_is_timms_on_the_others(tmp_path):
    _, vit = classifier(tmp_path)
    images, dropped = torch.randn(1, 3, 16, 16, generator=GENERATOR), torch.zeros(1, 16, dtype=torch.bool)
    dropped[0, [2, 3, 9, 11, 15]] = True
    with torch.no_grad():
        tokens = vit._pos_embed(vit.patch_embed(images))
        kept = torch.cat([tokens[:, :1], tokens[:, 1:][:, ~dropped[0]]], dim=1)
        wanted = vit.forward_head(vit.norm(vit.blocks(vit.norm_pre(kept))))
        found = leave_out(wrap(vit, ""), vit, images, dropped, 4, 5)
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-5)


def config(init: Path, val: str, run_dir: Path, **more) -> RobustnessConfig:
    data = LabelledConfig(val=val, crop_pct=1.0)
    given = {"precision": "no", "num_workers": 0, "batch_size": 4, "data": data, "drop_shares": (0.25, 0.75)}
    return RobustnessConfig(init=str(init), run_dir=str(run_dir), **(given | more))


def rows(run_dir: Path) -> list[dict[str, str]]:
    with (run_dir / "robustness.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def options(init: Path, val: str, run_dir: Path) -> dict[str, str]:
    return {
        "init": str(init), "data.val": val, "data.crop_pct": "1", "run_dir": str(run_dir), "precision": "no",
        "num_workers": "1", "batch_size": "4", "drop_shares": "[0.25,0.75]", "leave_out": "true", "seed": "5",
    }  # fmt: skip


def test_one_and_two_processes_leave_the_same_table_and_a_picture(tmp_path, launch):
    val = write_tars(tmp_path / "shards", "val", 21, size=16)
    init, model = classifier(tmp_path)
    launch("evaluate.py", options(init, val, tmp_path / "one"))
    launch("evaluate.py", options(init, val, tmp_path / "two"), processes=2)
    assert (tmp_path / "one" / "robustness.csv").read_bytes() == (tmp_path / "two" / "robustness.csv").read_bytes()
    found, result = rows(tmp_path / "one"), json.loads((tmp_path / "one" / "result.json").read_text())
    assert [(row["kind"], row["how"], row["dropped_patches"], row["tiles"]) for row in found] == [
        ("whole", "", "0", "1"),
        *((kind, how, dropped, "1") for how in ("pixels", "left_out")
          for kind in ("random", "salient", "non_salient") for dropped in ("4", "12")),
        ("shuffle", "", "0", "2"), ("shuffle", "", "0", "4"),
    ]  # fmt: skip
    assert {row["images"] for row in found} == {"21"} and result["images"] == 21
    assert float(found[0]["top1"]) == result["top1"] == pytest.approx(accuracy(model, val), abs=1e-6)
    with Image.open(tmp_path / "one" / "robustness.png") as picture:
        width, height = picture.size
    assert width >= 800 and height >= 400


def accuracy(model, val: str) -> float:
    """Returns the accuracy of timm's model on PIL's pixels, in percent."""
    right = []
    for path in sorted(Path(val).parent.glob("*.tar")):
        with tarfile.open(path) as tar:
            files = {member.name: tar.extractfile(member).read() for member in tar.getmembers()}
        for key in sorted({name.partition(".")[0] for name in files}):
            with Image.open(io.BytesIO(files[f"{key}.png"])) as image:
                pixels = np.asarray(image.convert("RGB"), np.float32) / 255
            x = (torch.from_numpy(pixels) - torch.tensor(MEAN)) / torch.tensor(STD)
            with torch.no_grad():
                right.append(int(model(x.permute(2, 0, 1)[None]).argmax()) == int(files[f"{key}.cls"]))
    return 100 * float(np.mean(right))


def test_a_swin_and_patches_of_ones_own_and_anothers_saliency(tmp_path):
    val = write_tars(tmp_path / "shards", "val", 9, size=64)
    init, _ = classifier(tmp_path, SWIN_NAME, SWIN)
    found = robustness(config(init, val, tmp_path / "swin", leave_out=True))
    assert found["patch"] == 32 and [row["tiles"] for row in found["curves"] if row["kind"] == "shuffle"] == [2]
    vit, _ = classifier(tmp_path / "vit", args=VIT | {"img_size": 64, "patch_size": 16}, classes=0)
    other = robustness(config(init, val, tmp_path / "other", saliency=str(vit), patch=16, fill="mean"))
    assert {row["patches"] for row in other["curves"]} == {16} and other["top1"] == found["top1"]


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"patch": 5}, "patch 5 does not divide the image of 16 x 16 pixels: use 1, 2, 4, 8"),
        ({"patch": 2, "leave_out": True}, "leave_out: .* patch is 2: use a multiple of 4"),
        ({"shuffle_grids": (3,)}, "has no 3 x 3 equal tiles: use some of 2, 4, 8, 16"),
        ({"data": LabelledConfig(val="nowhere.tar")}, "nowhere.tar"),
        ({"init": "encoder"}, "holds no classification head"),
        ({"init": "three"}, "labels up to 3, and the classifier has 3 classes"),
        ({"saliency": "nowhere"}, "init nowhere: no such file"),
    ],
)
def test_what_is_wrong_is_named(tmp_path, more, message):
    val = write_tars(tmp_path / "shards", "val", 8, size=16)
    files = {"encoder": 0, "three": 3, "right": 4}
    init, _ = classifier(tmp_path, classes=files[more.pop("init", "right")])
    with pytest.raises(InputError, match=message):
        robustness(config(init, val, tmp_path / "run", **more))


def test_a_folder_of_another_evaluation_is_refused(tmp_path):
    val = write_tars(tmp_path / "shards", "val", 8, size=16)
    init, _ = classifier(tmp_path)
    few = {"drop_orders": ("random",), "shuffle_grids": (2,)}
    first = robustness(config(init, val, tmp_path / "run", **few))
    assert robustness(config(init, val, tmp_path / "run", **few)) == first
    with pytest.raises(InputError, match="seed was 0, is 1"):
        robustness(config(init, val, tmp_path / "run", seed=1, **few))
