"""The jobs that are rehearsed: every launch file, meshes and switches, and the other commands.

Arguments may hold {work}, the folder of all jobs; "@FILE" stands for the lines of a file there.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from tests import ROOT
from tests.harness.folders import launch_files
from tests.rehearsal.plants import PLANTS

TINY = (
    "run.iterations=1",
    "prompts.limit=20",
    "prompts.per_iteration=2",
    "rollout.samples_per_prompt=4",
    "rollout.steps=4",
    "rollout.batch_size=4",
    "objective.best_of_n=none",
    "optimizer.batch_size=8",
    "optimizer.updates_per_iteration=2",
    "optimizer.ema_decay=0.5",
    "evaluate.prompts=1",
    "evaluate.seeds=1",
    "evaluate.clips=0",
    "rewards.0.where=process",
)
RECIPE = "launch/t2v_tiny.toml"
FLOAT32, BF16 = 1e-4, 5e-2
"""Tolerances: attention takes another path than on the CPU, which rounds otherwise."""

LOOSE = {"t2i_qwen": 1e-3, "t2v_wan22_a14b": 1e-3}
"""Tolerances of single jobs: 4.6e-4 and 2.8e-4 of the gradient's norm were measured. Guidance divides
by a token's length in the first; advantages divide by a small spread of rewards.
"""

LARGER = ("t2i_flux2", "t2i_sd", "t2v_hunyuan15", "i2v_hunyuan15", "i2v_wan", "i2v_wan_lora")
GB, MORE_GB = 0.0625, dict.fromkeys(LARGER, 0.25)
"""GiB of each device: somewhat more than the largest of the jobs takes."""
OFTEN = {
    "t2i_qwen": ("objective.timestep_fraction=0.99",),
    "t2i_zimage": ("objective.timestep_fraction=0.99",),
    "t2v_hunyuan_fast": ("rollout.window=4", "rollout.window_schedule=progressive"),
    "t2v_hunyuan15_lora": ("objective.timestep_fraction=0.99", "rollout.window=none"),
    "i2v_hunyuan15_lora": ("objective.timestep_fraction=0.99", "rollout.window=none"),
}
"""Overrides of recipes whose few trained states would leave an update nothing to evaluate again."""

FAULTS: dict[str, tuple[str, ...]] = {}
"""Known faults of the product, by job: taken out when they are mended."""


@dataclass(frozen=True, kw_only=True)
class Job:
    """One command on the rehearsed device, and what must come of it."""

    name: str
    arguments: tuple[str, ...]
    module: str = "fastgrpo.cli"  # or a file, with a slash
    ranks: int = 2  # 0: by itself, without torchrun
    gb: float = GB  # GiB of each device
    materials: tuple[str, ...] = ()  # of materials.py, {work}/KIND
    after: tuple[str, ...] = ()  # jobs whose run this one reads
    replicas: int = 0  # reward servers that run beside it
    like: str | None = None  # the job that has the same numbers, on the plain CPU path
    tolerance: float = FLOAT32  # relative, of these numbers
    cpu: bool = False  # on the plain CPU path, for others to be compared with
    plant: str | None = None  # a fault of plants.py
    rounds: bool = False  # as with `rounding` below
    faults: tuple[str, ...] = ()  # parts of findings that a known fault of the product causes


def run_folder(name: str) -> str:
    """The run of a job."""
    return f"{{work}}/{name}/run"


def tiny(name: str, *overrides: str) -> tuple[str, ...]:
    """Arguments of a training run of the shipped tiny model."""
    return ("train", RECIPE, *TINY, f"run.dir={run_folder(name)}", *overrides)


MESHES: dict[str, tuple[int, str, tuple[str, ...]]] = {
    "one": (0, "cpu", ()),
    "fsdp": (2, "cpu", ()),
    "sp": (2, "cpu", ("distributed.sp=2",)),
    "hsdp": (4, "cpu", ("distributed.shard=2",)),
    "hsdp_sp_sharded": (
        4,
        "cpu",
        ("distributed.shard=2", "distributed.sp=2", "distributed.rollout_weights=sharded"),
    ),
    "offload": (2, "cpu", ("distributed.offload=true", "optimizer.batch_size=2")),
    "background": (2, "cpu", ("checkpoint.background=true",)),
    "on_the_way": (2, "cpu", ("evaluate.every=1", "evaluate.seeds=2", "checkpoint.every=1")),
    "lora": (2, "cpu_lora", ("lora.rank=4",)),
    "host_store_auto": (2, "cpu", ("rollout.store=host", "rollout.batch_size=auto")),
    "bf16_recompute": (
        2,
        "cpu_bf16",
        ("model.dtype=bfloat16", "model.gradient_checkpointing=true"),
    ),
    "kl_guard": (2, "cpu_kl_guard", ("objective.kl_weight=0.01", "objective.kind=guard")),
    "ddpo": (2, "cpu_ddpo", ("objective.kind=ddpo", "objective.normalise=global")),
    "dppo_best_of_n": (2, "cpu_dppo", ("objective.kind=dppo", "objective.best_of_n=2")),
    "nft": (2, "cpu_nft", ("objective.kind=nft", "rollout.shared_noise=false")),
    "awm": (2, "cpu_awm", ("objective.kind=awm", "rollout.shared_noise=false")),
    "scouts": (
        2,
        "cpu_scouts",
        (
            "rollout.window=1",
            "rollout.window_schedule=per_prompt",
            "rollout.seeds_per_prompt=2",
            "rollout.scouts=4",
            "rollout.scout_steps=2",
            "distributed.rollout_weights=sharded",
        ),
    ),
}
"""By name: ranks, the CPU's job, overrides."""


