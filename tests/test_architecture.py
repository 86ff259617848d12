"""The import law, the size guides and the safety rules, read from the syntax trees of the packages."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("shared", "rollout", "learner", "launch")
FILES = {
    str(path.relative_to(ROOT)): path.read_text(encoding="utf-8")
    for package in PACKAGES
    for path in sorted((ROOT / package).rglob("*.py"))
}

MAY_IMPORT = {
    "shared": {"shared"},
    "rollout": {"shared", "rollout"},
    "learner": {"shared", "learner"},
    "launch": {"shared", "rollout", "learner", "launch"},
}
HEAVY = {
    # The bench runs raw vLLM beside ours.
    "vllm": {
        "rollout/engine.py",
        "rollout/vllm_setup.py",
        "rollout/in_process.py",
        "rollout/weight_receiver.py",
        "rollout/cpu_weights.py",
        "learner/weight_sender.py",
        "launch/bench_rollout.py",
    },
    "deepspeed": {
        "learner/distributed.py",
        "learner/learner.py",
        "learner/learner_state.py",
        "learner/reference.py",
        "learner/weight_sender.py",
        "launch/prebuild.py",
    },
    "ray": {
        "learner/learner_group.py",
        "launch/cluster.py",
        "launch/ray_actors.py",
        "launch/sinks.py",
    },
}
# What shared may import beside the standard library, numpy and pydantic, and how.
SHARED_MORE = {
    ("shared/weights.py", "torch", "type checking"),
    ("shared/weights.py", "torch", "function"),
    ("shared/weights.py", "blake3", "function"),
}
GIVEN_SIGNATURES = {"packed_attention", "vespo"}  # transformers and the formula fix these.
INSIDE_THE_SANDBOX = "rollout/sandboxed_program.py"
MEANT = {INSIDE_THE_SANDBOX: ["exec"]}  # It executes programs: that is its purpose.
MAX_LINES, MAX_FUNCTION, MAX_PARAMETERS, MAX_NESTING = 300, 60, 7, 3
FORBIDDEN_MODULES = {"pickle", "_pickle", "cloudpickle", "dill", "joblib", "marshal", "shelve"}
FORBIDDEN_NAMES = {
    *("os.system", "os.popen", "subprocess.getoutput", "subprocess.getstatusoutput", "tempfile.mktemp"),
    *("yaml.load", "yaml.full_load", "yaml.unsafe_load", "builtins.eval", "builtins.exec"),
}
EVERYWHERE = {"", "::", "*"}  # Addresses that bind to every interface, beside 0.0.0.0.
BINDING = {"bind", "create_server", "start_server", "HTTPServer", "ThreadingHTTPServer"}
FORBIDDEN_ARGUMENTS = {("shell", True), ("weights_only", False), ("trust_remote_code", True), ("allow_pickle", True)}


def imports(source: str) -> Iterator[tuple[str, str]]:
    """``(top-level package, where)`` of every import; where is module, function or type checking."""

    def visit(node: ast.AST, where: str) -> Iterator[tuple[str, str]]:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.Import):
                yield from ((alias.name.split(".")[0], where) for alias in child.names)
            elif isinstance(child, ast.ImportFrom):
                assert child.level == 0, "relative import"
                yield str(child.module).split(".")[0], where
            elif isinstance(child, ast.If) and ast.unparse(child.test) == "TYPE_CHECKING":
                yield from visit(child, "type checking")
            else:
                inside = isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef)
                yield from visit(child, "function" if inside else where)

    return visit(ast.parse(source), "module")


def functions(source: str) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield node


BLOCKS = (ast.If, ast.For, ast.AsyncFor, ast.While, ast.With, ast.AsyncWith, ast.Try, ast.TryStar, ast.Match)
DEFINITIONS = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef, ast.Lambda)


def nesting(node: ast.AST) -> int:
    """Deepest block inside ``node``; an elif is as deep as its if, an inner function counts for itself."""
    deepest = 0
    for child in ast.iter_child_nodes(node):
        if isinstance(child, DEFINITIONS):
            continue
        elif_of = isinstance(node, ast.If) and isinstance(child, ast.If) and node.orelse == [child]
        deepest = max(deepest, nesting(child) + (isinstance(child, BLOCKS) and not elif_of))
    return deepest


def parameters(function: ast.FunctionDef | ast.AsyncFunctionDef) -> list[str]:
    a = function.args
    named = [p.arg for p in (*a.posonlyargs, *a.args, *a.kwonlyargs, *filter(None, (a.vararg, a.kwarg)))]
    return [name for name in named if name not in ("self", "cls")]


def dangers(source: str) -> list[str]:
    """What the safety rules forbid, as it is written."""
    found = [name for name, _ in imports(source) if name in FORBIDDEN_MODULES]
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Call):
            keywords = ((k.arg, getattr(k.value, "value", None)) for k in node.keywords)
            found += [f"{name}={value}" for name, value in keywords if (name, value) in FORBIDDEN_ARGUMENTS]
            found += careless(node)
        elif isinstance(node, ast.ImportFrom):
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            found += sorted(names & (FORBIDDEN_NAMES | {"ray.get", "ray.wait"}))
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load) and node.id in ("eval", "exec"):
            found.append(node.id)
        elif isinstance(node, ast.Dict):
            pairs = ((getattr(k, "value", None), getattr(v, "value", None)) for k, v in zip(node.keys, node.values))
            found += [f"{name}={value}" for name, value in pairs if (name, value) in FORBIDDEN_ARGUMENTS]
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and "0.0.0.0" in node.value:
            found.append(node.value)
        elif isinstance(node, ast.Attribute) and ast.unparse(node) in FORBIDDEN_NAMES:
            found.append(ast.unparse(node))
    return found


def careless(call: ast.Call) -> list[str]:
    """What a call leaves open: every interface to strangers, a wait without end, a library's own choice of what to run."""
    name = ast.unparse(call.func)
    last, given = name.rpartition(".")[2], {k.arg: getattr(k.value, "value", None) for k in call.keywords}
    found = [f"{arg}={value!r}" for arg, value in given.items() if arg and arg.endswith("host") and value in EVERYWHERE]
    if last in BINDING:
        addresses = [a.elts[0] if isinstance(a, ast.Tuple) and a.elts else a for a in call.args]
        found += [f"{name} {a.value!r}" for a in addresses if isinstance(a, ast.Constant) and a.value in EVERYWHERE]
    timeouts = [k.value for k in call.keywords if k.arg == "timeout"]
    if name in ("ray.get", "ray.wait") and not any(ast.unparse(value) != "None" for value in timeouts):
        found.append(f"{name} without a timeout")
    if last == "from_pretrained":
        found += [] if "trust_remote_code" in given else [f"{name} without trust_remote_code"]
        found += (
            [f"{name} without use_safetensors"] if "Model" in name and given.get("use_safetensors") is not True else []
        )
    return found


