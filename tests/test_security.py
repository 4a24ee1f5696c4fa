"""The project under attack: code that must not appear, a planted key, rows, archives and models
that mean harm, a judge that sends its client elsewhere, and pages full of markup."""
import ast
import base64
import io
import json
import os
import re
import runpy
import shutil
import struct
import subprocess
import sys
import threading
import urllib.parse
import zipfile
import zlib
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import fsspec
import judge_server
import pyarrow
import pyarrow.parquet
import pytest
import report_pages
import torch
from data_fixtures import encoded, noise, row, write_processor
from fsspec.implementations.memory import MemoryFileSystem
from judge_server import judge
from PIL import Image, PngImagePlugin
from ranks import ROOT, forked
from report_browser import browser, needs_chromium
from test_judge import load as load_judge
from test_judge import verdicts

import common
import data
import policy
import reward
import tiny

# --- code that must not appear --------------------------------------------------------------------

MODULES = {"pickle", "_pickle", "cPickle", "cloudpickle", "dill", "joblib", "marshal", "shelve",
           "jsonpickle", "pty", "commands"}
CALLS = re.compile(r"""(builtins\.)?(eval|exec|compile|__import__|breakpoint)
    |torch\.(load|serialization\.load|hub\.load)|(\w+\.)?(read_pickle|to_pickle|unsafe_load)
    |yaml\.(load|full_load)(_all)?|os\.(system|popen|exec\w+|spawn\w+|posix_spawn\w*)
    |subprocess\.(getoutput|getstatusoutput)|tempfile\.mktemp|ssl\._create\w+context
    |(shutil\.unpack_archive|.*\.extractall)""", re.X)
SAFE = {"shell": False, "trust_remote_code": False, "allow_pickle": False, "allow_redirects": False,
        "verify": True, "weights_only": True, "use_safetensors": True}  # the only value, if given
ADDRESS = re.compile(r"http://(?!localhost\b|127\.0\.0\.1\b|HOST\b|\{)[^\s\"')]*")
KEY = re.compile(r"\b(sk-|hf_|ghp_|github_pat_|xox[bp]-|AKIA)[A-Za-z0-9_-]{16,}"
                 r"|-----BEGIN [A-Z ]*PRIVATE KEY")


def dangers(text):
    """What is dangerous in a Python file: ["line: what"]."""
    found, nodes = [], [*ast.walk(ast.parse(text))]
    safe = [x.func for x in nodes if isinstance(x, ast.Call) and ast.unparse(x.func) == "torch.load"
            and any(k.arg == "weights_only" for k in x.keywords)]  # whose value is looked at, too
    for node in nodes:
        if isinstance(node, ast.Import):
            names = {alias.name.split(".")[0] for alias in node.names} & MODULES
        elif isinstance(node, ast.ImportFrom):  # from torch import load is as good as torch.load
            names = {node.module.split(".")[0]} & MODULES | {
                name for alias in node.names
                if CALLS.fullmatch(name := f"{node.module}.{alias.name}")}
        elif isinstance(node, ast.Attribute) and node not in safe:  # named is as good as called
            names = {name} if CALLS.fullmatch(name := ast.unparse(node)) else set()
        elif isinstance(node, ast.Call):
            names = {ast.unparse(node)} if node.func not in safe and CALLS.fullmatch(
                ast.unparse(node.func)) else set()
            names |= {f"{k.arg}={ast.unparse(k.value)}" for k in node.keywords if k.arg in SAFE and
                      getattr(k.value, "value", None) is not SAFE[k.arg]}
        elif isinstance(node, ast.Dict):  # **{"shell": True}
            names = {k.value for k in node.keys if isinstance(k, ast.Constant) and k.value in SAFE}
        else:
            continue
        found += [f"{node.lineno}: {name}" for name in sorted(names)]
    return found + [f"{i}: {match[0]}" for i, line in enumerate(text.split("\n"), 1)
                    for match in [*ADDRESS.finditer(line), *KEY.finditer(line)]]


def files(*patterns):
    return {str(p.relative_to(ROOT)): p.read_text() for x in patterns for p in ROOT.glob(x)}


def test_nothing_dangerous_is_in_the_code():
    texts = files("*.py", "configs/*.py", "bench/*.py", "assets/*.py")
    assert len(texts) > 30
    found = [f"{name}:{danger}" for name, text in texts.items() for danger in dangers(text)]
    assert [re.sub(r":\d+:", ":", x) for x in found] == ["common.py: eval(rule, {}, settings)"]


