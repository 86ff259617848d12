"""The fenced blocks of the documentation: found, and handled as a reader would: written to a file, loaded, run, or checked.

``<!-- test: HOW -->`` above a block says how: ``dry`` (commands are parsed, and rehearsed where they can be), ``stack`` (run
for real by the tests of the stack, ``dry`` otherwise), ``output`` (what the command before printed). Without it a block runs.
"""

from __future__ import annotations

import ast
import importlib
import os
import re
import shlex
import subprocess
import sys
import tomllib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from launch.cli import VERBS
from launch.options import ConfigOptions
from learner.choices import Choices
from rollout.reward_loading import load_reward
from shared.config import Config
from shared.config_loader import config_of, load_config, shipped
from tests import fork_server
from tests.fakes import write_model
from tests.pace import scaled

ROOT = Path(__file__).resolve().parent.parent
PAGES = {str(path.relative_to(ROOT)): path for path in sorted((ROOT / "docs").rglob("*.md"))}
PAGES |= {name: ROOT / name for name in ("README.md", "launch/configs/README.md")}
BASE: dict[str, Any] = {
    "model": {"path": "builtin:addition"},
    "data": {"train": "builtin:addition"},
    "reward": {"functions": [{"function": "exact_match"}]},
}
OTHERS_PAGES = {"README.md": "dry", "launch/configs/README.md": "dry", "docs/import-trl.md": "dry"}
"""Pages that are not written for these tests, and how their blocks are handled that do not say so."""
OUR_WORDS = {"source", "cd", "export", "ray", "pip", "python", "printf"}
FENCE = re.compile(r"^( *)```(.*)$")
HOW = re.compile(r"^<!-- test: (\w+) -->$")


@dataclass(frozen=True)
class Block:
    """One fenced block."""

    page: str
    line: int
    language: str
    title: str
    how: str
    text: str

    @property
    def kind(self) -> str:
        """What becomes of it."""
        if self.language in ("text", ""):
            return "compared with output" if self.how == "output" else "shown"
        if self.title:
            return "written to a file and loaded"
        if self.language == "toml":
            return "loaded"
        return {"": "run", "dry": "dry", "stack": "run on the stack, dry before"}[self.how]

    @property
    def commands(self) -> list[str]:
        """Lines of a shell, with continued ones joined and comments gone."""
        lines = re.sub(r"\\\n\s*", "", self.text).splitlines()
        return [stripped for line in lines if (stripped := re.sub(r"(^|\s)#.*$", "", line).strip())]


def blocks_of(page: str) -> list[Block]:
    """All blocks of a page, in order."""
    found: list[Block] = []
    inside: list[str] | None = None
    info, begun, how = "", 0, ""
    for number, line in enumerate(PAGES[page].read_text(encoding="utf-8").splitlines(), 1):
        fence = FENCE.match(line)
        if fence and inside is None:
            info, begun, inside = fence[2].strip(), number, []
        elif fence and inside is not None:
            title = re.search(r'title="([^"]+)"', info)
            default = OTHERS_PAGES.get(page, "")
            language = info.split(" ")[0]
            found.append(Block(page, begun, language, title[1] if title else "", how or default, "\n".join(inside)))
            inside, how = None, ""
        elif inside is not None:
            inside.append(line)
        elif line.strip():
            mark = HOW.match(line.strip())
            how = mark[1] if mark else ""
    assert inside is None, f"{page}: a block is not closed"
    return found


