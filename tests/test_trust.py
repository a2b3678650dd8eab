"""What others have written is data: SECURITY.md's claims, tried with files that would do harm."""

import ast
import hashlib
import io
import json
import os
import re
import sys
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from conftest import TINY_PRETRAIN, write_tars
from loopback import web_server
from PIL import Image
from safetensors.torch import save_file

from quarterlight.ssl.addresses import shown
from quarterlight.ssl.command import parse_config
from quarterlight.ssl.config import DataConfig, EncoderConfig, PretrainConfig
from quarterlight.ssl.errors import InputError, printable
from quarterlight.ssl.export import ModelSpec, export_hub
from quarterlight.ssl.index import open_index
from quarterlight.ssl.make_index import write_index
from quarterlight.ssl.released import encoder_spec, encoder_with_weights, read_weights
from quarterlight.ssl.repair import repair_shards
from quarterlight.ssl.runs import open_run
from quarterlight.ssl.shard_config import IndexConfig, RepairConfig, ReshardConfig, VerifyConfig
from quarterlight.ssl.shards import reshard
from quarterlight.ssl.sidecar import INDEX_NAME, pack, read_sidecar, unpack
from quarterlight.ssl.verify import verify_shards

ROOT = Path(__file__).parents[1]
ARGS = {"img_size": [16, 16], "in_chans": 3, "patch_size": 4, "embed_dim": 24, "depth": 2, "num_heads": 2}
NAME = "vit_tiny_patch16_224"


class Planted:
    """What a pickle would run: it leaves a proof."""

    def __init__(self, proof: Path) -> None:
        self.proof = proof

    def __reduce__(self) -> tuple:
        return os.system, (f"touch {self.proof}",)


# The code itself.

PICKLES = {
    "ssl/ring.py": "from a data worker to its own training process, through torch's queue, which pickles as well",
    "ssl/fetcher.py": "from a training process to the fetcher that it starts, through its stdin",
}
RUNS_CODE = {"eval", "exec", "compile", "__import__"}
MODULES = {"pickle", "cPickle", "marshal", "shelve", "dill", "cloudpickle", "joblib", "runpy", "code"}


def calls(file: Path) -> list[tuple[str, dict[str, object]]]:
    """Returns (name, {keyword: constant}) of every call in a file; "torch.load", "load", "x.extractall"."""
    found = []
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Call):
            keywords = {k.arg or "**": getattr(k.value, "value", "not a constant") for k in node.keywords}
            found.append((ast.unparse(node.func), keywords))
    return found