def test_what_is_evaluated_is_the_text_of_the_source():
    """The one eval: of the rules in configs/defaults.py; what users say is values of names in it.
    A config of theirs cannot bring rules of its own: names with an underscore are left out."""
    module = ast.parse((ROOT / "common.py").read_text())
    loop = next(x for x in ast.walk(module) if isinstance(x, ast.For)
                and ast.unparse(x.target) == "rule")
    assert ast.unparse(loop.iter) == "RULES"
    stored = [x.id for x in ast.walk(module) if isinstance(x, ast.Name)
              and x.id in ("RULES", "rule") and isinstance(x.ctx, ast.Store)]
    assert sorted(stored) == ["RULES", "rule"]
    assert runpy.run_path(f"{ROOT}/configs/defaults.py")["_rules"] == common.RULES


@pytest.mark.parametrize("text", [
    "import pickle", "import os, cPickle", "from pickle import loads", "def f():\n import dill",
    "import joblib.numpy_pickle", "import marshal", "import shelve", "torch.load(f)",
    "from torch import load", "g = torch.load", "torch.load(f, weights_only=False)",
    "m.from_pretrained(p, trust_remote_code=True)", "f(trust_remote_code=cfg.trust)",
    "f(**{'trust_remote_code': 1})", "eval(x)", "exec(x)", "builtins.eval(x)", "compile(x, '', '')",
    "__import__(x)", "os.system(x)", "f = os.popen", "os.execvp(x, y)", "from os import system",
    "subprocess.run(x, shell=True)", "subprocess.run(x, shell=cfg.shell)",
    "subprocess.getoutput(x)", "yaml.load(x)", "requests.get(x, verify=False)", "f(verify=0)",
    "requests.get(x, allow_redirects=True)", "numpy.load(x, allow_pickle=True)",
    "pandas.read_pickle(x)", "archive.extractall(x)", "tempfile.mktemp()",
    "url = 'http://example.com/v1'", "# see http://10.0.0.1/", "key = 'sk-abcdefghij0123456789'",
    "'hf_ABCDEFGHIJKLMNOPQRSTUVWX'"])
def test_the_search_finds(text):
    assert dangers(text), text


@pytest.mark.parametrize("text", [
    "model.eval()", "re.compile(x)", "ast.literal_eval(x)", "get(x, allow_redirects=False)",
    "torch.load(x, weights_only=True)",
    "subprocess.run([x, y])", "from_pretrained(x, trust_remote_code=False)", "json.load(f)",
    "dcp.load(x)", "safetensors.torch.load_file(x)", "'http://localhost:8085/v1'", "torch.save(x)",
    "f'http://127.0.0.1:{port}'", "'https://example.com'", "torch.load_x(f)", "os.environ['A']"])
def test_the_search_leaves_in_peace(text):
    assert dangers(text) == []


# --- a planted key --------------------------------------------------------------------------------

