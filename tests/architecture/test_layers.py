"""The house stands: imports point downward, and each big library has one doorway."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

from tests.needs import REPOSITORY

PACKAGE = REPOSITORY / "kdad_dist"
# A part is a folder of the package, or a file beside them.
LAYERS = (
    {"errors", "types", "tiling", "wording"},
    {"config", "draws", "files"},
    {"data", "models", "metrics", "schedule", "pictures"},
    {"methods"},
    {"runtime"},
    {"detector", "provenance"},
    {"train", "score", "predict", "export", "report"},
    {"demo", "sweep", "status", "compare", "doctor"},
    {"cli"},
    {"__main__"},
)
DOORWAYS = {
    "accelerate": ("runtime/",),
    "deepspeed": ("runtime/",),
    "webdataset": ("data/shard.py",),
    "timm": ("models/backbone", "models/mae"),
    "transformers": ("models/hf.py",),
    "loralib": ("models/lora.py",),
    "wandb": ("runtime/tracker.py",),
    "onnx_ir": ("export/onnx.py",),
    "onnxruntime": ("export/onnx.py",),
}
WITHOUT_TORCH = (
    "cli.app",
    "config.changes",
    "config.errors",
    "errors",
    "report.page",
    "status.survey",
    "status.text",
    "compare.differences",
    "compare.text",
    "doctor.text",
    *(f"data.{name}" for name in ("index", "plan", "layouts", "image", "writer", "verify")),
)


def modules() -> dict[str, Path]:
    """Dotted name of every module of the package, and its file."""
    found = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(REPOSITORY).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def imports(path: Path) -> Iterator[str]:
    """Dotted names that a file imports, anywhere in it; `from a import b` gives `a.b`."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: write imports from the root"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def graph() -> dict[str, set[str]]:
    """The modules of the package that each module imports."""
    known = modules()
    edges: dict[str, set[str]] = {}
    for name, path in known.items():
        found = set()
        for target in imports(path):
            # The longest prefix that is a module: `kdad_dist.files.locked` is `kdad_dist.files`.
            module = target if target in known else target.rpartition(".")[0]
            if module in known and module != name:
                found.add(module)
        edges[name] = found
    return edges


def part(module: str) -> str:
    return module.split(".")[1]


def level(module: str) -> int:
    return next(i for i, parts in enumerate(LAYERS) if part(module) in parts)


def test_every_module_has_a_layer() -> None:
    known = set().union(*LAYERS)
    strangers = [name for name in modules() if name != "kdad_dist" and part(name) not in known]
    assert not strangers, f"say in LAYERS where they belong: {strangers}"


def test_imports_point_strictly_downward_and_siblings_do_not_know_each_other() -> None:
    wrong = [
        f"{name} imports {target}"
        for name, targets in graph().items()
        for target in targets
        if "kdad_dist" not in (name, target)
        and part(name) != part(target)
        and level(target) >= level(name)
    ]
    assert not wrong, "\n".join(wrong)


def test_no_module_imports_itself_through_others() -> None:
    # The package itself names its public parts, and imports them only when they are asked for.
    edges = {name: targets - {"kdad_dist"} for name, targets in graph().items()}
    TopologicalSorter(edges).prepare()  # CycleError names the cycle


def test_each_big_library_has_one_doorway() -> None:
    wrong = [
        f"{path.relative_to(REPOSITORY)} imports {target}"
        for path in modules().values()
        for target in imports(path)
        if (library := target.split(".")[0]) in DOORWAYS
        and not str(path.relative_to(PACKAGE)).startswith(DOORWAYS[library])
    ]
    assert not wrong, "\n".join(wrong)


def test_what_needs_no_torch_does_not_import_it() -> None:
    names = [f"kdad_dist.{name}" for name in WITHOUT_TORCH]
    code = (
        "import importlib, sys\n"
        f"for name in {names!r}:\n"
        "    importlib.import_module(name)\n"
        "    assert 'torch' not in sys.modules, f'{name} imports torch'\n"
    )
    command = [sys.executable, "-c", code]
    result = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
