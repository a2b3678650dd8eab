"""What a page says of runs in words and tables: what each one is, how far it came, its figures, and what differs."""

import csv
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from quarterlight.ssl.log import finite

from .run_folder import Run

STAGES = {"pretrain": "Pretraining", "finetune": "Fine-tuning", "linear_probe": "Linear probe and k-NN"}
# Figures that tables begin with; further ones follow in the order in which result.json has them.
FIRST = ("loss", "val_top1", "best_val_top1", "val_top5", "val_loss", "linear_top1", "linear_top5")
OF_A_RUN = ("command", "finished", "preempted", "signal", "steps", "step")  # in result.json, but no figures
NOT_COMPARED = ("run_dir",)  # differs by its nature
CSV_ROWS, CSV_COLUMNS, CSV_CHARACTERS = 40, 30, 200
RESULT_CHARACTERS = 20_000
DEPTH = 4  # of mappings in result.json whose figures are listed
ABSENT = "–"


@dataclass(frozen=True)
class Row:
    """A row of a comparison: one cell a run."""

    name: str
    cells: list[str]
    differs: bool = False


@dataclass(frozen=True)
class Table:
    """A table with a heading for each column."""

    title: str
    columns: list[str]
    rows: list[list[str]]
    note: str = ""


def stage_title(stage: str) -> str:
    """Returns what the command of a run is called in headings."""
    return STAGES.get(stage, stage.replace("_", " ").capitalize())


def by_stage(runs: Sequence[Run]) -> dict[str, list[Run]]:
    """Returns the runs by the command that made them, in the order in which one works."""
    stages = dict.fromkeys([*STAGES, *(run.stage for run in runs)])
    return {stage: found for stage in stages if (found := [run for run in runs if run.stage == stage])}


def describe(run: Run) -> str:
    """Returns what a run is, in one sentence, as far as its options say it."""
    get = run.config.get
    said = get("encoder.name") or (f"the encoder of {get('init')}" if get("init") else "an encoder")
    prefix = "encoder.args."
    args = [f"{key.removeprefix(prefix)} {plain(x)}" for key, x in run.config.items() if key.startswith(prefix)]
    encoder = str(said) + (f" ({', '.join(args)})" if args else "")
    size = get("encoder.img_size") or get("data.img_size")
    encoder += f", {size} px" if finite(size) else ""
    if run.stage == "pretrain":
        ratio = finite(get("mask.ratio"))
        masks = f"{get('mask.strategy')} masks" + (f" of {100 * ratio:g} %" if ratio is not None else "")
        rest = f"{masks}, target {get('target')}, decoder {get('decoder.name')}"
        return f"Masked-autoencoder pretraining of {encoder}; {rest}."
    untrained = ", from initial weights (untrained)" if get("untrained") is True else ""
    start = f", from {get('init')}" if get("init") and get("encoder.name") and not untrained else ""
    few = finite(get("data.samples_per_class"))
    labels = f"; {few:g} labelled images a class" if few else ""
    if run.stage in STAGES:
        return f"{stage_title(run.stage)} on {encoder}{start}{untrained}{labels}."
    return f"{stage_title(run.stage)}: {encoder}{start}." if run.config else f"{stage_title(run.stage)}."


def state_of(run: Run) -> tuple[str, str]:
    """Returns "finished", "stopped" or "unfinished", and a sentence on how far a run came."""
    total = run.total_steps
    of_total = f" of {total:,}" if total else ""
    if run.result.get("finished") is True:
        return "finished", f"Finished{f', {total:,} steps' if total else ''}."
    if run.result.get("finished") is False:
        step = finite(run.result.get("step"))
        where = f" behind step {step:,.0f}{of_total}" if step is not None else ""
        signal = f" by {run.result['signal']}" if run.result.get("signal") else ""
        return "stopped", f"Stopped{signal}{where}; the same command continues it."
    if run.result:
        return "finished", "Its result.json does not say whether it is finished."
    if not run.records:
        return "unfinished", "Not finished, and without a record yet."
    step = run.records[-1]["step"] or 0
    when = datetime.fromtimestamp(run.recorded_at or 0, UTC).strftime("%Y-%m-%d %H:%M UTC")
    where = f"Its newest record is of step {step:,.0f}{of_total}, written {when}."
    return "unfinished", f"Not finished: on its way, or ended. {where}"


def facts(run: Run) -> list[tuple[str, str]]:
    """Returns the few figures that a reader asks for first."""
    found = [(name, number(name, value)) for name, value in headline(run).items()]
    if run.last.get("loss", 0.0) is None:
        found.insert(0, ("loss", "not finite in the newest record"))
    if training_s := _training_s(run):
        found.append(("training took", _duration(training_s)))
    for key, name in (("device", "device"), ("processes", "processes"), ("train_samples", "training images")):
        value = run.environment.get(key)
        if value is not None:
            found.append((name, f"{value:,}" if type(value) is int else str(value)))
    return found


def headline(run: Run, most: int = 5) -> dict[str, float]:
    """Returns the first figures of a run: of its result, or else of its newest records."""
    values = figures(run)
    chosen = [name for name in FIRST if name in values] + [name for name in values if name.startswith("knn_top1")]
    return {name: values[name] for name in (chosen or list(values))[:most]}


