"""The rules of the house: what imports what, how long things are, what never appears, and that the
README, the configs and the requirements say what is true."""

import ast
import importlib.metadata
import os
import re
import subprocess

import pytest
from packaging.requirements import Requirement
from ranks import ROOT

import common
import data

MODULES = {"loss", "policy", "rollout", "reward", "data", "common"}
SCRIPTS = {"train_grpo", "train_dapo", "eval", "merge", "tiny", "report"}
CLASSES = {("common.py", "Stop")}


def tracked(pattern="*"):
    """What git has or would add, {path: text}; not what it ignores, nor pictures."""
    names = subprocess.run(["git", "ls-files", "-co", "--exclude-standard", "--", pattern],
                           cwd=ROOT, check=True, capture_output=True, text=True).stdout.split("\n")
    found = {}
    for name in sorted({*names} - {""}):
        if (ROOT / name).is_file() and b"\0" not in (content := (ROOT / name).read_bytes()):
            found[name] = content.decode()
    assert found, f"git lists no {pattern} in {ROOT}"
    return found


def root_files():
    return {name: text for name, text in tracked("*.py").items() if "/" not in name}


def lines(text):
    return text.count("\n")


def nodes(texts, kind=ast.AST):
    """(path, node) of every node of a kind."""
    return [(name, node) for name, text in texts.items() for node in ast.walk(ast.parse(text))
            if isinstance(node, kind)]


def at(found):
    return [f"{name}:{node.lineno}" for name, node in found]


def imports(text):
    """The first parts of all imported names, wherever in the file."""
    names = set()
    for _, node in nodes({"": text}, (ast.Import, ast.ImportFrom)):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        else:
            assert not node.level, "a relative import"
            names.add(node.module.split(".")[0])
    return names


def imports_ours(name):
    return imports(root_files()[f"{name}.py"]) & (MODULES | SCRIPTS)


def training_path():
    """train_grpo and what it imports, and so on."""
    path, ahead = set(), {"train_grpo"}
    while ahead:
        path |= ahead
        ahead = set().union(*map(imports_ours, ahead)) - path
    return path


def training_lines():
    return sum(lines(root_files()[f"{name}.py"]) for name in training_path())


# --- what imports what ----------------------------------------------------------------------------


def test_every_root_file_is_a_module_or_a_script():
    ours = {name.removesuffix(".py") for name in root_files()}
    assert ours >= MODULES and "train_grpo" in ours and ours <= MODULES | SCRIPTS


@pytest.mark.parametrize("name", sorted(MODULES))
def test_a_module_can_be_pasted_alone(name):
    assert imports_ours(name) == set(), "the script passes in what a module needs"


@pytest.mark.parametrize("name", sorted(SCRIPTS))
def test_a_script_imports_no_script(name):
    if f"{name}.py" in root_files():
        assert imports_ours(name) & SCRIPTS == set()


# --- how long -------------------------------------------------------------------------------------


def test_lengths():
    assert training_path() == {"train_grpo", *MODULES}
    assert training_lines() <= 1500
    assert sum(map(lines, root_files().values())) <= 2500
    assert {name: lines(text) for name, text in root_files().items() if lines(text) > 400} == {}


def test_functions_are_under_60_lines():
    functions = nodes(tracked("*.py"), (ast.FunctionDef, ast.AsyncFunctionDef))
    assert len(functions) > 100
    assert [f"{name}: {f.name}" for name, f in functions if f.end_lineno - f.lineno + 1 >= 60] == []


def test_columns():
    assert [f"{name}:{i}" for name, text in tracked("*.py").items()
            for i, row in enumerate(text.split("\n"), 1) if len(row) > 100] == []


# --- what never appears ---------------------------------------------------------------------------


def test_classes():
    """Functions, not classes, unless state really has to live together."""
    classes = nodes({k: v for k, v in tracked("*.py").items() if "tests/" not in k}, ast.ClassDef)
    assert {(name, node.name) for name, node in classes} == CLASSES


