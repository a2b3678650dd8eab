"""The playground's page: Gradio, on this machine, with nothing loaded from or sent to another one."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from jaxtyping import UInt8

from quarterlight.finetune.pictures.images import read_images
from quarterlight.ssl.decode import UnreadableImage
from quarterlight.ssl.errors import InputError

from .config import PlaygroundConfig
from .scene import ALL_HEADS, ROLLED_OUT, Scene

TITLE, PAINT, ORANGE = "Masking playground", "painted", "#ff8c00"
ABOUT = """### Masking playground
Pick an image or drop one, choose what is hidden, and see what the network fills in. Click a patch to see where it
looks."""
SYSTEM_FONTS = ("system-ui", "sans-serif")


def serve(config: PlaygroundConfig) -> None:
    """Answers at config.host until it is interrupted. Raises InputError for what cannot be tried."""
    gradio = _gradio()
    scene = Scene(config.init)
    print(scene.report, flush=True)
    app = build(scene, _images(scene, config), gradio)
    theme = gradio.themes.Default(font=SYSTEM_FONTS, font_mono=("monospace",))
    try:
        _, address, _ = app.launch(
            server_name=config.host, server_port=config.port, inbrowser=config.open_browser, theme=theme, quiet=True,
            share=False, ssr_mode=False, footer_links=[], show_error=True, prevent_thread_lock=True, mcp_server=False,
        )  # fmt: skip
    except OSError as error:
        where = f"{config.host}:{config.port or '7860 and the next hundred'}"
        raise InputError(f"{where} cannot be listened at, or is taken: give another --port or --host") from error
    print(f"playground: {address} (Ctrl-C ends it)", flush=True)
    app.block_thread()


def build(scene: Scene, images: list[UInt8[np.ndarray, "H W C"]], gradio: Any = None) -> Any:
    """Returns the page as gradio.Blocks. `images` are the crops to choose from; the first is shown at first."""
    gr = gradio or _gradio()
    # What was uploaded is deleted an hour later.
    with gr.Blocks(title=TITLE, analytics_enabled=False, fill_width=True, delete_cache=(3600, 3600)) as app:
        page = _Page(gr, scene, images)
        with gr.Row():
            with gr.Column(scale=2, min_width=300):
                page.lay_out_choices()
            with gr.Column(scale=5, min_width=320):
                page.lay_out_pictures()
        page.connect(app)
    return app.queue(default_concurrency_limit=1, api_open=False)


class _Page:
    """The components of the page and what they do, made inside gradio.Blocks."""

    def __init__(self, gr: Any, scene: Scene, images: list[UInt8[np.ndarray, "H W C"]]) -> None:
        self.gr, self.scene, self.images = gr, scene, images
        height, width = (side * scene.factor for side in scene.encoder.img_size)
        self.pixels = gr.State(images[0] if images else None)
        self.place = gr.State((width // 2, height // 2))
        self.seed = gr.State(0)
        gr.Markdown(ABOUT)

    def lay_out_choices(self) -> None:
        """The image, and what of it is hidden."""
        gr, scene = self.gr, self.scene
        self.dropped = gr.Image(label="Drop an image", sources=["upload", "clipboard"], height=180, elem_id="dropped")
        self.gallery = gr.Gallery(
            [(scene.shown(x), None) for x in self.images], label="Pick an image", columns=3, height=170,
            allow_preview=False, visible=bool(self.images), elem_id="gallery", buttons=[],
        )  # fmt: skip
        kinds = ["random", "block", "grid", PAINT]
        self.kind = gr.Radio(kinds, value=scene.mask.strategy, label="Mask", elem_id="kind")
        most = int(100 * (1 - 1 / scene.encoder.num_units)) / 100
        self.ratio = gr.Slider(0.0, most, scene.mask.ratio, step=0.01, label="Hidden share", elem_id="ratio")
        self.contrast_only = gr.Checkbox(
            False, label="Predicted contrast only, nothing of the original in hidden patches",
            visible=scene.predicts_contrast, elem_id="only",
        )  # fmt: skip
        self.again = gr.Button("Another mask", elem_id="again")
        size = scene.encoder.unit_size * scene.factor
        brush = gr.Brush(size, colors=[ORANGE], default_color=ORANGE, color_mode="fixed")
        self.canvas = gr.ImageEditor(
            label="Paint here what to hide", sources=(), transforms=(), layers=False, brush=brush, buttons=[],
            elem_id="canvas",
        )  # fmt: skip

    def lay_out_pictures(self) -> None:
        """What is filled in, and where a patch looks."""
        with self.gr.Row():
            self.masked = self._picture("What the encoder sees", "masked")
            self.pasted = self._picture("Filled in", "pasted")
            self.whole = self._picture("Prediction of every patch", "whole")
        self.said = self.gr.Markdown(elem_id="said")
        with self.gr.Row():
            self.seen = self._picture("Click a patch", "seen")
            self.looks = self._picture("Where it looks", "looks")
            with self.gr.Column(min_width=160):
                drop = self.gr.Dropdown
                self.layer = drop(self.scene.layers, value=ROLLED_OUT, label="Attention", elem_id="layer")
                self.head = drop(self.scene.heads, value=ALL_HEADS, label="Of a block's heads", elem_id="head")
                self.told = self.gr.Markdown(elem_id="told")

    def connect(self, app: Any) -> None:
        """Makes every choice show what comes of it."""
        gr = self.gr
        mask = [self.pixels, self.kind, self.ratio, self.seed, self.canvas, self.contrast_only]
        filled = [self.masked, self.pasted, self.whole, self.said]
        filling = {"fn": self._said(self._fill), "inputs": mask, "outputs": filled, "show_progress": "hidden"}
        asked = [self.pixels, self.place, self.layer, self.head]
        looking = {"fn": self._said(self._look), "inputs": asked, "outputs": [self.looks, self.told]}

        def pick(event: gr.SelectData) -> Any:  # type: ignore[valid-type]  # its type is how gradio knows to pass it
            return self.images[event.index]

        def click(event: gr.SelectData) -> tuple[int, int]:  # type: ignore[valid-type]
            return event.index[0], event.index[1]

        for event in (
            app.load(lambda: None),
            self.gallery.select(pick, None, self.pixels),
            self.dropped.upload(self._said(self.scene.cropped), self.dropped, self.pixels),
        ):
            shown = event.then(self._show, self.pixels, [self.seen, self.canvas], show_progress="hidden")
            shown.then(**filling).then(**looking)
        changed = [self.ratio.change, self.kind.change, self.contrast_only.change]
        gr.on(changed, **filling, trigger_mode="always_last")
        self.again.click(lambda n: n + 1, self.seed, self.seed).then(**filling)
        drawn = self.canvas.input(_kind_of, [self.canvas, self.kind], self.kind, show_progress="hidden")
        drawn.then(**filling)
        self.seen.select(click, None, self.place).then(**looking)
        gr.on([self.layer.change, self.head.change], **looking)

    def _picture(self, label: str, name: str) -> Any:
        return self.gr.Image(label=label, interactive=False, buttons=["download"], elem_id=name)

    def _fill(self, image: Any, kind: str, ratio: float, seed: int, canvas: Any, only: bool) -> tuple[Any, ...]:
        if image is None:
            return None, None, None, "Pick an image or drop one."
        sampled: Any = kind
        is_masked = self.scene.painted(_paint(canvas)) if kind == PAINT else self.scene.sampled(sampled, ratio, seed)
        return tuple(self.scene.fill(image, is_masked, only))

    def _look(self, image: Any, place: tuple[int, int], layer: str, head: str) -> tuple[Any, str]:
        return (None, "") if image is None else self.scene.attention(image, place, layer, head)

    def _show(self, image: Any) -> tuple[Any, Any]:
        """Returns the image to click on, and the same to paint on, without paint."""
        if image is None:
            return None, None
        shown = self.scene.shown(image)
        return shown, {"background": shown, "layers": [], "composite": None}

    def _said(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """Returns the function with a user's mistakes shown on the page instead of in a traceback."""

        def guarded(*given: Any) -> Any:
            try:
                return function(*given)
            except (InputError, UnreadableImage) as error:
                raise self.gr.Error(str(error), print_exception=False) from error

        return guarded


