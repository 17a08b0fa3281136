"""Write docs/troubleshooting.md: questions answered by hand, and every message of the code for a
user's mistake.

    python docs/troubleshooting.py            writes the page
    python docs/troubleshooting.py --check    exit code 1 where the page is not what this would
    write

Messages are read from the source of fastgrpo, models, rewards and data, without importing it: the
first argument of each UserError, of its subclasses and of fail_alone. What is filled in while it
runs is shown as "...".
"""

import ast
import re
import sys
import textwrap
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "troubleshooting.md"
FOLDERS = ("fastgrpo", "models", "rewards", "data")
COLUMNS = 100

HEAD = """\
# Troubleshooting and questions that are often asked

A mistake in a recipe, a file or a folder is one line: where, what is wrong, what to do; exit code 2.
[The second half](#messages) lists all of these lines. The first half is for what gives no message.

Written by `python docs/troubleshooting.py`, which reads the messages from the code; a test keeps the
page true.

## Questions

### Which recipe is for my GPU, and will it fit?

[recipes.md](recipes.md) by what you have, [guides/gpu/hardware.md](guides/gpu/hardware.md) by what each
recipe needs. For any other machine `fastgrpo plan RECIPE --gpus N --gpu NAME --advise` says what to
give up, the least first.

### Can I train HunyuanVideo on one card?

By the plan, which no GPU has confirmed: adapters and 25 frames on 80 GB, `one_card/t2v_hunyuan`, and on a
4090 smaller pictures yet. [guides/algorithms/lora.md](guides/algorithms/lora.md) has what adapters change.

### Does it fetch weights by itself?

No run downloads gigabytes unasked, but for a hub id in `model.path` that is not in the hub's cache yet.
`fastgrpo fetch RECIPE --dry-run` lists what there is to get, with sizes, licences and gates;
[guides/gpu/real_weights.md](guides/gpu/real_weights.md) goes on from there.

### How do I use my own prompts and my own reward?

[getting_started.md](getting_started.md#from-an-empty-folder-to-a-model-of-your-own) does both, line by
line. A column of the prompts' file reaches the reward by `prompts.reward_columns`.

### How many prompts do I need?

The paper trains on more than 10,000. The 200 that come along are enough to see that everything works.
Held-out intervals want two dozen at least: raise `prompts.heldout_share` where a run says that there are
fewer.

### May I stop, change something and go on?

`touch RUN/stop` or Ctrl-C, then the same command again. More iterations, another rate and other evaluations
are accepted and written down: [guides/cluster/checkpoints.md](guides/cluster/checkpoints.md) lists the keys.
Another run's weights are a start, too: `run.start_from`.

### May I look at a run while it goes on?

`fastgrpo watch RUN`, from any machine that sees its folder:
[guides/cluster/watching.md](guides/cluster/watching.md). wandb and TensorBoard are keys of `[track]`.

### Windows, macOS, AMD?

Linux on x86-64 is what was tried. The planner has figures of MI300X, which are arithmetic alone: ROCm was
never tried.

### Is two hours per rollout normal?

For some recipes, yes. `fastgrpo plan launch/t2v_hunyuan.toml --gpus 64 --gpu h800` says 87 s for a
rollout, the same recipe on 8 GPUs 694 s, and 2,928 s at 480 x 832 with 81 frames (computed,
2026-11-30, never compared with a GPU). Plan your own recipe on your GPUs. Where a run takes far
longer than its plan:

- `fastgrpo preflight RECIPE` prints seconds per phase on this machine, with the plan's beside them;
- `distributed.rollout_weights`: `sharded` gathers every block for every step;
- `rollout.batch_size` of 1 leaves a large GPU idle when clips are small;
- one rank may be slow: [guides/cluster/hanging.md](guides/cluster/hanging.md#which-rank-is-slow).

What makes an iteration shorter: a window of noisy steps (`rollout.window`), fewer prompts or samples,
adapters. [recipes.md](recipes.md) and [guides/planning.md](guides/planning.md) have the figures.

### Nothing is printed

Only the first rank prints. Before the first iteration a run encodes its prompts, reads the weights,
checks itself and evaluates; each tells of itself on a line. From a second terminal:

    fastgrpo status runs/a

names each rank's phase and function. Under slurm the lines are in `slurm-NAME-JOB.log` where the job was
submitted, and each rank's own output in `logs/job-JOB-ATTEMPT/NODE/` below the run's folder.

### It hangs

[guides/cluster/hanging.md](guides/cluster/hanging.md#what-to-do-when-it-hangs) goes from
`fastgrpo status` to the rank that is at fault, step by step.

### The reward does not rise

1. Look at clips first: `report.html` shows the same held-out prompts before and after.
2. Score clips that you can judge: `fastgrpo score clip.mp4 --reward NAME`. Does the reward prefer the
   better one? [guides/rewards/](guides/rewards/rewards.md) says what each looks at.
3. Compare held-out rewards, not training rewards: training draws with noise. `fastgrpo evaluate RUN` gives
   paired differences with intervals.
4. Read `metrics.jsonl`: `reward/invalid` (clips without a score), `update/clip_fraction` (near 1: the step is
   too large), `update/max_log_ratio_first` (rollout and update: near 0 in float32,
   [rounding in bfloat16](guides/preflight.md#what-the-ratio-is-made-of)),
   `update/grad_norm` and `update/skipped`.
5. Samples of a prompt that score alike teach nothing. More noise (`rollout.eta`), more samples per prompt or
   `objective.best_of_n` make groups differ.
6. Then the rate: `optimizer.lr`. [guides/algorithms/performance.md](guides/algorithms/performance.md) shows what
   helped in the tiny world.

### A part rises that nobody wants

That is reward hacking. Give monitors weight 0 and watch them:
[guides/rewards/rewards.md](guides/rewards/rewards.md#weights-of-the-parts).

### Out of memory

`fastgrpo plan RECIPE --gpus N --gpu NAME` names recipes near yours that fit, as overrides to paste. By phase:

| where | try, in this order |
|---|---|
| rollout | `rollout.batch_size=1`, `distributed.rollout_weights=sharded`, `rollout.store=host` |
| decode | `model.decode_batch=1` |
| reward | `rewards.0.where=server` on a GPU of its own, `rewards.0.dtype=bfloat16` |
| update | `optimizer.batch_size=1`, `model.gradient_checkpointing=true`, `distributed.sp=2` |
| everywhere | `lora.rank=32`, or `distributed.offload=true`, which wants host memory in exchange |

### A resumed run is refused

The folder holds another recipe. [guides/cluster/checkpoints.md](guides/cluster/checkpoints.md) lists the keys that
may change; for all others name another `run.dir`.

## Messages

Sorted by the key, option or thing in front; those that begin with a name that is filled in come last.
`...` stands for what is filled in. The remedy is in the message.
"""