def imports(file: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level:
            found.add((node.module or "").split(".")[0])
    return found


def test_no_code_is_read_from_files_anywhere():
    for file in [path for room in ("ssl", "finetune", "launch") for path in (ROOT / room).glob("*.py")]:
        where = str(file.relative_to(ROOT))
        assert bool(imports(file) & MODULES) == (where in PICKLES), where
        for name, keywords in calls(file):
            last = name.rpartition(".")[2]
            assert name not in RUNS_CODE and name != "os.system" and not keywords.get("shell"), (where, name)
            assert last not in ("extractall", "unpack_archive", "import_module", "system"), (where, name)
            if name in ("torch.load", "torch.jit.load", "torch.hub.load"):
                assert name == "torch.load" and keywords["weights_only"] is True, where
            if name.startswith(("np.", "numpy.")) and last in ("load", "save", "savez"):
                assert keywords.get("allow_pickle", last != "load") is (last != "load"), (where, name)
            assert not name.startswith("yaml.") or last in ("safe_load", "safe_dump"), (where, name)
            assert "trust_remote_code" not in keywords, where
            # MAE's own layout is a pickle of tensors; nothing else that leaves is one
            assert name != "torch.save" or where == "finetune/publish.py", where
            assert not name.startswith(("torch.jit.", "load_checkpoint_")), (where, name, "see SECURITY.md")


# Weights.


def weights_file(path: Path, **metadata: str) -> Path:
    """Writes an encoder as a run does, with changed metadata."""
    model = timm.create_model(NAME, num_classes=0, **ARGS)
    plain = {"architecture": NAME, "timm_args": json.dumps(ARGS), "mean": "[0.5]", "std": "[0.5]"}
    save_file(model.state_dict(), path, metadata=plain | metadata)
    return path


def opened(init: Path | str) -> None:
    """Does what a command does with --init."""
    weights = read_weights(str(init))
    encoder_with_weights(encoder_spec(EncoderConfig(), DataConfig(train="t"), weights), weights)


def test_code_in_a_released_file_is_refused_by_the_command_in_one_sentence(shards, tmp_path, launch):
    proof = tmp_path / "ran"
    torch.save({"model": Planted(proof)}, tmp_path / "x.pth")
    given = TINY_PRETRAIN | {"data.train": shards[0], "run_dir": str(tmp_path / "run"), "init": str(tmp_path / "x.pth")}
    done = launch("pretrain.py", given, check=False)
    assert done.returncode == 1
    assert re.fullmatch(r"error: init \S+x\.pth: not a .safetensors file, nor .* plain tensors .*\n", done.stderr)
    assert not proof.exists()


def with_args(**more: object) -> dict[str, str]:
    return {"timm_args": json.dumps(ARGS | more)}


METADATA = {
    "a file to load": with_args(checkpoint_path="x.pth"),
    "an address to load from": with_args(pretrained=True, pretrained_cfg={"url": "http://127.0.0.1:9/x.pth"}),
    "a folder to write to": with_args(cache_dir="cache"),
    "a function": with_args(pretrained_filter_fn="os.system"),
    "code for a layer": with_args(norm_layer="__import__('os').system('touch ran')"),
    "a class for a layer": with_args(act_layer={"class_path": "subprocess.Popen", "init_args": {"args": ["touch"]}}),
    "code for a name": {"architecture": "__import__('os').system('touch ran')"},
    "a model on the Hub": {"architecture": "hf-hub:someone/model"},
    "a folder for a name": {"architecture": "local-dir:."},
    "five megabytes": with_args(norm_layer="x" * 5_000_000),
    "deep JSON": {"timm_args": "[" * 100_000 + "]" * 100_000},
    "a number of 10,000 digits": {"mean": f"[{'9' * 10_000}]"},
    "arguments in a list": {"timm_args": "[]"},
    "a size of letters": with_args(img_size="abc"),
    "a mean of letters": {"mean": '"abc"'},
    "a mean of nothing": {"mean": "[]"},
    "a mean that is none": {"mean": "[NaN]"},
    "a deviation of 0": {"std": "[0]"},
    "no JSON": {"std": "0.5]"},
}


@pytest.mark.parametrize("metadata", METADATA.values(), ids=METADATA)
def test_metadata_of_weights_is_data(tmp_path, monkeypatch, metadata):
    monkeypatch.chdir(tmp_path)
    torch.save({"model": Planted(tmp_path / "ran")}, tmp_path / "x.pth")
    file = weights_file(tmp_path / "x.safetensors", **metadata)
    with pytest.raises(InputError) as caught:
        opened(file)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 1500
    assert {path.name for path in tmp_path.iterdir()} == {"x.pth", "x.safetensors"}


def test_metadata_of_our_own_files_is_read(tmp_path):
    opened(weights_file(tmp_path / "x.safetensors"))
    opened(weights_file(tmp_path / "y.safetensors", **with_args(img_size=16, dynamic_img_size=False)))


def test_a_pickle_in_a_hub_folder_is_refused(tmp_path):
    folder, proof = tmp_path / "hub", tmp_path / "ran"
    spec = ModelSpec(NAME, ARGS, (0.5,) * 3, (0.5,) * 3)
    export_hub(folder, timm.create_model(NAME, num_classes=0, **ARGS), spec, title="t", facts={})
    (folder / "model.safetensors").unlink()
    torch.save({"cls_token": Planted(proof)}, folder / "pytorch_model.bin")
    with pytest.raises(InputError, match="timm cannot load these weights"):
        read_weights(f"local-dir:{folder}")
    assert not proof.exists()


# Options.

POPEN = "{class_path: subprocess.Popen, init_args: {args: [touch, ran]}}"
CLASS = "{class_path: planted.Class}"


@pytest.mark.parametrize(
    "text",
    [
        "encoder: !!python/object/apply:os.system ['touch ran']",
        "seed: !!python/object/new:os.system ['touch ran']",
        f"encoder: {CLASS}",
        f"encoder.args: {{x: [{CLASS}]}}",
        "encoder.class_path: planted.Class",
        f"init: {CLASS}",
        f"data: {{train: {CLASS}}}",
        f"data: {{img_size: {CLASS}}}",
        "mask: planted.Class",
        "mask: other.yaml",
        "config: other.yaml",
    ],
)
def test_a_config_file_runs_and_imports_nothing(tmp_path, monkeypatch, capsys, text):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "modules").mkdir()
    (tmp_path / "modules" / "planted.py").write_text("open('ran', 'w').close()\nclass Class: pass\n")
    monkeypatch.syspath_prepend(str(tmp_path / "modules"))
    (tmp_path / "other.yaml").write_text(f"encoder: {CLASS}\nclass_path: planted.Class\n")
    (tmp_path / "x.yaml").write_text(text + "\n")
    with pytest.raises(SystemExit):
        parse_config(PretrainConfig, "", ["--run_dir", "r", "--data.train", "t", "--config", "x.yaml"])
    assert capsys.readouterr().err.startswith("error: ")
    assert not (tmp_path / "ran").exists() and "planted" not in sys.modules