SECRET = "sk-Planted/K3y+of~a=judge?4711"
HOSTILE = [b"", b"GIF89a" + struct.pack("<HH", 65535, 65535) + bytes(99), encoded(
    Image.new("L", (100_000, 1))), b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EOF\n"]


def forms(secret):
    """The bytes of a text as it is, escaped, and in base64 wherever it stands in what is coded."""
    shifted = [base64.b64encode(b"\0" * i + secret.encode())[4:-4] for i in range(3)]
    return {secret.encode(), urllib.parse.quote(secret, "").encode(),
            secret.encode().hex().encode(), urllib.parse.quote_plus(secret).encode(),
            secret.encode("utf-16-le"), secret.replace("/", "\\/").encode(),
            secret.split("/")[1].encode(), *shifted,
            *(x.translate(bytes.maketrans(b"+/", b"-_")) for x in shifted)}


def holding(secret, *folders):
    """The files below some folders that hold a text in any form, or are named by it."""
    found = [x for folder in folders for x in folder.rglob("*")]
    assert len(found) > 5
    return [str(x) for x in found if any(form in os.fsencode(x) or (
        x.is_file() and form in x.read_bytes()) for form in forms(secret))]


def test_the_search_finds_a_key_in_any_form(tmp_path):
    for i, form in enumerate([*forms(SECRET), base64.b64encode(f"x Bearer {SECRET} y".encode())]):
        (tmp_path / f"a/{i}").mkdir(parents=True)
        (tmp_path / f"a/{i}/b.bin").write_bytes(b"\0\xff" + form + b"\0")
    (tmp_path / "c").write_bytes(SECRET[:9].encode())
    assert len(holding(SECRET, tmp_path)) == i + 1


def test_a_key_is_nowhere_but_in_the_environment(tmp_path):
    """Training, logged by wandb, too, until a judge fails that shows the key in its errors; then an
    evaluation with it. Some rows have hostile images: they are named, and nothing else is lost."""
    torch.manual_seed(1)
    model = tmp_path / "model"
    tiny.build(model, ["Is there a pleural effusion?", "No, it is clear."]).save_pretrained(model)
    rows = [*(row(noise(64, 64, i)) for i in range(8)), *map(row, HOSTILE)]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "own.parquet")
    (tmp_path / "log.py").write_text("log = 'wandb'\n")
    env = {"JUDGE_KEY": SECRET, "WANDB_MODE": "offline", "WANDB_SILENT": "true"}
    shared = [f"--model={model}", "--judge=http", "--judge_api_key_env=JUDGE_KEY",
              "--judge_check=False", "--judge_patience_s=0.2", "--max_response_tokens=16"]
    with judge() as server:
        server.script = lambda r: "ok" if not (
            tmp_path / "run/checkpoints/step_000001").exists() else "401"
        run = forked(1, "train_grpo.py", "configs/tiny.py", tmp_path / "log.py", *shared,
                       f"--train_data={tmp_path}/own.parquet", f"--val_data={tmp_path}/own.parquet",
                       f"--judge_url={server.url}", f"--out_dir={tmp_path}/run", "--steps=3",
                       "--prompts_per_step=4", "--group_size=2", "--val_prompts=2",
                       "--save_every=1", "--max_bad_rows=0.9", check=False, env=env)
        asked = len(server.requests)
        server.script = lambda r: "ok" if len(server.requests) == asked + 1 else "403"
        done = subprocess.run(
            [sys.executable, "eval.py", "configs/eval.py", "configs/tiny_eval.py", *shared,
             f"--tasks=own={tmp_path}/own.parquet", f"--judge_url={server.url}",
             f"--out_dir={tmp_path}/out"],
            cwd=ROOT, env={**os.environ, **env}, capture_output=True, text=True, timeout=300)
        assert all(r.headers["Authorization"] == f"Bearer {SECRET}" for r in server.requests)
    said = run.stdout + run.stderr + done.stdout + done.stderr
    assert 2 < asked < len(server.requests) - 1, said[-4000:]
    assert not any(form in said.encode() for form in forms(SECRET)), said
    assert "no verdict" in run.stderr and "HTTP 401" in run.stderr and "Bearer ***" in run.stderr
    assert run.stdout.count("skipped row") == 2 * len(HOSTILE) and "step    1/3" in run.stdout
    assert (tmp_path / "run/checkpoints/step_000001/manifest.json").exists()
    assert list(tmp_path.glob("run/wandb/offline-run-*/*.wandb"))
    [folder] = (tmp_path / "out").iterdir()
    records = [json.loads(x) for x in (folder / "responses.jsonl").read_text().splitlines()]
    assert [bool(r["error"]) for r in records] == [False] * 8 + [True] * len(HOSTILE)
    assert all("image: " in r["error"] for r in records[8:])
    assert "HTTP 403" in (folder / "judgements.jsonl").read_text()
    for config in (tmp_path / "run/config.json", folder / "config.json"):
        assert json.loads(config.read_text())["judge_api_key_env"] == "JUDGE_KEY"
    assert holding(SECRET, tmp_path / "run", folder) == []


@pytest.mark.parametrize("script", ["train_grpo", "eval"])
@pytest.mark.parametrize("setting", [
    f"judge_url=http://user:{SECRET.replace('/', '.')}@localhost:1/v1",
    "judge_api_key_env=sk-Planted-K3y", "judge_api_key_env=Bearer sk-Planted"])
def test_a_key_in_a_setting_is_refused_unread(script, setting, tmp_path, monkeypatch, capfd):
    """It would be in config.json and in every log; the refusal does not show it either."""
    monkeypatch.setattr(sys, "argv", [f"{script}.py", f"--{setting}", f"--out_dir={tmp_path}/out",
                                      f"--model={ROOT}/configs/tiny_model", "--train_data=x",
                                      "--val_data=x", "--engine=torch", "--tasks=x=x"])
    if script == "eval":
        sys.argv = [x for x in sys.argv if "_data=" not in x]
    else:
        sys.argv = [x for x in sys.argv if "--tasks" not in x]
    with pytest.raises(SystemExit) as error:
        runpy.run_path(f"{ROOT}/{script}.py", run_name="__main__")
    said = f"{error.value}{''.join(capfd.readouterr())}"
    assert setting.split("=")[0] in said and "Planted" not in said
    assert not (tmp_path / "out").exists()


