"""The pages say what is there: links, commands, recipe keys and paths exist, and no page is a wall
of text.
"""

import ast
import contextlib
import importlib.util
import io
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest

from fastgrpo.cli import plan
from fastgrpo.cli.main import parser
from fastgrpo.core import config
from tests import ROOT

PAGES = sorted([ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").rglob("*.md")])
GENERATED = {"troubleshooting.md"}
"""Pages that a script writes, from texts that may hold anything."""

CELL, PARAGRAPH, COLUMNS, ENTRIES = 20, 120, 120, 10
"""The most words of a table cell and of a paragraph, columns of a line, entries of a folder of
docs/.
"""

NO_KEYS = {"py", "toml", "json", "md", "sh", "pth", "pt", "safetensors", "txt", "jsonl"}
"""Endings of file names that look like a `section.key`."""

ELSEWHERE = re.compile(r"[*<>{}$\s]|\bNAME\b|\bFAMILY\b|\.\.\.")
"""A path with one of these is a pattern."""

TREE = re.compile(
    r"(?<![\w./-])(?:fastgrpo|models|rewards|data|launch|docs|benchmarks)/[^\s`'\"),;:]*"
)
"""A path from the repository's root.

Tests are named by their file alone: the folders of tests/ may change.
"""

FOLDERS = ("fastgrpo", "models", "rewards", "data", "benchmarks", "tests", "docs", "launch")

AT_THE_TOP = {"setup.py", "prompt_template.py"}
"""Files outside those folders: the repository's own, and VideoAlign's template, which is not
shipped.
"""


@dataclass(frozen=True)
class Page:
    """A Markdown file, taken apart."""

    path: Path
    # number and text of the lines outside code blocks; of code blocks empty lines
    prose: list[tuple[int, str]]
    code: list[tuple[int, str]]  # the lines of code blocks, fenced or indented


@cache
def page(path: Path) -> Page:
    prose, code, fence, after_blank, in_list = [], [], False, True, False
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        if line.lstrip().startswith("```"):
            fence = not fence
            prose.append((number, ""))
        elif fence or (line.startswith("    ") and after_blank and not in_list):
            code.append((number, line))
            prose.append((number, ""))
        else:
            prose.append((number, line))
            in_list = bool(re.match(r"\s*([-*]|\d+\.) ", line)) or (
                in_list and (not line or line[0] == " ")
            )
            after_blank = not line.strip()
    return Page(path, prose, code)


def where(path: Path, number: int) -> str:
    return f"{path.relative_to(ROOT)}:{number}"


def plain(text: str) -> str:
    """Markdown without its marks: of a link its text, of code its words."""
    return re.sub(r"!?\[([^\]]*)\]\([^)]*\)", r"\1", text).replace("`", "").replace("*", "")


def cells(line: str) -> list[str]:
    return re.split(r"(?<!\\)\|", line.strip().strip("|"))


def paragraphs(lines: list[tuple[int, str]]) -> Iterator[tuple[int, str]]:
    """Blocks of text between blank lines; a table and a heading are none, a list's item is one."""
    start, text = 0, ""
    for number, line in [*lines, (0, "")]:
        ends = not line.strip() or line.startswith(("#", "|", "<!--"))
        if ends or re.match(r"\s*([-*]|\d+\.) ", line):
            if text:
                yield start, text
            start, text = number, "" if ends else line
        else:
            start, text = (start, f"{text} {line}") if text else (number, line)


def anchors(path: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub makes them."""
    found: set[str] = set()
    for _, line in page(path).prose:
        if heading := re.match(r"#+ (.*)", line):
            name = re.sub(r"[^\w\- ]", "", plain(heading[1]).strip().lower()).replace(" ", "-")
            copies = (name if not n else f"{name}-{n}" for n in range(100))
            found.add(next(copy for copy in copies if copy not in found))
    return found


def inline(path: Path) -> Iterator[tuple[int, str]]:
    """The texts between backticks."""
    for number, text in paragraphs(page(path).prose):
        yield from ((number, found) for found in re.findall(r"`([^`]+)`", text))
    for number, line in page(path).prose:
        if line.startswith(("|", "#")):
            yield from ((number, found) for found in re.findall(r"`([^`]+)`", line))


def by_name(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


@pytest.mark.parametrize("path", PAGES, ids=by_name)
def test_links_lead_somewhere(path: Path) -> None:
    dead = []
    for number, line in page(path).prose:
        for target in re.findall(r"\]\(([^)\s]+)\)", line):
            if re.match(r"[a-z]+:", target):
                continue
            file, _, anchor = target.partition("#")
            aim = (path.parent / file).resolve() if file else path
            if not aim.exists() or (anchor and anchor not in anchors(aim)):
                dead.append(f"{where(path, number)}: {target}")
    assert not dead


def test_every_page_is_found_from_the_readme() -> None:
    found, waiting = set[Path](), [ROOT / "README.md"]
    while waiting:
        here = waiting.pop()
        if here in found or here.suffix != ".md":
            continue
        found.add(here)
        targets = re.findall(r"\]\(([^)\s#:]+)", here.read_text(encoding="utf-8"))
        waiting += [(here.parent / target).resolve() for target in targets]
    assert not set(PAGES) - found


@pytest.mark.parametrize("path", PAGES, ids=by_name)
def test_no_page_is_a_wall_of_text(path: Path) -> None:
    if path.name in GENERATED:
        return
    found = []
    for number, line in page(path).prose:
        if len(line) > COLUMNS + 10 * line.startswith("|"):  # a row cannot be broken
            found.append(f"{where(path, number)}: {len(line)} columns")
        if line.startswith("|"):
            long = [cell for cell in cells(line) if len(plain(cell).split()) > CELL]
            found += [
                f"{where(path, number)}: {len(plain(cell).split())} words in the cell {cell!r}"
                for cell in long
            ]
    for number, text in paragraphs(page(path).prose):
        if (words := len(plain(text).split())) > PARAGRAPH:
            found.append(f"{where(path, number)}: a paragraph of {words} words")
    assert not found, "\n".join(found)


def test_the_readme_is_read_in_minutes() -> None:
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 150


def test_folders_of_pages_can_be_taken_in_at_a_glance() -> None:
    folders = [ROOT / "docs", *(folder for folder in (ROOT / "docs").rglob("*") if folder.is_dir())]
    sizes = {
        by_name(folder): len([1 for entry in folder.iterdir() if entry.name[0] not in "._"])
        for folder in folders
    }
    assert not {folder: size for folder, size in sizes.items() if size > ENTRIES}


def commands(path: Path) -> Iterator[tuple[int, str]]:
    """The lines of code blocks, continued ones joined, without comments."""
    kept, start = "", 0
    for number, line in page(path).code:
        line = re.sub(r"(^|\s)#.*", "", line).rstrip()
        start = start if kept else number
        kept += line.removesuffix("\\").strip() + " "
        if not line.endswith("\\"):
            yield start, kept.strip()
            kept = ""


def of_fastgrpo(line: str) -> list[str] | None:
    """The arguments behind `fastgrpo` in a command line, as the shell gives them; None: it runs
    another command.
    """
    found = re.search(r"(?:^|[\s/(])(?:fastgrpo|-m fastgrpo\.cli) (?=[a-z-])(.*)", line)
    if found is None or re.match(r"(\[|.*\| )", line):
        return None
    words = shlex.split(re.split(r" (?:>|2>|&|\|\||&&|;)", found[1])[0])
    return words


@pytest.mark.parametrize("path", PAGES, ids=by_name)
def test_commands_are_taken(path: Path) -> None:
    """Whole lines by the parser, as typed; in the text the options alone."""
    refused = []
    for number, line in commands(path):
        words = of_fastgrpo(line)
        if words is None or line.startswith("fastgrpo:"):
            continue
        told = io.StringIO()
        try:
            with contextlib.redirect_stderr(told), contextlib.redirect_stdout(told):
                parser().parse_args(plan.overrides_first(words))
        except SystemExit:
            refused.append(
                f"{where(path, number)}: {line}: {told.getvalue().strip().splitlines()[-1]}"
            )
        refused += [f"{where(path, number)}: {key}" for key in unknown_keys(words)]
    for number, text in inline(path):
        if found := re.match(r"fastgrpo ([a-z-]+)(.*)", text):
            known = options(found[1])
            refused += [f"{where(path, number)}: {text}" for _ in [0] if known is None]
            asked = re.findall(r"(?<!\S)--[a-z-]+", found[2])
            refused += [
                f"{where(path, number)}: {option}"
                for option in asked
                if option not in (known or {option})
            ]
    assert not refused, "\n".join(refused)


@cache
def options(command: str) -> frozenset[str] | None:
    """The options of a command, from its own help; None: there is no such command."""
    told = io.StringIO()
    with (
        contextlib.suppress(SystemExit),
        contextlib.redirect_stdout(told),
        contextlib.redirect_stderr(io.StringIO()),
    ):
        parser().parse_args([command, "--help"])
    return frozenset(re.findall(r"--[a-z-]+", told.getvalue())) or None


def unknown_keys(words: list[str]) -> list[str]:
    """The overrides among words whose key no recipe has."""
    keys = [found[1] for word in words if (found := re.match(r"([a-z_]+(?:\.\w+)+)=", word))]
    return [key for key in keys if not is_key(key)]


def is_key(name: str) -> bool:
    parts = name.split(".")
    parts = [parts[0], *(part for part in parts[1:] if not part.isdigit())]
    return ".".join(parts[:2]) in KEYS


KEYS = frozenset(config.all_keys())
SECTIONS = frozenset(key for key in KEYS if "." not in key)


@pytest.mark.parametrize("path", PAGES, ids=by_name)
def test_recipe_keys_exist(path: Path) -> None:
    unknown = []
    for number, text in inline(path):
        for word in text.split():
            found = re.fullmatch(r"([a-z]+)((?:\.\w+)+)(?:=.*|,)?", word.strip("()'\""))
            if found and found[1] in SECTIONS and found[2].rpartition(".")[2] not in NO_KEYS:
                unknown += [f"{where(path, number)}: {word}"] * (not is_key(found[1] + found[2]))
    assert not unknown


@pytest.mark.parametrize("path", PAGES, ids=by_name)
def test_paths_and_modules_exist(path: Path) -> None:
    if path.name in GENERATED:
        return
    names = {file.name for folder in FOLDERS for file in (ROOT / folder).rglob("*")} | AT_THE_TOP
    missing = []
    for number, text in [*inline(path), *commands(path)]:
        for word in re.findall(
            r"(?<![\w./-])(?:fastgrpo|models|rewards|data|launch|docs|benchmarks)/[^\s`'\"),;:]*",
            text,
        ):
            if not ELSEWHERE.search(word) and not (ROOT / word.rstrip(".")).exists():
                missing.append(f"{where(path, number)}: {word}")
        for word in re.findall(
            r"(?<![\w./-])(?:tests/[\w/]*/)?(\w+\.py|slurm_cluster\.sh)(?!\w)", text
        ):
            missing += [f"{where(path, number)}: {word}"] * (
                word not in names and not ELSEWHERE.search(word)
            )
        for word in re.findall(r"-m ((?:fastgrpo|benchmarks|tests)\.[\w.]+)", text):
            missing += [f"{where(path, number)}: {word}"] * (importlib.util.find_spec(word) is None)
        for word in re.findall(r"^(?:\S+ && )?make ([a-z][\w-]*)", text):
            targets = re.findall(r"^([a-z][\w-]*):", (ROOT / "Makefile").read_text(), re.MULTILINE)
            missing += [f"{where(path, number)}: make {word}"] * (
                word not in [*targets, "test-fast"]
            )
    assert not missing, "\n".join(missing)


@pytest.mark.parametrize("name", ["CONTRIBUTING.md", "docs/architecture.md"])
def test_the_floors_are_those_that_a_test_holds(name: str) -> None:
    (file,) = (ROOT / "tests").rglob("test_repository.py")
    tree = ast.parse(file.read_text(encoding="utf-8"))
    assigned = [
        node
        for node in tree.body
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name)
    ]
    (floors,) = (ast.literal_eval(n.value) for n in assigned if n.targets[0].id == "FLOORS")  # type: ignore[attr-defined]
    rows = re.findall(
        r"^\| (\d+) \| ([^|]+) \|", (ROOT / name).read_text(encoding="utf-8"), re.MULTILINE
    )
    told = {
        int(floor): set(re.sub(r"\.py|`", "", packages).strip().split(", "))
        for floor, packages in rows
    }
    assert told.pop(len(floors) + 1) == {"benchmarks", "launch", "tests"}
    assert told == dict(enumerate(floors, 1))


def test_troubleshooting_is_what_the_code_says() -> None:
    script = ROOT / "docs" / "troubleshooting.py"
    done = subprocess.run(
        [sys.executable, script, "--check"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
