"""Every table and figure of DanceGRPO (arXiv 2505.07818): its runs, its output, what is left open.

A run is a file of launch/ with switches; nothing here trains. GPUs are the paper's numbers. What
the paper does not state is listed with the entry and never filled in silently.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Literal

from fastgrpo.core.errors import UserError

Output = Literal["table", "curves", "pictures", "study", "settings"]


@dataclass(frozen=True, kw_only=True)
class Run:
    """A training run of an entry."""

    name: str
    """Folder of the run, and its name in messages."""
    row: str
    """Row of the table, or legend of the figure."""
    recipe: str
    """A file of launch/, without .toml."""
    gpus: int
    trained: Mapping[str, float]
    """Column -> weight of its reward's advantage."""
    thresholds: Mapping[str, float] = field(default_factory=dict)
    """Column -> value from which its reward counts as 1."""
    switches: tuple[str, ...] = ()
    """section.key=value, beside the recipe."""
    baseline: str = ""
    """The other method that the run stands for; "" = the paper's own."""


@dataclass(frozen=True, kw_only=True)
class Entry:
    """A table or a figure."""

    title: str
    output: Output
    runs: tuple[Run, ...] = ()
    benchmark: str | None = None
    own_column: bool = False
    """Whether a run fills only the columns that it is trained on."""
    curves: tuple[str, ...] = ()
    """Columns whose rewards are drawn over iterations."""
    prompts: tuple[str, ...] = ()
    """Those of the pictures; empty: the recipe's held-out ones."""
    steps: tuple[int, ...] = ()
    """Iterations whose pictures are shown; empty: the newest checkpoint."""
    seeds: int = 1
    """Pictures per prompt."""
    diversity: bool = False
    """Whether it is also measured how much these differ."""
    stated: tuple[str, ...] = ()
    """What the paper says of it."""
    open: tuple[str, ...] = ()
    """What the paper leaves open, and what is taken."""


HPS, CLIP = "HPS-v2.1", "CLIP"
CFG_NOTE = "guidance in training: the public script's 5.0"
CLIP_MODEL = "which CLIP: the author's DFN5B (issue 19), who mixes 0.7 to 1.4; here 1 to 1"
CURVES = "the moving average's window: 10 iterations here"
BASELINES = (
    "every hyper-parameter of DDPO, ReFL and DPO, none of which is in the public code: the recipe's "
    "with each method's defaults; a method that refuses this model leaves its row unmeasured"
)


def _run(name: str, row: str, base: tuple[str, int], *columns: str) -> Run:
    """A run that trains on these columns, weight 1 each.  base: recipe, GPUs"""
    trained = dict.fromkeys(columns, 1.0)
    return Run(name=name, row=row, recipe=base[0], gpus=base[1], trained=trained)


def _with(run: Run, *switches: str, baseline: str = "") -> Run:
    """A run with switches."""
    return replace(run, switches=switches, baseline=baseline)


SD, FLUX, T2I = ("t2i_sd", 8), ("t2i_flux", 32), ("t2i_hunyuan", 32)
T2V, I2V = ("t2v_hunyuan", 64), ("i2v_skyreels", 32)
SD_HPS = _run("sd-hps", "SD v1.4 + HPS-v2.1", SD, HPS)
SD_BOTH = _run("sd-hps-clip", "SD v1.4 + HPS-v2.1 & CLIP", SD, HPS, CLIP)
FLUX_HPS = _run("flux-hps", "FLUX + HPS-v2.1", FLUX, HPS)
FLUX_BOTH = _run("flux-hps-clip", "FLUX + HPS-v2.1 & CLIP", FLUX, HPS, CLIP)
T2I_HPS = _run("hunyuan-t2i-hps", "HunyuanVideo-T2I + HPS-v2.1", T2I, HPS)
T2I_BOTH = _run("hunyuan-t2i-hps-clip", "HunyuanVideo-T2I + HPS-v2.1 & CLIP", T2I, HPS, CLIP)
HUNYUAN = _run("hunyuan-vq-mq", "HunyuanVideo + VQ & MQ", T2V, "VQ", "MQ")
SKYREELS = _run("skyreels-mq", "SkyReels-I2V + MQ", I2V, "MQ")
NO_GROUP_NOISE = "rollout.shared_noise=false"
DDPO = ("objective.kind=ddpo", "objective.normalise=global")
METHODS: dict[str, tuple[str, ...]] = {
    "DanceGRPO": (),
    "DDPO": (*DDPO, NO_GROUP_NOISE),
    "ReFL": (
        "objective.kind=refl",
        NO_GROUP_NOISE,
        "objective.timestep_fraction=0.0199",
        "optimizer.batch_size=4",
    ),
    "DPO": ("objective.kind=dpo", NO_GROUP_NOISE, "objective.best_of_n=2"),
}
"""Table 4's rows, and the switches of each; 0.0199 of 50 steps is one step, and ReFL's gradient goes
through the decoder, which has no room for 16 samples at once.
"""


