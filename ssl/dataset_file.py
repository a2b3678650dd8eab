"""dataset.json beside shards: their classes, splits and counts, as `launch/shards.py` leaves them."""

import json
from typing import Any

from .addresses import shown
from .errors import InputError
from .shard_names import read_small_file

DATASET_FILE = "dataset.json"
LEFT_OUT_FILE = "left_out.jsonl"  # beside it: what could not be read, and why


def read_dataset(folder: str) -> dict[str, Any]:
    """Returns what the dataset.json of a folder, or of an address, holds; {} where there is none.

    Raises InputError when it is no JSON object.
    """
    file = f"{folder}/{DATASET_FILE}"
    data = read_small_file(file)
    if data is None:
        return {}
    try:
        dataset = json.loads(data)
    except ValueError as error:
        raise InputError(f"{shown(file)} is no JSON ({error}): copy it again, or delete it") from error
    if not isinstance(dataset, dict):
        raise InputError(f"{shown(file)} is no JSON object, but {data[:20]!r}: copy it again, or delete it")
    return dataset
