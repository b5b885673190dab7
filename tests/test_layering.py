"""The layers of the design, kept by reading every import: data flows one way, and no cycles."""

import ast
import pathlib

import edgeprune

ROOT = pathlib.Path(edgeprune.__file__).parent

# package -> what it may import of ours (itself always)
ALLOWED = {
    "errors": set(),
    "progress": set(),
    "nn": {"errors"},
    "device": {"errors"},
    "plan": {"errors"},
    "latency": {"device", "errors"},
    "graph": {"latency", "plan", "errors"},
    "prune": {"graph", "plan", "errors"},
    "train": {"graph", "plan", "errors"},
    "deploy": {"graph", "latency", "plan", "errors"},
    "methods": {"prune", "plan", "train", "errors"},
    "pipeline": {"methods", "prune", "train", "deploy", "graph", "latency", "device", "plan", "errors"},
    "api": {
        "pipeline",
        "methods",
        "prune",
        "train",
        "deploy",
        "graph",
        "latency",
        "device",
        "plan",
        "errors",
        "progress",
    },
    "__init__": {"api", "errors", "nn"},
    "commands": {"__init__", "api", "errors", "progress", "graph"},
    "cli": {"__init__", "commands", "errors"},
    "__main__": {"cli"},
}


def imports(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "edgeprune":
            base = node.module
            for alias in node.names:
                inner = ROOT.joinpath(*base.split(".")[1:], alias.name)
                is_module = inner.with_suffix(".py").exists() or (inner / "__init__.py").exists()
                yield f"{base}.{alias.name}" if is_module else base
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name.split(".")[0] == "edgeprune")


def module_name(path):
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(("edgeprune", *(p for p in parts if p != "__init__")))


def top(name):
    parts = name.split(".")
    return parts[1] if len(parts) > 1 else "__init__"


def sources():
    return [p for p in ROOT.rglob("*.py") if "_data" not in p.parts]


def test_layers():
    wrong = []
    for path in sources():
        layer = top(module_name(path))
        for name in imports(path):
            if top(name) != layer and top(name) not in ALLOWED[layer]:
                wrong.append(f"{path.relative_to(ROOT)} imports {name}")
    assert not wrong, "\n".join(wrong)


def test_no_cycles():
    graph = {module_name(p): {n for n in imports(p) if n != module_name(p)} for p in sources()}
    done, path = set(), []

    def visit(name):
        assert name not in path, " -> ".join([*path[path.index(name) :], name])
        if name in done or name not in graph:
            return
        path.append(name)
        for other in sorted(graph[name]):
            visit(other)
        done.add(path.pop())

    for name in sorted(graph):
        visit(name)
    assert len(done) == len(graph)


def test_the_agent_needs_nothing_installed():
    agent = ROOT / "device" / "agent.py"
    top_level = [n for n in ast.parse(agent.read_text()).body if isinstance(n, ast.Import | ast.ImportFrom)]
    import sys

    for node in top_level:
        names = [a.name for a in node.names] if isinstance(node, ast.Import) else [node.module]
        assert all(n.split(".")[0] in sys.stdlib_module_names for n in names), names


def test_files_stay_small():
    long = {str(p.relative_to(ROOT)): n for p in sources() if (n := len(p.read_text().splitlines())) > 400}
    assert not long, f"over 400 lines, split them: {long}"
