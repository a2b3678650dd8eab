"""The nearest neighbors of images by cosine similarity of their features: a table, and a picture of the first ones."""

import json
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from quarterlight.ssl.config import EncoderConfig
from quarterlight.ssl.errors import InputError
from quarterlight.ssl.files import replace_file
from quarterlight.ssl.knn import Nearest, nearest
from quarterlight.ssl.processes import build_accelerator
from quarterlight.ssl.runs import write_result

from .embed import embed, open_embedder
from .embeddings import Embeddings
from .neighbors_picture import draw_neighbors
from .tables import csv_text
from .use_config import CropConfig, EmbedConfig, NeighborsConfig

COLUMNS = ("query_path", "query_key", "query_label", "rank", "path", "key", "label", "similarity")


def neighbors(config: NeighborsConfig) -> dict[str, Any]:
    """Leaves neighbors.csv, neighbors.png and result.json in config.out, and returns what result.json holds.

    Raises InputError for embeddings that do not fit each other, and what cannot be read or written.
    """
    out = Path(config.out).expanduser()
    bank = Embeddings(config.embeddings)
    if config.top_k > len(bank) - (config.queries is None):
        raise InputError(
            f"top_k is {config.top_k}, and there are {len(bank)} images in {config.embeddings}"
            f"{', the query among them' if config.queries is None else ''}: give a smaller one"
        )
    _make_folder(out)
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise InputError("neighbors runs in one process: start it with python, not with a launcher of several")
    queries = _queries(config, bank, out)
    device = build_accelerator(_precision(config, bank)).device
    itself = torch.arange(len(bank)) if queries is bank else None
    found = nearest(bank, queries, config.top_k, itself=itself, device=device)
    _write_csv(out / "neighbors.csv", _rows(bank, queries, found))
    whole = torch.nonzero(found.places[:, 0] >= 0).squeeze(1).tolist()
    if whole and config.pictures:
        places = np.linspace(0, len(whole) - 1, min(config.pictures, len(whole))).round().astype(int).tolist()
        shown = [whole[i] for i in places]
        draw_neighbors(out / "neighbors.png", bank, queries, found.similarity, found.places, shown, config.cache_dir)
    result: dict[str, Any] = {"queries": len(queries), "bank": len(bank), "top_k": config.top_k}
    share = _same_label(bank, queries, found)
    result |= {} if share is None else {"same_label_pct": share}
    write_result(out, "neighbors", finished=True, **result)
    same = "" if share is None else f", {share:.1f} % of the neighbors have the query's label"
    print(f"done: {config.top_k} neighbors of {len(queries):,} images among {len(bank):,}{same}, {out}", flush=True)
    return result


def _precision(config: NeighborsConfig, bank: Embeddings) -> str:
    """Returns the precision in which queries are embedded. It matters to nothing else: similarities are float32."""
    return config.precision or bank.metadata.get("precision", "no") if _are_images(_given(config)) else "no"


def _given(config: NeighborsConfig) -> list[str]:
    return [config.queries] if isinstance(config.queries, str) else list(config.queries or [])


def _are_images(given: list[str]) -> bool:
    return bool(given) and not given[0].endswith(".safetensors")


def _make_folder(out: Path) -> None:
    try:
        out.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=out):
            pass
    except OSError as error:
        raise InputError(f"out {out} cannot be written ({error.strerror}): give another folder") from error


def _queries(config: NeighborsConfig, bank: Embeddings, out: Path) -> Embeddings:
    """Returns the features of the queries: the bank's, of a file, or computed as the bank's were. Raises InputError."""
    given = _given(config)
    if not given:
        return bank
    if not _are_images(given):
        if len(given) > 1:
            raise InputError(f"queries: {len(given)} are given, the first a file of embeddings: give that alone")
        queries = Embeddings(given[0])
        same = ("weights", "pool", "layers")
        if queries.dim != bank.dim or any(queries.metadata.get(x) != bank.metadata.get(x) for x in same):
            raise InputError(
                f"{given[0]} and {config.embeddings} are features of different networks or layers: embed both with the "
                "same --init, --pool and --layers"
            )
        return queries
    as_before = _embed_config(config, bank, out)
    if open_embedder(as_before).facts()["weights"] != bank.metadata.get("weights"):
        raise InputError(
            f"init {as_before.init} holds other weights than those that made {config.embeddings}: name them with --init"
        )
    embed(given, as_before)
    return Embeddings(as_before.out)


def _embed_config(config: NeighborsConfig, bank: Embeddings, out: Path) -> EmbedConfig:
    """Returns the options by which the bank was made, for the queries."""
    try:
        known = bank.metadata
        read = {key: json.loads(known[key]) for key in ("timm_args", "img_size", "crop_pct", "mean", "std", "layers")}
        args = {key: value for key, value in read["timm_args"].items() if key not in ("img_size", "global_pool")}
        crop: dict[str, Any] = {"img_size": tuple(read["img_size"]), "crop_pct": read["crop_pct"]}
        crop |= {"mean": tuple(read["mean"]), "std": tuple(read["std"]), "cache_dir": config.cache_dir}
        return EmbedConfig(
            init=config.init or known["init"],
            encoder=EncoderConfig(name=known["architecture"], args=args),
            data=CropConfig(**crop),
            pool=known["pool"],  # type: ignore[arg-type]
            layers=None if read["layers"] is None else tuple(read["layers"]),
            out=str(out / "queries.safetensors"),
            precision=_precision(config, bank),  # type: ignore[arg-type]
            batch_size=config.batch_size,
            num_workers=config.num_workers,
        )
    except (KeyError, ValueError, TypeError, AttributeError) as error:
        raise InputError(
            f"{config.embeddings} does not say which network made it ({error!r}): give --queries as embeddings, too"
        ) from error


def _rows(bank: Embeddings, queries: Embeddings, found: Nearest) -> list[tuple[Any, ...]]:
    """Returns the rows of the table, with COLUMNS; a query without features has none."""
    rows = []
    for query, (similarities, numbers) in enumerate(zip(found.similarity.tolist(), found.places.tolist(), strict=True)):
        for rank, (similarity, number) in enumerate(zip(similarities, numbers, strict=True), 1):
            if number >= 0:
                mine = (queries.path[query], queries.key[query], _label(queries, query))
                other = (bank.path[number], bank.key[number], _label(bank, number))
                rows.append((*mine, rank, *other, f"{similarity:.6f}"))
    return rows


def _label(embeddings: Embeddings, number: int) -> int | str:
    label = int(embeddings.label[number])
    return label if label >= 0 else ""


def _write_csv(path: Path, rows: Sequence[tuple[Any, ...]]) -> None:
    data = csv_text([COLUMNS, *rows]).encode("utf-8", "surrogateescape")
    replace_file(path, lambda partial: partial.write_bytes(data))


def _same_label(bank: Embeddings, queries: Embeddings, found: Nearest) -> float | None:
    """Returns the share, in percent, of neighbors that have the label of their query; None without labels."""
    mine, others = queries.label[:, None].expand_as(found.places), bank.label[found.places.clamp(min=0)]
    counted = (found.places >= 0) & (mine >= 0) & (others >= 0)
    return 100 * float((mine == others)[counted].double().mean()) if bool(counted.any()) else None
