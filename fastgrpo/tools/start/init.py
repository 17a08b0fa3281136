"""A new folder to train in: a recipe, its launch file, prompts, a reward of one's own, the next
commands.

All of it is copied from what comes with the package, so that it is the same from a checkout and
from an installed package. Nothing in the new folder names a file of a checkout.
"""

import re
import shlex
import sys
from dataclasses import dataclass
from pathlib import Path

from fastgrpo.core import config
from fastgrpo.core.config import paths
from fastgrpo.core.errors import UserError
from fastgrpo.core.registry import nearest
from fastgrpo.core.units import GIB
from fastgrpo.tools.plan import planner
from fastgrpo.tools.plan.gpus import Achieved, gpu
from fastgrpo.tools.plan.phases import Machine
from fastgrpo.tools.plan.planner import Plan
from fastgrpo.tools.plan.tuning.search import tune
from fastgrpo.tools.start.recipe_text import with_value

CORES_PER_GPU = 8  # asked of slurm, as the launch files do
REWARD = "my_reward.py"
OWN_REWARD = f"""
[[rewards]]
name = "./{REWARD}"
where = "process"
weights = {{ brightness = 0.0 }}  # 0: watched, not trained on
"""
FIRST_IMAGE_ROW = '{"prompt": "a boat leaves the shore", "image": "images/0001.png"}\n'
README = """# {name}

Made by `fastgrpo init` from the recipe {name}. What to type next, in this folder:

    {fetch}fastgrpo check {name}.toml    # what is wrong or missing, before anything is loaded
    bash {name}.sh    # trains; also with torchrun or sbatch
    fastgrpo watch {run}    # meanwhile, in another terminal: prints the address of a page
    fastgrpo sample {run} --against-base    # clips of what was trained
    fastgrpo evaluate {run}    # held-out rewards, base against trained

| file | what to do with it |
|---|---|
| `{name}.toml` | the recipe; `fastgrpo keys` explains each key |
| `{name}.sh` | starts it; any folder will do, as long as the recipe lies beside it |
| `{prompts}` | prompts to train on; put yours in their place |
| `my_reward.py` | a reward of your own, watched with weight 0; `fastgrpo check-reward ./my_reward.py` |
"""


@dataclass(frozen=True)
class Hardware:
    """What a recipe is to run on."""

    gpus: int
    gpu: str  # a name of the table of `fastgrpo plan`
    per_node: int = 8


def recipes() -> dict[str, Path]:
    """Name -> recipe that comes with the package: `t2v_hunyuan`, `one_card/t2v_hunyuan`, ..."""
    folder = paths.installed_folder("launch")
    found = sorted(folder.rglob("*.toml"), key=lambda file: (len(file.parts), file))
    return {file.relative_to(folder).with_suffix("").as_posix(): file for file in found}


def init(folder: Path, name: str, hardware: Hardware | None) -> list[Path]:
    """Write the folder.  returns its new files

    name: of a recipe that comes with the package
    hardware: for which the keys of speed and memory are tuned; None: as the recipe has them
    Raises UserError for an unknown recipe, a file that is there already, and hardware on which the
    recipe does not fit; nothing is written then.
    """
    known = recipes()
    if name not in known:
        raise UserError(
            f"--from={name}: no such recipe.{nearest(name, list(known))} Use one of "
            f"{', '.join(known)}."
        )
    contents = _contents(known[name], hardware)
    for file in contents:
        if (folder / file).exists():
            raise UserError(
                f"FOLDER={folder}: has a {file} already; choose another folder, or remove it."
            )
    if problem := paths.folder_problem(folder):
        raise UserError(f"FOLDER={folder}: {problem}; choose another folder or correct that.")
    folder.mkdir(parents=True, exist_ok=True)
    for file, text in contents.items():
        (folder / file).write_text(text, encoding="utf-8")
    (folder / f"{known[name].stem}.sh").chmod(0o755)
    return [folder / file for file in contents]