def meshes() -> list[Job]:
    """The tiny model on meshes and with switches, each with the CPU's numbers."""
    found = [
        Job(
            name=name,
            ranks=ranks,
            arguments=tiny(name, *overrides),
            like=cpu,
            tolerance=BF16 if cpu == "cpu_bf16" else FLOAT32,
            faults=FAULTS.get(name, ()),
        )
        for name, (ranks, cpu, overrides) in MESHES.items()
    ]
    return [*(_cpu(job) for job in _first_of_each(found)), *found]


def _first_of_each(jobs: list[Job]) -> list[Job]:
    """One job of each set of numbers that is compared."""
    first: dict[str | None, Job] = {}
    for job in jobs:
        first.setdefault(job.like, job)
    return list(first.values())


def _cpu(job: Job) -> Job:
    """The same job on the plain CPU path, by one process."""
    assert job.like is not None
    own, other = (f"run.dir={run_folder(name)}" for name in (job.like, job.name))
    arguments = tuple(own if argument == other else argument for argument in job.arguments)
    return Job(
        name=job.like,
        arguments=arguments,
        module=job.module,
        ranks=0,
        materials=job.materials,
        cpu=True,
    )


def launches() -> list[Job]:
    """Every launch file on two ranks, from tiny folders, each with the CPU's numbers."""
    found = [Job(name="t2v_tiny", arguments=tiny("t2v_tiny", "rewards.0.where=server"), like="cpu")]
    for name, (family, _) in launch_files.LAUNCH.items():
        model, images = f"{{work}}/{family}", "{work}/images/prompts.jsonl"
        settings = launch_files.arguments(name, model, run_folder(name), images)
        found.append(
            Job(
                name=name,
                module=str(ROOT / "launch" / f"{name}.sh"),
                arguments=(*settings, "run.iterations=1"),
                materials=(family, *(["images"] if launch_files.reads_image(name) else [])),
                gb=MORE_GB.get(name, GB),
                like=f"cpu_{name}",
                tolerance=LOOSE.get(name, FLOAT32),
            )
        )
    return [*(_cpu(job) for job in found[1:]), *found]