# --- rows that mean harm --------------------------------------------------------------------------


def png(width, height, depth=8, pixels=None, chunks=()):
    """A gray PNG of zeros, or with a few bytes of pixels only, and chunks [(kind, content)]."""
    file, pack = io.BytesIO(b"\x89PNG\r\n\x1a\n"), zlib.compressobj(1)
    file.seek(8)
    line = bytes(1 + (width * depth + 7) // 8)
    lines = [pixels] if pixels is not None else [line] * height
    content = b"".join(map(pack.compress, lines)) + pack.flush()
    header = struct.pack(">IIBBBBB", width, height, depth, 0, 0, 0, 0)
    for kind, x in ((b"IHDR", header), *chunks, (b"IDAT", content), (b"IEND", b"")):
        PngImagePlugin.putchunk(file, kind, x)
    return file.getvalue()


def swollen(megabytes):
    pack = zlib.compressobj(1)
    return b"".join(pack.compress(b"a" * 2**20) for _ in range(megabytes)) + pack.flush()


def tiff(width, height, *more):
    """Little endian, gray, one strip, without it; more: (tag, type, count, value)."""
    tags = [(256, 4, 1, width), (257, 4, 1, height), (258, 3, 1, 8), (259, 3, 1, 1), (262, 3, 1, 1),
            (273, 4, 1, 8), (277, 3, 1, 1), (278, 4, 1, height), (279, 4, 1, 2**31), *more]
    return b"II*\0\x08\0\0\0" + struct.pack("<H", len(tags)) + b"".join(
        struct.pack("<HHII", *tag) for tag in tags) + bytes(4)


def webp(width, height):
    """Lossless; its header alone."""
    content = b"\x2f" + struct.pack("<I", (width - 1) | (height - 1) << 14) + bytes(99)
    return (b"RIFF" + struct.pack("<I", len(content) + 12) + b"WEBPVP8L"
            + struct.pack("<I", len(content)) + content)


def jpeg(width, height):
    small = encoded(noise(16, 16), "JPEG")
    at = small.index(b"\xff\xc0") + 5
    return small[:at] + struct.pack(">HH", height, width) + small[at + 4:]


def large_rows():
    """Name -> images of a row."""
    scan = png(5000, 5000)
    return {
        "png whose header says 2.5 gigapixels": [png(50_000, 50_000, pixels=bytes(99))],
        "png of 400 megapixels in 50 kB": [png(20_000, 20_000, 1)],
        "png of 16 bits, 169 megapixels": [png(13_000, 13_000, 16)],
        "many large ones": [scan] * 40,
        "wide": [encoded(Image.new("RGB", (100_000, 1)))],
        "high": [encoded(Image.new("RGB", (1, 100_000)))],
        "gif": [b"GIF89a" + struct.pack("<HH", 65535, 65535) + bytes(99)],
        "bmp": [encoded(noise(16, 16), "BMP")[:18] + struct.pack("<II", 60_000, 60_000)
                + encoded(noise(16, 16), "BMP")[26:]],
        "jpeg": [jpeg(65_500, 65_500)], "webp": [webp(16_383, 16_383)],
        "tiff": [tiff(60_000, 60_000)], "tiff of 2^31 tags": [tiff(64, 64, (700, 7, 2**31, 8))],
        "png with 300 MB of text": [png(64, 64, chunks=[(b"zTXt", b"a\0\0" + swollen(300))])],
        "png with a large profile": [png(64, 64, chunks=[(b"iCCP", b"a\0\0" + swollen(300))])],
        "png with much text": [png(64, 64, chunks=[
            (b"zTXt", b"%d\0\0" % i + swollen(1)) for i in range(200)])],
        "postscript": [b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n"
                       b"(%pipe%touch here) (w) file\n%%EOF\n"],
        "empty": [b""]}


def read_hostile(tmp_path, source):
    """What tests/security_rows.py prints of a source."""
    run = subprocess.run(
        [sys.executable, ROOT / "tests/security_rows.py",
         write_processor(tmp_path / "model", 16), source], cwd=tmp_path, capture_output=True,
        text=True, timeout=300, env={**os.environ, "HF_DATASETS_CACHE": str(tmp_path / "cache")})
    assert run.returncode == 0, run.stderr[-3000:]
    return json.loads(run.stdout)


def check_refused(found, names, good):
    """All rows but the good ones are named, for a reason of their own, at a low price."""
    bad = {int(x.split(",")[0][4:]): x.partition(", image: ")[2] for x in found["bad"]}
    said = "\n".join(f"{name}: {bad.get(i, 'accepted')}, {found['megabytes'][i]} MB, "
                     f"{found['seconds'][i]} s" for i, name in enumerate(names))
    assert set(bad) == set(range(len(names))) - set(good) and found["keep"] == good, said
    assert not [x for x in bad.values() if not x or "MemoryError" in x or "no end after" in x], said
    assert max(found["megabytes"]) < 1000 and max(found["seconds"]) < 4, said
    return bad


def test_images_of_hostile_sizes_are_refused_and_named(tmp_path):
    """And a mammogram of 16 bits among them is used."""
    rows = {"before": [noise(64, 64)], **large_rows(), "mammogram": [png(3328, 4096, 16)]}
    images = [row(*x) for x in rows.values()]
    assert sum(len(x["bytes"]) for r in images for x in r["image"]) < 20_000_000
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(images), tmp_path / "a.parquet")
    check_refused(read_hostile(tmp_path, tmp_path / "a.parquet"), [*rows], [0, len(rows) - 1])
    assert not (tmp_path / "here").exists()


