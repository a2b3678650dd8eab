"""What do launchers do with a signal, and does the run survive it? Prints a table and one JSON line.

python benchmarks/launchers.py --dir runs/launchers

A run is started under each launcher, which gets a signal after some steps, and continued by the same command under the
next signal.
"""

import argparse
import json
import sys
from pathlib import Path
from signal import SIGINT, SIGKILL, SIGTERM, SIGUSR1

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tests"))
from conftest import write_tars  # noqa: E402
from launchers import LAUNCHERS, saved_step, signalled  # noqa: E402
from ranks import LONG, steps_logged  # noqa: E402


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dir", type=Path, required=True, help="a new folder for shards and runs")
    folder = parser.parse_args().dir.resolve()
    pattern = write_tars(folder / "shards", "train", 60)
    figures = []
    print("| launcher | signal | its exit code | it ended after | all processes ended after | state of the last step |")
    print("|---|---|---|---|---|---|")
    for number, launcher in enumerate(LAUNCHERS):
        run_dir, saved = folder / f"run-{number}", 0
        for sent in (SIGTERM, SIGINT, SIGUSR1, SIGKILL):
            given = LONG | {"data.train": pattern, "run_dir": str(run_dir)}
            outcome = signalled(launcher, sent, given, run_dir, folder / f"output-{number}-{sent.name}.txt")
            continued = not saved or f"continuing from step {saved} of" in outcome.said
            saved = saved_step(run_dir)
            whole = saved == steps_logged(run_dir) and continued
            print(
                f"| {launcher} | {sent.name} | {outcome.code} | {outcome.launcher_s:.1f} s | "
                f"{outcome.processes_s:.1f} s | {'saved' if whole else 'NOT saved'} |",
                flush=True,
            )
            figures.append(
                {"launcher": launcher, "signal": sent.name, "code": outcome.code, "saved": whole}
                | {"launcher_s": round(outcome.launcher_s, 2), "processes_s": round(outcome.processes_s, 2)}
            )
    print(json.dumps({"cases": figures}))


if __name__ == "__main__":
    main()
