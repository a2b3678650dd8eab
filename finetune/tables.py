"""Tables with a row for each image, as CSV or Parquet, written a block of rows at a time."""

import csv
import io
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from quarterlight.ssl.errors import InputError

Rows = list[dict[str, Any]]  # by name of the column; None where there is nothing
PARQUET = ".parquet"


def check_out(out: str, suffixes: Sequence[str]) -> Path:
    """Returns the path of a file to write. Raises InputError when it cannot be written, before anything is computed."""
    path = Path(out).expanduser()
    if path.suffix not in suffixes:
        raise InputError(f"out {out} ends in {path.suffix or 'nothing'}: give a name in {' or '.join(suffixes)}")
    if path.is_dir():
        raise InputError(f"out {out} is a folder: give the name of a file")
    if not path.parent.is_dir():
        raise InputError(f"out {out}: there is no folder {path.parent}: make it, or give another name")
    if not os.access(path.parent, os.W_OK):
        raise InputError(f"out {out}: the folder {path.parent} cannot be written: give another one")
    if path.suffix == PARQUET:
        _pyarrow()
    return path


def csv_text(rows: Iterable[Sequence[Any]]) -> str:
    """Returns rows as CSV, the first of them the names of the columns."""
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(rows)
    return text.getvalue()


def write_table(path: Path, kind: str, columns: dict[str, str], blocks: Iterable[Rows]) -> None:
    """Writes a table. `kind` is its suffix; `columns` has a type by name: text, int, float, or floats (a list).

    Numbers in a CSV have six significant digits.
    """
    if kind == PARQUET:
        _write_parquet(path, columns, blocks)
        return
    with path.open("w", newline="", encoding="utf-8", errors="surrogateescape") as file:  # names are bytes on a disk
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(columns)
        for rows in blocks:
            writer.writerows([_text(row[name]) for name in columns] for row in rows)


def _text(value: Any) -> str:
    return "" if value is None else f"{value:.6g}" if isinstance(value, float) else str(value)


def _write_parquet(path: Path, columns: dict[str, str], blocks: Iterable[Rows]) -> None:
    arrow, parquet = _pyarrow()
    types = {"text": arrow.string(), "int": arrow.int64(), "float": arrow.float32()}
    types["floats"] = arrow.list_(arrow.float32())
    schema = arrow.schema([(name, types[kind]) for name, kind in columns.items()])
    with parquet.ParquetWriter(path, schema) as writer:
        for rows in blocks:
            values = {name: [_utf8(row[name]) for row in rows] for name in columns}
            writer.write_table(arrow.table(values, schema=schema))


def _utf8(value: Any) -> Any:
    """Returns text as Parquet has it, which knows no bytes of other encodings in file names."""
    return value.encode("utf-8", "surrogateescape").decode("utf-8", "replace") if isinstance(value, str) else value


def _pyarrow() -> tuple[Any, Any]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise InputError("a .parquet file needs pyarrow: pip install 'quarterlight[parquet]'") from error
    return pyarrow, pyarrow.parquet
