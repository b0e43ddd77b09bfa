"""The import rule: a file imports lower ranks only, so that each part can be read, tested and reused alone."""

import ast
from pathlib import Path

PACKAGE = Path(__file__).resolve().parent.parent / "retinanet"
RANKS = {
    **dict.fromkeys(("errors", "structures"), 0),
    **dict.fromkeys(("config", "ops", "layers", "utils"), 1),
    **dict.fromkeys(("modeling", "data", "weights"), 2),
    **dict.fromkeys(("engine", "deploy"), 3),
}
SAME_RANK = {("layers", "ops"), ("engine", "deploy")}
INSIDE_FUNCTIONS = {"matplotlib", "onnx", "onnxruntime"}  # slow to import, and few runs need them
ASSEMBLY = {"modeling.build", "engine.run"}  # turn the configuration into objects, for tools to call
TREES = {
    ".".join(path.relative_to(PACKAGE).with_suffix("").parts).removesuffix(".__init__"): ast.parse(path.read_text())
    for path in sorted(PACKAGE.rglob("*.py"))
}


def imports(tree: ast.AST) -> list[str]:
    """Return the dotted names that `tree` imports; of `from a import b` both a and a.b, since b may be a module."""
    names = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "a relative import"
            names += [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
    return names


def functions(tree: ast.AST) -> list[ast.FunctionDef]:
    return [node for node in ast.walk(tree) if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))]


def test_every_package_has_a_rank():
    assert {name.split(".")[0] for name in TREES} - {"__init__"} == set(RANKS)


def test_imports_go_down_the_ranks():
    for name, tree in TREES.items():
        own = name.split(".")[0]
        below = {i.split(".")[1] for i in imports(tree) if i.startswith("retinanet.")} & set(RANKS) - {own}
        wrong = {i for i in below if RANKS[i] >= RANKS.get(own, 4) and (own, i) not in SAME_RANK}
        assert not wrong, f"{name} imports {wrong}"


def test_no_files_import_each_other_in_a_circle():
    graph = {name: {i.removeprefix("retinanet.") for i in imports(tree)} - {name} for name, tree in TREES.items()}
    while graph:
        leaves = {name for name, below in graph.items() if not below & graph.keys()}
        assert leaves, f"circle among {sorted(graph)}"
        graph = {name: below for name, below in graph.items() if name not in leaves}


def test_one_file_imports_torch_distributed():
    users = {name for name, tree in TREES.items() if any(i.startswith("torch.distributed") for i in imports(tree))}
    assert users == {"utils.distributed"}


def test_config_imports_no_heavy_package():
    top = {i.split(".")[0] for name, tree in TREES.items() if name.split(".")[0] == "config" for i in imports(tree)}
    assert top & {"torch", "torchvision", "numpy", "cv2", "PIL", "pycocotools", "yacs"} == {"yacs"}


def test_plotting_and_export_packages_are_imported_inside_functions():
    for name, tree in TREES.items():
        inside = {id(node) for function in functions(tree) for node in ast.walk(function)}
        outside = ast.Module([node for node in ast.walk(tree) if id(node) not in inside and hasattr(node, "names")], [])
        assert not {i.split(".")[0] for i in imports(outside)} & INSIDE_FUNCTIONS, name


def test_only_build_functions_see_the_configuration():
    for name, tree in TREES.items():
        if name in ASSEMBLY or name.split(".")[0] == "config":
            continue
        for function in functions(tree):
            arguments = {argument.arg for argument in (*function.args.args, *function.args.kwonlyargs)}
            assert "cfg" not in arguments or function.name.startswith("build_"), f"{name}: {function.name}"
