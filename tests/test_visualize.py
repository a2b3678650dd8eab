"""launch/visualize.py on small real runs, and the numbers behind its pictures against scikit-learn's."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import TINY_PRETRAIN, write_tars
from PIL import Image
from sklearn.decomposition import PCA
from sklearn.neighbors import NearestNeighbors
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from quarterlight.finetune.pictures.autoencoders import load_run, load_subject
from quarterlight.finetune.pictures.config import VisualizeConfig
from quarterlight.finetune.pictures.curves import PANELS, draw_curves, names_of, read_metrics
from quarterlight.finetune.pictures.feature_pictures import draw_features_map, principal_components
from quarterlight.finetune.pictures.figure import CannotDraw, save_figure
from quarterlight.finetune.pictures.images import Images, read_images
from quarterlight.finetune.pictures.visualize import visualize
from quarterlight.finetune.pictures.weight_pictures import filter_components, position_similarity
from quarterlight.ssl.augment import CenterCrop, Normalize
from quarterlight.ssl.config import EncoderConfig
from quarterlight.ssl.encoders import build_encoder
from quarterlight.ssl.errors import InputError
from quarterlight.ssl.index import open_index
from quarterlight.ssl.knn import nearest
from quarterlight.ssl.pictures import reconstruction_picture

CROP = CenterCrop((16, 16), 1.0)
ALWAYS = {"filters", "attention_distance", "rollout", "features_map", "features_rgb", "neighbors"}
FILLED_IN = {"reconstructions", "ratios", "strategies"}
OF_WINDOWS = {"bias_tables", "window_mask"}
TINY_SWIN = "{window_size: 2, embed_dim: 12, depths: [2, 2], num_heads: [1, 2]}"


@pytest.fixture(scope="session")
def run(tmp_path_factory) -> tuple[Path, str]:
    """A short pretraining through the real command, and the glob of the images it draws."""
    from quarterlight.ssl.command import parse_config
    from quarterlight.ssl.config import PretrainConfig
    from quarterlight.ssl.pretrain import pretrain

    folder = tmp_path_factory.mktemp("looked-at")
    train, val = write_tars(folder, "train", 40), write_tars(folder, "val", 21)
    options = TINY_PRETRAIN | {
        "run_dir": str(folder / "run"),
        "data.train": train,
        "data.val": val,
        "picture_every_steps": "4",
    }
    pretrain(parse_config(PretrainConfig, "", [word for k, v in options.items() for word in (f"--{k}", v)]))
    return folder / "run", val


def drawn_in(out: Path) -> set[str]:
    """Checks a folder of pictures. Returns their names."""
    result = json.loads((out / "result.json").read_text())
    names = {about["file"].removesuffix(".png") for about in result["pictures"]}
    events = EventAccumulator(str(out), size_guidance={"images": 0}).Reload()
    assert set(events.Tags()["images"]) == names == {path.stem for path in out.glob("*.png")}
    for about in result["pictures"]:
        assert about["title"] and about["caption"].endswith((".", ". "))
        with Image.open(out / about["file"]) as picture:
            assert picture.width == 1000 and np.asarray(picture).std() > 5
    assert not names & result["left_out"].keys()
    return names


def test_a_run_with_a_class_token_is_drawn(run, launch, tmp_path):
    run_dir, val = run
    done = launch("visualize.py", {"init": str(run_dir), "images": val, "out": str(tmp_path / "out")})
    assert drawn_in(tmp_path / "out") == ALWAYS | FILLED_IN | {"positions", "curves"}
    result = json.loads((tmp_path / "out" / "result.json").read_text())
    assert set(result["left_out"]) == OF_WINDOWS and "has no windows" in result["left_out"]["window_mask"]
    assert "left out bias_tables" in done.stdout and " decoder tensors loaded" in done.stdout
    assert result["images"] == 21
    reconstructions = next(x for x in result["pictures"] if x["file"] == "reconstructions.png")
    assert "taken from the original" in reconstructions["caption"]  # norm_pix flatters, and says so
    assert set(result["ratios_loss"]) == {"75 % hidden", "80 % hidden", "85 % hidden"}  # 95 % would hide all 16
    assert len(result["attention_distance_px"]) == 2 and all(
        0 < x < 17 for block in result["attention_distance_px"].values() for x in block
    )


@pytest.mark.parametrize(
    ("name", "args", "size", "expected"),
    [
        ("vit_medium_patch16_gap_240", "{patch_size: 4, embed_dim: 24, depth: 2, num_heads: 2}", "16", {"positions"}),
        ("swin_tiny_patch4_window7_224", TINY_SWIN, "32", OF_WINDOWS),
        ("swinv2_tiny_window8_256", TINY_SWIN, "32", OF_WINDOWS),
    ],
)  # fmt: skip
def test_an_untrained_encoder_is_drawn(run, launch, tmp_path, name, args, size, expected):
    options = {"images": run[1], "out": str(tmp_path / "out"), "encoder.name": name, "encoder.args": args}
    launch("visualize.py", options | {"encoder.img_size": size, "mask_ratios": "[0.5, 0.75]", "num_images": "3"})
    assert drawn_in(tmp_path / "out") == ALWAYS | FILLED_IN | expected


def test_mistakes_are_told_in_one_sentence(run, launch, tmp_path):
    run_dir, val = run
    (tmp_path / "file").write_text("x")
    (tmp_path / "empty").mkdir()
    base = {"init": str(run_dir), "images": val, "out": str(tmp_path / "out")}
    done = launch("visualize.py", base | {"pictures": "[filter]"}, check=False)
    assert done.returncode == 2 and done.stderr.startswith("error: ") and "filters" in done.stderr
    for wrong, said in (
        ({"out": str(tmp_path / "file")}, "is a file: give a folder"),
        ({"out": str(run_dir)}, "holds a run or results of another command"),
        ({"init": str(tmp_path / "nowhere")}, "no such file or folder"),
        ({"images": str(tmp_path / "nowhere-*.tar")}, "matches no file"),
        ({"images": str(tmp_path / "empty")}, "no image inside"),
        ({"images": str(tmp_path / "none.png")}, "no such file"),
        ({"pictures": ["window_mask"]}, "window_mask cannot be drawn: VisionTransformer has no windows"),
        ({"images": None, "pictures": ["neighbors"]}, "neighbors cannot be drawn: it is a picture of images"),
        ({"init": str(run_dir / "encoder.safetensors"), "pictures": ["ratios"]}, "holds no decoder"),
        ({"runs": [str(tmp_path / "empty")], "pictures": ["curves"]}, "holds no metrics.jsonl"),
    ):
        with pytest.raises(InputError, match=said):
            visualize(VisualizeConfig(**(base | wrong)))
        assert not (tmp_path / "out" / "result.json").exists()
    assert json.loads((run_dir / "result.json").read_text())["command"] == "pretrain"


def test_the_decoder_of_a_run_fills_in_what_the_run_itself_drew(run):
    """The last picture of training, drawn again from what lies on disk."""
    run_dir, val = run
    autoencoder, index = load_run(run_dir), open_index(val)
    normalize = Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    images = read_images(val, count=16, crop=CROP, in_chans=3)
    assert images.names == [index.key(i) for i in np.linspace(0, 20, 16).astype(int).tolist()]  # where the run looked
    masking = autoencoder.encoder.sample_masking(16, 0.75)
    with torch.no_grad():
        normalized = normalize(images.pixels)
        result = autoencoder(normalized, masking)
    mine = reconstruction_picture(autoencoder, normalized, result, mean=normalize.mean, std=normalize.std)
    theirs = np.asarray(Image.open(run_dir / "reconstructions.png"))
    factor = theirs.shape[1] // mine.shape[1]
    assert np.abs(theirs[::factor, ::factor].astype(int) - mine.astype(int)).max() <= 1


def test_a_run_leaves_a_picture_each_time_and_a_filmstrip(run):
    folder = run[0] / "pictures"
    assert sorted(x.name for x in folder.iterdir()) == [
        "filmstrip.png", "step-00000004.png", "step-00000008.png", "step-00000012.png",
    ]  # fmt: skip
    assert (folder / "step-00000012.png").read_bytes() == (run[0] / "reconstructions.png").read_bytes()
    assert (folder / "step-00000004.png").read_bytes() != (folder / "step-00000012.png").read_bytes()
    events = EventAccumulator(str(run[0]), size_guidance={"images": 0}).Reload()
    steps = [x.step for x in events.Images("reconstructions (masked, predicted, original)")]
    assert steps == [4, 8, 12] and any(tag.startswith("filmstrip") for tag in events.Tags()["images"])


def test_the_same_look_draws_the_same_bytes(run, tmp_path):
    for out in ("a", "b"):
        config = VisualizeConfig(
            init=str(run[0]), images=run[1], out=str(tmp_path / out), pictures=["ratios", "positions", "features_map"]
        )
        visualize(config)
    for name in ("ratios", "positions", "features_map"):
        assert (tmp_path / "a" / f"{name}.png").read_bytes() == (tmp_path / "b" / f"{name}.png").read_bytes()
    first = next(path for path in (tmp_path / "a").glob("events*"))
    visualize(VisualizeConfig(init=str(run[0]), out=str(tmp_path / "a"), pictures=["filters"]))
    assert not first.exists() and len(list((tmp_path / "a").glob("events*"))) == 1  # of one look, the last


def test_untrained_is_the_same_architecture_with_other_weights(run, tmp_path):
    shown = {}
    for untrained in (False, True):
        out = tmp_path / str(untrained)
        visualize(VisualizeConfig(init=str(run[0]), out=str(out), untrained=untrained, pictures=["filters"]))
        shown[untrained] = np.asarray(Image.open(out / "filters.png"))
    assert shown[False].shape == shown[True].shape and (shown[False] != shown[True]).any()


def test_sine_cosine_positions_are_alike_along_rows_and_columns():
    """Their similarity is the mean of one that depends on the row's distance and one on the column's."""
    similarity = position_similarity(build_encoder_with_sincos()).view(6, 8, 6, 8)
    row, column = similarity[:, 0, :, 0], similarity[0, :, 0, :]  # the other coordinate the same: (f + 1) / 2
    expected = row[:, None, :, None] + column[None, :, None, :] - 1
    torch.testing.assert_close(similarity, expected, atol=1e-5, rtol=0)
    y, x = np.indices((6, 8)).reshape(2, -1)
    rows, columns = abs(y[:, None] - y), abs(x[:, None] - x)
    values, far = similarity.view(48, 48).numpy(), 3
    same_line = values[((rows == 0) & (columns == far)) | ((columns == 0) & (rows == far))]
    off_line = values[(rows == far) & (columns == far)]
    assert values[(rows == 0) & (columns == 0)] == pytest.approx(1.0)
    assert same_line.min() > off_line.max() + 0.05
    assert (np.diff([values[(rows == 0) & (columns == d)].mean() for d in range(4)]) < 0).all()  # less, farther away


def build_encoder_with_sincos():
    encoder = build_encoder("vit_tiny_patch16_224", img_size=(24, 32), patch_size=4, embed_dim=64, depth=1, num_heads=2)
    encoder.init_weights()
    return encoder


def test_without_absolute_positions_there_is_no_similarity():
    swin = build_encoder("swin_tiny_patch4_window7_224", img_size=32, window_size=2, depths=(2, 2), num_heads=(1, 2))
    with pytest.raises(CannotDraw, match="no absolute positions"):
        position_similarity(swin)


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "swin_tiny_patch4_window7_224"])
def test_filters_are_reduced_as_scikit_learn_does(name):
    encoder = build_encoder(name)
    weight = encoder.timm.patch_embed.proj.weight.detach()
    components, share = filter_components(encoder)
    wanted = PCA(28, svd_solver="full").fit(weight.flatten(1).double().numpy())
    assert share.numpy() == pytest.approx(wanted.explained_variance_ratio_, rel=1e-5)
    assert components.shape == (28, *weight.shape[1:])
    cosine = (components.flatten(1).numpy() * wanted.components_).sum(axis=1)
    assert abs(cosine) == pytest.approx(np.ones(28), abs=1e-4)


def test_principal_components_and_neighbors_are_scikit_learns():
    features = torch.from_numpy(np.random.default_rng(0).normal(size=(40, 12)).cumsum(axis=1)).float()
    mine, wanted = principal_components(features, 3).numpy(), PCA(3).fit_transform(features.double().numpy())
    assert abs(mine) == pytest.approx(abs(wanted), abs=1e-4)
    assert (mine[abs(mine).argmax(axis=0), range(3)] > 0).all()
    assert principal_components(features[:2, :2], 3).shape == (2, 3)
    similarity, ids = nearest(features, features[[3, 11]], 5, itself=torch.tensor([3, 11]))
    distances, others = NearestNeighbors(n_neighbors=6, metric="cosine").fit(features).kneighbors(features[[3, 11]])
    assert ids.tolist() == others[:, 1:].tolist()
    assert similarity.numpy() == pytest.approx(1 - distances[:, 1:], abs=1e-5)


def test_a_map_without_scikit_learn_is_of_principal_components(monkeypatch, tmp_path):
    module = "quarterlight.finetune.pictures.feature_pictures"
    monkeypatch.setattr(f"{module}.find_spec", lambda name: None)
    rng = np.random.default_rng(0)
    features = torch.from_numpy(rng.normal(size=(30, 8))).float()
    labels = np.arange(30) % 15
    names = ["$x_$", "_hidden", "\u732b", *map(str, range(3, 15))]  # of classes, in any language
    images = Images(torch.zeros(30, 4, 4, 3, dtype=torch.uint8), labels, [str(i) for i in range(30)], names, 30, [])
    picture = draw_features_map(features, images, seed=0)
    assert "principal components" in picture.title and "10 most frequent of 15 classes" in picture.caption
    save_figure(tmp_path / "map.png", picture.figure)
    assert np.asarray(Image.open(tmp_path / "map.png")).std() > 5
    assert [x.get_text() for x in picture.figure.axes[0].get_legend().get_texts()][1:5] == [
        r"\$x_\$", " _hidden", "\u732b", "3",
    ]  # fmt: skip
    drawn = np.concatenate([np.asarray(x.get_offsets()) for x in picture.figure.axes[0].collections])
    wanted = principal_components(features, 2).numpy()
    assert np.sort(drawn[:, 0]) == pytest.approx(np.sort(wanted[:, 0]))
    with pytest.raises(CannotDraw, match="at least 4 images, and there are 3"):
        draw_features_map(features[:3], images, seed=0)


def test_images_come_from_folders_files_shards_and_digits(tmp_path, run):
    for name in ("cat/a.png", "cat/b.png", "dog/c.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        Image.new("RGB", (20, 24), (len(name), 100, 0) if "cat" in name else (0, 0, 200)).save(tmp_path / name)
    (tmp_path / "dog" / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n no picture")
    images = read_images(str(tmp_path), count=10, crop=CROP, in_chans=3)
    assert images.names == ["cat/a.png", "cat/b.png", "dog/c.png"] and images.total == 4
    assert [images.class_name(label) for label in images.labels.tolist()] == ["cat", "cat", "dog"]
    assert images.unreadable[0][0] == "dog/broken.png" and images.pixels.shape == (3, 16, 16, 3)
    one = read_images([str(tmp_path / "dog/c.png")], count=10, crop=CROP, in_chans=1)
    assert one.pixels.shape == (1, 16, 16, 1) and one.labels.tolist() == [-1]
    two = read_images([str(tmp_path / "cat"), str(tmp_path / "dog/c.png")], count=10, crop=CROP, in_chans=3)
    assert two.labels.tolist() == [-1, -1, -1]
    digits = read_images("digits", count=5, crop=CROP, in_chans=3)
    assert digits.pixels.shape == (5, 16, 16, 3) and digits.total == 359
    by_glob = read_images(run[1], count=5, crop=CROP, in_chans=3)
    folder = str(Path(run[1]).parent)
    assert by_glob.total == 21 and read_images(folder, count=5, crop=CROP, in_chans=3).total == 61
    with pytest.raises(InputError, match="not both"):
        read_images([str(tmp_path), run[1]], count=5, crop=CROP, in_chans=3)
    with pytest.raises(InputError, match="none of 1 can be read"):
        read_images(str(tmp_path / "dog" / "broken.png"), count=5, crop=CROP, in_chans=3)
    with pytest.raises(InputError, match="local shards"):
        read_images("https://example.invalid/a.tar", count=5, crop=CROP, in_chans=3)


def test_curves_of_runs_need_no_encoder(tmp_path):
    for name, factor in (("mine", 1.0), ("reference", 0.9)):
        (tmp_path / name).mkdir()
        lines = [json.dumps({"step": step, "loss": factor / step, "lr": 1e-3}) for step in range(1, 9)]
        (tmp_path / name / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    runs = [str(tmp_path / "mine"), str(tmp_path / "reference")]
    result = visualize(VisualizeConfig(runs=runs, pictures=["curves"], out=str(tmp_path / "look")))
    assert (tmp_path / "look" / "curves.png").is_file() and "encoder" not in result
    with pytest.raises(InputError, match="there is no encoder: give --init"):
        visualize(VisualizeConfig(runs=runs, pictures=["curves", "filters"], out=str(tmp_path / "look")))


def test_curves_of_several_runs_share_a_plot(tmp_path):
    for name, scale in (("x/one", 1.0), ("y/one", 2.0)):
        (tmp_path / name).mkdir(parents=True)
        lines = [
            {"step": s, "loss": scale / s, "lr": 1e-3, "grad_norm": None if s == 20 else 0.5, "data_wait_pct": 3.0}
            for s in (10, 20, 30)
        ]
        lines.append({"step": 30, "val_top1": 40.0})
        text = "\n".join(map(json.dumps, lines)) + '\n{"step": 40, "lo\n[1]\n{"loss": 1}\n'
        (tmp_path / name / "metrics.jsonl").write_text(text)
    names = names_of([tmp_path / "x" / "one", tmp_path / "y" / "one"])
    assert list(names) == ["x/one", "y/one"] and list(names_of([tmp_path / "x"])) == ["x"]
    runs = {name: read_metrics(path) for name, path in names.items()}
    assert [record["step"] for record in runs["x/one"]] == [10, 20, 30, 30]
    picture = draw_curves(runs)
    loss, _, norm, _ = picture.figure.axes
    assert len(picture.figure.axes) == len(PANELS)
    drawn = {line.get_label(): line.get_xydata().tolist() for line in loss.lines}
    assert drawn == {"x/one": [[10, 0.1], [20, 0.05], [30, 1 / 30]], "y/one": [[10, 0.2], [20, 0.1], [30, 1 / 15]]}
    assert np.isnan(norm.lines[0].get_ydata()).tolist() == [False, True, False]
    save_figure(tmp_path / "curves.png", picture.figure)
    assert np.asarray(Image.open(tmp_path / "curves.png")).std() > 5
    with pytest.raises(CannotDraw, match="no loss"):
        draw_curves({"x": []})
    with pytest.raises(InputError, match="no training run"):
        read_metrics(tmp_path)


def test_a_damaged_state_costs_the_decoder_only(run, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(run[0], copy)
    state = next(copy.glob("state/step-00000012/model.safetensors"))
    state.write_bytes(state.read_bytes()[:1000])
    subject = load_subject(str(copy), EncoderConfig(), untrained=False, seed=0)
    assert subject.autoencoder is None and "holds no decoder that can be read" in subject.no_decoder
    with pytest.raises(InputError, match="holds no decoder that can be read"):
        load_run(copy)
    assert state.parent.is_dir()  # nothing is set aside: the run may go on


def test_another_image_size_keeps_the_decoder(run):
    subject = load_subject(str(run[0]), EncoderConfig(img_size=24), untrained=False, seed=0)
    assert subject.encoder.grid == (6, 6) and subject.autoencoder is not None and not subject.no_decoder
