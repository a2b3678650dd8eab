import os
import re
import signal
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from browser import Visit, open_browser
from conftest import TINY_PRETRAIN, arguments, command, write_tars
from PIL import Image

from quarterlight.finetune.playground.app import _paint
from quarterlight.finetune.playground.scene import ALL_HEADS, ROLLED_OUT, Scene
from quarterlight.ssl.checkpoint import save_state, state_tensors
from quarterlight.ssl.command import parse_config
from quarterlight.ssl.config import PretrainConfig
from quarterlight.ssl.encoders import build_encoder
from quarterlight.ssl.errors import InputError
from quarterlight.ssl.export import ENCODER_FILE, ModelSpec, export_weights, run_facts
from quarterlight.ssl.mae import attach_decoder
from quarterlight.ssl.masking import random_masking
from quarterlight.ssl.runs import write_run_files

SWIN = {
    "encoder.name": "swin_tiny_patch4_window7_224",
    "encoder.args": "{img_size: 128, window_size: 4, embed_dim: 16, depths: [1, 1, 2, 1], num_heads: [2, 2, 2, 2]}",
    "data.img_size": "128",
}


def write_run(folder: Path, options: dict[str, str]) -> Path:
    """Writes what the playground reads of a pretraining run that was stopped before its first step."""
    given = TINY_PRETRAIN | {"data.train": "gone-*.tar", "run_dir": str(folder)} | options
    config = parse_config(PretrainConfig, "", arguments(given))
    args = {**config.encoder.args, "img_size": list((config.data.img_size,) * 2), "in_chans": config.data.in_chans}
    spec = ModelSpec(str(config.encoder.name), args, (0.5,) * config.data.in_chans, (0.25,) * config.data.in_chans)
    torch.manual_seed(0)
    encoder = build_encoder(spec.name, **spec.timm_args())
    autoencoder = attach_decoder(encoder, in_chans=config.data.in_chans, decoder=config.decoder, target=config.target)
    folder.mkdir()
    write_run_files(folder, config)
    progress = {"step": 0, "samples_seen": 0}
    export_weights(folder / ENCODER_FILE, encoder.timm, spec, run_facts("pretraining", progress, 0))
    task = torch.nn.ModuleDict({"autoencoder": autoencoder})
    save_state(folder, state_tensors(task, torch.optim.SGD(task.parameters())), progress, keep=1)
    return folder


@pytest.fixture(scope="module")
def vit(tmp_path_factory) -> Scene:
    return Scene(str(write_run(tmp_path_factory.mktemp("runs") / "vit", {"target": "pixels"})))


@pytest.fixture(scope="module")
def swin(tmp_path_factory) -> Scene:
    return Scene(str(write_run(tmp_path_factory.mktemp("runs") / "swin", SWIN)))


def random_image(height: int, width: int) -> np.ndarray:
    return np.random.default_rng(height).integers(0, 256, (height, width, 3), np.uint8)


def test_visible_patches_stay_and_hidden_ones_are_what_the_autoencoder_predicts(vit):
    pixels = vit.cropped(random_image(40, 30))
    assert pixels.shape == (16, 16, 3)
    noise = torch.rand(1, 16, generator=torch.Generator().manual_seed(1))
    masking = random_masking(1, 16, 0.75, noise=noise)
    is_masked = masking.is_masked[0].numpy().reshape(4, 4)
    filled = vit.fill(pixels, is_masked)
    images = vit.normalize(torch.from_numpy(pixels)[None])
    with torch.no_grad():
        loss, prediction, _ = vit.autoencoder(images, masking)
    assert f"12 of 16 patches of 4 x 4 pixels are hidden (75 %), loss on them {float(loss):.4f}." in filled.said
    f = vit.factor
    small = [x[::f, ::f] for x in (filled.masked, filled.pasted, filled.prediction)]
    hidden = is_masked.repeat(4, axis=0).repeat(4, axis=1)
    assert (small[1][~hidden] == pixels[~hidden]).all() and (small[0][~hidden] == pixels[~hidden]).all()
    assert (small[0][hidden] == 128).all() and (small[1][hidden] == small[2][hidden]).all()
    of_patch = prediction[0, 5].reshape(4, 4, 3) * 0.25 + 0.5  # second row, second column; mean and std undone
    assert np.abs(small[2][4:8, 4:8] / 255 - of_patch.clamp(0, 1).numpy()).max() < 0.5 / 255 + 1e-5


