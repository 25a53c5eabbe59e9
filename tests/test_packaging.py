"""The package is what it says: import arrows, names that shadow nothing, no torch where none is due."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

#: What each folder may import of the others (docs/architecture.md).
ARROWS: dict[str, set[str]] = {
    "kernels": set(),
    "tokenizers": set(),
    "data_pipes": {"tokenizers"},
    "parallel": {"kernels"},
    "pretrain": {"kernels", "tokenizers", "data_pipes", "parallel"},
    "launch": {"kernels", "tokenizers", "data_pipes", "parallel", "pretrain"},
}
#: Folders that must work where torch is not wanted.
NO_TORCH = ("tokenizers", "data_pipes")
#: Except where codecs are trained; only those modules and the command that trains may import them.
TRAINING = (
    "tokenizers/learn.py",
    "tokenizers/learn_run.py",
    "tokenizers/learn_core.py",
    "tokenizers/learn_rgba.py",
    "tokenizers/learn_vae.py",
    "tokenizers/picture_vae.py",
)
#: Modules of torch-heavy folders that config mistakes go through, and so must not wait for torch.
LIGHT = ("pretrain/config.py", "pretrain/errors.py", "launch/cli.py", "launch/plan.py", "launch/local.py")


def sources(folder: str) -> list[Path]:
    return sorted(path for path in (ROOT / folder).rglob("*.py") if "__pycache__" not in path.parts)


def imported(path: Path, *, top_only: bool = False) -> set[str]:
    """Dotted names of the modules that `path` imports, anywhere or only when it is loaded."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    nodes: list[ast.AST] = list(tree.body) if top_only else list(ast.walk(tree))
    names: set[str] = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


@pytest.mark.parametrize("folder", ARROWS)
def test_imports_follow_the_arrows(folder: str) -> None:
    files = sources(folder)
    assert files, f"{folder}/ has no modules"
    for path in files:
        for name in imported(path):
            parts = name.split(".")
            if parts[0] == "ringweave" and len(parts) > 1:
                assert parts[1] == folder or parts[1] in ARROWS[folder], (
                    f"{path.relative_to(ROOT)} imports {name}"
                )
            assert parts[0] not in ("pickle", "dill", "cloudpickle"), (
                f"{path.relative_to(ROOT)} imports {name}"
            )
            # A bare `import kernels` would find the folder when run from the root and nothing when installed.
            assert parts[0] not in ARROWS or parts[0] == "tokenizers", (
                f"{path.relative_to(ROOT)} imports {name}"
            )


@pytest.mark.parametrize("folder", NO_TORCH)
def test_no_torch_at_module_level(folder: str) -> None:
    training = tuple("ringweave." + name.removesuffix(".py").replace("/", ".") + "." for name in TRAINING)
    for path in sources(folder):
        if str(path.relative_to(ROOT)) in TRAINING:
            continue
        heavy = {
            name
            for name in imported(path, top_only=True)
            if name.split(".")[0] in ("torch", "transformers") or name.startswith(training)
        }
        assert not heavy, f"{path.relative_to(ROOT)} imports {heavy}"


def test_light_modules_import_without_torch() -> None:
    names = [path.removesuffix(".py").replace("/", ".") for path in LIGHT]
    program = (
        "; ".join(f"import ringweave.{name}" for name in names)
        + "; import sys; print('torch' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True, cwd=ROOT
    )
    assert done.stdout.strip() == "False"


def test_top_folders_have_no_init() -> None:
    found = [folder for folder in ARROWS if (ROOT / folder / "__init__.py").exists()]
    assert not found, "a top-level __init__.py shadows the Hugging Face packages of that name"


