"""The documentation says what is so: its blocks run, what it names exists, its links lead somewhere."""

from __future__ import annotations

import re
import subprocess
import sys
from collections import Counter
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote

import pytest

from launch.cli import VERBS
from shared.metrics import OWN, read_metrics
from tests.docs_blocks import OTHERS_PAGES, PAGES, ROOT, Block, Reader, blocks_of

sys.path.insert(0, str(ROOT / "docs"))

import generate
import generate_code

from tests.pace import scaled

WRITTEN = [page for page in PAGES if page.startswith("docs/")]
SETUPS = {"docs/recipes/planning.md": Reader.model} | dict.fromkeys(OTHERS_PAGES, Reader.repository)
ON_STACK = [page for page in PAGES if any(block.how == "stack" for block in blocks_of(page))]
SECTIONS = "run|model|data|rollout|reward|algorithm|learner|eval"
FILES = (".py", ".png", ".html", ".toml", ".jsonl", ".json")


def follow(page: str, folder: Path, stack: bool = False) -> list[Block]:
    """A reader does what ``page`` says; returns the blocks that he has handled."""
    reader = Reader(folder, stack)
    SETUPS.get(page, lambda _: None)(reader)
    for block in blocks_of(page):
        reader.read(block)
    return reader.handled


def code_spans(page: str) -> set[str]:
    """What a page shows as code within its text."""
    text = re.sub(r"^ *```.*?^ *```", "", PAGES[page].read_text(encoding="utf-8"), flags=re.M | re.S)
    return set(re.findall(r"`([^`\n]+)`", text))


# --- blocks ---


def test_every_block_is_of_a_kind_that_is_handled():
    kinds = Counter(block.kind for page in PAGES for block in blocks_of(page))
    languages = {block.language for page in PAGES for block in blocks_of(page)}
    assert languages <= {"bash", "toml", "python", "text", ""}
    print(", ".join(f"{count} {kind}" for kind, count in kinds.most_common()))
    assert kinds["run"] >= 15
    assert kinds["shown"] <= 12, "show less, run more"


def test_a_page_of_our_own_says_how_a_block_is_tested_only_if_it_does_not_simply_run():
    hows = {block.how for page in WRITTEN if page not in OTHERS_PAGES for block in blocks_of(page)}
    assert hows <= {"", "dry", "stack", "output"}


@pytest.mark.process
@pytest.mark.parametrize("page", [page for page in PAGES if blocks_of(page)])
def test_a_reader_can_do_what_a_page_says(page, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(tmp_path))
    assert follow(page, tmp_path) == blocks_of(page)


@pytest.mark.slow
@pytest.mark.stack
@pytest.mark.timeout(600)
@pytest.mark.parametrize("page", ON_STACK)
def test_a_reader_who_trains_gets_what_a_page_says(page, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(tmp_path))
    assert follow(page, tmp_path, stack=True) == blocks_of(page)
    rows = [row for folder in (tmp_path / "runs").iterdir() for row in read_metrics(folder)]
    unknown = sorted({name for row in rows for name in row if name != "step" and not generate_code.explained(name)})
    assert unknown == [], "say what they mean in docs/meanings.toml"


# --- names ---


def test_every_metric_that_is_explained_is_known_as_the_runs_own():
    """A reward function must not write it (see ``rollout/logged.py``)."""
    explained = {name.partition("/")[0] for table in generate_code.MEANINGS["metrics"].values() for name in table}
    assert explained <= OWN


@pytest.mark.parametrize("page", PAGES)
def test_every_setting_that_a_page_names_exists(page):
    keys = {key.replace("[]", "") for key in generate.all_settings()}
    prefixes = {key.rpartition(".")[0] for key in keys}
    named = set(re.findall(rf"--((?:{SECTIONS})\.[a-z_.]+)", PAGES[page].read_text(encoding="utf-8")))
    for span in code_spans(page):
        if found := re.fullmatch(rf"((?:{SECTIONS})\.[a-z_.\[\]]+)(?: = .*)?", span):
            named.add(found[1].replace("[]", ""))
    named = {name for name in named if not name.endswith(FILES) and not is_module(name)}
    arguments = {name for name in named if name.rpartition(".")[0] in keys}
    assert sorted(named - keys - prefixes - arguments) == []


def is_module(name: str) -> bool:
    return (ROOT / "/".join(name.split(".")[:2])).with_suffix(".py").is_file()


@pytest.fixture(scope="module")
def codes() -> set[str]:
    """Codes of all errors and warnings, read off the code."""
    return generate_code.all_codes("E") | generate_code.all_codes("W")


@pytest.mark.parametrize("page", PAGES)
def test_every_code_that_a_page_names_exists(codes, page):
    text = PAGES[page].read_text(encoding="utf-8")
    assert sorted(set(re.findall(r"\b[EW][0-9]{3}\b", text)) - codes) == []


@pytest.mark.parametrize("page", WRITTEN)
def test_every_metric_that_a_page_names_exists(page):
    named = {span for span in code_spans(page) if re.fullmatch(r"[a-z_]+(/[a-z_@0-9]+)+", span)}
    named = {name for name in named if not (ROOT / name).exists() and not name.startswith(("org/", "runs/"))}
    assert sorted(name for name in named if not generate_code.explained(name.replace("@k", "@1"))) == []


