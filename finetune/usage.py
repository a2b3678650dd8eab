"""Snippets for model cards: how each library loads what was exported to it."""

import json

from .release import Release

CHECKERS = {
    "timm": "timm",
    "transformers": "transformers",
    "mae": "torch.load",
    "onnx": "onnxruntime",
    "torch": "torch",
}


def usage(to: str, release: Release, where: str, what: str) -> str:
    """Returns Python that loads a release.

    `where` is the repository or folder, `what` the file's name, or the class in transformers.
    """
    shape = ", ".join(map(str, (len(release.spec.mean), *release.timm.patch_embed.img_size)))
    args = {key: value for key, value in release.spec.timm_args().items() if key != "num_classes"}
    args["num_classes"] = release.timm.num_classes
    text = ", ".join(f"{key}={json.dumps(value) if isinstance(value, str) else value!r}" for key, value in args.items())
    create = f'model = timm.create_model("{release.spec.name}", {text})'
    dtype = str(next(release.model.parameters()).dtype).removeprefix("torch.")
    outputs = "logits" if release.kind == "classifier" else "tokens, features"
    none = ", add_pooling_layer=False" if what == "ViTModel" else ""
    comma = "" if "," in outputs else ","  # they come as a tuple
    lines = {
        "timm": [
            "import timm",
            "from safetensors.torch import load_file",
            create,
            f'model.load_state_dict(load_file("{what}"))',
        ],
        "transformers": [
            f"from transformers import AutoImageProcessor, {what}",
            f'processor = AutoImageProcessor.from_pretrained("{where}")',
            f'model = {what}.from_pretrained("{where}"{none})',
        ],
        "mae": [
            "import torch",
            "# under the names of facebookresearch/mae",
            f'tensors = torch.load("{what}", weights_only=True)["model"]',
        ],
        "onnx": [
            "import onnxruntime",
            f'session = onnxruntime.InferenceSession("{what}")',
            f"# images: {dtype} [B, {shape}], normalized",
            f'{outputs}{comma} = session.run(None, {{"images": images}})',
        ],
        "torch": [
            "import torch",
            f'model = torch.export.load("{what}").module()',
            f"# images: {dtype} [B, {shape}], normalized",
            f"{outputs}{comma} = model(images)",
        ],
    }
    return "\n".join(lines[to])