@dataclass
class Reader:
    """Somebody who does what a page says, in a folder of his own."""

    folder: Path
    stack: bool = False
    """Really run what takes minutes, with few steps."""
    output: str = ""
    handled: list[Block] = field(default_factory=list)

    def __post_init__(self) -> None:
        """With ``millrace`` on the path."""
        (self.folder / ".bin").mkdir()
        if not self.stack:
            fork_server.commands(self.folder / ".bin")
            return
        program = "import sys; from launch.cli import main; sys.exit(main())"
        path = f'export PYTHONPATH="{ROOT}${{PYTHONPATH:+:$PYTHONPATH}}"'
        calls = {"millrace": f"{path}\nexec {sys.executable} -P -c '{program}'", "python": f"exec {sys.executable}"}
        for name, call in calls.items():
            (self.folder / ".bin" / name).write_text(f'#!/bin/sh\n{call} "$@"\n', encoding="utf-8")
            (self.folder / ".bin" / name).chmod(0o755)

    def repository(self) -> None:
        """What a copy of the repository has at hand."""
        (self.folder / "launch").symlink_to(ROOT / "launch")

    def model(self) -> None:
        """A configuration of a model directory, for pages that speak of one."""
        write_model(self.folder / "model", num_hidden_layers=2, num_key_value_heads=1, intermediate_size=96)
        (self.folder / "my.toml").write_text(
            '[model]\npath = "model"\n[data]\ntrain = "rows.jsonl"\n[[reward.functions]]\nfunction = "exact_match"\n'
        )

    def read(self, block: Block) -> None:
        """Do what the block says."""
        if block.title:
            (self.folder / block.title).write_text(block.text + "\n", encoding="utf-8")
        getattr(self, f"_{block.language or 'text'}")(block)
        self.handled.append(block)

    # --- by language ---

    def _text(self, block: Block) -> None:
        if block.how == "output":
            for line in block.text.splitlines():
                pattern = ".*".join(re.escape(part.strip()) for part in line.split("…"))
                assert re.search(pattern, self.output), f"{block.page}:{block.line}: {line!r} not in {self.output!r}"

    def _toml(self, block: Block) -> None:
        config = load_text(block.text)
        Choices(config, block.page)
        for spec in config.reward.functions:
            source = (spec.function or "").rpartition(":")[0]
            if spec.function and (not source or (self.folder / source).is_file()):
                where = f"{self.folder}/" if source else ""
                load_reward(spec.model_copy(update={"function": where + spec.function}), block.page)

    def _python(self, block: Block) -> None:
        check_python(block)
        if block.how == "dry" or (block.how == "stack" and not self.stack):
            return
        name = block.title or "block.py"
        (self.folder / name).write_text(block.text + "\n", encoding="utf-8")
        module = block.title and not block.title.startswith("make_")
        self._run(f"python -c 'import runpy; runpy.run_path(\"{name}\")'" if module else f"python {name}", block)

    def _bash(self, block: Block) -> None:
        self.output = ""
        for command in block.commands:
            words = check_command(command)
            if self.stack and block.how == "stack":
                self._run(quick(command), block)
            elif not block.how or "--help" in words:
                self._run(command, block)
            elif rehearsed := self._rehearsal(words):
                self._run(rehearsed, block)

    def _rehearsal(self, words: list[str]) -> str:
        """A training that is only shown, as a dry run, if all that it needs is there."""
        verb, rest = words[:2], words[2:]
        if verb not in (["millrace", "train"], ["python", "launch/run.py"]):
            return ""
        files = [word for word in rest if not word.startswith("--")][:1]
        offline = {"quickstart", "gsm8k_cpu"}
        there = [f for f in files if Path(f).stem in offline or ("/" not in f and (self.folder / f).is_file())]
        return shlex.join([*verb, *rest, "--dry-run"]) if there else ""

    def _run(self, command: str, block: Block) -> None:
        environment = os.environ | {
            "PATH": f"{self.folder / '.bin'}{os.pathsep}{os.environ['PATH']}",
            "MILLRACE_PLAIN": "1",
            "COLUMNS": "100",
        }
        if not command.startswith("millrace"):
            environment["PYTHONPATH"] = str(ROOT)
        done = subprocess.run(
            ["bash", "-c", command],
            cwd=self.folder,
            capture_output=True,
            text=True,
            timeout=scaled(280),
            check=False,
            env=environment,
        )
        self.output += done.stdout + done.stderr
        assert done.returncode == 0, f"{block.page}:{block.line}: {command}\n{done.stdout[-3000:]}{done.stderr[-3000:]}"


