"""The most probable classes of every image of a folder or of shards."""

from collections.abc import Sequence
from pathlib import Path

from torch import Tensor

from quarterlight.ssl.errors import InputError
from quarterlight.ssl.index import ShardIndex
from quarterlight.ssl.processes import build_accelerator, on_all

from .heads import load_classifier
from .network import crop_of, open_weights
from .parts import Part, Parts
from .rows import ROW_NAMES, Network, row_names, write_rows
from .tables import Rows, check_out, write_table
from .use_config import PredictConfig

TOP_K = 5


def predict(images: Sequence[str], config: PredictConfig) -> int:
    """Writes config.out, a row for each image in the order of the input: path, key, label, the top-k classes, error.

    Returns the exit status: 1 when an image could not be read and `strict` asks for it. Raises InputError.
    """
    accelerator = build_accelerator(config.precision)
    out = on_all(lambda: check_out(config.out, (".csv", ".parquet")))
    network, names, top_k = on_all(lambda: _open(config))

    def compute(x: Tensor) -> dict[str, Tensor]:
        probability, number = network.model(x).float().softmax(dim=1).topk(top_k, dim=1)  # [B, k]
        return {"class": number, "probability": probability}

    def write(index: ShardIndex, parts: Parts, partial: Path) -> None:
        _write(index, parts, partial, kind=out.suffix, top_k=top_k, names=names)

    options = {"command": "predict", "top_k": top_k}
    return write_rows(images, config, out, accelerator, network, options, compute, write)


def _open(config: PredictConfig) -> tuple[Network, list[str] | None, int]:
    """Returns the classifier, the names of its classes if they are known, and how many are wanted of each image."""
    weights, encoder = open_weights(config.init, config.encoder, config.data)
    classifier, spec, said = load_classifier(encoder, weights)
    count = classifier.num_classes
    if config.top_k is not None and not 1 <= config.top_k <= count:
        raise InputError(f"top_k is {config.top_k}, and the classifier has {count} classes: give 1 to {count}")
    top_k = min(TOP_K, count) if config.top_k is None else config.top_k
    names = weights.class_names if config.class_names is None else _names_in(config.class_names)
    if config.class_names is not None and names is not None and len(names) != count:
        raise InputError(
            f"class_names {config.class_names} has {len(names)} lines, and the classifier {count} classes: give a file "
            "with the name of a class in each line, in the order of their numbers"
        )
    if names is not None and len(names) != count:
        names = None
    return Network(classifier, spec, crop_of(classifier, config.init, config.data), said), names, top_k


def _names_in(file: str) -> list[str]:
    try:
        return Path(file).expanduser().read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(
            f"class_names {file} cannot be read ({error}): give a text file, a name in each line"
        ) from error


def _write(index: ShardIndex, parts: Parts, partial: Path, *, kind: str, top_k: int, names: list[str] | None) -> None:
    columns = dict(ROW_NAMES)
    for i in range(1, top_k + 1):
        columns |= {f"class_{i}": "int"} | ({f"name_{i}": "text"} if names else {}) | {f"prob_{i}": "float"}
    columns["error"] = "text"
    write_table(partial, kind, columns, (_rows(index, part, columns, names) for part in parts))


def _rows(index: ShardIndex, part: Part, columns: dict[str, str], names: list[str] | None) -> Rows:
    rows: Rows = []
    classes, probabilities = part.tensors["class"].tolist(), part.tensors["probability"].tolist()
    for sample, (numbers, values) in enumerate(zip(classes, probabilities, strict=True), part.start):
        row = dict.fromkeys(columns) | row_names(index, sample) | {"error": part.unreadable.get(sample)}
        if row["error"] is None:
            for i, (number, value) in enumerate(zip(numbers, values, strict=True), 1):
                row |= {f"class_{i}": number, f"prob_{i}": value}
                if names is not None:
                    row[f"name_{i}"] = names[number]
        rows.append(row)
    return rows