def test_no_error_is_swallowed():
    def broad(kind):
        kinds = kind.elts if isinstance(kind, ast.Tuple) else [kind]
        return any(k is None or ast.unparse(k).split(".")[-1] in ("Exception", "BaseException")
                   for k in kinds)

    handlers = nodes(root_files(), ast.ExceptHandler)
    handlers = [(name, h) for name, h in handlers if broad(h.type)]
    assert at((n, h) for n, h in handlers if not isinstance(h.body[-1], ast.Raise)) == []
    suppressed = [(n, c) for n, c in nodes(root_files(), ast.Call)
                  if ast.unparse(c.func).endswith("suppress") and any(map(broad, c.args))]
    assert at(suppressed) == []


def test_trainers_leave_collectives_to_the_modules():
    texts = {name: text for name, text in root_files().items() if name.startswith("train_")}
    calls = [name for name, node in nodes(texts, ast.Call)
             if ast.unparse(node.func).startswith(("dist.", "torch.distributed."))]
    assert {name: calls.count(name) for name in texts if calls.count(name) > 3} == {}


def test_nothing_is_unpickled_and_no_foreign_code_is_run():
    for name, text in root_files().items():
        assert not imports(text) & {"pickle", "cloudpickle", "dill", "joblib", "shelve"}, name
        assert "trust_remote_code" not in text.replace("trust_remote_code=False", ""), name
        assert "weights_only" not in text, name
    loads = [(n, x) for n, x in nodes(root_files(), ast.Attribute)
             if ast.unparse(x) == "torch.load"]
    loads += [(n, x) for n, x in nodes(root_files(), ast.ImportFrom)
              if x.module == "torch" and "load" in {alias.name for alias in x.names}]
    assert at(loads) == []


def test_a_device_is_not_compared_with_a_text():
    """torch.device("cuda", 0) == "cuda" is False; its .type may be compared."""
    wrong = []
    for name, node in nodes(tracked("*.py"), ast.Compare):
        sides = [node.left, *node.comparators]
        device = any(re.search(r"device$", ast.unparse(side)) for side in sides)
        texts = any(isinstance(leaf, ast.Constant) and isinstance(leaf.value, str)
                    for side in sides for leaf in [side, *getattr(side, "elts", [])])
        wrong += [(name, node)] if device and texts else []
    assert at(wrong) == []


TRACES = {
    "a path of one machine": r"(?<![\w.}~)])/(?:work|root|tmp|home|mnt|opt|Users)/",
    "a package registry": r"(?i)\b(?:py[p]i\.|python[h]osted|npm[j]s|arti[f]actory|ne[x]us)",
    "the tale of its making": r"(?i)\b(?:session|issue)s?\s*#?\d+\b",
    "unfinished work": r"\b(?:TO[D]O|FIX[M]E|XX[X])\b|@[A-Z]\w*@",
}


@pytest.mark.parametrize("trace", TRACES)
def test_files_hold_no(trace):
    assert [f"{name}:{i}: {match[0]}" for name, text in tracked().items()
            for i, row in enumerate(text.split("\n"), 1)
            for match in re.finditer(TRACES[trace], row)] == []


# --- what is said is true -------------------------------------------------------------------------


@pytest.mark.parametrize("name", sorted(MODULES))
def test_public_functions_are_explained(name):
    module = ast.parse(root_files()[f"{name}.py"])
    assert ast.get_docstring(module)
    public = [f for f in module.body if isinstance(f, ast.FunctionDef) and f.name[0] != "_"]
    assert public and [f.name for f in public if not ast.get_docstring(f)] == []


CONFIGS = {p.name for p in (ROOT / "configs").glob("*.py")} - {"defaults.py"}


