"""The import law, the size guides and the safety rules, read from the syntax trees of the packages."""

from __future__ import annotations

import ast
import functools
import subprocess
import sys
from collections.abc import Iterator
from fnmatch import fnmatch
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
# Heavy library -> files that may import it. A file of LATE may do so inside its functions only.
HEAVY = {
    # The bench runs raw vLLM beside ours.
    "vllm": {
        "rollout/engine.py",
        "rollout/vllm_requests.py",
        "rollout/vllm_setup.py",
        "rollout/in_process.py",
        "rollout/weight_receiver.py",
        "rollout/cpu_weights.py",
        "learner/device_senders.py",
        "launch/bench_rollout.py",
    },
    "deepspeed": {
        "learner/distributed.py",
        "learner/learner.py",
        "learner/learner_state.py",
        "learner/reference.py",
        "learner/sharded_loading.py",
        "learner/weight_sender.py",
    },
    "ray": {
        "learner/learner_group.py",
        "launch/cluster.py",
        "launch/private_ray.py",
        "launch/ray_actors.py",
        "launch/sinks.py",
    },
    "torch": {"learner/*", "rollout/weight_receiver.py", "rollout/cpu_weights.py"},
    "transformers": {"learner/*"},
}
LATE = {
    "torch": {
        "shared/weights.py",
        "shared/fingerprints.py",
        "rollout/in_process.py",
        "rollout/reward_models.py",
        "launch/bench_learner.py",
        "launch/bench_workloads.py",
        "launch/builtin.py",
        "launch/model_files.py",
        "launch/sinks.py",  # TensorBoard's writer lives in torch.
    },
    "transformers": {
        "rollout/reward_models.py",
        "launch/bench_learner.py",
        "launch/builtin.py",
        "launch/model_tokenizer.py",
        "launch/report/samples.py",
        "launch/show.py",
    },
}
# What shared may import beside the standard library, numpy and pydantic, and how.
SHARED_MORE = {
    ("shared/weights.py", "torch", "type checking"),
    ("shared/weights.py", "torch", "function"),
    ("shared/weights.py", "blake3", "function"),
    ("shared/fingerprints.py", "torch", "type checking"),
    ("shared/fingerprints.py", "torch", "function"),
    ("shared/fingerprints.py", "blake3", "function"),
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


@functools.cache
def parsed(source: str) -> ast.Module:
    return ast.parse(source)


@functools.cache
def imports(source: str) -> list[tuple[str, str]]:
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

    return list(visit(parsed(source), "module"))


def functions(source: str) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    for node in ast.walk(parsed(source)):
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
    for node in ast.walk(parsed(source)):
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


def offenders(problems_of) -> dict[str, list]:
    """Path -> what ``problems_of(path, source)`` finds there, for every file in which it finds anything."""
    found = {path: sorted(problems_of(path, source)) for path, source in FILES.items()}
    return {path: problems for path, problems in found.items() if problems}


def test_all_packages_are_read():
    assert {path.split("/")[0] for path in FILES} == set(PACKAGES)
    assert len(FILES) > 25


# --- the import law ---


def test_packages_import_only_what_lies_below_them():
    def upwards(path, source):
        return {name for name, _ in imports(source) if name in PACKAGES} - MAY_IMPORT[path.split("/")[0]]

    assert offenders(upwards) == {}


def may_import(path: str, library: str, where: str) -> bool:
    late = where != "module" and path in LATE.get(library, ())
    return late or any(fnmatch(path, pattern) for pattern in HEAVY[library])


def test_heavy_libraries_stay_at_the_edge():
    def misplaced(path, source):
        return {(name, where) for name, where in imports(source) if name in HEAVY and not may_import(path, name, where)}

    assert offenders(misplaced) == {}


def test_shared_needs_only_the_standard_library_numpy_and_pydantic():
    allowed = set(sys.stdlib_module_names) | {"numpy", "pydantic", "shared"}

    def foreign(path, source):
        if not path.startswith("shared/"):
            return set()
        return {(path, name, where) for name, where in imports(source) if name not in allowed} - SHARED_MORE

    assert offenders(foreign) == {}


def test_the_entry_point_imports_nothing_heavy_at_its_top():
    light = set(sys.stdlib_module_names) | {"shared", "launch"}
    for path in ("launch/run.py", "launch/options.py", "launch/cli.py"):
        assert {name for name, where in imports(FILES[path]) if where == "module"} <= light


@pytest.mark.parametrize("module", ["launch.controller", "launch.preflight", "launch.plan", "rollout.reward_worker"])
def test_what_works_without_a_heavy_library_does_not_load_it(module):
    """Also not through another module: what is loaded is read from a fresh interpreter."""
    heavy = ("torch", "ray", "vllm", "deepspeed", "transformers")
    code = f"import sys, {module}; print([name for name in {heavy} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


# --- guides ---


def test_a_file_fits_its_guide():
    assert [path for path, source in FILES.items() if len(source.splitlines()) > MAX_LINES] == []


def oversized(path: str, source: str) -> Iterator[str]:
    for function in functions(source):
        length = function.end_lineno - function.lineno + 1
        if length > MAX_FUNCTION:
            yield f"{function.name}: {length} lines"
        if len(parameters(function)) > MAX_PARAMETERS and function.name not in GIVEN_SIGNATURES:
            yield f"{function.name}: {len(parameters(function))} parameters"
        if nesting(function) > MAX_NESTING:
            yield f"{function.name}: nested {nesting(function)} deep"


def test_functions_fit_their_guides():
    assert offenders(oversized) == {}


def undocumented(path: str, source: str) -> list[str]:
    tree = parsed(source)
    public = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
    nodes = [tree, *(node for node in tree.body if isinstance(node, public) and not node.name.startswith("_"))]
    return [getattr(node, "name", path) for node in nodes if tree.body and ast.get_docstring(node) is None]


def test_modules_and_public_names_have_a_docstring():
    assert offenders(undocumented) == {}


# --- safety ---


def test_nothing_dangerous_is_written():
    assert offenders(lambda path, source: dangers(source)) == MEANT


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
    long = f"def f({', '.join('abcdefgh')}):\n" + "    pass\n" * 60
    assert list(oversized("x.py", long)) == ["f: 61 lines", "f: 8 parameters"]
    assert undocumented("x.py", "def f(): pass\ndef _g(): pass\n") == ["x.py", "f"]
    assert may_import("learner/kl.py", "torch", "module")
    assert may_import("launch/builtin.py", "torch", "function")
    assert not may_import("launch/builtin.py", "torch", "module")
    assert not may_import("launch/controller.py", "torch", "function")


DANGEROUS = [
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
]


def test_each_danger_is_seen():
    assert [code for code in DANGEROUS if not dangers(code)] == []


HARMLESS = [
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
]


def test_harmless_code_passes():
    assert [code for code in HARMLESS if dangers(code)] == []
