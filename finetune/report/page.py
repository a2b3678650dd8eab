"""One page about runs: what they are, how they went and what they left, in a file that needs nothing beside it."""

import csv
import secrets
from collections.abc import Sequence
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

from quarterlight.ssl.errors import InputError
from quarterlight.ssl.files import write_text

from .config import ReportConfig
from .images import files_of, pictures_of
from .run_folder import Run, read_runs
from .tables import (
    Table,
    by_stage,
    csv_table,
    describe,
    environment_table,
    facts,
    figure_table,
    incident_tables,
    option_table,
    result_text,
    stage_title,
    state_of,
)
from .template import PAGE, STYLE

MOST_TABLES = 8  # CSV files of one run
MOST_FIGURES = 40  # rows; result.json may have one a class
# Options by which losses of pretraining are of different things.
LOSS_IS_OF = ("target", "loss", "mask.ratio", "mask.strategy", "encode_masked")


def write_report(folders: Sequence[str], config: ReportConfig) -> Path:
    """Writes a page about the runs in these folders, and returns its path.

    The page loads nothing, from no server and from no other file, and its content security policy forbids it to; only
    plotly's own scripts run in it. Raises InputError for what is no run, and for a file that cannot be written.
    """
    out = Path(config.out).expanduser()
    if out.suffix.lower() not in (".html", ".htm"):
        raise InputError(f"out {out} does not end in .html: the report is a web page")
    if out.is_dir():
        raise InputError(f"out {out} is a folder: give the name of a file")
    try:
        import plotly  # noqa: F401
    except ImportError as error:
        raise InputError("a report needs plotly: pip install 'quarterlight[report]'") from error
    write_text(out, page(read_runs(folders), config))
    return out


def page(runs: Sequence[Run], config: ReportConfig) -> str:
    """Returns the HTML of a page about these runs."""
    from jinja2 import Environment, StrictUndefined
    from plotly.offline import get_plotlyjs

    from .curves import probe_plot

    names = ", ".join(run.name for run in runs) if len(runs) < 5 else f"{len(runs)} runs"
    nonce = secrets.token_urlsafe(16)
    told = [_told(run, runs, config) for run in runs]
    stages = [_stage(i, *found, nonce) for i, found in enumerate(by_stage(runs).items())]
    probes = probe_plot(runs)
    has = {
        "has_plots": any(stage["plots"] for stage in stages),
        "has_pictures": any(x["pictures"].single or x["pictures"].series for x in told),
        "has_tables": any(x["tables"] for x in told),
        "has_incidents": any(x["incidents"] for x in told),
    }
    sections = [("summary", "Summary"), ("figures", "Figures"), ("curves", "Curves"), ("pictures", "Pictures")]
    sections += [("tables", "Tables"), ("options", "Options"), ("environment", "Environment")]
    sections += [("incidents", "Unreadable and skipped")]
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True)
    return environment.from_string(PAGE).render(
        title=config.title or f"Report on {names}",
        written=datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        version=version("quarterlight"),
        # Nothing is loaded, and no script runs but those with this number; plotly writes styles, and saves blobs.
        policy=f"default-src 'none'; img-src data: blob:; style-src 'unsafe-inline'; script-src 'nonce-{nonce}'; "
        "base-uri 'none'; form-action 'none'",
        nonce=nonce,
        style=STYLE,
        plotly_js=get_plotlyjs(),
        runs=told,
        all_runs=runs,
        stages=stages,
        probes=None if probes is None else _plot_html(probes, "plot-probes", nonce),
        environment=environment_table(runs),
        sections=[(id, name) for id, name in sections if has.get(f"has_{id if id != 'curves' else 'plots'}", True)],
        **has,
    )


def _told(run: Run, runs: Sequence[Run], config: ReportConfig) -> dict[str, Any]:
    """Returns what the page says of one run."""
    pictures = pictures_of(run, series_pictures=config.series_pictures, width=config.picture_width)
    tables, problems = _csv_tables(run)
    state, progress = state_of(run)
    init = run.config.get("init")
    start = Path(init).resolve() if isinstance(init, str) and run.config.get("untrained") is not True else None
    sources = [(i, x.name) for i, x in enumerate(runs, start=1) if x is not run and x.folder.resolve() == start]
    return {
        "run": run,
        "what": describe(run),
        "state": state,
        "progress": progress,
        "source": sources[0] if sources else None,
        "problems": [*run.problems, *pictures.problems, *problems],
        "facts": facts(run),
        "pictures": pictures,
        "tables": tables,
        "incidents": incident_tables(run),
        "result": result_text(run) if run.result else "",
    }


def _csv_tables(run: Run) -> tuple[list[Table], list[str]]:
    tables, problems = [], []
    for path in files_of(run, ".csv")[:MOST_TABLES]:
        try:
            tables.append(csv_table(path, str(path.relative_to(run.folder))))
        except (OSError, ValueError, csv.Error) as error:
            problems.append(f"{path.name} cannot be read ({' '.join(str(error).split())[:200]}).")
    return tables, problems


def _stage(number: int, stage: str, runs: list[Run], nonce: str) -> dict[str, Any]:
    """Returns what the page says of the runs of one command."""
    from .curves import curve_plots

    options, rows = option_table(runs), figure_table(runs)
    differing = [row for row in options if row.differs]
    other = [row.name for row in differing if row.name in LOSS_IS_OF]
    caution = f"The losses are not of the same thing, since these differ: {', '.join(other)}." if other else ""
    plots = enumerate(curve_plots(runs))
    return {
        "title": stage_title(stage),
        "runs": runs,
        "options": options,
        "differing": differing,
        "caution": caution if stage == "pretrain" else "",
        "figures": rows[:MOST_FIGURES],
        "more_figures": max(0, len(rows) - MOST_FIGURES),
        "plots": [(title, _plot_html(figure, f"plot-{number}-{i}", nonce)) for i, (title, figure) in plots],
    }


def _plot_html(figure: Any, name: str, nonce: str) -> str:
    """Returns a plot as HTML, its script under the page's nonce.

    plotly writes `<` in its data as an escape, but `name` as it is: no text of a run may be in it.
    """
    buttons = [["toImage", "zoom2d", "pan2d", "resetScale2d"]]  # none of those that ask a server
    config = {"displaylogo": False, "responsive": True, "scrollZoom": False, "modeBarButtons": buttons}
    inline = figure.to_html(config=config, include_plotlyjs=False, full_html=False, default_height="340px", div_id=name)
    return inline.replace("<script>", f'<script nonce="{nonce}">')