def rounding() -> list[Job]:
    """Every launch file in bfloat16, with products that round otherwise for other batch sizes.

    Its two optimizer steps change nothing, so that nothing may be clipped.
    """
    unmoved = (
        "run.iterations=1",
        "run.preflight=false",
        "model.dtype=bfloat16",
        "rollout.batch_size=2",
        "optimizer.batch_size=3",
        "optimizer.updates_per_iteration=2",
        "optimizer.lr=1e-30",
    )
    found = [Job(name="rounds_t2v_tiny", arguments=tiny("rounds_t2v_tiny", *unmoved), rounds=True)]
    for name, (family, _) in launch_files.LAUNCH.items():
        model, images = f"{{work}}/{family}", "{work}/images/prompts.jsonl"
        settings = launch_files.arguments(name, model, run_folder(f"rounds_{name}"), images)
        found.append(
            Job(
                name=f"rounds_{name}",
                module=str(ROOT / "launch" / f"{name}.sh"),
                arguments=(*settings, *unmoved, *OFTEN.get(name, ())),
                materials=(family, *(["images"] if launch_files.reads_image(name) else [])),
                gb=MORE_GB.get(name, GB),
                rounds=True,
            )
        )
    return found


def commands() -> list[Job]:
    """The other commands, on a run of `fsdp`; rewards in the process and behind two replicas."""
    run = run_folder("fsdp")
    return [
        Job(
            name="embed",
            arguments=("embed", RECIPE, *TINY, f"run.dir={run_folder('embed')}"),
        ),
        *(
            Job(
                name=f"embed_{way}",
                arguments=("embed", *tiny(f"embed_{way}", f"model.text_encoders={way}")[1:]),
            )
            for way in ("sharded", "streamed")
        ),
        Job(
            name="preflight",
            arguments=("preflight", *tiny("preflight", "checkpoint.background=true")[1:]),
        ),
        Job(name="evaluate", arguments=("evaluate", run, "--limit", "2"), after=("fsdp",)),
        Job(
            name="sample",
            arguments=("sample", run, "--against-base", "--limit", "2", "--out", "{work}/clips"),
            after=("fsdp",),
        ),
        Job(
            name="score",
            ranks=0,
            arguments=(
                "score",
                "{work}/clips",
                "--reward",
                "video_stats",
                "--reward",
                "tiny_world",
            ),
            after=("sample",),
        ),
        Job(
            name="export",
            ranks=0,
            arguments=("export", run, "{work}/exported"),
            after=("fsdp",),
        ),
        Job(
            name="resume",
            arguments=("train", RECIPE, *TINY, f"run.dir={run}", "run.iterations=2"),
            after=("fsdp",),
        ),
        Job(
            name="in_process",
            arguments=tiny("in_process", "@{work}/scorers/overrides", "rollout.store=host"),
            materials=("scorers",),
        ),
        Job(
            name="replicas",
            arguments=tiny("replicas", "rewards.0.where=server"),
            materials=("token",),
            replicas=2,
            like="cpu",
        ),
    ]


UNPLANTED = "unplanted"


def planted(names: Iterable[str]) -> list[Job]:
    """A run for each of these faults of plants.py, after one without a fault to compare with."""
    short = ("run.preflight=false",)
    found = [Job(name=UNPLANTED, arguments=tiny(UNPLANTED, *short))]
    for name in names:
        arguments = tiny(name, *short, *PLANTS[name].overrides)
        found.append(Job(name=name, arguments=arguments, plant=name, like=UNPLANTED))
    return found


def table() -> list[Job]:
    """Every job of `make rehearse`, in an order in which what is read is there."""
    return [*meshes(), *launches(), *rounding(), *commands()]


def chosen(names: list[str]) -> list[Job]:
    """The jobs of these names, all without one, and the jobs that they are compared with or read.

    Raises SystemExit for a name that is none.
    """
    everything = {job.name: job for job in table()}
    unknown = [name for name in names if name not in everything]
    if unknown:
        raise SystemExit(f"{unknown[0]}: no such job; one of {', '.join(everything)}")
    wanted, todo = set[str](), list(names or everything)
    while todo:
        job = everything[todo.pop()]
        if job.name not in wanted:
            wanted.add(job.name)
            todo += [*job.after, *([job.like] if job.like else [])]
    return [job for name, job in everything.items() if name in wanted]


def place(text: str, work: Path) -> str:
    """An argument with the folder put in."""
    return text.replace("{work}", str(work))
