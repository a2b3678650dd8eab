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

PAINT = "painted"
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
    _, address, _ = app.launch(
        server_name=config.host, server_port=config.port, inbrowser=config.open_browser, theme=theme, quiet=True,
        share=False, ssr_mode=False, footer_links=[], show_error=True, prevent_thread_lock=True, mcp_server=False,
    )  # fmt: skip
    print(f"playground: {address} (Ctrl-C ends it)", flush=True)
    app.block_thread()


def build(scene: Scene, images: list[UInt8[np.ndarray, "H W C"]], gradio: Any = None) -> Any:
    """Returns the page as gradio.Blocks. `images` are the crops to choose from; the first is shown at first."""
    gr = gradio or _gradio()
    most = 1 - 1 / scene.encoder.num_units
    with gr.Blocks(
        title="Masking playground", analytics_enabled=False, fill_width=True, delete_cache=(3600, 3600)
    ) as app:
        pixels = gr.State(images[0] if images else None)
        place = gr.State(tuple(side // 2 for side in images[0].shape[1::-1]) if images else (0, 0))
        seed = gr.State(0)
        gr.Markdown(ABOUT)
        with gr.Row():
            with gr.Column(scale=2, min_width=300):
                dropped = gr.Image(
                    label="Drop an image", sources=["upload", "clipboard"], height=180, elem_id="dropped"
                )
                choice = [(scene.shown(x), None) for x in images]
                gallery = gr.Gallery(choice, label="Pick an image", columns=3, height=170, allow_preview=False,
                                     visible=bool(images), elem_id="gallery", buttons=[])  # fmt: skip
                kind = gr.Radio(
                    ["random", "block", "grid", PAINT], value=scene.mask.strategy, label="Mask", elem_id="kind"
                )
                ratio = gr.Slider(0.0, int(100 * most) / 100, scene.mask.ratio, step=0.01, label="Hidden share",
                                  elem_id="ratio")  # fmt: skip
                again = gr.Button("Another mask", elem_id="again")
                canvas = gr.ImageEditor(
                    label="Paint here what to hide", sources=(), transforms=(), layers=False, elem_id="canvas",
                    brush=gr.Brush(default_size=scene.encoder.unit_size * scene.factor, colors=["#ff8c00"],
                                   default_color="#ff8c00", color_mode="fixed"), buttons=[],
                )  # fmt: skip
            with gr.Column(scale=5, min_width=320):
                with gr.Row():
                    masked = gr.Image(label="What the encoder sees", interactive=False, buttons=[], elem_id="masked")
                    pasted = gr.Image(label="Filled in", interactive=False, buttons=["download"], elem_id="pasted")
                    whole = gr.Image(label="Prediction of every patch", interactive=False, buttons=[], elem_id="whole")
                said = gr.Markdown(elem_id="said")
                with gr.Row():
                    seen = gr.Image(label="Click a patch", interactive=False, buttons=[], elem_id="seen")
                    looks = gr.Image(label="Where it looks", interactive=False, buttons=["download"], elem_id="looks")
                    with gr.Column(min_width=160):
                        layer = gr.Dropdown(scene.layers, value=ROLLED_OUT, label="Attention", elem_id="layer")
                        head = gr.Dropdown(scene.heads, value=ALL_HEADS, label="Of a block's heads", elem_id="head")
                        told = gr.Markdown(elem_id="told")

        def refill(image: Any, kind: str, share: float, seed: int, canvas: Any) -> tuple[Any, Any, Any, str]:
            if image is None:
                return None, None, None, "Pick an image or drop one."
            is_masked = scene.painted(_paint(canvas)) if kind == PAINT else scene.sampled(kind, share, seed)  # type: ignore[arg-type]
            return tuple(scene.fill(image, is_masked))

        def look(image: Any, place: tuple[int, int], layer: str, head: str) -> tuple[Any, str]:
            return (None, "") if image is None else scene.attention(image, place, layer, head)

        def show(image: Any) -> tuple[Any, Any]:
            shown = None if image is None else scene.shown(image)
            return shown, None if shown is None else {"background": shown, "layers": [], "composite": None}

        mask_inputs, filled = [pixels, kind, ratio, seed, canvas], [masked, pasted, whole, said]
        attention = {"fn": _said(gr, look), "inputs": [pixels, place, layer, head], "outputs": [looks, told]}
        filling = {"fn": _said(gr, refill), "inputs": mask_inputs, "outputs": filled, "show_progress": "hidden"}

        def renew(event: Any) -> None:
            """Shows everything anew after an event that changes the image."""
            shown = event.then(show, pixels, [seen, canvas], show_progress="hidden")
            shown.then(**filling).then(**attention)

        def pick(event: gr.SelectData) -> Any:
            return images[event.index]

        def click(event: gr.SelectData) -> tuple[int, int]:
            return event.index[0], event.index[1]

        renew(app.load(lambda: None))
        renew(gallery.select(pick, None, pixels))
        renew(dropped.upload(_said(gr, scene.cropped), dropped, pixels))
        gr.on([ratio.change, kind.change], **filling, trigger_mode="always_last")
        again.click(lambda n: n + 1, seed, seed).then(**filling)
        # The editor also speaks of its input when a new image is put into it, without paint.
        drawn = canvas.input(
            lambda x, kind: PAINT if _paint(x).any() else kind, [canvas, kind], kind, show_progress="hidden"
        )
        drawn.then(**filling)
        seen.select(click, None, place).then(**attention)
        gr.on([layer.change, head.change], **attention)
    return app.queue(default_concurrency_limit=1, api_open=False)


def _paint(canvas: Any) -> Any:
    """Returns where an image editor has paint: opacity of its layers, [h, w]."""
    layers = (canvas or {}).get("layers") or []
    return np.stack([layer[:, :, 3] for layer in layers]).max(axis=0) / 255 if layers else np.zeros((1, 1))


def _said(gr: Any, function: Callable[..., Any]) -> Callable[..., Any]:
    """Returns the function with a user's mistakes shown on the page instead of in a traceback."""

    def guarded(*args: Any) -> Any:
        try:
            return function(*args)
        except (InputError, UnreadableImage) as error:
            raise gr.Error(str(error), print_exception=False) from error

    return guarded


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