def test_paths_that_are_no_image_files_are_refused_and_named(tmp_path):
    """Devices, pipes and files without end; and no word of a file that is not an image."""
    folder = tmp_path / "data"
    (folder / "folder").mkdir(parents=True)
    noise(64, 64).save(folder / "a.png")
    noise(64, 64, 1).save(tmp_path / "b.png")
    (tmp_path / "secret.txt").write_text(f"password: {SECRET}")
    os.mkfifo(folder / "pipe.png")
    (folder / "link.png").symlink_to("/dev/zero")
    (folder / "loop.png").symlink_to("loop.png")
    (folder / "empty.png").touch()
    names = ["a.png", "/dev/zero", "/dev/stdin", "/dev/tty", "pipe.png", "link.png", "loop.png",
             "empty.png", "folder", ".", "", "../secret.txt",
             str(tmp_path / "secret.txt"), "../../../../../../../../etc/passwd",
             "/proc/self/environ",
             "/proc/self/mem", "a\0.png", "x" * 5000, "http://127.0.0.1:1/a.png", "file:a.png",
             "zip://a.png::a.zip", "~/a.png", "$HOME/a.png", "../b.png"]
    (folder / "a.jsonl").write_text("".join(json.dumps(
        {"problem": "Is it?", "solution": "<X_RAY> a", "image": [name]}) + "\n" for name in names))
    bad = check_refused(read_hostile(tmp_path, folder / "a.jsonl"), names, [0, len(names) - 1])
    said = "\n".join(bad.values())
    assert "password" not in said and SECRET not in said and "root:" not in said


class Web(BaseHTTPRequestHandler):
    """Records who comes, in its server's list `seen`."""

    def do_GET(self):
        self.server.seen.append((self.command, self.path, self.headers.get("Authorization")))
        self.send_response(200)
        self.send_header("Content-Length", "0")
        self.end_headers()

    do_POST = do_HEAD = do_CONNECT = do_GET

    def log_message(self, *_):
        pass


@pytest.fixture
def web():
    """Another host, which nobody should ask for anything: .url and .seen."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Web)
    server.url, server.seen = f"http://localhost:{server.server_port}", []
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.mark.parametrize("kind", ["Image", "nested Image", "listed Image", "Audio", "Video", "Pdf",
                                  "Nifti"])
def test_no_column_of_a_parquet_is_opened_by_datasets(kind, web, tmp_path):
    """The file's own metadata says what its columns are; a row that is read asks nobody."""
    nested, kind = kind.split()[0], kind.split()[-1]
    feature, value = {"_type": kind}, {"bytes": None, "path": f"{web.url}/a"}
    if nested == "nested":
        feature, value = {"x": feature}, {"x": value}
    if nested == "listed":
        feature = {"feature": {"feature": feature, "_type": "List"}, "_type": "List"}
        value = [[value]]
    text = {"dtype": "string", "_type": "Value"}
    features = {"problem": text, "solution": text, "more": feature}
    table = pyarrow.Table.from_pylist([{"problem": "a?", "solution": "<X_RAY> a", "more": value}])
    struct_of = pyarrow.struct([("bytes", pyarrow.binary()), ("path", pyarrow.string())])
    kinds = {"nested": pyarrow.struct([("x", struct_of)]),
             "listed": pyarrow.list_(pyarrow.list_(struct_of))}
    table = table.set_column(2, "more", pyarrow.array([value], kinds.get(nested, struct_of)))
    pyarrow.parquet.write_table(table.replace_schema_metadata(
        {"huggingface": json.dumps({"info": {"features": features}})}), tmp_path / "a.parquet")
    rows, _ = data.read_rows(tmp_path / "a.parquet")
    assert rows[0]["more"] == value and web.seen == []


