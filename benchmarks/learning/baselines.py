"""The paper's comparison with other methods on the tiny world: GRPO, DDPO, online DPO and ReFL.

    python -m benchmarks.learning.baselines                      all four, three seeds, Table 4
    python -m benchmarks.learning.baselines --iterations 76 --only grpo refl
    python -m benchmarks.learning.baselines --capabilities       Table 1 alone, which runs nothing
    python -m benchmarks.learning.baselines --rates 1e-4 5e-4 --only dpo      a rate's search, seed 3

As the paper's Table 4, each method is trained from the same weights on the same reward and
judged on held-out prompts with the ODE sampler, the same noise before and after; intervals are of
the paired difference over prompts, see `campaign.paired`. Every method draws as many samples of
as many prompts in an iteration; what it trains of them is its own. Rates are those of `--rates`'
search on a seed that the comparison does not use. Finished runs are not run again.
"""

import argparse
import os
import platform
from collections.abc import Sequence
from datetime import date
from pathlib import Path

from benchmarks.learning import pictures
from benchmarks.learning.campaign import Trained, Variant, ensure, train_all
from fastgrpo import rewards
from fastgrpo.cli import main as cli
from fastgrpo.core import config
from fastgrpo.core.errors import UserError
from fastgrpo.core.method import Traits
from fastgrpo.core.processes import leave
from fastgrpo.tools.report.run_data import read_run
from fastgrpo.training import methods

RECIPE = Path("launch/t2v_tiny.toml")
PICTURE = Path("docs/pictures/baselines.png")
PARTS = ("VQ", "MQ", "TA")
TUNED_ON = 3
"""The seed of the rates' search: the comparison has seeds 0, 1 and 2."""
COMMON = (
    "rollout.batch_size=32",
    "optimizer.batch_size=32",
    "optimizer.ema_decay=0",
    "run.preflight=false",
    "rewards.0.where=process",
    "checkpoint.keep=1",
    "checkpoint.keep_best=false",
    "evaluate.clips=0",
)
OWN_NOISE = "rollout.shared_noise=false"
ARMS = (
    Variant("grpo", "GRPO", ("objective.best_of_n=none", "optimizer.lr=2.5e-4")),
    Variant(
        "ddpo",
        "DDPO",
        (
            "objective.kind=ddpo",
            "objective.normalise=global",
            "objective.best_of_n=none",
            OWN_NOISE,
            "optimizer.lr=2.5e-4",
        ),
    ),
    Variant(
        "dpo",
        "DPO, online",
        ("objective.kind=dpo", "objective.best_of_n=2", OWN_NOISE, "optimizer.lr=2.5e-4"),
    ),
    Variant(
        "refl",
        "ReFL",
        (
            "objective.kind=refl",
            "objective.refl_last=3",
            "objective.timestep_fraction=0.16",
            "objective.best_of_n=none",
            OWN_NOISE,
            "model.decode_batch=8",
            "optimizer.lr=2.5e-4",
        ),
    ),
)


def capabilities() -> str:
    """Markdown: what each method is able to do, as its file declares it (the paper's Table 1)."""
    head = ["method", "flows", "diffusion", "rewards without a gradient", "served rewards"]
    head += ["draws with noisy steps", "initial policy"]
    rows = [head, ["---"] * len(head)]
    for name in methods.known():
        traits = methods.traits_of(name)
        able = [True, traits.noisy_steps or traits.differentiates]
        able += [not traits.differentiates, not traits.differentiates, traits.noisy_steps]
        cells = ["yes" if one else "no" for one in able]
        rows.append([f"`{name}`", *cells, initial_policy(traits)])
    with_gradient = [
        name for name in rewards.known() if rewards.differentiable(rewards.plain(name))
    ]
    table = "\n".join(f"| {' | '.join(row)} |" for row in rows)
    return f"{table}\n\nRewards with a gradient: {', '.join(with_gradient)}."


def initial_policy(traits: Traits) -> str:
    """When a method needs the initial policy."""
    return "always" if traits.pairs else f"with `{traits.reference_key}`"


