"""The house: imports go down the floors only, in no circle, and never to the peers."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FLOORS = {"errors": 0, "kernels": 1, "quant": 2, "loading": 3, "models": 4, "registry": 5, "cli": 6}
ROOF = ("__init__", "__main__")  # the face and the command: they may use every floor, none may use them
FILES = sorted(file for floor in FLOORS for file in ROOT.glob(f"{floor}/**/*.py")) + [
    ROOT / f"{name}.py" for name in ("errors", *ROOF)
]
FUSED = ROOT / "kernels" / "fused"  # the Triton kernels
PEERS = {"transformers", "bitsandbytes", "peft", "vllm", "optimum"}
AT_USE = {"huggingface_hub", "accelerate", "rich", "tqdm", "tokenizers", "gguf", "triton", "safetensors", "numpy"}


def name_of(file: Path) -> str:
    """``kernels/mask.py`` → ``kernels.mask``; a package's ``__init__`` is the package."""
    parts = file.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" and len(parts) > 1 else parts)


def typing_only(tree: ast.Module) -> set[ast.AST]:
    """Everything under ``if TYPE_CHECKING``."""
    found: set[ast.AST] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING":
            found.update(child for statement in node.body for child in ast.walk(statement))
    return found


def imports(file: Path, *, lazy: bool = True) -> Iterator[tuple[str, int]]:
    """(absolute name, line) of what a file imports when it runs; our own modules without the leading ``loadstone``.

    lazy: also what functions import when called.
    """
    tree = ast.parse(file.read_text(encoding="utf-8"))
    skipped = typing_only(tree)
    inside = {c for n in ast.walk(tree) if isinstance(n, (ast.FunctionDef, ast.AsyncFunctionDef)) for c in ast.walk(n)}
    package = list(file.relative_to(ROOT).parent.parts)
    for node in ast.walk(tree):
        if node in skipped or (node in inside and not lazy):
            continue
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = [] if node.level == 0 else [".", *package[: len(package) - node.level + 1]]
            module = [*base, *(node.module or "").split(".")]
            for alias in node.names:
                yield (
                    ".".join(part for part in (*module, alias.name) if part and part != ".")
                    if base
                    else (node.module or ""),
                    node.lineno,
                )


def own(name: str) -> str | None:
    """The longest prefix that is a module of ours, or None."""
    parts = name.removeprefix("loadstone.").split(".")
    for end in range(len(parts), 0, -1):
        stem = ROOT.joinpath(*parts[:end])
        if parts[0] in (*FLOORS, *ROOF) and (stem.with_suffix(".py").is_file() or (stem / "__init__.py").is_file()):
            return ".".join(parts[:end])
    return None


def floor(module: str) -> int:
    return FLOORS[module.split(".")[0]]


def test_the_walk_sees_imports() -> None:
    """The tests below are worth nothing if this finds nothing."""
    found = {own(name) for name, _ in imports(ROOT / "models" / "causal_lm.py")}
    assert {"kernels", "errors", "models.configuration"} <= found
    seen = {own(name) for file in FILES for name, _ in imports(file)} - {None}
    assert {str(name).split(".")[0] for name in seen} >= {"errors", "kernels", "quant", "loading", "models", "registry"}
    assert len(FILES) > 50


@pytest.mark.parametrize("file", FILES, ids=name_of)
def test_imports_go_down(file: Path) -> None:
    name = name_of(file)
    for imported, line in imports(file):
        target = own(imported)
        if target is None or name in ROOF:
            continue
        assert target not in ROOF, f"{name}:{line} imports the face of the package"
        assert floor(target) <= floor(name), f"{name}:{line} imports {imported}, which is on a higher floor"


@pytest.mark.parametrize("file", FILES, ids=name_of)
def test_no_peers_and_nothing_heavy_at_the_top(file: Path) -> None:
    for imported, line in imports(file):
        assert imported.split(".")[0] not in PEERS, f"{file.name}:{line} imports {imported}"
        assert not imported.startswith("loadstone"), f"{file.name}:{line}: imports inside the package are relative"
    allowed = {"triton"} if file.parent == FUSED else set()
    for imported, line in imports(file, lazy=False):
        top = imported.split(".")[0]
        assert top not in AT_USE - allowed, f"{file.name}:{line} imports {imported} before it is needed"


def test_triton_kernels_are_imported_by_nobody_at_the_top() -> None:
    """Only each other: everything else imports them in a function, when one first runs."""
    for file in FILES:
        if file.parent != FUSED:
            for imported, line in imports(file, lazy=False):
                assert not imported.startswith("kernels.fused"), f"{file.name}:{line} imports {imported}"


def test_no_circles() -> None:
    """Not even among the files of one floor; imports inside functions do not run at import."""
    graph = {name_of(file): set[str]() for file in FILES}
    for file in FILES:
        for imported, _ in imports(file, lazy=False):
            target = own(imported)
            if target is not None and target != name_of(file) and not name_of(file).startswith(f"{target}."):
                graph[name_of(file)].add(target)
    done: set[str] = set()

    def walk(module: str, path: tuple[str, ...]) -> None:
        assert module not in path, " → ".join((*path[path.index(module) :], module))
        if module not in done:
            for target in sorted(graph.get(module, ())):
                walk(target, (*path, module))
            done.add(module)

    for module in graph:
        walk(module, ())
