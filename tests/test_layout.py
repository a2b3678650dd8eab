"""The rooms and their walls: what is packaged, what may import what, and that no file hides a standard module."""

import ast
import subprocess
import sys
import sysconfig
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ROOMS = ("ssl", "finetune")
FOLDERS = (*ROOMS, "launch", "configs", "tests", "benchmarks")
MAY_IMPORT = {"ssl": {"ssl"}, "finetune": {"ssl", "finetune"}, "launch": {"ssl", "finetune"}}
# A file of ssl/ imports only files that stand before it.
ORDER = [
    "errors",
    "addresses",
    "config",
    "shard_config",
    "parent",
    "command",
    "files",
    "randoms",
    "patches",
    "packing",
    "strategies",
    "masking",
    "pos_embed",
    "epochs",
    "balanced",
    "order",
    "tar_scan",
    "entries",
    "patience",
    "remote",
    "shard_cache",
    "look_ahead",
    "stock",
    "fetcher",
    "sidecar",
    "shard_names",
    "dataset_file",
    "index_files",
    "index",
    "fetching",
    "decode",
    "check",
    "resample",
    "augment",
    "small_images",
    "batches",
    "spans",
    "ring",
    "signals",
    "watch",
    "loader",
    "attention",
    "recompute",
    "encoder",
    "vit",
    "hybrid",
    "rope",
    "tiling",
    "window_groups",
    "swin",
    "encoders",
    "pooling",
    "knn",
    "ridge",
    "targets",
    "decoder",
    "mae",
    "sources",
    "loose_files",
    "encode",
    "shard_records",
    "shards",
    "verify",
    "repair",
    "make_index",
    "optim",
    "sharding",
    "checkpoint",
    "runs",
    "log",
    "meter",
    "processes",
    "saving",
    "incidents",
    "task",
    "engine",
    "model_card",
    "export",
    "pickles",
    "renaming",
    "kinds",
    "architectures",
    "read_transformers",
    "weights",
    "spec",
    "relative_tables",
    "released",
    "convert_config",
    "convert",
    "export_config",
    "layouts",
    "plain_vit",
    "write_transformers",
    "graphs",
    "half",
    "hub",
    "stage",
    "pictures",
    "online_probe",
    "pretrain",
]
FINETUNE_ORDER = [
    "config",
    "probe_config",
    "evaluate",
    "tables",
    "confusion",
    "duplicates",
    "heads",
    "partial",
    "mixing",
    "stopping",
    "use_config",
    "network",
    "eval_only",
    "intervals",
    "features",
    "classify",
    "probe_grid",
    "linear_probe",
    "lars",
    "frozen",
    "train_probe",
    "logistic",
    "sub_runs",
    "few_shot",
    "release",
    "usage",
    "publish",
    "inputs",
    "parts",
    "rows",
    "predict",
    "embeddings",
    "embed",
    "neighbors_picture",
    "neighbors",
    "occlusion",
    "damage",
    "robustness_picture",
    "robustness",
]
# finetune/pictures/, which no stage may import: matplotlib costs seconds, and pictures are no part of training.
PICTURES = "finetune/pictures"
PICTURES_ORDER = [
    "config",
    "figure",
    "images",
    "autoencoders",
    "attention",
    "attention_pictures",
    "weight_pictures",
    "feature_pictures",
    "reconstructions",
    "curves",
    "visualize",
]
# Two more such folders: plotly and gradio are needed by them only.
REPORT, PLAYGROUND = "finetune/report", "finetune/playground"
REPORT_ORDER = ["config", "template", "run_folder", "tables", "images", "curves", "page"]
PLAYGROUND_ORDER = ["config", "scene", "app"]
ASIDE = (PICTURES, REPORT, PLAYGROUND)
ORDERS = {
    "ssl": ORDER,
    "finetune": FINETUNE_ORDER,
    PICTURES: PICTURES_ORDER,
    REPORT: REPORT_ORDER,
    PLAYGROUND: PLAYGROUND_ORDER,
}


def files(folder: str) -> list[Path]:
    return sorted((ROOT / folder).glob("*.py"))


def imported(file: Path) -> set[tuple[str, str]]:
    """Returns the (room, module) pairs below quarterlight that `file` imports, wherever in the file."""
    room, found = file.parent.name, set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.ImportFrom):
            module = node.module or ""
            if node.level == 1:
                found |= {(room, module)} if module else {(room, alias.name) for alias in node.names}
            elif node.level > 1:
                found.add(("a wall", module))
            elif module.split(".")[0] == "quarterlight":
                found.add(tuple([*module.split(".")[1:], "", ""][:2]))
        elif isinstance(node, ast.Import):
            found |= {("a wall", alias.name) for alias in node.names if alias.name.split(".")[0] == "quarterlight"}
    return found


def test_packages_are_the_folders_with_code():
    setuptools = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    folders = {file.parent.relative_to(ROOT) for room in ROOMS for file in (ROOT / room).rglob("*.py")}
    assert folders == {Path(folder) for folder in (*ROOMS, *ASIDE)}
    names = {f"quarterlight.{'.'.join(folder.parts)}": folder.as_posix() for folder in folders}
    assert set(setuptools["packages"]) == set(names)
    assert setuptools["package-dir"] == names