@pytest.mark.parametrize("value", [POPEN, f"{{x: {POPEN}}}", f"{{x: [{POPEN}]}}"])
def test_model_arguments_stay_what_they_are(tmp_path, monkeypatch, value):
    monkeypatch.chdir(tmp_path)
    given = ["--run_dir", "r", "--data.train", "t", "--encoder.args", value]
    args = parse_config(PretrainConfig, "", given).encoder.args
    assert json.loads(json.dumps(args)) == args, "an object was made"
    assert not (tmp_path / "ran").exists()


def test_the_config_of_a_run_folder_runs_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run" / "state" / "step-00000001").mkdir(parents=True)
    (tmp_path / "run" / "config.yaml").write_text("seed: !!python/object/apply:os.system ['touch ran']\n")
    with pytest.raises(InputError, match="config.yaml cannot be read"):
        open_run(PretrainConfig(run_dir=str(tmp_path / "run"), data=DataConfig(train="t")))
    assert not (tmp_path / "ran").exists()


# Shards.


def png(number: int) -> bytes:
    pixels, buffer = np.random.default_rng(number).integers(0, 256, (20, 20, 3), np.uint8), io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def hostile_tar(path: Path, outside: Path) -> None:
    """Writes a tar that a careless program would let write to `outside`, read from it, and steer a terminal."""
    path.parent.mkdir(parents=True)
    steering = "k\x1b]0;title\x07\x1b[31m\udce9\u202e"
    names = [f"{i:03d}.png" for i in range(20)]
    names += [
        "../up.png",
        "../../../up.png",
        f"{outside}/absolute.png",
        "//double.png",
        "link/through.png",
        "./here.png",
    ]
    with tarfile.open(path, "w", format=tarfile.GNU_FORMAT, encoding="utf-8", errors="surrogateescape") as tar:
        for kind, name, target in (
            (tarfile.SYMTYPE, "link", str(outside)),
            (tarfile.SYMTYPE, "link.png", str(outside / "secret.png")),
            (tarfile.LNKTYPE, "hard.png", str(outside / "secret.png")),
            (tarfile.CHRTYPE, "device.png", ""),
            (tarfile.BLKTYPE, "block.png", ""),
            (tarfile.FIFOTYPE, "pipe.png", ""),
            (tarfile.DIRTYPE, "../made", ""),
        ):
            special = tarfile.TarInfo(name)
            special.type, special.linkname, special.devmajor, special.devminor = kind, target, 1, 3
            tar.addfile(special)
        for number, name in enumerate(names):
            member, data = tarfile.TarInfo(name), png(number)
            member.size, member.mode = len(data), 0o6777
            tar.addfile(member, io.BytesIO(data))
        for ending, data in (("png", b"no image"), ("cls", b"\x1b[31m")):  # for messages, and for repair
            member = tarfile.TarInfo(f"{steering}.{ending}")
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
        far = tarfile.TarInfo("000.cls")
        far.size = 16
        tar.addfile(far, io.BytesIO(b"4000000000000000"))


def tree(root: Path) -> dict[str, str]:
    """Returns what every path below a folder is."""
    found = {}
    for path in sorted(root.rglob("*")):
        kind = "link" if path.is_symlink() else "folder" if path.is_dir() else "file" if path.is_file() else "other"
        content = hashlib.sha256(path.read_bytes()).hexdigest() if kind == "file" else ""
        found[str(path.relative_to(root))] = kind + content
    return found


def test_names_and_links_in_tars_lead_nowhere(tmp_path, monkeypatch, capsys, launch):
    outside, here = tmp_path / "outside", tmp_path / "a" / "b" / "here"
    outside.mkdir()
    here.mkdir(parents=True)
    (outside / "secret.png").write_bytes(png(99))
    hostile_tar(tmp_path / "a" / "shards" / "x.tar", outside)
    shard = {"name": "x.tar", "samples": 27, "bytes": (tmp_path / "a" / "shards" / "x.tar").stat().st_size}
    split = {"samples": 27, "per_class": [1, 0], "shards": [shard]}
    dataset = {"classes": None, "splits": {"train": split}}
    (tmp_path / "a" / "shards" / "dataset.json").write_text(json.dumps(dataset))
    before = tree(tmp_path)
    before = tree(tmp_path)
    pattern = str(tmp_path / "a" / "shards" / "*.tar")
    monkeypatch.chdir(here)
    assert verify_shards([pattern], VerifyConfig(num_workers=0)) is False
    write_index([pattern], IndexConfig())
    reshard([pattern], "new", ReshardConfig(num_workers=0))
    given = TINY_PRETRAIN | {"data.train": pattern, "run_dir": "run", "data.max_bad_share": "1", "steps": "4"}
    done = launch("pretrain.py", given, cwd=here)
    assert repair_shards([pattern], RepairConfig(num_workers=0)) is True
    ours = capsys.readouterr()
    said = ours.out + ours.err + done.stdout + done.stderr
    assert "is a link, not followed" in said and not re.search("[\x1b\x07\u202e\udc80-\udcff]", said)
    after = {name: what for name, what in tree(tmp_path).items() if before.get(name) != what}
    beside = r"x\.tar(\.damaged)?|index\.npz|left_out\.jsonl|dataset\.json|pixels-\w+-3\.(npy|json)"
    own = rf"a/b/here/(new|run)(/.*)?|a/shards/({beside})"
    assert [name for name in after if not re.fullmatch(own, name)] == []
    assert before.keys() <= tree(tmp_path).keys()
    assert {what[:4] for what in after.values()} <= {"file", "fold"}
    for name in ("a/b/here/new/train-000000.tar", "a/shards/x.tar"):
        with tarfile.open(tmp_path / name) as tar:
            assert all(member.isreg() for member in tar)
    with tarfile.open(here / "new" / "train-000000.tar") as tar:
        assert all(re.fullmatch(r"\d{8}-\w+\.(png|cls)", member.name) for member in tar)