def test_masks_are_those_of_pretraining_and_of_the_brush(vit, swin):
    for strategy in ("random", "block", "grid"):
        assert vit.sampled(strategy, 0.75, 3).sum() == 12 and swin.sampled(strategy, 0.5, 3).sum() == 8
    assert (vit.sampled("random", 0.75, 1) != vit.sampled("random", 0.75, 2)).any()
    layer = np.zeros((448, 448, 4), np.uint8)
    layer[0:112, 112:224, 3] = 255  # one patch of a grid of 4 x 4
    layer[224:230, 224:230, 3] = 255  # a dot in another one
    paint = _paint({"layers": [layer, np.zeros_like(layer)]})
    expected = np.zeros((4, 4), bool)
    expected[0, 1] = True
    assert (vit.painted(paint) == expected).all()
    assert (swin.painted(paint) == expected).all()
    assert not vit.painted(_paint(None)).any() and not vit.painted(_paint({"layers": []})).any()


def test_nothing_hidden_is_the_image_and_everything_hidden_is_refused(vit):
    pixels = vit.cropped(random_image(16, 16))
    filled = vit.fill(pixels, np.zeros((4, 4), bool))
    assert (filled.pasted == vit.shown(pixels)).all() and "Nothing is hidden" in filled.said
    with pytest.raises(InputError, match="everything is hidden: leave at least one patch visible"):
        vit.fill(pixels, np.ones((4, 4), bool))


def test_a_patch_looks_where_its_softmax_says(vit):
    pixels = vit.cropped(random_image(16, 16))
    images = vit.normalize(torch.from_numpy(pixels)[None])
    seen = {}
    block = vit.encoder.timm.blocks[1]
    handle = block.attn.register_forward_pre_hook(lambda module, given: seen.update(x=given[0]))
    with torch.no_grad():
        vit.encoder(images)
        q, k, _ = block.attn.qkv(seen["x"]).reshape(17, 3, 2, 12).double().permute(1, 2, 0, 3)  # [heads, 17, 12] each
    handle.remove()
    weights = (q @ k.transpose(1, 2) / 12**0.5).softmax(dim=2)[:, 1 + 6, 1:]  # of the second row's third patch
    side = 4 * vit.factor
    for head, expected in ((ALL_HEADS, weights.mean(dim=0)), ("head 2", weights[1])):
        shares = vit._shares(pixels, 6, "block 2", head)
        np.testing.assert_allclose(shares.ravel(), expected.numpy(), rtol=1e-4)
        picture, said = vit.attention(pixels, (2 * side + 3, side + 3), "block 2", head)
        assert picture.shape == vit.shown(pixels).shape
        others = expected.numpy() * (np.arange(16) != 6)
        assert said.startswith(f"Row 2, column 3, block 2, {head}: {100 * expected[6]:.1f} % of its attention")
        assert said.endswith(f"the brightest place has {100 * others.max():.1f} %.")
    assert vit.layers == [ROLLED_OUT, "block 1", "block 2"] and vit.heads == [ALL_HEADS, "head 1", "head 2"]


def test_a_swin_is_filled_in_and_its_patches_look_through_all_blocks(swin):
    pixels = swin.cropped(random_image(150, 200))
    filled = swin.fill(pixels, swin.sampled("block", 0.5, 0))
    assert "mean and contrast" in filled.said  # norm_pix takes them from the original, and says so
    flattering, honest = filled, swin.fill(pixels, swin.sampled("block", 0.5, 0), True)
    assert swin.predicts_contrast and "nothing of the original" in honest.said
    assert (honest.masked == flattering.masked).all() and (honest.pasted != flattering.pasted).any()
    picture, said = swin.attention(pixels, (0, 10**6), ROLLED_OUT, ALL_HEADS)
    assert picture.shape == filled.pasted.shape and said.startswith("Row 4, column 1, rolled out over all blocks")
    assert swin._shares(pixels, 5, ROLLED_OUT, ALL_HEADS).sum() == pytest.approx(1)
    assert swin.layers == [ROLLED_OUT]


def test_grey_images_are_seen_in_grey(tmp_path):
    options = {"data.in_chans": "1", "data.mean": "[0.5]", "data.std": "[0.25]", "encoder.img_size": "null"}
    scene = Scene(str(write_run(tmp_path / "grey", options)))
    pixels = scene.cropped(random_image(32, 32))
    assert pixels.shape == (16, 16, 1) and scene.shown(pixels).shape[2] == 3
    scene.fill(pixels, scene.sampled("random", 0.75, 0))
    image = random_image(16, 16)
    grey = np.asarray(Image.fromarray(image).convert("L")).astype(int)
    assert np.abs(scene.cropped(image)[:, :, 0] - grey).max() <= 2


