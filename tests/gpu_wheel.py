"""``make check-gpu-wheel``: vLLM's CUDA wheel, which GPUs get, against the CPU wheel that all other tests run on.

Downloads the pinned wheel into a temporary folder, compares every Python file that our imports reach, and lets the tests of
contracts run over the CUDA wheel's sources. Exits with 1 if something differs or does not bind.
"""

from __future__ import annotations

import ast
import importlib.util
import os
import subprocess
import sys
import tempfile
import tomllib
import zipfile
from collections.abc import Iterator
from pathlib import Path

from tests.contracts import ROOT, sources

MEANT = {
    "vllm/_version.py": "the version",
    "vllm/platforms/__init__.py": "the CPU wheel takes a CPU for granted",
    "vllm/utils/cpu_triton_utils.py": "kernels for CPUs",
}
"""Files that differ for a reason."""


def pinned() -> str:
    """Return what ``pip install .[gpu]`` asks for."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    (requirement,) = [one for one in project["optional-dependencies"]["gpu"] if one.startswith("vllm==")]
    return str(requirement)


def installed() -> Path:
    """Return the folder that holds the installed package ``vllm``."""
    found = importlib.util.find_spec("vllm")
    assert found is not None
    assert found.origin is not None
    return Path(found.origin).parent.parent


def named_files(site: Path) -> set[str]:
    """Return the files of vLLM that our sources name."""
    found: set[str] = set()
    for text in sources().values():
        for module, name in _imports(ast.parse(text), ""):
            found |= _files(site, module, name)
    return found


def reached_files(site: Path) -> set[str]:
    """Return ``named_files`` with all files of vLLM that they import, and so on."""
    left, reached = list(named_files(site)), set[str]()
    while left:
        file = left.pop()
        if file in reached:
            continue
        reached.add(file)
        package = ".".join(Path(file).parts[:-1])
        for module, name in _imports(ast.parse((site / file).read_text(encoding="utf-8")), package):
            left += _files(site, module, name)
    return reached


def _imports(tree: ast.AST, package: str) -> Iterator[tuple[str, str]]:
    """``(module, name)`` of every import from vLLM; the name is empty for a module alone."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            above = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            module = ".".join([*above, *filter(None, [node.module])])
            yield from ((module, alias.name) for alias in node.names if module.split(".")[0] == "vllm")
        elif isinstance(node, ast.Import):
            yield from ((alias.name, "") for alias in node.names if alias.name.split(".")[0] == "vllm")


def _files(site: Path, module: str, name: str) -> set[str]:
    """The file of ``module``, that of its submodule ``name`` if there is one, and of the packages around them."""
    parts = module.split(".")
    paths = ["/".join(parts[: i + 1]) for i in range(len(parts))] + ["/".join([*parts, name])] * bool(name)
    candidates = [candidate for path in paths for candidate in (f"{path}.py", f"{path}/__init__.py")]
    return {candidate for candidate in candidates if (site / candidate).is_file()}


def differing(wheel: zipfile.ZipFile, site: Path, files: set[str]) -> list[str]:
    """Return those of ``files`` that the wheel lacks or has otherwise, and not for a reason."""
    there = set(wheel.namelist())
    return [
        file
        for file in sorted(files - MEANT.keys())
        if file not in there or wheel.read(file) != (site / file).read_bytes()
    ]


def bound(wheel: zipfile.ZipFile, folder: Path) -> int:
    """Run the tests of contracts over the wheel's Python; return pytest's exit code."""
    names = [name for name in wheel.namelist() if not name.endswith(".so")]
    wheel.extractall(folder, names)
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/test_contracts_stack.py"]
    chosen = ["-k", "call_of_a_library or receivers_take or hide_none or trainer_calls"]
    path = os.pathsep.join([str(folder), str(ROOT)])
    return subprocess.run([*command, *chosen], cwd=ROOT, env=os.environ | {"PYTHONPATH": path}, check=False).returncode


def main() -> int:
    """Compare, and say what was compared."""
    site = installed()
    with tempfile.TemporaryDirectory(prefix="millrace-wheel-") as folder:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", folder, pinned()]
        subprocess.run(command, check=True)
        (path,) = Path(folder).glob("vllm-*.whl")
        with zipfile.ZipFile(path) as wheel:
            named, files = named_files(site), reached_files(site)
            wrong = differing(wheel, site, files)
            code = bound(wheel, Path(folder) / "unpacked")
            print(f"{path.name}: {len(named)} files of vLLM named by our sources, {len(files)} reached from them")
    for file in wrong:
        print(f"differs from the CPU wheel: {file}{' (named by our sources)' if file in named else ''}")
    print("the wheels agree" if not wrong and code == 0 else "the wheels do not agree")
    return int(bool(wrong) or code != 0)


if __name__ == "__main__":
    sys.exit(main())
