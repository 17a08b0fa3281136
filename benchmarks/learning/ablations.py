"""The paper's ablations on the tiny world: every switch, each run in a folder of its own, one
picture per question.

    python -m benchmarks.learning.ablations                                   fifteen short runs
    python -m benchmarks.learning.ablations --iterations 76 --seeds 3      longer, three of each
    python -m benchmarks.learning.ablations --only eta noise               some of the questions
    python -m benchmarks.learning.ablations --without-seconds    on a machine that is not idle

A finished run is not run again, so that the command can be stopped and started, and only draws
where all is done. It writes docs/pictures/ablations/NAME.png and figures.json, and the tables of
docs/guides/algorithms/ablations.md between their markers; the text around them is written by hand.

Variants are compared by the sum of all three parts, whatever they were trained on: held-out
prompts, ODE sampler, the same noise before and after, mean of the seeds. Intervals are over prompts
and, with more than one, over seeds; where the paper claims a difference, its interval says whether
that shows.
"""

import argparse
import json
import os
import platform
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import date
from pathlib import Path

from benchmarks.learning import pictures
from benchmarks.learning.campaign import Trained, Variant, train_all
from fastgrpo.cli import main as cli
from fastgrpo.core.errors import UserError
from fastgrpo.core.files import replace_text
from fastgrpo.core.processes import leave

RECIPE = Path("launch/t2v_tiny.toml")
PAGE = Path("docs/guides/algorithms/ablations.md")
PICTURES = Path("docs/pictures/ablations")
PARTS = ("VQ", "MQ", "TA")
COMMON = (
    "prompts.per_iteration=8",
    "rollout.samples_per_prompt=12",
    "rollout.batch_size=48",
    "objective.best_of_n=none",
    "run.preflight=false",
    "rewards.0.where=process",
    "checkpoint.keep=1",
    "checkpoint.keep_best=false",
    "evaluate.seeds=4",
    "evaluate.clips=0",
)
"""The demo's recipe, smaller and without Best-of-N; iterations and the rate's decay come from the
command line.
"""


@dataclass(frozen=True)
class Claim:
    """What the paper says of a variant, as a difference whose sign can be looked up."""

    words: str
    variant: str
    other: str | None  # the variant that it is set against; None: itself before training
    sign: int  # of the difference, 1 or -1
    parts: tuple[str, ...] = PARTS

    def row(self, trained: Sequence[Trained]) -> list[str]:
        """The claim, the difference here with its interval, and whether it shows."""
        found = {one.variant.name: one for one in trained}
        one = found[self.variant]
        gain = one.against(found[self.other], self.parts) if self.other else one.gain(self.parts)
        if gain is None:
            return [self.words, "a run ended early", "", ""]
        low, high = sorted((self.sign * gain.low, self.sign * gain.high))
        verdict = "yes" if low > 0 else "no, the contrary" if high < 0 else "cannot be told"
        return [
            self.words,
            f"{gain.difference:+.3f}",
            f"{gain.low:+.3f} .. {gain.high:+.3f}",
            verdict,
        ]


@dataclass(frozen=True)
class Question:
    """One ablation: what is varied beside the recipe as it stands."""

    name: str
    title: str
    variants: tuple[Variant, ...]
    claims: tuple[Claim, ...] = ()


def rewards(weights: str, threshold: str = "{}") -> str:
    """The override that trains on other parts; parts of weight 0 are still scored."""
    return f'rewards=[{{name="tiny_world", where="process", weights={weights}, threshold={threshold}}}]'


def binary(threshold: str) -> str:
    """The override that trains on whether parts reach their thresholds."""
    weights = "{VQ=0.0, MQ=0.0, TA=0.0, VQ_above=1.0, MQ_above=1.0, TA_above=1.0}"
    return rewards(weights, threshold)