AREAS = {
    "run": ("run", "track"),
    "model": ("model", "lora", "video"),
    "prompts": ("prompts",),
    "rollout": ("rollout",),
    "objective": ("objective",),
    "optimizer": ("optimizer",),
    "distributed": ("distributed",),
    "rewards": ("rewards", "reward"),
    "server": ("server", "urls", "token"),
    "checkpoint": ("checkpoint",),
    "evaluate": ("evaluate",),
    "command-line options": ("--",),
    "files": (),
}
"""Heading -> what a message of it begins with. The last takes what no other does."""

BY_FOLDER = (
    ("fastgrpo/core/config", "files"),
    ("fastgrpo/cli", "command-line options"),
    ("fastgrpo/checkpoint", "checkpoint"),
    ("fastgrpo/parallel", "distributed"),
    ("fastgrpo/tools/evaluate", "evaluate"),
    ("rewards/serving", "server"),
    ("rewards", "rewards"),
    ("models", "model"),
    ("data", "prompts"),
)
"""Where the message begins with something else: the first folder that its module lies in."""


def raisers(trees: list[ast.Module]) -> set[str]:
    """Names whose call tells a user's mistake: UserError, the classes that inherit from it,
    fail_alone.
    """
    names = {"UserError"}
    bases = {
        node.name: {base.id for base in node.bases if isinstance(base, ast.Name)}
        for tree in trees
        for node in ast.walk(tree)
        if isinstance(node, ast.ClassDef)
    }
    while more := {name for name, of in bases.items() if of & names} - names:
        names |= more
    return names | {"fail_alone"}


