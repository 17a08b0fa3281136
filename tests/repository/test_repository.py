"""The repository keeps its own rules: what is installed, who imports whom, and what its files
say.
"""

import ast
import glob
import os
import re
import sys
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from importlib.metadata import packages_distributions
from pathlib import Path
from typing import Any

import pytest

from tests import ROOT

LINKED = ("models", "rewards", "data", "launch")
"""Folders at the top that are packages of fastgrpo, through a link of the same name in fastgrpo/.
"""

FLOORS = (
    {"core"},
    {"parallel", "algorithm"},
    {"data"},
    {"models", "rewards"},
    {"run"},
    {"training"},
    {"checkpoint"},
    {"session"},
    {"tools"},
    {"train"},
    {"cli"},
    {"__main__"},
)
"""A package imports only from floors below its own: packages of one floor do not import each other.
"""

NOT_INSTALLED = {".", "tests", "docs", "benchmarks"}
BROUGHT = {"huggingface_hub", "tokenizers", "starlette"}
"""Libraries that others bring in the version that they want: transformers and fastapi."""
NOT_OURS = {"__pycache__", "build", "dist", "runs", "wandb", "venv"}


def files(*suffixes: str) -> Iterator[Path]:
    """The repository's files with one of these suffixes, relative to its root; no hidden folders,
    links or outputs.
    """
    for folder, folders, names in os.walk(ROOT):
        folders[:] = [name for name in folders if name not in NOT_OURS and not name.startswith(".")]
        folders[:] = [name for name in folders if not name.endswith(".egg-info")]
        paths = (Path(folder, name).relative_to(ROOT) for name in names)
        yield from (path for path in paths if path.suffix in suffixes)


def setup_arguments() -> dict[str, Any]:
    """The keyword arguments of setup() in setup.py that are plain literals, and its table of
    packages.
    """
    tree = ast.parse((ROOT / "setup.py").read_text())
    calls = (node for node in ast.walk(tree) if isinstance(node, ast.Call))
    call = next(
        call for call in calls if isinstance(call.func, ast.Name) and call.func.id == "setup"
    )
    literals = {}
    for keyword in call.keywords:
        try:
            literals[keyword.arg or ""] = ast.literal_eval(keyword.value)
        except ValueError:
            continue  # computed, such as the long description
    (table,) = (node.value for node in tree.body if isinstance(node, ast.Assign))
    return literals | {"packages": ast.literal_eval(table)}


def test_every_folder_with_python_files_is_installed() -> None:
    setup = setup_arguments()
    folders = {path.parent.as_posix() for path in files(".py")} - NOT_INSTALLED
    assert {folder for folder in folders if Path(folder).parts[0] not in NOT_INSTALLED} == set(
        setup["packages"].values()
    )


def test_every_data_file_of_a_package_is_installed() -> None:
    setup = setup_arguments()
    for package, folder in setup["packages"].items():
        names = (
            Path(name)
            for name in glob.glob("**", root_dir=ROOT / folder, recursive=True, include_hidden=True)
        )
        present = {
            name
            for name in names
            if (ROOT / folder / name).is_file() and name.suffix not in (".py", ".pyc")
        }
        present = {
            name for name in present if not _below_another_package(name, folder, setup["packages"])
        }
        patterns = setup["package_data"].get(package, [])
        installed = {
            Path(name)
            for p in patterns
            for name in glob.glob(p, root_dir=ROOT / folder, recursive=True)
        }
        assert present <= installed, (
            f"setup.py: package_data[{package!r}] leaves these out; add a pattern"
        )


def _below_another_package(name: Path, folder: str, packages: dict[str, str]) -> bool:
    """Whether a file of the folder belongs to a package further down, or to one that is linked
    there.
    """
    if folder == "fastgrpo" and name.parts[0] in LINKED:
        return True
    return any(
        (Path(folder) / parent).as_posix() in packages.values()
        for parent in name.parents
        if parent.name
    )


def test_the_links_name_the_folders() -> None:
    for name in LINKED:
        link = ROOT / "fastgrpo" / name
        assert link.is_symlink()
        assert link.readlink() == Path("..", name)


def modules() -> dict[str, Path]:
    """Every module of fastgrpo by its installed name, such as "fastgrpo.data.video" for
    data/video.py.
    """
    folders = {folder: package for package, folder in setup_arguments()["packages"].items()}
    sources = [path for path in files(".py") if path.parent.as_posix() in folders]
    names = (
        f"{folders[path.parent.as_posix()]}.{path.stem}".removesuffix(".__init__")
        for path in sources
    )
    return dict(zip(names, sources, strict=True))