def test_what_cannot_be_tried_is_refused(tmp_path, vit):
    with pytest.raises(InputError, match="no such file or folder"):
        Scene(str(tmp_path / "nothing"))
    with pytest.raises(InputError, match="hog predicts histograms"):
        Scene(str(write_run(tmp_path / "hog", {"target": "hog"})))
    run = write_run(tmp_path / "encoder", {})
    with pytest.raises(InputError, match="holds no decoder: give the folder of a pretraining run"):
        Scene(str(run / ENCODER_FILE))
    done = subprocess.run(
        [*command("playground.py", {})[:2], "--init", str(run), "--images", str(tmp_path / "no-images")],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 1 and done.stderr.startswith("error: ") and "no-images" in done.stderr


WATCHED = """
import os, sys

def watch(event, given):
    if event == "socket.connect" and isinstance(given[1], tuple) or event == "socket.getaddrinfo":
        host = given[1][0] if event == "socket.connect" else given[0]
        if str(host) not in ("127.0.0.1", "::1", "localhost", "None", "0.0.0.0"):
            with open(os.environ["CONNECTIONS"], "a") as file:
                file.write(f"{event} {given}\\n")

sys.addaudithook(watch)
"""  # a sitecustomize.py: what does the process ask of other machines?


def test_the_page_is_driven_and_nothing_leaves_the_machine(tmp_path):
    run = write_run(tmp_path / "run", {"target": "pixels", "data.train": write_tars(tmp_path / "tars", "train", 8)})
    Image.fromarray(random_image(64, 48)).save(tmp_path / "dropped.png")
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "sitecustomize.py").write_text(WATCHED)
    connections = tmp_path / "connections"
    environment = os.environ | {
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(tmp_path / "site"),
        "CONNECTIONS": str(connections),
        "GRADIO_TEMP_DIR": str(tmp_path / "uploads"),
    }
    line = [*command("playground.py", {})[:2], "--init", str(run)]
    with (
        open_browser() as browser,
        subprocess.Popen(
            line,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
            # tests in the background of a shell ignore SIGINT, and so would what they start
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        ) as process,
    ):
        try:
            assert process.stdout is not None
            said = (re.match(r"playground: (http://127.0.0.1:\d+/)", text) for text in process.stdout)
            address = next(found[1] for found in said if found)
            _drive(Visit(browser, address, viewport={"width": 1400, "height": 1400}), address, tmp_path / "dropped.png")
            process.send_signal(signal.SIGINT)
            assert process.wait(timeout=120) in (0, 130)
        finally:
            process.kill()
    assert not connections.exists(), connections.read_text()


def _drive(visit: Visit, address: str, dropped: Path) -> None:
    """Drops an image, moves the ratio, clicks a patch and paints, and sees the page answer each time."""
    page = visit.page
    page.wait_for_selector("#pasted img")
    page.wait_for_function("document.querySelector('#said').innerText.includes('12 of 16 patches')")

    def changes(what: str, do, attribute: str = "src") -> None:
        before = page.evaluate(f"document.querySelector('{what}').{attribute}")
        do()
        page.wait_for_function(f"b => document.querySelector('{what}').{attribute} !== b", arg=before)

    ratio = page.locator("#ratio input[type=number]")
    changes("#pasted img", lambda: (ratio.fill("0.5"), ratio.press("Enter")))
    page.wait_for_function("document.querySelector('#said').innerText.includes('8 of 16 patches')")
    changes("#seen img", lambda: page.locator("#dropped input[type=file]").set_input_files(dropped))
    changes("#pasted img", lambda: page.get_by_role("button", name="Another mask").click())
    changes("#told", lambda: page.locator("#seen img").click(position={"x": 8, "y": 8}), "innerText")
    page.wait_for_function("document.querySelector('#told').innerText.startsWith('Row 1, column 1')")
    box = page.locator("#canvas canvas").first.bounding_box()
    page.mouse.move(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
    page.mouse.down()
    page.mouse.move(box["x"] + box["width"] / 2 + 20, box["y"] + box["height"] / 2 + 5, steps=5)
    page.mouse.up()
    page.wait_for_function("!document.querySelector('#said').innerText.includes('8 of 16 patches')")
    assert page.locator("#kind input[value=painted]").is_checked()
    assert visit.errors() == []
    assert visit.strangers(address) == []
