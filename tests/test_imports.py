"""Imports run downwards, and no files import each other in a circle."""

import ast
from pathlib import Path

SOURCE = Path(__file__).parents[1] / "src"

MAY_IMPORT = {
    "core": set(),
    "locks": {"core"},
    "files": {"core", "locks"},
    "pictures": {"core"},
    "pages": {"core", "files"},
    "distributed": {"core", "files", "locks"},
    "sampling": {"core"},
    "networks": {"core", "files", "distributed"},
    "data": {"core", "files", "distributed"},
    "tokenizer": {"core", "sampling", "networks", "data", "distributed", "files"},
    "generator": {"core", "sampling", "networks", "data", "distributed", "files"},
    "runs": {"core", "files", "locks", "distributed"},
    "export": {"core", "files", "distributed", "tokenizer", "generator"},
    "interop": {"core", "files", "tokenizer", "export"},
    "evaluation": {
        "core", "files", "pictures", "distributed", "sampling", "networks", "data", "tokenizer", "generator", "export",
    },
    "training": {
        "core", "files", "pictures", "distributed", "sampling", "networks", "data", "tokenizer", "generator", "runs",
        "evaluation",
    },
}  # fmt: skip
"""Packages and modules below `config` and `jobs`; those may import all but `jobs`."""


def _modules():
    return {
        ".".join(file.relative_to(SOURCE).with_suffix("").parts).removesuffix(".__init__"): file
        for file in (SOURCE / "graincode").rglob("*.py")
    }


def _imports(module, file, modules, everywhere):
    tree = ast.parse(file.read_text())
    first = (inner for node in tree.body for inner in (node.body if isinstance(node, ast.If) else [node]))
    for node in ast.walk(tree) if everywhere else first:  # first: when the file is imported, or for its types
        if isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] == "graincode":
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                yield inner if inner in modules else node.module
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name.partition(".")[0] == "graincode")


def test_packages_import_downwards_only():
    modules = _modules()
    wrong = []
    for module, file in modules.items():
        package = module.split(".")[1] if "." in module else ""
        for imported in _imports(module, file, modules, everywhere=True):
            other = imported.split(".")[1] if "." in imported else ""
            allowed = MAY_IMPORT.get(package)
            if other not in (package, "") and (other == "jobs" or (allowed is not None and other not in allowed)):
                wrong.append(f"{module} imports {imported}")
    assert not wrong


def test_no_files_import_each_other_in_a_circle():
    modules = _modules()
    graph = {module: set(_imports(module, file, modules, everywhere=False)) for module, file in modules.items()}
    done, path = set(), []

    def visit(module):
        assert module not in path, " -> ".join([*path[path.index(module) :], module])
        if module in done:
            return
        path.append(module)
        for imported in graph.get(module, ()):
            if imported != module:
                visit(imported)
        done.add(path.pop())

    for module in graph:
        visit(module)


def test_no_file_is_long():
    long = {str(file): count for file in _modules().values() if (count := len(file.read_text().splitlines())) > 350}
    assert not long