# --- archives -------------------------------------------------------------------------------------


class Store(MemoryFileSystem):
    """The hub's place, as fsspec sees it."""

    protocol, store, pseudo_dirs = "hf", {}, [""]


def test_an_archive_gives_no_bombs_and_leads_nowhere_else(tmp_path):
    """SLAKE's images: the names in its rows are names in its archive, not addresses."""
    with zipfile.ZipFile(tmp_path / "imgs.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("imgs/a.png", encoded(noise(64, 64)))
        archive.writestr("imgs/bomb.png", encoded(noise(64, 64))[:-12] + bytes(300_000_000),
                         compresslevel=1)
    with zipfile.ZipFile(tmp_path / "other.zip", "w") as archive:
        archive.writestr("imgs/a.png", SECRET)
    fsspec.register_implementation("hf", Store, clobber=True)
    try:
        with fsspec.open("hf://datasets/BoKelvin/SLAKE/imgs.zip", "wb") as file:
            file.write((tmp_path / "imgs.zip").read_bytes())
        fetch = runpy.run_path(f"{ROOT}/configs/eval.py")["benchmarks"]["slake_vqa"]["fetch"]
        assert fetch("a.png") == encoded(noise(64, 64))
        swollen_to = len(fetch("bomb.png"))
        assert swollen_to < 300_000_000
        for path in (f"a.png::file://{tmp_path}/other.zip", f"a.png::{tmp_path}/other.zip"):
            with pytest.raises(ValueError, match="other"):
                fetch(path)
    finally:
        fsspec.register_implementation("hf", "huggingface_hub.HfFileSystem", clobber=True)


# --- models that mean harm ------------------------------------------------------------------------


def with_code(folder, marker):
    """A file of Python that is as good as run if marker is there."""
    (folder / "evil.py").write_text(
        f"open({str(marker)!r}, 'w')\nfrom transformers import PretrainedConfig as Evil\n")


@pytest.mark.parametrize("kind", ["qwen3_vl", "evil"])
def test_a_models_own_code_is_not_run(kind, tmp_path, monkeypatch):
    """Nor is anyone asked whether it may be."""
    folder, marker = shutil.copytree(ROOT / "configs/tiny_model", tmp_path / "m"), tmp_path / "run"
    with_code(folder, marker)
    names = ("AutoConfig", "AutoModelForImageTextToText", "AutoImageProcessor", "AutoProcessor")
    codes = dict.fromkeys(names, "evil.Evil") | {"AutoTokenizer": ["evil.Evil", "evil.Evil"]}
    for name in ("config", "tokenizer_config", "preprocessor_config"):
        config = json.loads((folder / f"{name}.json").read_text()) | {"auto_map": codes}
        config |= {"model_type": kind} if name == "config" else {}
        (folder / f"{name}.json").write_text(json.dumps(config))
    monkeypatch.setattr(sys, "stdin", io.StringIO("y\n" * 20))  # who says yes to everything
    if kind == "evil":
        with pytest.raises(ValueError, match="is no complete Qwen-VL folder"):
            data.load_processor(str(folder))
    else:
        assert data.load_processor(str(folder)).patch == 16
    assert not marker.exists()


class Harm:
    """Its pickle opens a file."""

    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return open, (str(self.marker), "w")


def test_pickled_weights_are_not_read(tmp_path, process_group):
    folder, marker = shutil.copytree(ROOT / "configs/tiny_model", tmp_path / "m"), tmp_path / "run"
    torch.save({"model.language_model.norm.weight": Harm(marker)}, folder / "pytorch_model.bin")
    cfg = type("cfg", (), dict(model=str(folder), dtype="float32", lora_rank=0, kl_coef=0.0,
                               freeze_vision=False, activation_checkpointing=False, offload=False,
                               shard_ranks=0, tokens_per_micro_batch=1024))
    with pytest.raises(OSError, match="safetensors"):
        policy.load(cfg, torch.device("cpu"))
    with pytest.raises(OSError, match="safetensors"):
        policy.load(cfg, torch.device("cpu"), reference_of=object())
    assert not marker.exists()


@pytest.mark.parametrize("kind", ["evil.Evil", "pdb.Pdb", "os.system"])
def test_an_embedders_own_code_is_not_run(kind, tmp_path, monkeypatch):
    pytest.importorskip("sentence_transformers", reason="requirements.txt brings it")
    (tmp_path / "e").mkdir()
    with_code(tmp_path / "e", tmp_path / "run")
    (tmp_path / "e/modules.json").write_text(json.dumps(
        [{"idx": 0, "name": "0", "path": "", "type": kind}]))
    monkeypatch.setattr(sys, "stdin", io.StringIO("y\n" * 20))
    with pytest.raises(ValueError, match=r"^embedder="):
        reward.load_encoder(str(tmp_path / "e"), "cpu")
    assert not (tmp_path / "run").exists()


# --- a judge that sends its client elsewhere ------------------------------------------------------


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_no_redirect_is_followed(status, web, monkeypatch):
    """With a key, of which the other host would learn."""

    class Moved(judge_server.Handler):
        def act(self, what, request):
            self.send(status, "", Location=f"{web.url}/v1/chat/completions")

    monkeypatch.setattr(judge_server, "Handler", Moved)
    monkeypatch.setenv("JUDGE_KEY", SECRET)
    with judge() as server, pytest.raises(ValueError, match=f"HTTP {status}") as error:
        load_judge(server, judge_api_key_env="JUDGE_KEY")
    assert web.seen == [] and SECRET not in str(error.value)


def test_no_proxy_and_no_netrc_of_the_environment_is_used(web, tmp_path, monkeypatch):
    for name in ("http_proxy", "https_proxy", "all_proxy"):
        monkeypatch.setenv(name, web.url)
        monkeypatch.setenv(name.upper(), web.url)
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.setenv(name, "")
    (tmp_path / "netrc").write_text(f"default login me password {SECRET}\n")
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    with judge() as server:
        assert verdicts(load_judge(server), ["ribs"]) == [0.0]
        assert {r.headers.get("Authorization") for r in server.requests} == {None}
    assert web.seen == []


# --- pages ----------------------------------------------------------------------------------------

RUN = "window.owned = (window.owned || 0) + 1"
MARKUP = [f"</script><script>{RUN}</script>", f"\"'><img src=x onerror=\"{RUN}\">", "<!--<script>",
          f"javascript:{RUN}", f"' onmouseover='{RUN}", f"<svg onload={RUN}>", "{{data}}",
          "${" + RUN + "}", "`\\u003cb>", "&lt;b&gt; &#60;", "a\0b", "half \ud83d, \udc00\ud800",
          "line\u2028paragraph\u2029", "\x1b[2K\x07\x85", "\u202etxt.exe", "\ufffe\ufeff\uffff",
          f"<iframe srcdoc=\"<script>parent.{RUN}</script>\">", "<base href=//example.com>",
          "<meta http-equiv=refresh content=\"0;url=https://example.com\">", "__proto__", "]]>",
          "<style>*{display:none}</style>", f"</title><a href='javascript:{RUN}' autofocus>"]
OPEN = ("document.querySelectorAll('details').forEach(x => x.open = true), "
        "document.querySelector('main').textContent")
ATTRIBUTES = """[...new Set([...document.querySelectorAll('body *')].flatMap(
    x => [...x.attributes].map(a => `${x.localName} ${a.name}`)))].sort()"""
ALLOWED = {"script type", "script id", "img src", "img loading", "img alt", "td title", "li value",
           "option value", *(f"{x} {name}" for name in ("class", "style", "open") for x in (
               "div", "span", "p", "h1", "h2", "b", "i", "td", "th", "tr", "small", "details", "dl",
               "summary", "table", "thead", "tbody", "article", "section", "header", "li", "ol",
               "button", "select", "option", "nav", "dt", "dd", "img"))}


def hostile_results(folder):
    """A results folder in which every text, name of a task, item, model, judge, setting and image
    file is markup."""
    report_pages.write_results(folder)
    config, scores = (json.loads((folder / f"{x}.json").read_text()) for x in ("config", "scores"))
    responses, judgements, items = [], [], {}
    for i, text in enumerate(MARKUP):
        name = f"{text}/{i}"
        items[name] = 0.0
        responses.append(dict(
            id=name, task=text, row=i, question=f"{text} ?", choices=[text, f"not {text}"],
            answer=text, response=f"{text}<thinking>{text}</thinking><answer>{text}</answer>",
            finish_reason=text, tokens=4, error=f"{text} failed" if i % 5 == 4 else None))
        judgements.append(dict(id=name, round=0, prompt=text, judge=f"{text} judge", reply=text,
                               verdict=0.0, error=None))
        with_slash = "/" in text or "\0" in text or not text.isprintable()
        if not with_slash:
            Image.new("L", (9, 9)).save(folder / f"images/{text}_{i}.jpg")
    scores |= {"items": items, "published": dict.fromkeys(MARKUP, 50.0), "protocol": MARKUP[0],
               "tasks": dict.fromkeys(MARKUP, scores["tasks"]["medqa"]),
               "skipped": {text: f"{text}!" for text in MARKUP}}
    config = {f"key {text}": {text: [text]} for text in MARKUP} | {"model": " ".join(MARKUP[:9])}
    for name, content in (("config", config), ("scores", scores)):
        (folder / f"{name}.json").write_text(json.dumps(content))
    report_pages.write_lines(folder / "responses.jsonl", responses)
    report_pages.write_lines(folder / "judgements.jsonl", judgements)
    return [str(folder)], [*MARKUP, *(f"{x}!" for x in MARKUP), *(f"{x} ?" for x in MARKUP),
                           *(f"key {x}" for x in MARKUP), *(f"not {x}" for x in MARKUP)]


def hostile_rollouts(folder):
    """A run's out_dir, the same; the rows of the data are the markup, too."""
    report_pages.write_rollouts(folder)
    whole = [x.encode("utf-8", "backslashreplace").decode() for x in MARKUP]  # a file has no halves
    rows = [{"problem": f"{x} ?", "solution": f"<X_RAY> {x}", "image": []} for x in whole]
    report_pages.write_lines(folder / "data/train.jsonl", rows)
    (folder / "data/train.parquet").unlink()
    groups = [dict(
        slot=i, step=2, row=i, prompt=rows[i]["problem"], solution=rows[i]["solution"], responses=[
            report_pages.reply(1.0, 1.0, 0.5, f"{x}<thinking>{x}</thinking><answer>{x}</answer>")
            | {"finish_reason": x}, report_pages.reply(0.0, 0.0, -0.5, f"{x} alone")])
        for i, x in enumerate(MARKUP)]
    report_pages.write_lines(folder / "rollouts/step_000002.jsonl", groups)
    config = json.loads((folder / "config.json").read_text())
    config |= {f"key {x}": {x: [x]} for x in MARKUP} | {"out_dir": MARKUP[1]}
    (folder / "config.json").write_text(json.dumps(config))
    return ["rollouts", str(folder), "--step", "2"], [
        *MARKUP, *(f"{x} ?" for x in whole), *(f"{x} alone" for x in MARKUP),
        *(f"key {x}" for x in MARKUP)]


@needs_chromium
@pytest.mark.parametrize("make", [hostile_results, hostile_rollouts])
def test_pages_are_text_whatever_is_in_them(make, tmp_path):
    arguments, texts = make(tmp_path / "<b>\"'&lt; folder")
    page = tmp_path / "page <b>.html"
    done = subprocess.run([sys.executable, ROOT / "report.py", *arguments, "--out", page],
                          capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    with browser(tmp_path / "chromium") as visit:
        evaluate = visit(page, 1280)
        shown = evaluate(OPEN)
        assert [x for x in texts if x not in shown] == []
        for select in ("article header", "nav button, nav option", "td, dd, summary, li, h1"):
            evaluate(f"document.querySelectorAll({select!r}).forEach(x => {{ x.click(); "
                     "x.dispatchEvent(new Event('mouseover', {bubbles: true})) })")
        names = "[...new Set([...document.querySelectorAll('body *')].map(x => x.localName))]"
        assert {*evaluate(names)} <= {x.split()[0] for x in ALLOWED} | {"main"}
        assert {*evaluate(ATTRIBUTES)} <= ALLOWED
        assert evaluate("[document.scripts.length, document.querySelectorAll('head *').length, "
                        "typeof owned, location.protocol]") == [2, 5, "undefined", "file:"]


@pytest.mark.parametrize("name, text", [
    ("responses.jsonl", '{"id": ' + "[" * 200_000 + "]" * 200_000 + "}\n"),
    ("scores.json", '{"a": ' * 200_000 + "1" + "}" * 200_000), ("scores.json", '{"micro": NaN}'),
    ("config.json", '{"model": "a", "judge_args": {"top_p": Infinity}}')])
def test_results_that_no_browser_could_read_are_refused(name, text, tmp_path):
    folder = report_pages.write_results(tmp_path / "results")
    (folder / name).write_text(text)
    done = subprocess.run([sys.executable, ROOT / "report.py", folder], capture_output=True,
                          text=True, timeout=120)
    assert done.returncode == 1 and done.stderr.count("\n") == 1, done.stderr[-500:]
    assert done.stderr.startswith("error: ") and not (folder / "page.html").exists()