def table(trained: Sequence[Trained]) -> str:
    """Markdown: one row per method (the paper's Table 4), against the first on the same clips."""
    head = ["method", "before", "after", "gain", "95 % interval", *PARTS]
    head += [f"less {trained[0].variant.label}'s", "95 % interval", "seconds per iteration"]
    rows = [head, ["---"] * len(head)]
    for one in trained:
        gain = one.gain(PARTS)
        if gain is None:
            ended = one.failures[0] if one.failures else "unfinished"
            rows.append([one.variant.label, f"ended: {ended}", *[""] * (len(head) - 2)])
            continue
        cells = [f"{gain.before:.3f}", f"{gain.after:.3f}", f"{gain.difference:+.3f}"]
        cells.append(f"{gain.low:+.3f} .. {gain.high:+.3f}")
        parts = [one.gain([part]) for part in PARTS]
        cells += [f"{part.difference:+.3f}" for part in parts if part is not None]
        other = one.against(trained[0], PARTS) if one is not trained[0] else None
        cells += ["", ""]
        if other is not None:
            cells[-2:] = [f"{other.difference:+.3f}", f"{other.low:+.3f} .. {other.high:+.3f}"]
        rows.append([one.variant.label, *cells, f"{one.metric('seconds/total'):.2f}"])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def search(
    common: Sequence[str], arms: Sequence[Variant], rates: Sequence[float], folder: Path
) -> list[Trained]:
    """Each method with each rate on the seed that is not compared, in folders of their own."""
    trained = []
    for arm in arms:
        for rate in rates:
            place = folder / f"{arm.name}-{rate:g}-{TUNED_ON}"
            switches = (*arm.overrides, f"optimizer.lr={rate:g}", f"run.seed={TUNED_ON}")
            cache = f"prompts.cache={folder / 'embeddings'}"
            recipe = config.load(RECIPE, [*common, *switches, cache, f"run.dir={place}"])
            failure = ensure(recipe, tell=print)
            variant = Variant(place.name, f"{arm.label}, lr {rate:g}", switches)
            trained.append(Trained(variant, [read_run(place)], [failure] if failure else []))
    return trained


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="for every run")
    for name, value, what in (
        ("iterations", 40, "of each run"),
        ("seeds", 3, "runs of each method"),
        ("prompts", 4, "per iteration"),
        ("samples", 8, "of a prompt"),
        ("heldout", 24, "held-out prompts"),
    ):
        parser.add_argument(
            f"--{name}", type=int, default=value, help=f"{what} (default: %(default)s)"
        )
    names = [arm.name for arm in ARMS]
    parser.add_argument("--only", nargs="+", choices=names, default=names, help="methods")
    parser.add_argument(
        "--rates", nargs="+", type=float, help="learning rates to try on one other seed"
    )
    parser.add_argument("--capabilities", action="store_true", help="print Table 1 and end")
    parser.add_argument(
        "--folder", type=Path, default=Path("runs/baselines"), help="of the runs (%(default)s)"
    )
    parser.add_argument("--picture", type=Path, default=PICTURE, help="default: %(default)s")
    return parser.parse_args()


def main() -> None:
    arguments = parsed()
    if arguments.capabilities:
        print(capabilities())
        return
    cli.quiet_libraries()
    arms = [arm for arm in ARMS if arm.name in arguments.only]
    common = [
        *COMMON,
        f"run.iterations={arguments.iterations}",
        f"optimizer.decay_updates={arguments.iterations}",
        f"prompts.per_iteration={arguments.prompts}",
        f"rollout.samples_per_prompt={arguments.samples}",
        f"evaluate.prompts={arguments.heldout}",
        *arguments.overrides,
    ]
    if arguments.rates:
        trained = search(common, arms, arguments.rates, arguments.folder)
    else:
        trained = train_all(
            RECIPE, common, variants=arms, seeds=arguments.seeds, folder=arguments.folder
        )
        pictures.compare(trained, PARTS, arguments.picture, by_seconds=True)
    print(table(trained))
    seeds = [TUNED_ON] if arguments.rates else [*range(arguments.seeds)]
    print(
        f"{date.today()}, {os.cpu_count()} cores of {platform.machine()}: {arguments.iterations} "
        f"iterations of {arguments.prompts} prompts with {arguments.samples} samples, seeds {seeds}; "
        f"{' '.join(arguments.overrides) or 'no overrides'}"
    )
    leave(0)


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        raise SystemExit(f"baselines: {error}") from None
    except KeyboardInterrupt:
        raise SystemExit("baselines: stopped; start again to go on") from None
