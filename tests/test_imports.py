"""The import graph: one direction, no cycles, packages imported by the core only where they are used."""

import ast
import subprocess
import sys
from graphlib import TopologicalSorter

from helpers import ROOT

LAYERS = ("scripts", "tasks", "nanochat")  # each imports only from itself and from later ones


def module_name(path):
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {
    module_name(path): ast.parse(path.read_text(encoding="utf-8"))
    for layer in LAYERS
    for path in sorted((ROOT / layer).rglob("*.py"))
}


def imports(module, top_level_only=False):
    """Names of our modules that `module` imports, function-level imports included."""
    tree = MODULES[module]
    nodes = tree.body if top_level_only else ast.walk(tree)
    names = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module} has a relative import"
            names |= {f"{node.module}.{alias.name}" for alias in node.names} | {node.module}
    return {name for name in names if name in MODULES and MODULES[name].body and name != module}


def is_core(module):
    return (
        module.startswith("nanochat.") and module.count(".") == 1 and len(list(ROOT.glob(f"nanochat/{module[9:]}.py")))
    )


def test_there_are_no_cycles():
    graph = {module: imports(module) for module in MODULES}
    assert len(list(TopologicalSorter(graph).static_order())) >= len(MODULES) - 10  # raises CycleError


def test_imports_go_one_way():
    for module in MODULES:
        layer = LAYERS.index(module.split(".")[0])
        for name in imports(module):
            target = LAYERS.index(name.split(".")[0])
            assert target > layer or (target == layer and layer > 0), f"{module} imports {name}"


def test_the_core_imports_packages_only_inside_functions():
    core = [module for module in MODULES if is_core(module)]
    assert len(core) > 20
    for module in core:
        packages = {name for name in imports(module, top_level_only=True) if name.count(".") > 1}
        if module == "nanochat.engine":
            assert all(name.startswith("nanochat.inference.") for name in packages)
        else:
            assert not packages, f"{module} imports {packages} at the top"


def test_the_model_does_not_import_the_compiler():
    """torch._dynamo takes seconds to import; GPT.compile() does it."""
    code = "import sys, nanochat.gpt, nanochat.train; sys.exit('torch._dynamo' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0