QUESTIONS = (
    Question(
        "noise",
        "Initial noise",
        (
            Variant("base", "shared by the group"),
            Variant("independent", "independent", ("rollout.shared_noise=false",)),
        ),
        (
            Claim(
                "independent noise is worse than shared noise", "independent", other="base", sign=-1
            ),
        ),
    ),
    Question(
        "timesteps",
        "Trained timesteps",
        (
            Variant("base", "random 0.6"),
            Variant("tau-0.3", "random 0.3", ("objective.timestep_fraction=0.3",)),
            Variant("tau-1.0", "all", ("objective.timestep_fraction=1.0",)),
            Variant(
                "first",
                "first 0.3",
                ("objective.timestep_fraction=0.3", "objective.timestep_choice=first"),
            ),
            Variant(
                "last",
                "last 0.4",
                ("objective.timestep_fraction=0.4", "objective.timestep_choice=last"),
            ),
        ),
    ),
    Question(
        "eta",
        "Noise level",
        (
            Variant("eta-0.1", "eta 0.1", ("rollout.eta=0.1",)),
            Variant("eta-0.3", "eta 0.3 (paper)", ("rollout.eta=0.3",)),
            Variant("base", "eta 0.7 (recipe)"),
            Variant("eta-1.0", "eta 1.0", ("rollout.eta=1.0",)),
        ),
        (Claim("0.1 is too small: worse than 0.3", "eta-0.1", other="eta-0.3", sign=-1),),
    ),
    Question(
        "best_of_n",
        "Best-of-N",
        (
            Variant("all-of-8", "8 drawn, all trained", ("rollout.samples_per_prompt=8",)),
            Variant(
                "best-8-of-16",
                "16 drawn, 4 best and 4 worst",
                (
                    "rollout.samples_per_prompt=16",
                    "objective.best_of_n=8",
                ),
            ),
            Variant("base", "12 drawn, all trained"),
        ),
        (
            Claim(
                "the extremes of more samples learn faster per update",
                "best-8-of-16",
                other="all-of-8",
                sign=1,
            ),
        ),
    ),
    Question(
        "binary",
        "Binary reward",
        (
            Variant("base", "scores"),
            Variant("binary", "scores at least 0.6", (binary("{VQ=0.6, MQ=0.6, TA=0.6}"),)),
            Variant(
                "binary-each",  # what about half of the samples of training reach at its beginning
                "VQ at least 0.5, MQ and TA 0.6",
                (binary("{VQ=0.5, MQ=0.6, TA=0.6}"),),
            ),
        ),
        (Claim("a binary reward teaches", "binary-each", other=None, sign=1),),
    ),
    Question(
        "rewards",
        "One reward or several",
        (
            Variant("vq", "VQ alone", (rewards("{VQ=1.0, MQ=0.0, TA=0.0}"),)),
            Variant("vq-mq", "VQ and MQ", (rewards("{VQ=1.0, MQ=1.0, TA=0.0}"),)),
            Variant("base", "VQ, MQ and TA"),
        ),
        (
            Claim("of several rewards each rises less: VQ alone", "vq", "base", 1, parts=("VQ",)),
            Claim("and what was added rises: MQ", "vq-mq", "vq", 1, parts=("MQ",)),
        ),
    ),
    Question(
        "ddpo",
        "DDPO's objective",
        (
            Variant("base", "GRPO"),
            Variant("ddpo", "DDPO", ("objective.kind=ddpo", "objective.normalise=global")),
        ),
        (Claim("DDPO is worse than GRPO on a flow", "ddpo", other="base", sign=-1),),
    ),
)


def answer(question: Question, arguments: argparse.Namespace) -> list[Trained]:
    """Train what is missing, and draw."""
    common = [
        *COMMON,
        f"run.iterations={arguments.iterations}",
        f"optimizer.decay_updates={arguments.iterations}",
        *arguments.overrides,
    ]
    trained = train_all(
        RECIPE,
        common=common,
        variants=question.variants,
        seeds=range(arguments.seeds),
        folder=arguments.folder,
    )
    pictures.compare(
        trained, PARTS, PICTURES / f"{question.name}.png", not arguments.without_seconds
    )
    return trained