each_file = pytest.mark.parametrize("path", FILES)


def test_all_packages_are_read():
    assert {path.split("/")[0] for path in FILES} == set(PACKAGES)
    assert len(FILES) > 25


# --- the import law ---


@each_file
def test_packages_import_only_what_lies_below_them(path):
    package = path.split("/")[0]
    ours = {name for name, _ in imports(FILES[path]) if name in PACKAGES}
    assert ours <= MAY_IMPORT[package]


@each_file
def test_heavy_libraries_stay_at_the_edge(path):
    heavy = {name for name, _ in imports(FILES[path]) if name in HEAVY}
    assert {name for name in heavy if path not in HEAVY[name]} == set()


@pytest.mark.parametrize("path", [path for path in FILES if path.startswith("shared/")])
def test_shared_needs_only_the_standard_library_numpy_and_pydantic(path):
    allowed = set(sys.stdlib_module_names) | {"numpy", "pydantic", "shared"}
    more = {(path, name, where) for name, where in imports(FILES[path]) if name not in allowed}
    assert more <= SHARED_MORE


def test_the_entry_point_imports_nothing_heavy_at_its_top():
    light = set(sys.stdlib_module_names) | {"shared", "launch"}
    for path in ("launch/run.py", "launch/options.py", "launch/cli.py"):
        assert {name for name, where in imports(FILES[path]) if where == "module"} <= light


# --- guides ---


@each_file
def test_a_file_fits_its_guide(path):
    assert len(FILES[path].splitlines()) <= MAX_LINES