@pytest.mark.parametrize("page", PAGES)
def test_every_verb_that_a_page_names_exists(page):
    text = PAGES[page].read_text(encoding="utf-8")
    assert set(re.findall(r"`millrace ([a-z][a-z-]*)", text)) <= set(VERBS)


def test_every_verb_is_documented():
    generated = generate.commands()
    assert [verb for verb in VERBS if f"{{ #{verb} }}" not in generated] == []
    written = " ".join(PAGES[page].read_text(encoding="utf-8") for page in PAGES)
    assert [verb for verb in VERBS if f"millrace {verb}" not in written + generated] == []


def test_every_message_is_read_off_the_code():
    told = {message.code for message in generate_code.messages()}
    assert len(told) > 40
    for message in generate_code.messages():
        assert message.what.strip("… "), message
    page = generate_code.errors()
    assert [code for code in generate_code.all_codes("E") if f"#### {code} " not in page] == []


def test_what_a_message_says_is_followed_through_names_and_branches():
    words = [(told.code, told.what, told.expected, told.fix) for told in generate_code.messages()]
    fixes = {(code, what): fix for code, what, _, fix in words}
    assert fixes["E103", "group too small"] == "set 8; one completion has no group to compare with"
    expected = {(code, what, text) for code, what, text, _ in words}
    assert ("E301", "reward token missing", "the service's token") in expected
    assert ("E104", "batch does not divide", "a multiple of learner.num_ranks = …") in expected


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("rollout.max_staleness", "integer, at least 0"),
        ("run.sinks", "list of a name, or a table of name and arguments"),
        ("eval.max_new_tokens", "integer, at least 1, or left out"),
        ("algorithm.kl.corrected", '`false` or `true` or `"token"` or `"sequence"`'),
        ("model.dtype", '`"float32"` or `"bfloat16"` or `"float16"`'),
    ],
)
def test_a_type_is_told_in_words(kind, words):
    field = generate.all_settings()[kind]
    assert generate.kind_of(field.annotation, field.metadata) == words


def test_every_choice_is_on_the_page_of_choices():
    from learner.losses import AGGREGATIONS, POLICY_LOSSES
    from learner.rejection import REJECTIONS

    page = generate.choices()
    names = [*AGGREGATIONS, *POLICY_LOSSES, *REJECTIONS]
    assert [name for name in names if f"| `{name}` |" not in page] == []
    assert "batch_tokens" not in page  # What the learner supplies is no argument of the configuration.


# --- the site ---


class Links(HTMLParser):
    """Ids, links and resources of a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.ids: set[str] = set()
        self.links: list[str] = []
        self.resources: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = {name: value or "" for name, value in attrs}
        self.ids |= {found["id"]} if "id" in found else set()
        if tag == "a" and "href" in found:
            self.links.append(found["href"])
        elif tag == "link" and found.get("rel") != "canonical":
            self.resources.append(found.get("href", ""))
        elif "src" in found:
            self.resources.append(found["src"])


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    """The site as ``make docs`` builds it."""
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=scaled(200), check=False)
    assert done.returncode == 0, done.stderr
    return folder


@pytest.mark.slow
@pytest.mark.process
def test_the_site_has_every_page(site):
    there = {str(path.relative_to(site).with_suffix(".md")) for path in site.rglob("*.html")}
    assert {page.removeprefix("docs/") for page in WRITTEN} <= there
    assert not list(site.rglob("*.py"))
    assert "<!-- generated" not in "".join(path.read_text(encoding="utf-8") for path in site.rglob("*.html"))


@pytest.mark.slow
@pytest.mark.process
def test_every_link_and_anchor_leads_somewhere(site):
    pages = {path: Links(path.read_text(encoding="utf-8")) for path in site.rglob("*.html")}
    lost = []
    for path, page in pages.items():
        for link in (*page.links, *page.resources):
            target, _, anchor = unquote(link).partition("#")
            if re.match(r"^[a-z]+:", target) or path.name == "404.html":
                continue
            there = (path.parent / target).resolve() if target else path
            there = there / "index.html" if there.is_dir() else there
            if not there.is_file() or (anchor and there in pages and anchor not in {*pages[there].ids, "__top"}):
                lost.append(f"{path.relative_to(site)}: {link}")
    assert lost == []


@pytest.mark.slow
@pytest.mark.process
def test_nothing_on_the_site_comes_from_the_network(site):
    for path in site.rglob("*.html"):
        outside = [r for r in Links(path.read_text(encoding="utf-8")).resources if re.match(r"^(https?:)?//", r)]
        assert outside == [], path
    for path in [*site.rglob("*.css"), *site.rglob("*.svg")]:
        text = re.sub(r'xmlns(:\w+)?="[^"]+"', "", path.read_text(encoding="utf-8"))
        assert not re.search(r"url\(['\"]?(https?:)?//|href=\"http|@import", text), path