def figures(run: Run) -> dict[str, float]:
    """Returns all figures by dotted name: of result.json once the run is finished, else of the newest records.

    Lists are left out; the page shows result.json as it is beside.
    """
    told = {} if run.result.get("finished") is False else run.result
    values = dict(_numbers_in({key: value for key, value in told.items() if key not in OF_A_RUN}))
    values = values or {key: value for key, value in run.last.items() if key != "step" and value is not None}
    return {key: values[key] for key in dict.fromkeys([*(x for x in FIRST if x in values), *values])}


def figure_table(runs: Sequence[Run]) -> list[Row]:
    """Returns the figures of runs, one row a figure; none is marked, since nearly all differ."""
    values = [figures(run) for run in runs]
    names = dict.fromkeys(name for name in FIRST if any(name in x for x in values))
    names |= dict.fromkeys(name for x in values for name in x)
    return [Row(name, [number(name, x[name]) if name in x else ABSENT for x in values]) for name in names]


def option_table(runs: Sequence[Run]) -> list[Row]:
    """Returns the options of runs, one row an option."""
    return _compare([run.config for run in runs])


def environment_table(runs: Sequence[Run]) -> list[Row]:
    """Returns versions and devices, one row a fact."""
    return _compare([run.environment for run in runs])


def incident_tables(run: Run) -> list[Table]:
    """Returns what could not be read and which steps were skipped."""
    tables = []
    what = (("Unreadable samples, or parts of damaged shards", run.bad_samples), ("Skipped steps", run.bad_steps))
    for title, listing in what:
        if not listing.count:
            continue
        columns = list(dict.fromkeys(key for record in listing.first for key in record))
        rows = [[plain(record.get(key, ABSENT))[:CSV_CHARACTERS] for key in columns] for record in listing.first]
        reasons = "; ".join(f"{count:,} x {reason[:CSV_CHARACTERS]}" for reason, count in listing.reasons)
        shown = f" The first {len(rows)}:" if len(rows) < listing.count else ""
        tables.append(Table(f"{title} ({listing.count:,})", columns, rows, f"{reasons}.{shown}"))
    return tables


def csv_table(path: Path, title: str) -> Table:
    """Returns the first rows of a CSV file. Raises OSError or ValueError for what is none."""
    with path.open(newline="", encoding="utf-8") as file:
        lines = csv.reader(file)
        columns = next(lines, [])
        rows, count = [], 0
        for line in lines:
            count += 1
            if count <= CSV_ROWS:
                rows.append([cell[:CSV_CHARACTERS] for cell in line[:CSV_COLUMNS]])
    sizes = (("rows", CSV_ROWS, count), ("columns", CSV_COLUMNS, len(columns)))
    shown = [f"{most} of {there:,} {what}" for what, most, there in sizes if there > most]
    note = f"shown are {' and '.join(shown)}." if shown else ""
    return Table(title, [x[:CSV_CHARACTERS] for x in columns[:CSV_COLUMNS]], rows, note)


def result_text(run: Run) -> str:
    """Returns result.json as text, cut where it is long."""
    text = json.dumps(run.result, indent=2, ensure_ascii=False)
    return text if len(text) <= RESULT_CHARACTERS else f"{text[:RESULT_CHARACTERS]}\n... ({len(text):,} characters)"


def number(name: str, value: float) -> str:
    """Returns a figure as a reader wants it: accuracies in percent, counts with thousands, else four digits."""
    if any(part in name for part in ("top1", "top5")):
        return f"{value:.2f} %"
    if value == int(value) and abs(value) < 1e15:
        return f"{int(value):,}"
    return f"{value:.4g}" if abs(value) < 1e4 else f"{value:,.0f}"


def plain(value: Any) -> str:
    """Returns an option as it is written on a command line."""
    if isinstance(value, str):
        return value
    return json.dumps(value, ensure_ascii=False, default=str)


def _compare(values: list[dict[str, Any]]) -> list[Row]:
    """Returns one row for each key; one that only some runs have differs as well."""
    keys = dict.fromkeys(key for x in values for key in x)
    rows = []
    for key in keys:
        cells = [plain(x[key]) if key in x else ABSENT for x in values]
        rows.append(Row(key, cells, key not in NOT_COMPARED and len(set(cells)) > 1))
    return rows


def _numbers_in(value: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, float]]:
    for key, inner in value.items():
        if isinstance(inner, dict) and prefix.count(".") < DEPTH:
            yield from _numbers_in(inner, f"{prefix}{key}.")
        elif (found := finite(inner)) is not None:
            yield f"{prefix}{key}", found


def _training_s(run: Run) -> float | None:
    """Returns the time that training took by its records, in seconds: without saving, evaluating and starting."""
    batch, before, total = finite(run.config.get("batch_size")), 0.0, 0.0
    for record in run.records:
        if batch and (rate := record.get("images_per_s")):
            step = record["step"] or 0
            total, before = total + (step - before) * batch / rate, step
    return total or None


def _duration(time_s: float) -> str:
    if time_s < 60:
        return f"{time_s:.0f} s"
    minutes = round(time_s / 60)
    return f"{minutes} min" if minutes < 100 else f"{minutes // 60} h {minutes % 60:02d} min"