def _kind_of(canvas: Any, kind: str) -> str:
    """Returns the kind of mask after a word from the editor, which also speaks when a new image is put into it."""
    return PAINT if _paint(canvas).any() else kind


def _paint(canvas: Any) -> Any:
    """Returns where an image editor has paint: opacity of its layers, [h, w]."""
    layers = (canvas or {}).get("layers") or []
    return np.stack([layer[:, :, 3] for layer in layers]).max(axis=0) / 255 if layers else np.zeros((1, 1))


def _images(scene: Scene, config: PlaygroundConfig) -> list[UInt8[np.ndarray, "H W C"]]:
    """Returns crops of the images that the config names, or of the run's own as far as they are still there."""
    given = config.images
    if given is None:
        data = (yaml.safe_load((Path(config.init).expanduser() / "config.yaml").read_text()) or {}).get("data") or {}
        given = data.get("val") or data.get("train")
    if not given:
        return []
    try:
        found = read_images(given, count=config.num_images, crop=scene.crop, in_chans=scene.in_chans)
    except InputError as error:
        if config.images is not None:
            raise
        print(f"the run's own images cannot be read ({error}): give --images, or drop one on the page", flush=True)
        return []
    return [x.numpy() for x in found.pixels]


def _gradio() -> Any:
    """Returns gradio, told not to report to anyone. Raises InputError when it is not installed."""
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # read when it is imported
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    try:
        import gradio
    except ImportError as error:
        raise InputError("the playground needs gradio: pip install 'quarterlight[playground]'") from error
    return gradio