def templates(node: ast.expr) -> list[str]:
    """The texts that an expression may give, "..." for what is not written in it."""
    match node:
        case ast.Constant(value=str(text)):
            return [text]
        case ast.JoinedStr(values=values):
            return ["".join(str(v.value) if isinstance(v, ast.Constant) else "..." for v in values)]
        case ast.IfExp():
            return [*templates(node.body), *templates(node.orelse)]
        case ast.BinOp(op=ast.Add()):
            return [
                left + right for left in templates(node.left) for right in templates(node.right)
            ]
    return ["..."]


def messages() -> Iterator[tuple[str, str]]:
    """Every message and the module it comes from; those that hold no words of their own are left
    out.
    """
    files = sorted(f for folder in FOLDERS for f in _python_files(ROOT / folder))
    trees = [ast.parse(file.read_text(encoding="utf-8")) for file in files]
    names = raisers(trees)
    for file, tree in zip(files, trees, strict=True):
        for node in ast.walk(tree):
            if isinstance(node, ast.Call) and node.args and _name(node.func) in names:
                for text in templates(node.args[0]):
                    text = re.sub(r"\s+", " ", text).strip()
                    if len(re.findall(r"[A-Za-z]{2,}", text)) > 2:
                        yield text, file.relative_to(ROOT).as_posix()


def _python_files(folder: Path) -> Iterator[Path]:
    """Without those behind the links of fastgrpo/, which are the folders at the top."""
    for entry in folder.iterdir():
        if entry.is_dir() and not entry.is_symlink():
            yield from _python_files(entry)
        elif entry.suffix == ".py":
            yield entry


def _name(node: ast.expr) -> str:
    return (
        node.attr
        if isinstance(node, ast.Attribute)
        else node.id
        if isinstance(node, ast.Name)
        else ""
    )


def area(message: str, module: str) -> str:
    """The heading that a message belongs under."""
    for heading, fronts in AREAS.items():
        if any(
            re.match(rf"{re.escape(front)}(?![a-z])" if front != "--" else "--", message)
            for front in fronts
        ):
            return heading
    return next((heading for folder, heading in BY_FOLDER if module.startswith(folder)), "files")


def page() -> str:
    """The whole page."""
    modules: dict[tuple[str, str], set[str]] = defaultdict(set)
    for message, module in messages():
        modules[area(message, module), message].add(module)
    blocks = [HEAD]
    for heading in AREAS:
        told = [
            (message, sorted(of)) for (where, message), of in modules.items() if where == heading
        ]
        if told:
            told.sort(key=lambda pair: (pair[0].startswith("."), pair))
            blocks.append(
                f"### {heading}\n\n"
                + "\n".join(_bullet(message, of) for message, of in told)
                + "\n"
            )
    return "\n".join(blocks)


def _bullet(message: str, modules: list[str]) -> str:
    tick = "``" if "`" in message else "`"
    room = " " if message[0] == "`" or message[-1] == "`" else ""
    text = f"- {tick}{room}{message}{room}{tick} ({', '.join(modules)})"
    return textwrap.fill(
        text, COLUMNS, subsequent_indent="  ", break_long_words=False, break_on_hyphens=False
    )


def main() -> int:
    if "--check" in sys.argv[1:]:
        if not PAGE.exists() or PAGE.read_text(encoding="utf-8") != page():
            print(
                f"{PAGE.relative_to(ROOT)}: not what the code says; run python "
                "docs/troubleshooting.py",
                file=sys.stderr,
            )
            return 1
        return 0
    PAGE.write_text(page(), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