@pytest.mark.parametrize("name", sorted(CONFIGS))
def test_configs(name, monkeypatch):
    """Each loads, names settings that there are, and passes the checks on its own number of GPUs.
    The command in its header says the trainer and the ranks."""
    monkeypatch.chdir(ROOT)
    text = (ROOT / "configs" / name).read_text()
    header = "".join(row for row in text.splitlines(True) if row.startswith("#"))
    command = re.search(
        rf"torchrun --nproc_per_node (\d+) (\w+)\.py ((?:configs/\w+\.py )*configs/{name})", header)
    assert command, "the header shows no command"
    script = importlib.import_module(command[2])
    cfg = common.load_config(script.defaults, command[3].split())
    if command[2] != "eval":
        assert cfg.out_dir != script.defaults["out_dir"]
        common.check(cfg, int(command[1]))
    assert data.read_template(cfg.prompt_template).count("{question}") == 1


def test_readme_counts():
    text = (ROOT / "README.md").read_text()
    rows = re.findall(r"\| \[(\w+\.py)\]\(\w+\.py\) \| (\d+) \|", text)
    assert dict(rows) == {name: str(lines(text)) for name, text in root_files().items()}
    claims = [int(n.replace(",", "")) for n in re.findall(r"in ([\d,]+) lines", text)]
    assert claims, "the README does not say in how many lines"
    real = training_lines()
    assert all(real <= claim <= real + 20 for claim in claims), f"{claims}, really {real}"


def test_readme_names_what_is_there():
    """Relative links, make targets, scripts and settings in commands."""
    text = (ROOT / "README.md").read_text()
    links = {link for link in re.findall(r"\]\(([^)#\s]+)[^)]*\)", text) if ":" not in link}
    links |= {link for link in re.findall(r'src="([^"]+)"', text) if ":" not in link}
    assert [link for link in sorted(links) if not (ROOT / link).exists()] == []
    targets = {*re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.M)}
    used = set(re.findall(r"(?:^|`)make ([\w-]+)", text, re.M))
    assert used and used <= targets, used - targets
    files = re.findall(r"\b((?:configs/|bench/)?\w+\.py)\b", text)
    assert [f for f in sorted({*files})
            if not (ROOT / f).exists() and not (ROOT / "configs" / f).exists()] == []


def test_ci_runs_the_tests():
    assert os.access(ROOT / ".ci/run", os.X_OK)
    mode = subprocess.run(["git", "ls-files", "-s", ".ci/run"], cwd=ROOT, check=True, text=True,
                          capture_output=True).stdout[:6]
    assert mode == "100755"
    script = (ROOT / ".ci/run").read_text()
    assert re.search(r"^make test$", script, re.M) and "set -e" in script
    assert re.search(r"^test: .*\n\t.*python -m pytest", (ROOT / "Makefile").read_text(), re.M)


def test_license():
    text = (ROOT / "LICENSE").read_text()
    assert text.startswith("MIT License") and "WITHOUT WARRANTY OF ANY KIND" in text


def test_requirements_admit_what_the_tests_ran_with():
    names = set()
    for file in ROOT.glob("requirements*.txt"):
        for row in file.read_text().splitlines():
            if row and not row.startswith(("#", "-")):
                requirement = Requirement(row)
                names.add(requirement.name)
                try:
                    version = importlib.metadata.version(requirement.name)
                except importlib.metadata.PackageNotFoundError:
                    continue  # of another environment, or for what a test skips
                assert requirement.specifier.contains(version, prereleases=True), (file.name, row)
    assert {"torch", "transformers", "pytest", "ruff"} <= names
    first = (ROOT / "requirements.txt").read_text()
    for name in ("torch", "transformers"):  # bounded: their insides are relied on
        assert re.search(rf"^{name}>=[\d.]+,<[\d.]+$", first, re.M), name
    pinned = re.search(r"^TORCH \?= (torch==\S+)$", (ROOT / "Makefile").read_text(), re.M)[1]
    torch_row = re.search(r"^torch\S+$", first, re.M)[0]
    assert Requirement(torch_row).specifier.contains(pinned.split("==")[1])
