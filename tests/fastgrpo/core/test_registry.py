"""What a file declares is what an import of it would give, without the rest of the file."""

import sys
from pathlib import Path

import pytest

from fastgrpo.core import registry

FILE = '''
"""A file."""
import no_such_library
import math as m
from dataclasses import dataclass

LIMIT = 3
LIMIT += 4
TWICE = m.floor(LIMIT * 2.5)
FIRST, SECOND = "a", "b"

@dataclass
class Size:
    width: int = LIMIT

def plan(config: int) -> Size:
    return _made(config)

def _made(width: int) -> Size:
    return Size(width + TWICE)

def load() -> object:
    return no_such_library.load()
'''


@pytest.fixture
def file(tmp_path: Path) -> Path:
    (tmp_path / "one.py").write_text(FILE)
    return tmp_path / "one.py"


def test_only_what_a_name_needs_is_run(file: Path) -> None:
    assert registry.declared(file, "LIMIT") == 7
    assert registry.declared(file, "TWICE") == 17
    assert registry.declared(file, "SECOND") == "b"
    assert registry.declared(file, "plan")(1).width == 18
    with pytest.raises(ModuleNotFoundError, match="no_such_library"):
        registry.declared(file, "no_such_library")


def test_a_missing_name_has_its_default_or_is_an_error(file: Path) -> None:
    assert registry.declared(file, "NONE", 1) == 1 and registry.declared(file, "NONE", None) is None
    with pytest.raises(KeyError, match=r"one\.py: no NONE"):
        registry.declared(file, "NONE")


def test_an_edited_file_is_read_anew(file: Path) -> None:
    assert registry.declared(file, "LIMIT") == 7
    file.write_text(FILE.replace("LIMIT = 3", "LIMIT = 10"))
    assert registry.declared(file, "LIMIT") == 14


def test_the_files_with_an_entry_are_the_registry(file: Path) -> None:
    (file.parent / "two.py").write_text("def other() -> None: ...\n")
    (file.parent / "_three.py").write_text("def load() -> None: ...\n")
    assert registry.names(file.parent, "load") == ("one",)
    assert "fastgrpo.models" not in registry.__dict__ and "no_such_library" not in sys.modules