def quick(command: str) -> str:
    """The same training with few steps."""
    if command.startswith("millrace train"):
        return f"{command} --run.steps 6 --eval.max_rows 16 --eval.every_steps 3 --run.samples_every 1"
    return re.sub(r"--run\.steps \d+", "--run.steps 8", command)


def load_text(text: str) -> Config:
    """A whole configuration, or a piece of one over a small base. Raises what a wrong file raises."""
    table = tomllib.loads(text)
    base = {key: value for key, value in BASE.items() if key not in table}
    for key in ("model", "data", "reward"):
        if key in table and key in BASE:
            base[key] = BASE[key] | table[key]
    return config_of({**table, **base})


# --- checks without running ---


def check_command(command: str) -> list[str]:
    """The words of a command whose verb, options and settings exist."""
    words = shlex.split(command)
    while words and re.match(r"^[A-Z_]+=", words[0]):
        words.pop(0)
    if "--" in words and words[0] == "ray":
        words = words[words.index("--") + 1 :]
    if words[0] == "make":
        targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.M)
        assert set(words[1:]) <= set(targets), command
    elif words[0] == "pip":
        check_extras(command)
    elif words[0] == "millrace":
        check_verb(words[1], words[2:])
    elif words[:2] == ["python", "launch/run.py"]:
        check_verb("train", words[2:])
    else:
        assert words[0] in OUR_WORDS, f"{command}: nobody knows {words[0]}"
    return words


def check_extras(command: str) -> None:
    """Extras that are installed exist."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    for extra in re.findall(r"\[(\w+)\]", command):
        assert extra in project["optional-dependencies"], command


def check_verb(verb: str, arguments: list[str]) -> None:
    """As the verb itself would parse them; raises its ``InputError``."""
    if verb.startswith("--") or "--help" in arguments:
        return
    arguments = arguments[: next((i for i, word in enumerate(arguments) if word in (">", ">>", "|")), None)]
    module, _, function = VERBS[verb][0].partition(":")
    make = getattr(importlib.import_module(module), "resume_parser" if function == "resume" else "parser")
    parser = make(arguments[0]) if verb == "bench" else make()
    if not isinstance(parser, ConfigOptions):
        parser.parse_args(arguments)
        return
    _, files, settings = parser.parse_config(arguments)
    name = Path(files[0]).stem
    names = [str(shipped()[name])] if name in shipped() else []
    if names:
        load_config(names, settings)
    else:
        config_of({key: dict(value) for key, value in BASE.items()}, settings)


def check_python(block: Block) -> None:
    """It compiles, what it imports exists, and so do the settings that it names."""
    tree = ast.parse(block.text)
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            module = importlib.import_module(str(node.module))
            assert all(hasattr(module, alias.name) for alias in node.names), f"{block.page}:{block.line}"
        if (
            isinstance(node, ast.Constant)
            and isinstance(node.value, str)
            and re.match(r"^[a-z]+\.[a-z_]+$", node.value)
        ):
            section, _, key = node.value.partition(".")
            fields = Config.model_fields
            if section in fields:
                assert key in getattr(fields[section].annotation, "model_fields", {}), node.value
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in KNOWN:
            assert node.attr in members(KNOWN[node.value.id]), f"{block.page}:{block.line}: {ast.unparse(node)}"


KNOWN = {"learner": "learner.learner:Learner", "report": "shared.types:StepReport", "run": "launch.api:Run"}
"""Names that the pages give to what they speak of."""


def members(name: str) -> set[str]:
    """Attributes of a class, fields included."""
    module, _, attribute = name.partition(":")
    found = getattr(importlib.import_module(module), attribute)
    return {*dir(found), *getattr(found, "__annotations__", {})}
