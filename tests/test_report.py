import json
import math
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from browser import Visit, open_browser
from conftest import TINY, TINY_PRETRAIN, command
from PIL import Image

from quarterlight.finetune.report.config import ReportConfig
from quarterlight.finetune.report.curves import MOST_POINTS, curve_plots
from quarterlight.finetune.report.page import write_report
from quarterlight.finetune.report.run_folder import read_runs
from quarterlight.ssl.errors import InputError

EVIL = "<script>window.hacked=1</script><img src=x onerror=window.hacked=1>"
VOID = {"meta", "img", "input", "br", "link"}


class Page(HTMLParser):
    """The elements of a page, its text, and whether every element that begins also ends."""

    def __init__(self, path: Path) -> None:
        super().__init__(convert_charrefs=True)
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.open: list[str] = []
        self.feed(path.read_text())
        self.close()
        assert self.open == []
        self.text = " ".join(" ".join(self.words).split())

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] not in ("script", "style"):
            self.words.append(data)

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.elements if name == tag]


def write_run(
    folder: Path, *, config: str = "batch_size: 8\nsteps: 40\nmask: {ratio: 0.75}\n", result=None, records=()
):
    """Writes a run folder by hand: what a command leaves, or what is left of it."""
    folder.mkdir(parents=True)
    if config:
        (folder / "config.yaml").write_text(config)
    if result is not None:
        (folder / "result.json").write_text(json.dumps(result))
    if records:
        (folder / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return folder


def report(tmp_path: Path, *folders: Path, **options) -> Page:
    return Page(write_report([str(x) for x in folders], ReportConfig(out=str(tmp_path / "report.html"), **options)))


@pytest.fixture(scope="module")
def real(tmp_path_factory, shards) -> tuple[list[Path], Path]:
    """Returns the folders of a real pretraining run and of probes and fine-tuning on it, and their report's path."""
    import os
    import subprocess

    out = tmp_path_factory.mktemp("real")
    train, val = shards
    data = {"data.train": train, "data.val": val}
    few = {"extract_batch_size": "32", "epochs": "2", "batch_size": "16"}
    head = {k: TINY_PRETRAIN[k] for k in ("batch_size", "optim.warmup_steps", "log_every_steps")} | {"steps": "6"}
    todo = [
        ("pretrain.py", TINY_PRETRAIN | data | {"run_dir": str(out / "mae"), "picture_every_steps": "4"}),
        ("linear_probe.py", data | few | {"init": str(out / "mae"), "run_dir": str(out / "probe"), "num_workers": "0"}),
        ("finetune.py", TINY | data | head | {"init": str(out / "mae"), "run_dir": str(out / "tuned")}),
    ]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    for script, options in todo:
        subprocess.run(command(script, options), check=True, capture_output=True, env=environment, timeout=300)
    folders = [out / "mae", out / "probe", out / "tuned"]
    line = [*command("report.py", {})[:2], *map(str, folders), "--out", str(out / "page" / "all.html")]
    done = subprocess.run(line, check=True, capture_output=True, text=True, env=environment, timeout=120)
    assert done.stdout == f"done: {out / 'page' / 'all.html'}\n"
    return folders, out / "page" / "all.html"


def test_a_page_about_real_runs_has_their_figures_options_and_pictures(real):
    folders, path = real
    page = Page(path)
    results = [json.loads((folder / "result.json").read_text()) for folder in folders]
    assert f"loss {results[0]['loss']:.4g}" in page.text
    assert f"linear_top1 {results[1]['linear_top1']:.2f} %" in page.text
    assert f"knn_top1.avg_k10 {results[1]['knn_top1']['avg_k10']:.2f} %" in page.text
    assert f"best_val_top1 {results[2]['best_val_top1']:.2f} %" in page.text
    environment = json.loads((folders[0] / "environment.json").read_text())
    for told in (
        environment["packages"]["torch"],
        environment["device"],
        "Finished, 12 steps.",
        "optim.base_lr",
        "0.01",
    ):
        assert told in page.text
    assert "Masked-autoencoder pretraining of vit_tiny_patch16_224 (patch_size 4, " in page.text
    assert page.text.count("Begins with mae") == 2  # the probe and fine-tuning
    assert "avg with batch norm" in path.read_text()  # a curve of linear probes for each kind of them
    assert "step 4" in page.text and "step 12" in page.text and "reconstructions.png" in page.text
    assert "None." in page.text  # no unreadable samples


def test_a_page_loads_nothing_and_runs_only_its_own_scripts(real):
    page = Page(real[1])
    loading = [
        value for _, attributes in page.elements for name, value in attributes.items() if name in ("src", "srcset")
    ]
    assert loading and all(str(value).startswith("data:") for value in loading)
    assert page.all("link") == page.all("iframe") == page.all("object") == page.all("base") == []
    assert all(str(x["href"]).startswith("#") for x in page.all("a"))
    assert "url(" not in re.search(r"<style>(.*?)</style>", real[1].read_text(), re.DOTALL)[1]
    nonces = {x.get("nonce") for x in page.all("script")}
    policy = next(x["content"] for x in page.all("meta") if x.get("http-equiv") == "Content-Security-Policy")
    assert (
        len(nonces) == 1 and f"script-src 'nonce-{nonces.pop()}'" in str(policy) and "default-src 'none'" in str(policy)
    )


def test_every_curve_of_a_page_has_the_numbers_of_metrics_jsonl(real):
    for run in read_runs([str(folder) for folder in real[0]]):
        path = run.folder / "metrics.jsonl"
        records = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
        plots = dict(curve_plots([run]))
        for name, title in {
            "loss": "Loss",
            "lr": "Learning rate",
            "val_top1": "Accuracy",
            "data_wait_pct": "Waiting",
        }.items():
            given = [(record["step"], record[name]) for record in records if name in record]
            traces = [x for t, figure in plots.items() if t.startswith(title) for x in figure.data]
            shown = [list(zip(x.x, x.y, strict=True)) for x in traces if x.name in (name, run.name)]
            assert shown == ([given] if given else [])


def test_text_from_a_run_is_text(tmp_path):
    run = write_run(
        tmp_path / "<script>window.hacked=1</script>",
        config=f"batch_size: 8\nmask: {{ratio: 0.75}}\ndata: {{train: '{EVIL}'}}\ninit: 'javascript:hacked'\n",
        result={
            "command": f"pretrain{EVIL}",
            "finished": True,
            EVIL: 1.0,
            "pictures": [{"file": "x.png", "caption": EVIL}],
        },
        records=[
            {"step": 1, EVIL: 0.5, "loss</script><script>window.hacked=1</script>": 1},
            {"step": 2, EVIL: 0.4, "loss": 1},
        ],
    )
    (run / "bad_samples.jsonl").write_text(json.dumps({"step": 1, "key": EVIL, EVIL: EVIL, "reason": EVIL}) + "\n")
    (run / "environment.json").write_text(json.dumps({EVIL: EVIL}))
    (run / "t.csv").write_text(f"{EVIL},b\n{EVIL},2\n")
    Image.new("RGB", (4, 4)).save(run / "x.png")
    page = report(tmp_path, run, title=EVIL)
    assert page.text.count(EVIL) >= 9
    plots = len([x for x in page.all("div") if x.get("class") == "plotly-graph-div"])
    assert len(page.all("script")) == 1 + plots and plots == 3
    assert not [x for x in page.all("img") if "onerror" in x]
    with open_browser() as browser:
        visit = Visit(browser, f"file://{tmp_path / 'report.html'}")
        visit.page.wait_for_selector(".plotly .main-svg")
        visit.page.locator(".plotly").first.hover()
        assert visit.page.evaluate("window.hacked") is None
        assert visit.errors() == []


def test_what_is_damaged_or_missing_is_said_and_the_rest_is_shown(tmp_path):
    half = write_run(
        tmp_path / "half", records=[{"step": 2, "loss": 1.5, "epoch": 0.5}, {"step": 4, "loss": 1.25, "epoch": 1}]
    )
    with (half / "metrics.jsonl").open("ab") as file:
        file.write(
            b'[1]\n{"loss": 3}\n{"step": 6, "loss": NaN, "lr": 1e999, "x": "y", "n": 1' + b"0" * 400 + b"}\n\xff\xfe\n"
        )
        file.write(b'{"step": 8, "loss": 1.1')
    (half / "result.json").write_text('{"command": "pret')
    (half / "environment.json").write_text("[]")
    (half / "cut.png").write_bytes(b"\x89PNG\r\n\x1a\n and no more")
    (half / "binary.csv").write_bytes(b"\xff\xfe\x00\x00\xff")
    (half / "events.out.tfevents.1.x").write_bytes(b"no events")
    odd = write_run(
        tmp_path / "odd", config="a: [1\n", result={"finished": True, "all_probes": [3, {"pool": []}], "pictures": 4}
    )
    looped = write_run(
        tmp_path / "looped", config="&a {1: *a}\n", result={"finished": False, "step": None, "signal": 15}
    )
    deep = write_run(tmp_path / "deep")
    for name in ("result.json", "environment.json"):
        (deep / name).write_text('{"a":' * 980 + "1" + "}" * 980)
    (tmp_path / "only_states" / "state" / "step-00000004").mkdir(parents=True)
    page = report(tmp_path, half, odd, looped, deep, tmp_path / "only_states")
    for sentence in (
        "metrics.jsonl: 3 of 7 lines cannot be read (line 3, 6, 7).",
        "result.json cannot be read", "environment.json holds no JSON object.", "cut.png is no readable picture",
        "binary.csv cannot be read", "config.yaml cannot be read", "config.yaml holds no options.",
        "config.yaml is missing.", "Its newest record is of step 6 of 40", "Not finished, and without a record yet.",
        "Stopped by 15; the same command continues it.",
    ):  # fmt: skip
        assert sentence in page.text, sentence
    assert "loss not finite in the newest record" in page.text
    run = read_runs([str(half)])[0]
    assert [record["loss"] for record in run.records] == [1.5, 1.25, None]


def test_what_is_no_run_is_refused_with_the_way_out(tmp_path):
    write_run(tmp_path / "runs" / "a", result={})
    (tmp_path / "runs" / "shards").mkdir()
    for given, message in (
        (tmp_path / "nothing", "nothing: no such folder"),
        (tmp_path / "runs", rf"holds no run .*: give the runs in it \({tmp_path}/runs/a\)"),
        (tmp_path / "runs" / "shards", "shards holds no run .*: give the run_dir of a command"),
        (tmp_path / "runs" / "a" / "config.yaml", "config.yaml is a file: give the folder of a run"),
    ):
        with pytest.raises(InputError, match=message):
            report(tmp_path, tmp_path / "runs" / "a", given)
    with pytest.raises(InputError, match="does not end in .html"):
        write_report([str(tmp_path / "runs" / "a")], ReportConfig(out=str(tmp_path / "runs" / "a" / "config.yaml")))
    assert not list(tmp_path.glob("*.html"))


def test_options_that_differ_are_marked_and_runs_keep_short_names_of_their_own(tmp_path):
    first = write_run(
        tmp_path / "x" / "mae", config="run_dir: x\nseed: 0\nmask: {ratio: 0.75}\noptim: {base_lr: 0.1}\n"
    )
    second = write_run(
        tmp_path / "y" / "mae", config="run_dir: y\nseed: 0\nmask: {ratio: 0.5}\noptim: {base_lr: 0.1}\n"
    )
    page = report(tmp_path, first, second, first)  # given twice, shown once
    html = (tmp_path / "report.html").read_text()
    marked = re.findall(r'<tr class="differs"><th scope="row">([\w.]+)</th><td>(.*?)</td><td>(.*?)</td></tr>', html)
    assert set(marked) == {("mask.ratio", "0.75", "0.5")}
    assert "Report on x/mae, y/mae" in page.text
    assert "The losses are not of the same thing, since these differ: mask.ratio." not in page.text  # there are none


def test_pictures_over_training_begin_and_end_with_the_run_and_come_with_their_captions(tmp_path):
    run = write_run(tmp_path / "run")
    for step in range(0, 1000, 40):
        (run / "pictures").mkdir(exist_ok=True)
        Image.new("RGB", (30, 20), (step // 4, 0, 0)).save(run / "pictures" / f"step-{step:08d}.png")
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (500, 3000, 3), np.uint8)).save(run / "wide.png")
    drawn = run / "drawn"
    drawn.mkdir()
    Image.new("RGB", (30, 20)).save(drawn / "filters.png")
    listed = [{"file": "filters.png", "title": "Filters", "caption": "They are of color."}]
    (drawn / "result.json").write_text(json.dumps({"command": "visualize", "finished": True, "pictures": listed}))
    write_run(run / "another", result={"finished": True})
    Image.new("RGB", (30, 20)).save(run / "another" / "foreign.png")
    (run / "hub").mkdir()
    Image.new("RGB", (30, 20)).save(run / "hub" / "hidden.png")
    page = report(tmp_path, run, series_pictures=5, picture_width=600)
    shown = {x["alt"]: (int(x["width"]), int(x["height"])) for x in page.all("img")}
    assert [alt for alt in shown if alt.startswith("step")] == [
        "step 0",
        "step 240",
        "step 480",
        "step 720",
        "step 960",
    ]
    assert shown["wide.png"] == (600, 100)
    assert "Filters. They are of color." in page.text
    assert "foreign" not in page.text and "hidden" not in page.text
    assert (tmp_path / "report.html").stat().st_size < 6.5e6


def test_a_long_curve_keeps_its_extremes_and_gaps(tmp_path):
    values = np.sin(np.arange(20_000) / 50).tolist()
    values[7777], values[12_345] = 9.0, math.nan
    records = [{"step": i, "loss": x if math.isfinite(x) else None} for i, x in enumerate(values)]
    (_, figure), *_ = curve_plots(read_runs([str(write_run(tmp_path / "run", records=records))]))
    x, y = figure.data[0].x, figure.data[0].y
    assert len(x) <= MOST_POINTS + 3 and x[0] == 0 and x[-1] == 19_999
    assert y[x.index(7777)] == 9.0 and y[x.index(12_345)] is None
    assert all(y[i] == pytest.approx(values[int(step)]) for i, step in enumerate(x) if y[i] is not None)


def test_incidents_and_tables_are_listed_and_counted(tmp_path):
    run = write_run(
        tmp_path / "run",
        records=[{"step": 1, "loss": 1, "skipped_steps": 0}, {"step": 2, "loss": 1, "skipped_steps": 1}],
    )
    bad = [{"step": i, "key": f"key{i}", "reason": "cut short" if i % 4 else "no image"} for i in range(400)]
    (run / "bad_samples.jsonl").write_text("".join(json.dumps(x) + "\n" for x in bad))
    (run / "bad_steps.jsonl").write_text('{"step": 1, "loss": "nan", "grad_norm": "nan", "keys": ["a", "b"]}\n')
    (run / "confusion.csv").write_text("true,0,1\n0,11,12\n1,21,22\n" + "9,9,9\n" * 100)
    page = report(tmp_path, run)
    assert "damaged shards (400): 300 x cut short; 100 x no image. The first 100:" in page.text
    assert "key99 " in page.text and "key100 " not in page.text
    assert "Skipped steps (1): 1 x nan." in page.text and '["a", "b"]' in page.text
    assert "confusion.csv: shown are 40 of 102 rows." in page.text and "0 11 12" in page.text
    assert "Unreadable samples and skipped steps, so far" in page.text


def test_the_page_works_in_a_browser(real):
    with open_browser() as browser:
        address = f"file://{real[1]}"
        visit = Visit(browser, address, viewport={"width": 1280, "height": 900}, color_scheme="light")
        page = visit.page
        page.wait_for_selector("#curves .plotly .main-svg")
        plot = page.locator("#curves .plot", has_text="Loss").first
        plot.scroll_into_view_if_needed()
        box = plot.locator(".nsewdrag").first.bounding_box()
        page.mouse.move(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
        plot.locator(".hoverlayer text").first.wait_for()
        assert re.search(r"mae|loss", " ".join(plot.locator(".hoverlayer text").all_text_contents()))
        before = plot.locator(".xtick text").all_text_contents()
        page.mouse.down()
        page.mouse.move(box["x"] + box["width"] * 0.9, box["y"] + box["height"] * 0.6, steps=5)
        page.mouse.up()
        page.wait_for_function("b => [...document.querySelectorAll('#curves .plot')][0].querySelector('.xtick text')"
                               " && [...document.querySelectorAll('#curves .plot')[0].querySelectorAll('.xtick text')]"
                               ".map(x => x.textContent).join() !== b", arg=",".join(before))  # fmt: skip
        style = "getComputedStyle(document.querySelector('{}')).{}"
        colors = f"() => [{style.format('body', 'backgroundColor')}, {style.format('.ytick text', 'fill')}]"
        light = page.evaluate(colors)
        page.check("#theme-dark")
        dark = page.evaluate(colors)
        assert light[0] == "rgb(255, 255, 255)" and dark[0] != light[0] and dark[1] != light[1]
        page.emulate_media(media="print")
        assert page.evaluate(colors) == light
        assert visit.said == [] and visit.strangers() == [address]
        phone = Visit(browser, address, viewport={"width": 360, "height": 740}, color_scheme="dark")
        phone.page.wait_for_selector("#curves .plotly .main-svg")
        assert phone.page.evaluate("document.documentElement.scrollWidth") == 360
        assert phone.page.evaluate(colors) == dark
        assert phone.said == []