def imported(source: Path) -> Iterator[str]:
    """Dotted names that a file imports, anywhere in it: "a.b" for `import a.b`, "a.b.c" for `from
    a.b import c`.
    """
    for node in ast.walk(ast.parse((ROOT / source).read_text())):
        if isinstance(node, ast.Import):
            yield from (name.name for name in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{source}:{node.lineno}: relative import; write the full name"
            yield from (f"{node.module}.{name.name}" for name in node.names)


def test_every_library_is_declared() -> None:
    """A module that nothing asks for is there by accident, and gone from the next environment."""
    setup, brought_by = setup_arguments(), packages_distributions()
    asked = [
        *setup["install_requires"],
        *(line for extra in setup["extras_require"].values() for line in extra),
    ]
    declared = {re.split(r"[<>=;\s]", line)[0].lower().replace("_", "-") for line in asked}
    for module, source in modules().items():
        for library in (
            {name.partition(".")[0] for name in imported(source)}
            - {"fastgrpo"}
            - sys.stdlib_module_names
        ):
            # an extra's library that is not installed here goes by its own name
            packages = brought_by.get(library, [library])
            found = {name.lower().replace("_", "-") for name in packages}
            assert found & declared or library in BROUGHT, (
                f"{module} imports {library}: declare it in setup.py"
            )


def graph() -> dict[str, set[str]]:
    """For each module of fastgrpo the modules of fastgrpo that it imports."""
    known = modules()
    edges: dict[str, set[str]] = {}
    for module, source in known.items():
        names = {name if name in known else name.rpartition(".")[0] for name in imported(source)}
        edges[module] = {
            name for name in names if name in known and name not in (module, "fastgrpo")
        }
    return edges


def floor_of(module: str) -> int:
    """The floor of a module's package."""
    package = module.split(".")[1]
    return next(floor for floor, packages in enumerate(FLOORS) if package in packages)


def upward(edges: dict[str, set[str]]) -> list[str]:
    """The imports that do not go down to a lower floor and leave their package."""
    found = []
    for module, targets in edges.items():
        for target in targets:
            if "fastgrpo" in (module, target) or module.split(".")[1] == target.split(".")[1]:
                continue
            if floor_of(target) >= floor_of(module):
                found.append(f"{module} imports {target}")
    return found


def test_imports_go_downwards() -> None:
    assert not upward(graph())


def test_an_import_between_any_two_packages_is_seen_where_it_goes_up() -> None:
    packages = [(floor, package) for floor, names in enumerate(FLOORS) for package in sorted(names)]
    for here, importing in packages:
        for there, imported_one in packages:
            if importing == imported_one:
                continue
            planted = {f"fastgrpo.{importing}.a": {f"fastgrpo.{imported_one}.b"}}
            goes_up = [f"fastgrpo.{importing}.a imports fastgrpo.{imported_one}.b"]
            assert upward(planted) == (goes_up if there >= here else []), planted


def test_an_upward_import_in_a_file_is_seen(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Also one inside a function, or for types alone."""
    (tmp_path / "a.py").write_text(
        "def f():\n    from fastgrpo.tools.plan import planner\n    return planner\n"
    )
    (tmp_path / "b.py").write_text(
        "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import fastgrpo.cli.main\n"
    )
    monkeypatch.setattr(sys.modules[__name__], "ROOT", tmp_path)
    names = ("fastgrpo.core.a", "fastgrpo.tools.b")
    found = {
        name: {i for i in imported(Path(f"{name[-1]}.py")) if i.startswith("fastgrpo.")}
        for name in names
    }
    assert upward(found) == [
        "fastgrpo.core.a imports fastgrpo.tools.plan.planner",
        "fastgrpo.tools.b imports fastgrpo.cli.main",
    ]


def test_every_package_has_a_face() -> None:
    """A docstring that says what lives there, and what to read first where there is a choice."""
    for folder in setup_arguments()["packages"].values():
        face = ast.get_docstring(ast.parse((ROOT / folder / "__init__.py").read_text()))
        assert face, f"{folder}/__init__.py: no docstring"
        choice = [
            path
            for path in (ROOT / folder).glob("*.py")
            if path.stem.strip("_") not in ("init", "main")
        ]
        if len(choice) > 1:
            assert re.search(r"\w+\.py", face), f"{folder}/__init__.py: name the file to read first"


def test_imports_have_no_cycle() -> None:
    try:
        TopologicalSorter(graph()).prepare()
    except CycleError as error:
        pytest.fail(" <- ".join(error.args[1]))


def test_folders_at_the_top_are_imported_by_their_full_name() -> None:
    bare = [
        f"{file}: {name}"
        for file in files(".py")
        for name in imported(file)
        if name.split(".")[0] in LINKED
    ]
    assert not bare, "write fastgrpo.models, fastgrpo.rewards, fastgrpo.data"


def test_no_file_is_named_after_nothing() -> None:
    vague = {"util", "utils", "misc", "helper", "helpers", "common"}
    assert not [file for file in files(".py", ".sh") if file.stem.strip("_") in vague]


def test_the_make_commands_of_the_readme_exist() -> None:
    targets = set(re.findall(r"^([a-z][\w-]*):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    code = re.findall(r"```.*?```|`[^`\n]+`", (ROOT / "README.md").read_text(), re.DOTALL)
    used = {name for text in code for name in re.findall(r"(?<![\w-])make ([a-z][\w-]*)", text)}
    assert used, "README.md: its first command is a make command"
    assert used <= targets


def test_no_file_names_a_path_of_one_machine() -> None:
    path = re.compile(r"(?<![\w.\-/$}])/(?:work|root|home|Users)/[\w.]+")
    suffixes = (
        ".py",
        ".md",
        ".toml",
        ".sh",
        ".txt",
        ".json",
        ".lock",
        ".html",
        ".yml",
        ".yaml",
        ".cfg",
        "",
    )
    found = [f"{file}: {match}" for file in files(*suffixes) for match in path.findall(_text(file))]
    assert not found


def _text(file: Path) -> str:
    return (ROOT / file).read_text(encoding="utf-8", errors="replace")