@each_file
def test_functions_fit_their_guides(path):
    problems = []
    for function in functions(FILES[path]):
        length = function.end_lineno - function.lineno + 1
        if length > MAX_FUNCTION:
            problems.append(f"{function.name}: {length} lines")
        if len(parameters(function)) > MAX_PARAMETERS and function.name not in GIVEN_SIGNATURES:
            problems.append(f"{function.name}: {len(parameters(function))} parameters")
        if nesting(function) > MAX_NESTING:
            problems.append(f"{function.name}: nested {nesting(function)} deep")
    assert problems == []


@each_file
def test_modules_and_public_names_have_a_docstring(path):
    tree = ast.parse(FILES[path])
    if not tree.body:
        return
    public = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
    nodes = [tree, *(node for node in tree.body if isinstance(node, public) and not node.name.startswith("_"))]
    assert [getattr(node, "name", path) for node in nodes if ast.get_docstring(node) is None] == []


# --- safety ---


@each_file
def test_nothing_dangerous_is_written(path):
    assert dangers(FILES[path]) == MEANT.get(path, [])


def test_what_executes_programs_is_never_imported():
    module = INSIDE_THE_SANDBOX.removesuffix(".py").replace("/", ".")
    assert not [path for path, source in FILES.items() if f"import {module}" in source or f"from {module}" in source]


# --- the rules can fail ---


def test_the_readers_see_what_they_should():
    code = (
        "import ray\nfrom torch.nn import x\nif TYPE_CHECKING:\n    import vllm\ndef f():\n    from ray.util import y\n"
    )
    seen = {("ray", "module"), ("torch", "module"), ("vllm", "type checking"), ("ray", "function")}
    assert set(imports(code)) == seen
    deep = "def f():\n for a in b:\n  if a:\n   pass\n  elif c:\n   with d:\n    try:\n     pass\n    finally:\n     pass\n"
    assert nesting(next(functions(deep))) == 4
    assert len(parameters(next(functions("def f(self, a, /, b, *c, d, **e): pass")))) == 5


@pytest.mark.parametrize(
    "code",
    [
        "import pickle",
        "def f():\n    from pickle import loads",
        "eval(text)",
        "exec(text)",
        "run(command, shell=True)",
        "torch.load(path, weights_only=False)",
        "load(path, trust_remote_code=True)",
        "options = {'trust_remote_code': True}",
        "numpy.load(path, allow_pickle=True)",
        "host = '0.0.0.0'",
        "os.system(command)",
        "from os import system",
        "subprocess.getoutput(command)",
        "import dill",
        "from cloudpickle import loads",
        "import joblib",
        "builtins.exec(text)",
        "run = exec",
        "yaml.load(text)",
        "from yaml import load",
        "path = tempfile.mktemp()",
        "from tempfile import mktemp",
        "server.bind(('', 80))",
        "server.bind(('::', 80))",
        "socket.create_server(('', 80))",
        "asyncio.start_server(serve, '', 80)",
        "HTTPServer(('', 80), Handler)",
        "serve(dashboard_host='')",
        "serve(f'{x}0.0.0.0:80')",
        "ray.get(reference)",
        "ray.get([reference], timeout=None)",
        "ray.wait(references, num_returns=1)",
        "from ray import get",
        "AutoTokenizer.from_pretrained(path)",
        "AutoModel.from_pretrained(path, trust_remote_code=trusted)",
        "AutoModel.from_pretrained(path, trust_remote_code=trusted, use_safetensors=False)",
    ],
)
def test_each_danger_is_seen(code):
    assert dangers(code)


@pytest.mark.parametrize(
    "code",
    [
        "model.eval()",
        "loader.exec_module(m)",
        "run(c, shell=False)",
        "x = '127.0.0.1'",
        "server.bind(('127.0.0.1', 0))",
        "ray.get(reference, timeout=5.0)",
        "asyncio.create_subprocess_exec(name)",
        "AutoTokenizer.from_pretrained(path, trust_remote_code=trusted)",
        "AutoModel.from_pretrained(path, trust_remote_code=False, use_safetensors=True)",
        "yaml.safe_load(text)",
    ],
)
def test_harmless_code_passes(code):
    assert dangers(code) == []