def _methods() -> tuple[Run, ...]:
    """Table 4's runs: each method on each reward alone."""
    found = []
    for method, switches in METHODS.items():
        for short, column in (("hps", HPS), ("clip", CLIP)):
            own = method == "DanceGRPO"
            name = f"sd-{short}" if own else f"sd-{short}-{method.lower()}"
            run = _run(name, method, SD, column)
            found.append(_with(run, *switches, baseline="" if own else method))
    return tuple(found)


def _steps() -> tuple[Run, ...]:
    """Figure 4b's runs."""
    chosen = {
        "first-30": ("first", 0.3),
        "random-30": ("random", 0.3),
        "last-40": ("last", 0.4),
        "random-60": ("random", 0.6),
        "all": ("random", 1.0),
    }
    return tuple(
        _with(
            _run(
                f"hunyuan-t2i-{name}",
                name.replace("-", " ") + (" %" if name != "all" else ""),
                T2I,
                HPS,
            ),
            f"objective.timestep_choice={choice}",
            f"objective.timestep_fraction={share}",
        )
        for name, (choice, share) in chosen.items()
    )


PICTURES = "prompts, seeds and sizes, in part or in full"
MORE_PICTURES = Entry(
    title="Figures 10 to 19: more pictures and clips",
    output="pictures",
    runs=(FLUX_HPS, T2I_HPS, T2I_BOTH, HUNYUAN, SKYREELS),
    stated=("FLUX, HunyuanVideo-T2I with HPS and with HPS & CLIP, HunyuanVideo, SkyReels",),
    open=(PICTURES, "which of the ten shows what is not told apart here"),
)
ENTRIES: dict[str, Entry] = {
    "table1": Entry(
        title="Table 1: what DDPO/DPOK, ReFL, DPO and DanceGRPO can do",
        output="settings",
        stated=("ticks and crosses, nothing measured",),
        open=(
            "nothing to run: each method is a switch, whose options `fastgrpo keys` lists",
            "DDPO and DPOK [baselines]: objective.kind=ddpo",
            "ReFL [baseline]: objective.kind=refl",
            "DPO [baseline]: objective.kind=dpo",
            "DanceGRPO: objective.kind=grpo",
        ),
    ),
    "table2": Entry(
        title="Table 2: Stable Diffusion v1.4",
        output="table",
        benchmark="table2",
        runs=(SD_HPS, SD_BOTH),
        stated=("50 sampling steps in training",),
        open=(CFG_NOTE, CLIP_MODEL),
    ),
    "table3": Entry(
        title="Table 3: FLUX",
        output="table",
        benchmark="table3",
        runs=(FLUX_HPS, FLUX_BOTH),
        stated=("the prompts of Table 2", "HPS alone lowers CLIP and GenEval"),
        open=(CLIP_MODEL,),
    ),
    "table4": Entry(
        title="Table 4: DanceGRPO, DDPO, ReFL and DPO, each reward alone",
        output="table",
        benchmark="table4",
        own_column=True,
        runs=_methods(),
        open=(BASELINES, CFG_NOTE, CLIP_MODEL),
    ),
    "table5": Entry(
        title="Table 5: HunyuanVideo",
        output="table",
        benchmark="table5",
        runs=(HUNYUAN,),
        stated=("trained on VQ and MQ; TA and VisionReward are measured",),
        open=(
            "frames, frames per second and size of the evaluation",
            "the formula of VisionReward's probability version",
        ),
    ),
    "table6": Entry(
        title="Table 6: hyper-parameters",
        output="settings",
        runs=(SD_HPS, FLUX_HPS, T2I_HPS, HUNYUAN, SKYREELS),
        stated=(
            "lr 1e-5, 32 prompts x 12 samples, 4 updates, clip 1e-4, noise 0.3, share 0.6; 50 steps "
            "(SD), 25 (FLUX, HunyuanVideo)",
        ),
        open=("warm-up, weight decay, iterations; with guidance in training one update",),
    ),
    "figure1": Entry(
        title="Figure 1: HPS while training",
        output="curves",
        curves=(HPS,),
        runs=(SD_HPS, FLUX_HPS, T2I_HPS, T2I_BOTH),
        stated=("HunyuanVideo-T2I about 0.23 to 0.33",),
        open=(CURVES, "which of the runs has CLIP added: HunyuanVideo-T2I is taken"),
    ),
    "figure2": Entry(
        title="Figure 2: VideoAlign while training",
        output="curves",
        curves=("VQ", "MQ"),
        runs=(HUNYUAN, SKYREELS),
        stated=("HunyuanVideo: MQ +181 %, VQ +56 %; SkyReels: MQ +118 %",),
        open=(CURVES, "absolute values of SkyReels, so that its percentage has no base"),
    ),
    "figure3a": Entry(
        title="Figure 3a: binary reward",
        output="curves",
        curves=(HPS, CLIP),
        runs=(
            replace(_run("sd-binary-hps", "HPS above 0.28", SD, HPS), thresholds={HPS: 0.28}),
            replace(_run("sd-binary-clip", "CLIP above 0.39", SD, CLIP), thresholds={CLIP: 0.39}),
        ),
        stated=("thresholds 0.28 and 0.39, Stable Diffusion",),
        open=(CURVES, "whether both are trained together: each alone is taken"),
    ),
    "figure3b": Entry(
        title="Figure 3b: human study",
        output="study",
        runs=(FLUX_HPS, HUNYUAN, SKYREELS),
        stated=(
            "240 prompts (FLUX), 200 (HunyuanVideo), 200 with images (SkyReels); artists rate",
        ),
        open=(
            "raters, votes per pair, ties, question, blinding, checkpoint and reward of each model; "
            "`fastgrpo study` has answers of its own",
        ),
    ),
    "figure4a": Entry(
        title="Figure 4a: Best-of-N",
        output="curves",
        curves=(HPS,),
        runs=tuple(
            _with(
                _run(f"sd-best-of-{n}", f"best 8 and worst 8 of {n}", SD, HPS),
                f"rollout.samples_per_prompt={n}",
                "objective.best_of_n=16",
            )
            for n in (16, 64, 256)
        ),
        stated=("more samples converge in fewer updates",),
        open=(CURVES, "whether advantages are normalised before the choice: before, as the code"),
    ),
    "figure4b": Entry(
        title="Figure 4b: which timesteps are trained",
        output="curves",
        curves=(HPS,),
        runs=_steps(),
        stated=("first 30 %, random 30 %, last 40 %, random 60 %, 100 %; HunyuanVideo-T2I",),
        open=(CURVES, '"three conditions" are announced and five listed'),
    ),
    "figure4c": Entry(
        title="Figure 4c: noise level",
        output="curves",
        curves=(HPS,),
        runs=tuple(
            _with(_run(f"flux-eta-{eta}", f"eta {eta}", FLUX, HPS), f"rollout.eta={eta}")
            for eta in (0.1, 0.3, 0.5)
        ),
        stated=("lower than 0.3 is much worse, above it pictures are sometimes noisy; FLUX",),
        open=(CURVES, "the values beside 0.3: 0.1 and 0.5 are taken"),
    ),
    "figure5": Entry(
        title="Figure 5: DDPO's objective in a flow's SDE",
        output="curves",
        curves=(HPS,),
        runs=(
            FLUX_HPS,
            _with(_run("flux-hps-ddpo", "DDPO", FLUX, HPS), *DDPO, baseline="DDPO"),
        ),
        stated=("it diverges",),
        open=(CURVES, "model and learning rate: FLUX with the recipe's are taken"),
    ),
    "figure6": Entry(
        title="Figure 6: FLUX over iterations",
        output="pictures",
        runs=(
            _with(
                _run("flux-hps-300", "FLUX + HPS-v2.1", FLUX, HPS),
                "run.iterations=300",
                "checkpoint.every=60",
                "checkpoint.keep=5",
            ),
        ),
        steps=(0, 60, 120, 180, 240, 300),
        prompts=(
            "a blue sports car parked on the road, metal texture",
            "a basketball player with number 23",
            "a boy cycling on a country road",
        ),
        stated=("iterations 0, 60, 120, 180, 240, 300",),
        open=("seed and size", "the prompts are given beside the pictures and shortened here"),
    ),
    "figure7": Entry(
        title="Figure 7: diversity before and after",
        output="pictures",
        runs=(FLUX_HPS,),
        seeds=8,
        diversity=True,
        stated=("several seeds of a prompt look alike after training",),
        open=(
            "model, prompts and number of seeds: FLUX and 8 are taken",
            "metric: mean 1 - cosine of CLIP's image vectors over pairs of seeds, ours",
        ),
    ),
    "figure8": Entry(
        title="Figure 8: independent initial noise",
        output="pictures",
        runs=(
            HUNYUAN,
            _with(_run("hunyuan-own-noise", "independent noise", T2V, "VQ", "MQ"), NO_GROUP_NOISE),
        ),
        stated=("independent noise leads to reward hacking in video",),
        open=(PICTURES,),
    ),
    "figure9": Entry(
        title="Figure 9: HPS alone and with CLIP",
        output="pictures",
        runs=(FLUX_HPS, FLUX_BOTH),
        prompts=("A photo of cup",),
        stated=("HPS alone looks oily, with CLIP natural",),
        open=("model and seed: FLUX is taken",),
    ),
} | {f"figure{n}": MORE_PICTURES for n in range(10, 20)}
"""By the name that the command takes."""


def entry_of(text: str) -> tuple[str, Entry]:
    """An entry by its name: table2, "Table 2", fig4a. Raises UserError for another name."""
    name = re.sub(r"[\s._-]", "", text.lower())
    name = re.sub(r"^fig(?!ure)", "figure", name)
    if name not in ENTRIES:
        raise UserError(
            f"TABLE_OR_FIGURE={text}: the paper has none of that name; use one of "
            f"{', '.join(ENTRIES)}."
        )
    return name, ENTRIES[name]