def test_no_folder_is_a_regular_package():
    assert not [path for folder in FOLDERS for path in (ROOT / folder).glob("**/__init__.py")]


def test_ssl_from_the_root_is_the_standard_library():
    code = "import ssl, asyncio; ssl.SSLContext; print(ssl.__file__)"
    found = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert Path(found.stdout.strip()).is_relative_to(sysconfig.get_path("stdlib"))


@pytest.mark.parametrize("folder", [*ROOMS, *ASIDE, "launch"])
def test_no_file_has_the_name_of_a_module_it_would_hide(folder):
    taken = set(sys.stdlib_module_names) | {"torch", "timm", "accelerate", "numpy", "webdataset", "tensorboard"}
    assert not {file.stem for file in files(folder)} & taken


@pytest.mark.parametrize("folder", MAY_IMPORT)
def test_imports_stay_inside_the_walls(folder):
    crossings = {(file.name, room) for file in files(folder) for room, _ in imported(file)}
    assert {room for _, room in crossings} <= MAY_IMPORT[folder], crossings


def test_pictures_are_imported_by_no_stage():
    inside = {("finetune", Path(folder).name) for folder in ASIDE}
    allowed = {"visualize.py", "report.py", "playground.py"}
    importing = {file.name for folder in (*ROOMS, "launch") for file in files(folder) if imported(file) & inside}
    assert importing <= allowed
    for folder in ASIDE:
        for file in files(folder):
            rooms = {room for room, _ in imported(file)}
            assert rooms <= {"ssl", "finetune", Path(folder).name}, f"{file.name} imports {rooms}"
    for room in ROOMS:
        for file in files(room):
            nodes = [node for node in ast.parse(file.read_text()).body if isinstance(node, ast.Import | ast.ImportFrom)]
            named = {getattr(node, "module", None) or node.names[0].name for node in nodes}
            heavy = {name for name in named if name.split(".")[0] in ("matplotlib", "plotly", "gradio")}
            assert not heavy, f"{file} imports {heavy} when it is imported itself"


@pytest.mark.parametrize(("room", "order"), ORDERS.items())
def test_a_file_imports_only_earlier_files(room, order):
    assert [file.stem for file in files(room)] == sorted(order)
    for file in files(room):
        inside = {module for target, module in imported(file) if target == Path(room).name}
        late = inside - set(order[: order.index(file.stem)])
        assert not late, f"{room}/{file.name} imports {late}, which stand after it"


def test_every_file_is_described():
    described = (ROOT / "docs" / "architecture.md").read_text()
    all_files = [file for folder in (*ROOMS, *ASIDE) for file in files(folder)]
    assert [file.name for file in all_files if f"`{file.name}`" not in described] == []


def test_rooms_import_each_other_by_full_name_only():
    for file in files("finetune"):
        assert "from quarterlight.finetune" not in file.read_text(), file


def test_launch_scripts_are_short():
    assert {
        file.name: n
        for file in files("launch")
        if (n := len(file.read_text().splitlines())) > 60 and file.stem != "demo"
    } == {}


def test_wheel_is_complete(tmp_path):
    """Builds a wheel, installs it away from the checkout, and imports every module of it there."""
    source, wheels, venv = tmp_path / "source", tmp_path / "wheels", tmp_path / "venv"
    tracked = [file for folder in (*ROOMS, *ASIDE) for file in files(folder)]
    tracked += [ROOT / name for name in ("pyproject.toml", "README.md", "LICENSE")]
    for file in tracked:
        target = source / file.relative_to(ROOT)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(file.read_bytes())
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    build = [*pip, "wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", str(wheels), str(source)]
    subprocess.run(build, check=True, cwd=tmp_path)
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(venv)], check=True)
    site = next(venv.glob("lib/python*/site-packages"))
    install = [
        *pip,
        "--python",
        str(venv / "bin" / "python"),
        "install",
        "--no-deps",
        "--no-index",
        *map(str, wheels.iterdir()),
    ]
    subprocess.run(install, check=True, cwd=tmp_path)
    (site / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")  # its own .pth files stay unread
    modules = [
        f"quarterlight.{folder.replace('/', '.')}.{file.stem}" for folder in (*ROOMS, *ASIDE) for file in files(folder)
    ]
    code = f"import importlib; print([importlib.import_module(m).__file__ for m in {modules}])"
    found = subprocess.run(
        [venv / "bin" / "python", "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    assert found.stdout.count(str(site)) == len(modules)


def test_configs_are_read_by_their_commands():
    from quarterlight.finetune.config import FinetuneConfig, LinearProbeConfig
    from quarterlight.finetune.probe_config import TrainProbeConfig
    from quarterlight.ssl.command import parse_config
    from quarterlight.ssl.config import PretrainConfig

    stages = {"pretrain": PretrainConfig, "finetune": FinetuneConfig, "linear_probe": LinearProbeConfig}
    stages |= {"train_probe": TrainProbeConfig, "few_shot": FinetuneConfig}  # few_shot.py hands these to finetune.py
    for folder, config_class in stages.items():
        recipes = sorted((ROOT / "configs" / folder).glob("*.yaml"))
        assert recipes
        for recipe in recipes:
            args = ["--config", str(recipe), "--run_dir", "x", "--data.train", "x.tar"]
            assert isinstance(parse_config(config_class, "", args), config_class)