def _contents(recipe: Path, hardware: Hardware | None) -> dict[str, str]:
    """File name -> text."""
    text, launcher = recipe.read_text("utf-8"), _launcher(recipe)
    if hardware is not None:
        text = _tuned(text, recipe, hardware)
    elif not recipe.with_suffix(".sh").exists():
        hardware = _told(text)
    if hardware is not None:
        launcher = _for_nodes(launcher, hardware)
    tree = config.read_tree(recipe)
    train = str(tree["prompts"]["train"])
    builtin = Path(train).suffix == ".txt"
    prompts = "prompts.txt" if builtin else "prompts.jsonl"
    text = re.sub(r'^train = "[^"]*"', f'train = "./{prompts}"', text, flags=re.MULTILINE)
    text = re.sub(r'"(\.\./)+', '"./', text)  # weights, which lie beside the recipe
    python = shlex.quote(sys.executable)
    hub = '"builtin:' not in re.findall(r"^path = (\S+)", text, re.MULTILINE)[0]
    fetch = (
        f"fastgrpo fetch {recipe.stem}.toml    # weights; --dry-run: what, how large, where\n    "
    )
    named = {"name": recipe.stem, "run": tree["run"]["dir"], "fetch": fetch if hub else ""}
    return {
        f"{recipe.stem}.toml": _with_own_reward(text),
        f"{recipe.stem}.sh": launcher.replace(":-python3}", f":-{python}}}"),
        prompts: Path(train).read_text("utf-8") if builtin else FIRST_IMAGE_ROW,
        REWARD: Path(__file__).with_name(REWARD).read_text("utf-8"),
        "README.md": README.format(prompts=prompts, **named),
    }


def _launcher(recipe: Path) -> str:
    """The recipe's launch file; of one for a card or a node that of the recipe it is made of."""
    own = recipe.with_suffix(".sh")
    return (own if own.exists() else recipe.parent.with_name(own.name)).read_text("utf-8")


def _told(text: str) -> Hardware | None:
    """What a recipe's head says that it is for."""
    told = re.search(r"^# Plan: (\d+) x ([\w-]+):", text, re.MULTILINE)
    return Hardware(int(told[1]), told[2]) if told else None


def _with_own_reward(text: str) -> str:
    """The recipe with the reward of one's own behind its others."""
    rewards = [match.start() for match in re.finditer(r"^\[\[rewards\]\]", text, re.MULTILINE)]
    following = re.compile(r"\n(?=\[(?!\[rewards))").search(text, rewards[-1])
    end = following.start() if following else len(text)
    return text[:end] + OWN_REWARD + text[end:]


def _tuned(text: str, recipe: Path, hardware: Hardware) -> str:
    """The recipe with the keys that change speed and memory alone as `plan --tune` would have them.

    Raises UserError where nothing fits.
    """
    where = f"{hardware.gpus} x {hardware.gpu}"
    machine = Machine(gpu(hardware.gpu), Achieved())
    settings = config.load(recipe)
    given = planner.plan(settings, hardware.gpus, machine, ranks_per_node=hardware.per_node)
    found = tune(given)
    if found is None:
        raise UserError(
            f"--gpus={hardware.gpus}: {recipe.stem} does not fit on {where} with any settings of "
            f"the same results; ask for more, or see what else there is: fastgrpo plan {recipe} "
            f"--gpus {hardware.gpus} --gpu {hardware.gpu} --tune."
        )
    for override in found.overrides:
        key, _, value = override.partition("=")
        typed = config.value_of(key.split("."), value)
        text = with_value(text, key, typed, f"plan --tune for {where}")
    return re.sub(r"^# Plan: .*", _plan_line(where, found.plan), text, flags=re.MULTILINE)


def _plan_line(where: str, plan: Plan) -> str:
    peak = plan.worst.peak / GIB
    line = f"# Plan: {where}: {plan.seconds:.0f} s per iteration, {peak:.1f} GiB at the peak."
    waiting = sum(plan.host.values()) / GIB
    return f"{line} Of a node's own memory: {waiting:.0f} GiB." if waiting else line


def _for_nodes(launcher: str, hardware: Hardware) -> str:
    """The launch file with what it asks of slurm."""
    inside = min(hardware.gpus, hardware.per_node)
    asked = {
        "nodes": -(-hardware.gpus // inside),
        "gpus-per-node": inside,
        "cpus-per-task": CORES_PER_GPU * inside,
    }
    for option, count in asked.items():
        line = f"#SBATCH --{option}={count}"
        launcher, found = re.subn(rf"^#SBATCH --{option}=.*", line, launcher, flags=re.MULTILINE)
        if not found:
            launcher = launcher.replace("#SBATCH --ntasks", f"{line}\n#SBATCH --ntasks", 1)
    return launcher