def test_an_index_of_pickled_objects_is_not_believed(tmp_path):
    pattern, proof = write_tars(tmp_path / "shards", "train", 20), tmp_path / "ran"
    open_index(pattern)
    known = read_sidecar(tmp_path / "shards")
    buffer = io.BytesIO()
    np.save(buffer, np.array([Planted(proof)], object), allow_pickle=True)
    with zipfile.ZipFile(io.BytesIO(pack(known))) as good, zipfile.ZipFile(tmp_path / "x", "w") as bad:
        for name in good.namelist():
            bad.writestr(name, buffer.getvalue() if name == "keys.npy" else good.read(name))
    os.replace(tmp_path / "x", tmp_path / "shards" / INDEX_NAME)
    assert len(open_index(pattern)) == 20
    assert not proof.exists()


def test_an_index_that_unpacks_to_more_than_it_is_is_not_unpacked(tmp_path):
    pattern = write_tars(tmp_path / "shards", "train", 20)
    open_index(pattern)
    file = tmp_path / "shards" / INDEX_NAME
    with zipfile.ZipFile(file) as good, zipfile.ZipFile(tmp_path / "x", "w", zipfile.ZIP_DEFLATED) as bomb:
        for name in good.namelist():
            bomb.writestr(name, good.read(name))
        bomb.writestr("more.npy", bytes(50_000_000))
    assert (tmp_path / "x").stat().st_size < 100_000
    os.replace(tmp_path / "x", file)
    assert unpack(file.read_bytes()) == {}
    assert len(open_index(pattern)) == 20


# Addresses.


def test_passwords_and_signatures_stay_in_the_config(tmp_path, launch):
    write_tars(tmp_path / "shards", "train", 40)
    with web_server() as web:
        for number in range(2):
            data = bytearray((tmp_path / "shards" / f"train-{number:04d}.tar").read_bytes())
            data[3072:3584] = bytes(512)  # damage is reported with the address
            data[6 * 1024 + 100 : 6 * 1024 + 140] = bytes(40)
            web.files[f"/d/train-{number:04d}.tar?signature=SECRET"] = bytes(data)
        address = web.url.replace("http://", "http://me:SECRET@") + "/d/train-000{0..1}.tar?signature=SECRET"
        given = TINY_PRETRAIN | {"data.train": address, "run_dir": str(tmp_path / "run"), "data.max_bad_share": "1"}
        done = launch("pretrain.py", given | {"data.cache_dir": str(tmp_path / "cache"), "steps": "8"})
    assert "bytes lost" in done.stdout and "/d/train-0000.tar" in done.stdout
    assert "SECRET" not in done.stdout + done.stderr
    assert "train-0000.tar" in (tmp_path / "run" / "bad_samples.jsonl").read_text()
    holding = {path.name for path in (tmp_path / "run").rglob("*") if path.is_file() and b"SECRET" in path.read_bytes()}
    assert holding == {"config.yaml"}, "from which the run starts again"


def test_a_path_is_shown_as_it_is():
    assert shown("/data/what?/a@b.tar") == "/data/what?/a@b.tar"
    assert shown("s3://me:key@bucket/a.tar?x=1") == "s3://bucket/a.tar"


def test_printable_leaves_text_alone_and_escapes_the_rest():
    assert printable("größe 漢字\nb'\\x1b'") == "größe 漢字\nb'\\x1b'"
    assert printable("\x1b[2J\udce9\u202e") == "\\x1b[2J\\udce9\\u202e"
    printable("\udcff" * 10).encode()