def table(trained: Sequence[Trained], with_seconds: bool) -> str:
    """Markdown: one row per variant, with what it gained, and how it ended against the recipe on
    the same clips.
    """
    recipe = next((one for one in trained if one.variant.name == "base"), None)
    head = ["variant", "after", "gain", "95 % interval", *PARTS, "less recipe's", "95 % interval"]
    head += ["seconds per iteration"] if with_seconds else []
    rows = [head, ["---"] * len(head)]
    for one in trained:
        gain, other = one.gain(PARTS), None
        if gain is None:
            cells = [f"ended: {one.failures[0] if one.failures else 'unfinished'}"]
        else:
            cells = [
                f"{gain.after:.3f}",
                f"{gain.difference:+.3f}",
                f"{gain.low:+.3f} .. {gain.high:+.3f}",
            ]
            cells += [
                f"{of.difference:+.3f}" for part in PARTS if (of := one.gain([part])) is not None
            ]
            other = one.against(recipe, PARTS) if recipe and recipe is not one else None
        cells += (
            [f"{other.difference:+.3f}", f"{other.low:+.3f} .. {other.high:+.3f}"] if other else []
        )
        cells += [""] * (8 - len(cells))
        cells += [f"{one.metric('seconds/total'):.2f}"] if with_seconds else []
        rows.append([one.variant.label, *cells])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def claims(question: Question, trained: Sequence[Trained]) -> str:
    """Markdown: each claim of the paper, and whether its sign shows; empty where there is none."""
    if not question.claims:
        return ""
    rows = [["the paper", "difference here", "95 % interval", "shows"], ["---"] * 4]
    rows += [claim.row(trained) for claim in question.claims]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows) + "\n\n"


def put(page: str, name: str, content: str) -> str:
    """The page with what stands between the markers of `name` replaced.

    Raises UserError where it has none.
    """
    start, end = f"<!-- {name} -->", f"<!-- end of {name} -->"
    if start not in page or end not in page:
        raise UserError(
            f"{PAGE}: lacks the markers '{start}' and '{end}'; put them where the table belongs."
        )
    before, rest = page.split(start, 1)
    return f"{before}{start}\n{content}\n{end}{rest.split(end, 1)[1]}"


def figures(trained: Sequence[Trained], with_seconds: bool) -> dict[str, object]:
    """All that the pictures and tables show, by variant."""
    told: dict[str, object] = {}
    for one in trained:
        gains = {
            name: one.gain(parts)
            for name, parts in (("sum", PARTS), *((part, (part,)) for part in PARTS))
        }
        told[one.variant.name] = {
            "overrides": one.variant.overrides,
            "heldout": {name: gain and asdict(gain) for name, gain in gains.items()},
            "training_reward": [round(float(value), 4) for value in one.curve(PARTS)],
            "failures": one.failures,
        } | (
            {"seconds": [round(float(value), 2) for value in one.seconds()]} if with_seconds else {}
        )
    return told


def setting(arguments: argparse.Namespace) -> str:
    """Under which circumstances a question was answered."""
    of = " ".join(arguments.overrides)
    return (
        f"{date.today()}, {os.cpu_count()} cores of {platform.machine()}: {arguments.iterations} "
        "iterations, "
        f"{arguments.seeds} seeds{of and ', '}{of}"
    )


def write(question: Question, trained: Sequence[Trained], timed: bool, how: str) -> None:
    """One question's table in the page, and its figures in the file beside its picture."""
    block = f"![{question.title}](../../pictures/ablations/{question.name}.png)\n\n{table(trained, timed)}\n\n"
    block += claims(question, trained) + how
    replace_text(PAGE, put(PAGE.read_text(encoding="utf-8"), question.name, block))
    file = PICTURES / "figures.json"
    told = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    told[question.name] = {"setting": how, "variants": figures(trained, timed)}
    replace_text(file, json.dumps(told, indent=1) + "\n")
    print(f"{question.name}: {PAGE} and {PICTURES} written", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="for every run")
    parser.add_argument(
        "--iterations", type=int, default=20, help="of each run (default: %(default)s)"
    )
    parser.add_argument(
        "--seeds", type=int, default=1, help="runs of each variant (default: %(default)s)"
    )
    parser.add_argument(
        "--only", nargs="+", choices=[question.name for question in QUESTIONS], metavar="QUESTION"
    )
    parser.add_argument(
        "--folder", type=Path, default=Path("runs/ablations"), help="of the runs (%(default)s)"
    )
    parser.add_argument(
        "--without-seconds", action="store_true", help="do not show what the runs took"
    )
    arguments = parser.parse_args()
    cli.quiet_libraries()
    timed = not arguments.without_seconds
    for question in QUESTIONS:
        if not arguments.only or question.name in arguments.only:
            trained = answer(question, arguments)
            write(question, trained, timed, setting(arguments))
    leave(0)


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        raise SystemExit(f"ablations: {error}") from None
    except KeyboardInterrupt:
        raise SystemExit("ablations: stopped; start again to go on") from None
