"""The runs of an entry, each by `fastgrpo train`, and what the entry makes of them.

Every step is a command in a process of its own, over this machine's GPUs. A finished run is not
run again, a sheet of the same command and checkpoint is not measured again; so the same command
goes on where the last one ended, and takes runs that a scheduler has carried out.
"""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from fastgrpo.core.errors import UserError
from fastgrpo.core.files import read_json_or_none, replace_text
from fastgrpo.core.processes import processes_to_start, torchrun_command, torchrun_environment
from fastgrpo.tools.check.check import refuse
from fastgrpo.tools.evaluate.benchmark import choosing
from fastgrpo.tools.evaluate.benchmark.catalogue import COLUMNS
from fastgrpo.tools.evaluate.benchmark.choosing import Sources
from fastgrpo.tools.evaluate.benchmark.prompt_sets import GENEVAL_FILE
from fastgrpo.tools.evaluate.reproduce import diversity, results
from fastgrpo.tools.evaluate.reproduce.entries import Entry, Run
from fastgrpo.tools.evaluate.reproduce.recipes import Options, folder_of, recipe_of
from fastgrpo.tools.evaluate.reproduce.results import Outcome

Start = Callable[[Sequence[str]], int]
"""Runs `fastgrpo` with these arguments, and gives its exit code."""


def start(arguments: Sequence[str]) -> int:
    """Run `fastgrpo` with these arguments over this machine's GPUs.  returns its exit code"""
    program = ["-m", "fastgrpo.cli", *arguments]
    count = processes_to_start(os.environ)
    command = [sys.executable, *program] if count < 2 else torchrun_command(program, count)
    environment = torchrun_environment(os.environ, count)
    return subprocess.run(command, env=environment, check=False).returncode


def write_recipes(entry: Entry, options: Options) -> dict[str, Path]:
    """Every run's recipe as a file that `fastgrpo train` takes.  returns them by run

    Raises UserError for what a run cannot be, before any is begun.
    """
    recipes = {run.name: recipe_of(run, options).to_toml() for run in entry.runs}
    folder = options.out / "recipes"
    folder.mkdir(parents=True, exist_ok=True)
    files = {name: (folder / f"{name}.toml").resolve() for name in recipes}
    for name, text in recipes.items():
        replace_text(files[name], text)
    return files


def carry_out(
    name: str, entry: Entry, options: Options, asked: Sequence[str], begin: Start
) -> list[Path]:
    """Train what is not trained yet, and make the entry's output.  returns the files of it

    A baseline that cannot be trained leaves its row unmeasured.
    asked: options of `fastgrpo evaluate --benchmark` from the command line
    Raises UserError where another step fails, which has said why.
    """
    left_out = _trained(entry, options, begin)
    runs = [run for run in entry.runs if run.name not in left_out]
    if entry.output == "table":
        assert entry.benchmark is not None
        words = [*asked, "--benchmark", entry.benchmark]
        sheets = {run.name: _sheet(run, options, words, begin) for run in runs}
        return results.write_table(name, entry, options, Outcome(sheets, left_out))
    if entry.output == "curves":
        return results.write_curves(name, entry, options, left_out)
    if entry.output == "pictures":
        folders = {run.name: _pictures(run, entry, options, begin) for run in runs}
        found = [folder for own in folders.values() for folder in own]
        return [*found, *(_diversity(name, folders, options) if entry.diversity else [])]
    return [folder_of(run, options) for run in runs]


def _trained(entry: Entry, options: Options, begin: Start) -> dict[str, str]:
    """Train the runs that are not finished.  returns why, by name, for baselines that cannot be"""
    files, left_out = write_recipes(entry, options), dict[str, str]()
    for run in entry.runs:
        try:
            refuse(recipe_of(run, options))
        except UserError as error:
            if not run.baseline:
                raise UserError(f"{run.name}: {error}") from None
            left_out[run.name] = f"cannot be trained here: {error}"
    for run in entry.runs:
        if run.name in left_out or finished(run, options):
            continue
        try:
            _do(begin, ["train", str(files[run.name])], run)
        except UserError as error:
            if not run.baseline:
                raise
            left_out[run.name] = str(error)
    return left_out


def finished(run: Run, options: Options) -> bool:
    """Whether a run has all its iterations and its held-out comparison."""
    summary = read_json_or_none(folder_of(run, options) / "summary.json") or {}
    return summary.get("iterations") == recipe_of(run, options).run.iterations


def _sheet(run: Run, options: Options, asked: Sequence[str], begin: Start) -> dict[str, Any]:
    """The run's benchmark, measured now or before."""
    folder = options.out / "sheets"
    folder.mkdir(parents=True, exist_ok=True)
    file, note = folder / f"{run.name}.json", folder / f"{run.name}.command"
    summary = (folder_of(run, options) / "summary.json").read_text()
    command = json.dumps([*asked, summary])
    if not file.is_file() or not note.is_file() or note.read_text() != command:
        arguments = ["evaluate", str(folder_of(run, options)), *asked, "--json", str(file)]
        _do(begin, arguments, run)
        replace_text(note, command)
    sheet = read_json_or_none(file)
    if sheet is None:
        raise UserError(f"{file}: damaged; remove it and start again.")
    return sheet


def _pictures(run: Run, entry: Entry, options: Options, begin: Start) -> list[Path]:
    """Folders of pictures beside the base model's, one per checkpoint that is shown."""
    found = []
    # the base model, step 0, stands beside every other
    for step in [str(step) for step in entry.steps if step] or ["newest"]:
        out = options.out / "pictures" / run.name / step
        arguments = ["sample", str(folder_of(run, options)), "--against-base", "--overwrite"]
        arguments += ["--out", str(out), "--seeds", *map(str, range(entry.seeds))]
        arguments += [word for prompt in entry.prompts for word in ("--prompt", prompt)]
        arguments += ["--step", step]
        _do(begin, arguments, run)
        found.append(out)
    return found


def _diversity(name: str, folders: Mapping[str, Sequence[Path]], options: Options) -> list[Path]:
    """OUT/NAME.json with the diversity of every run's pictures."""
    sources = Sources(judges=options.judges, files=options.files, weights=options.weights)
    judge = choosing.choose(COLUMNS["CLIP"], sources, GENEVAL_FILE)
    found = {run: diversity.of_samples(own[-1], judge) for run, own in folders.items()}
    file = options.out / f"{name}.json"
    replace_text(file, diversity.as_json(found))
    return [file]


def _do(begin: Start, arguments: Sequence[str], run: Run) -> None:
    """One command. Raises UserError where it fails."""
    code = begin(arguments)
    if code:
        raise UserError(
            f"reproduce: `fastgrpo {arguments[0]}` of {run.name} ended with exit code {code}, as "
            "its own lines say; correct that and start the same command again, which goes on there."
        )
