"""Imports point down: command lines, then reports and runs, then settings, then data and models, then operators."""

import ast
from graphlib import TopologicalSorter
from pathlib import Path

import fastres

ROOT = Path(fastres.__file__).parent
LAYERS = (  # from the bottom; a module may import from its own layer and from those before
    ("errors", "__init__"),
    ("fields", "files", "machine", "ops"),
    ("nn",),
    ("data", "models"),
    (
        "training.schedule",
        "training.optimizer",
        "training.muon",
        "training.memory",
        "training.distributed",
        "training.history",
    ),
    ("config", "flags", "studies"),
    ("training", "profiling"),
    ("report", "trained"),
    ("studies.plan", "studies.estimate", "studies.execute"),
    ("train", "predict", "export", "study", "profile", "compare", "doctor"),
    ("__main__",),
)
COMMANDS = {"train", "predict", "export", "study", "profile", "compare", "doctor"}


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" and len(parts) > 1 else parts)


def imports(path: Path) -> set[str]:
    """The modules of fastres that the file imports when it is imported itself."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    skipped = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef) or "TYPE_CHECKING" in ast.dump(getattr(node, "test", ast.Pass()))
        for inner in ast.walk(node)
    }
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and id(node) not in skipped and (node.module or "").startswith("fastres"):
            base = node.module.removeprefix("fastres").lstrip(".")
            found |= {".".join(filter(None, (base, alias.name))) for alias in node.names} | {base or "__init__"}
        elif isinstance(node, ast.Import):
            found |= {alias.name.removeprefix("fastres.") for alias in node.names if alias.name.startswith("fastres.")}
    return found


GRAPH = {module_name(path): imports(path) for path in ROOT.rglob("*.py")}
GRAPH = {name: (found & GRAPH.keys()) - {name} for name, found in GRAPH.items()}


def layer(name: str) -> int:
    """Of the longest entry of LAYERS that ``name`` is, or is in."""
    ranks = {entry: rank for rank, entries in enumerate(LAYERS) for entry in entries}
    return ranks[max((entry for entry in ranks if f"{name}.".startswith(f"{entry}.")), key=len)]


def test_imports_point_down():
    upward = [(name, other) for name, found in GRAPH.items() for other in found if layer(other) > layer(name)]
    assert not upward


def test_imports_have_no_cycles():
    TopologicalSorter(GRAPH).prepare()


def test_no_command_line_imports_another():
    assert not [(name, other) for name in COMMANDS for other in GRAPH[name] & COMMANDS]
