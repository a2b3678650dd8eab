"""All pictures of an encoder and its run, in one folder: what launch/visualize.py does."""

import json
from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import Any, get_args

import numpy as np
import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor

from quarterlight.ssl.augment import CenterCrop, Normalize
from quarterlight.ssl.encoder import Encoder
from quarterlight.ssl.errors import InputError, printable
from quarterlight.ssl.files import write_json

from .attention_pictures import draw_attention_distance, draw_rollout
from .autoencoders import Subject, load_subject
from .config import PictureName, VisualizeConfig
from .curves import draw_curves, names_of, read_metrics
from .feature_pictures import draw_features_map, draw_features_rgb, draw_neighbors, features_of
from .figure import CannotDraw, Picture, as_color, save_figure
from .images import Images, read_images
from .reconstructions import Reconstructor, draw_ratios, draw_reconstructions, draw_strategies
from .weight_pictures import draw_bias_tables, draw_filters, draw_positions, draw_window_mask


def visualize(config: VisualizeConfig) -> dict[str, Any]:
    """Draws the pictures that `config` asks for, and leaves them in `config.out` with result.json and TensorBoard.

    Returns what result.json holds: titles and captions of the pictures, why others were left out, and figures.

    Raises InputError for what cannot be read, and when a picture that was asked for by name cannot be drawn.
    """
    out = Path(config.out)
    _refuse_foreign(out)
    studio = Studio(config)
    out.mkdir(parents=True, exist_ok=True)
    drawn: list[Picture] = []
    left_out: dict[str, str] = {}
    for name in config.pictures or get_args(PictureName):
        try:
            picture = studio.draw(name)
        except CannotDraw as reason:
            if config.pictures:
                raise InputError(f"pictures: {name} cannot be drawn: {reason}") from reason
            left_out[name] = str(reason)
            print(f"left out {name}: {reason}", flush=True)
            continue
        save_figure(out / f"{name}.png", picture.figure)
        drawn.append(picture)
        print(f"{out / name}.png: {picture.title}", flush=True)
    if not drawn:
        raise InputError(f"none of the pictures can be drawn ({'; '.join(left_out.values())})")
    about = [{"file": f"{p.name}.png", "title": p.title, "caption": p.caption} for p in drawn]
    result: dict[str, Any] = {"command": "visualize", "finished": True}
    result |= {"encoder": studio.subject.report} if studio.needs_encoder else {}
    result |= {"pictures": about, "left_out": left_out, **studio.figures}
    write_json(out / "result.json", result)
    _to_tensorboard(out, drawn)
    return result


def _refuse_foreign(out: Path) -> None:
    """Raises InputError for a folder in which something else lies whose files would be replaced, such as a run."""
    if out.exists() and not out.is_dir():
        raise InputError(f"out {out} is a file: give a folder")
    try:
        of_pictures = json.loads((out / "result.json").read_text())["command"] == "visualize"
    except FileNotFoundError:
        of_pictures = not any(out.glob("events.out.tfevents.*"))
    except (OSError, ValueError, KeyError, TypeError):
        of_pictures = False
    if not of_pictures or (out / "config.yaml").exists():
        raise InputError(f"out {out} holds a run or results of another command: give a folder below it, as {out}/look")