@pytest.mark.parametrize("command", [["-c"], ["-m"]], ids=["python -c", "python -m"])
def test_hugging_face_tokenizers_import_from_the_root(command: list[str]) -> None:
    """`tokenizers` must be the package, not our folder, though the root is first on sys.path."""
    program = "import tokenizers; print(tokenizers.Tokenizer.__name__)"
    argv = [sys.executable, "-c", program]
    if command == ["-m"]:
        argv = [sys.executable, "-m", "timeit", "-n1", "-r1", "from tokenizers import Tokenizer"]
    done = subprocess.run(argv, capture_output=True, text=True, check=False, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert "Tokenizer" in done.stdout or "loops" in done.stdout or "loop" in done.stdout


def test_torchaudio_works_with_this_torch() -> None:
    """torchaudio declares no torch version; its compiled filter must still run."""
    torch, functional = pytest.importorskip("torch"), pytest.importorskip("torchaudio.functional")
    impulse = torch.tensor([1.0, 0.0, 0.0, 0.0])
    out = functional.lfilter(impulse, torch.tensor([1.0, -0.5]), torch.tensor([1.0, 0.0]), clamp=False)
    assert torch.allclose(out, torch.tensor([1.0, 0.5, 0.25, 0.125]))


def project() -> dict:
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


def test_every_subpackage_is_listed() -> None:
    """Only listed packages get into a wheel; a forgotten sub-folder would be missing there and only there."""
    listed = set(project()["tool"]["setuptools"]["packages"])
    expected = {f"ringweave.{folder}" for folder in ARROWS}
    for folder in ARROWS:
        inner = {path.parent for path in sources(folder) if path.parent != ROOT / folder}
        expected |= {f"ringweave.{path.relative_to(ROOT).as_posix().replace('/', '.')}" for path in inner}
    assert listed == expected


def test_every_dependency_is_pinned() -> None:
    pins = {}
    for line in (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines():
        if line and not line.startswith("#"):
            name, equals, version = line.partition("==")
            assert equals and version and "/" not in line and "@" not in line, line
            pins[name.lower().replace("_", "-")] = version
    settings = project()["project"]
    wanted = [
        *settings["dependencies"],
        *(name for extra in settings["optional-dependencies"].values() for name in extra),
    ]
    missing = [
        name for name in wanted if name.split(">")[0].split("[")[0].lower().replace("_", "-") not in pins
    ]
    assert not missing


# What must not stand in a public repository: folders of one machine, and hosts of a package mirror.
LOCAL = ("/" + "work" + "/", "/" + "root" + "/", "/" + "home" + "/", "/" + "tmp" + "/bash_jobs")


def test_no_path_of_one_machine() -> None:
    kinds = {".py", ".md", ".toml", ".txt", ".yaml", ".yml", ".json", ".sh", ""}
    skipped = {"runs", "build", "shared", "__pycache__"}
    checked = 0
    for folder, inner, names in os.walk(ROOT):
        # Folders with a leading dot are git's or caches, except CI's.
        inner[:] = [
            d for d in inner if (d == ".ci" or d[0] != ".") and d not in skipped and "egg-info" not in d
        ]
        for path in (Path(folder) / name for name in names):
            if path.suffix in kinds and path.is_file():
                text = path.read_text(encoding="utf-8", errors="replace")
                assert not any(local in text for local in LOCAL), (
                    f"{path.relative_to(ROOT)} names a local folder"
                )
                checked += 1
    assert checked > 20


def test_worlds_are_joined_in_one_place() -> None:
    """Only there gloo's groups get one worker thread; torch's two corrupt memory (parallel/gloo.py)."""
    callers = {
        str(path.relative_to(ROOT))
        for folder in ARROWS
        for path in (ROOT / folder).rglob("*.py")
        if "init_process_group(" in path.read_text(encoding="utf-8")
    }
    assert callers == {"parallel/gloo.py"}


def test_code_runs_no_shell_and_no_pickle() -> None:
    """`shell=True`, `eval`, `exec`, `os.system` and unsafe loaders occur nowhere in the package."""
    for folder in ARROWS:
        for path in sources(folder):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if not isinstance(node, ast.Call):
                    continue
                where = f"{path.relative_to(ROOT)}:{node.lineno}"
                called = ast.unparse(node.func)
                if called == "torch.load":  # only tensors and an allow-list: for DeepSpeed's own checkpoints
                    assert any(
                        k.arg == "weights_only" and ast.unparse(k.value) == "True" for k in node.keywords
                    )
                    continue
                assert called not in ("eval", "exec", "os.system", "os.popen", "torch.load", "yaml.load"), (
                    where
                )
                for keyword in node.keywords:
                    is_true = isinstance(keyword.value, ast.Constant) and keyword.value.value is True
                    assert not (is_true and keyword.arg in ("shell", "allow_pickle", "trust_remote_code")), (
                        where
                    )