class Studio:
    """Draws by name; what several pictures need is read and computed once."""

    def __init__(self, config: VisualizeConfig) -> None:
        self.config = config
        self.figures: dict[str, Any] = {}
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        # the curves of runs can be drawn without any
        self.needs_encoder = list(config.pictures or ()) != ["curves"] or not config.runs
        if self.needs_encoder:
            if config.init is None and config.encoder.name is None:
                raise InputError("there is no encoder: give --init (only --pictures '[curves]' of --runs needs none)")
            print(self.subject.report, flush=True)
        self.how: dict[str, Callable[[], Picture]] = {
            "reconstructions": lambda: self._noted(draw_reconstructions(self.reconstruct)),
            "ratios": lambda: self._noted(draw_ratios(self.reconstruct, config.mask_ratios)),
            "strategies": lambda: self._noted(draw_strategies(self.reconstruct)),
            "filters": lambda: draw_filters(self.encoder),
            "positions": lambda: draw_positions(self.encoder),
            "attention_distance": self._attention_distance,
            "rollout": lambda: draw_rollout(self.encoder, *self.shown),
            "bias_tables": lambda: draw_bias_tables(self.encoder),
            "window_mask": lambda: draw_window_mask(self.encoder),
            "features_map": lambda: draw_features_map(self.features, self.images, seed=config.seed),
            "features_rgb": lambda: draw_features_rgb(self.encoder, *self.shown),
            "neighbors": self._neighbors,
            "curves": self._curves,
        }
        if self.needs_encoder and config.images:
            _ = self.images  # a mistake in their name shows before anything is drawn

    def draw(self, name: PictureName) -> Picture:
        """Returns a picture. Raises CannotDraw, with the reason, where there is nothing to draw it of."""
        return self.how[name]()

    @cached_property
    def subject(self) -> Subject:
        """The encoder, with its decoder where there is one."""
        found = load_subject(
            self.config.init, self.config.encoder, untrained=self.config.untrained, seed=self.config.seed
        )
        (found.autoencoder or found.encoder).to(self.device)
        return found

    @property
    def encoder(self) -> Encoder:
        """What the pictures are of."""
        return self.subject.encoder

    @cached_property
    def normalize(self) -> Normalize:
        """Normalizes the images as the encoder expects."""
        return Normalize(self.subject.spec.mean, self.subject.spec.std).to(self.device)

    @cached_property
    def images(self) -> Images:
        """The images, at most num_features of them."""
        if self.config.images is None:
            raise CannotDraw("it is a picture of images: give --images")
        crop_pct = self.config.crop_pct if self.config.crop_pct is not None else self.subject.crop_pct
        in_chans = self.subject.spec.args.get("in_chans", 3)
        count = max(self.config.num_features, self.config.num_images)
        crop = CenterCrop(self.encoder.img_size, crop_pct)
        images = read_images(self.config.images, count=count, crop=crop, in_chans=in_chans)
        for name, reason in images.unreadable:
            print(printable(f"left out the image {name}: {reason}"), flush=True)
        self.figures |= {"images": len(images.names), "images_in_all": images.total}
        self.figures["unreadable_images"] = [list(x) for x in images.unreadable]
        return images

    @cached_property
    def shown(self) -> tuple[Float[Tensor, "B C H W"], Float[np.ndarray, "B H W 3"]]:
        """The images that are shown one by one: normalized, and in color."""
        numbers = self.images.evenly(self.config.num_images)
        pixels = self.images.pixels[torch.from_numpy(numbers)].to(self.device)
        return self.normalize(pixels), self.colored(numbers)

    def colored(self, numbers: np.ndarray) -> Float[np.ndarray, "B H W 3"]:
        """Returns images by number as they are shown."""
        return as_color(self.images.pixels[torch.from_numpy(numbers)].permute(0, 3, 1, 2).numpy() / np.float32(255))

    @cached_property
    def reconstruct(self) -> Reconstructor:
        """What fills in the shown images."""
        if self.subject.autoencoder is None:
            raise CannotDraw(self.subject.no_decoder)
        return Reconstructor(
            self.subject.autoencoder,
            self.normalize,
            self.shown[0],
            self.subject.mask,
            contrast_only=self.config.norm_pix_statistics == "none",
            seed=self.config.seed,
        )

    @cached_property
    def features(self) -> Float[Tensor, "n D"]:
        """A feature of each image."""
        return features_of(self.encoder, self.normalize, self.images, self.device)

    def _noted(self, made: tuple[Picture, dict[str, Any]]) -> Picture:
        self.figures |= made[1]
        return made[0]

    def _attention_distance(self) -> Picture:
        picture, distances = draw_attention_distance(self.encoder, self.shown[0])
        self.figures["attention_distance_px"] = distances
        return picture

    def _neighbors(self) -> Picture:
        queries = self.images.evenly(min(self.config.num_images, 8))
        return draw_neighbors(self.features, self.images, self.colored, queries)

    def _curves(self) -> Picture:
        run_dirs = [Path(run).expanduser() for run in self.config.runs or []]
        if not run_dirs:
            if self.subject.of_run is None or not (self.subject.of_run / "metrics.jsonl").is_file():
                raise CannotDraw("there is no metrics.jsonl in --init: give --runs")
            run_dirs = [self.subject.of_run]
        return draw_curves({name: read_metrics(path) for name, path in names_of(run_dirs).items()})


def _to_tensorboard(out: Path, pictures: list[Picture]) -> None:
    from torch.utils.tensorboard import SummaryWriter

    for old in out.glob("events.out.tfevents.*"):  # of an earlier look: the same names, other pictures
        old.unlink()
    with SummaryWriter(out) as writer:
        for picture in pictures:
            with Image.open(out / f"{picture.name}.png") as drawn:
                writer.add_image(picture.name, np.array(drawn.convert("RGB")), dataformats="HWC")
            writer.add_text(picture.name, f"{picture.title}\n\n{picture.caption}")
