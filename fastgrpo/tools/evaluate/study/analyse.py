"""What the votes of a study say: win rates, agreement of raters, bias to a side.

- **Win rate**: wins over wins and losses, ties left out, with Wilson's 95 % interval: of votes, of
  raters and of prompts, where a rater or a prompt counts once, by the majority of its votes. Votes
  of one rater or prompt are not independent, so that the interval of votes is too narrow to speak
  of other raters and prompts; the two-way bootstrap resamples both (Owen, 2007).
- **Agreement**: Krippendorff's alpha for nominal data (run, against, tie), which allows for pairs
  with few votes; where all have n votes in total and equally many, 1 - alpha is (1 - Fleiss'
  kappa)(n - 1)/n.
- **Bias**: the share of left among the votes that are no ties. Sides are drawn at random, so it is
  1/2 but for chance whichever model is better.
"""

import json
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from statistics import NormalDist

import numpy as np
from numpy.typing import NDArray
from rich.table import Table

from fastgrpo.core.files import nan_to_null
from fastgrpo.tools.evaluate.study.blinding import AGAINST, RUN, Key
from fastgrpo.tools.evaluate.study.votes import CHOICES, Vote, raters_of
from fastgrpo.tools.score import score

Z95 = NormalDist().inv_cdf(0.975)
RESAMPLES = 10_000


@dataclass(frozen=True)
class Share:
    """A share of `count` with Wilson's interval; NaN of nothing."""

    count: int
    share: float
    low: float
    high: float

    @classmethod
    def of(cls, part: int, count: int, z: float = Z95) -> "Share":
        """The share of `part` in `count`.  z: half the interval's width in standard deviations"""
        return cls(count, part / count if count else math.nan, *wilson(part, count, z))

    @property
    def excludes_half(self) -> bool:
        """Whether 1/2 lies outside the interval."""
        return self.low > 0.5 or self.high < 0.5

    def text(self) -> str:
        """`62.0 % (55.1 .. 68.4)`"""
        if not self.count:
            return "-"
        return f"{self.share:.1%} ({100 * self.low:.1f} .. {100 * self.high:.1f})"


@dataclass(frozen=True)
class Tally:
    """How often the run's model won, tied and lost."""

    wins: int
    ties: int
    losses: int

    @property
    def rate(self) -> Share:
        """The win rate without ties."""
        return Share.of(self.wins, self.wins + self.losses)


@dataclass(frozen=True, kw_only=True)
class Result:
    """What the votes of a study say."""

    labels: dict[str, str]  # of RUN and AGAINST
    pairs: int
    prompts: int
    raters: dict[str, int]  # votes by rater
    tallies: dict[str, Tally]  # by what counts once: votes, raters, prompts
    resampled: tuple[float, float]  # the votes' win rate, by resampled raters and prompts
    ties: Share  # of all votes
    left: Share  # of the votes that are no ties
    one_sided: dict[str, Share]  # raters whose own share of left is not 1/2, by Bonferroni
    agreement: float  # share of two raters' votes on one pair that agree; NaN without such
    alpha: float  # Krippendorff's; NaN without such
    unseen: int  # pairs without a vote

    def rows(self) -> list[list[str]]:
        """The table as text, the heading first."""
        heading = ["counted once", "wins", "ties", "losses", "win rate (95 % interval)"]
        body = [
            [name, *map(str, (tally.wins, tally.ties, tally.losses)), tally.rate.text()]
            for name, tally in self.tallies.items()
        ]
        return [heading, *body]

    def lines(self) -> list[str]:
        """What the table does not say, a line each."""
        votes, raters = sum(self.raters.values()), len(self.raters)
        text = f"{self.labels[RUN]} against {self.labels[AGAINST]}: {votes} votes of {raters} "
        text += f"rater{'s' * (raters > 1)} on {self.pairs} pairs of {self.prompts} prompts"
        short = sum(count < self.pairs for count in self.raters.values())
        text += f"; {short} of the raters have not answered all" if short else ""
        text += f"; {self.unseen} pairs have no vote" if self.unseen else ""
        lines = [f"{text}."]
        low, high = self.resampled
        if math.isfinite(low):
            lines.append(
                f"Win rate of votes, raters and prompts resampled: {100 * low:.1f} .. "
                f"{100 * high:.1f} %, for other raters and other prompts."
            )
        lines.append(f"Ties: {self.ties.text()} of the votes.")
        if math.isfinite(self.agreement):
            alpha = f"{self.alpha:.3f}" if math.isfinite(self.alpha) else "not defined"
            lines.append(
                f"Agreement: two raters say the same of a pair in {self.agreement:.1%}; "
                f"Krippendorff's alpha {alpha} (1: always, 0: as by chance)."
            )
        seen = "BIAS TO A SIDE" if self.left.excludes_half else "No bias to a side is seen"
        lines.append(f"{seen}: left is chosen in {self.left.text()} of the votes that are no ties.")
        if self.one_sided:
            named = ", ".join(f"{name} {own.share:.0%}" for name, own in self.one_sided.items())
            lines.append(f"Raters who prefer a side, by their share of left: {named}.")
        return lines

    def markdown(self) -> str:
        """A table with its lines below."""
        heading, *body = self.rows()
        table = [heading, ["---", *["---:"] * (len(heading) - 1)], *body]
        rows = [f"| {' | '.join(row)} |" for row in table]
        return "\n".join([*rows, "", *(f"- {line}" for line in self.lines()), ""])

    def to_json(self) -> str:
        """All numbers; what is not defined is null."""
        content = asdict(self)
        for name, tally in self.tallies.items():
            content["tallies"][name]["win_rate"] = asdict(tally.rate)
        content["position_bias"] = self.left.excludes_half
        return json.dumps(nan_to_null(content), indent=1, ensure_ascii=False) + "\n"

    def show(self) -> None:
        """Print the table and its lines."""
        heading, *body = self.rows()
        table = Table()
        for number, name in enumerate(heading):
            table.add_column(name, justify="right" if number else "left")
        for row in body:
            table.add_row(*row)
        console = score.console()
        console.print(table)
        for line in self.lines():
            console.print(line, soft_wrap=True, markup=False, highlight=False)


def analyse(key: Key, votes: Sequence[Vote]) -> Result:
    """Count the votes of a study, at least one."""
    raters = raters_of(votes)
    prompts = sorted({pair.prompt for pair in key.pairs})
    by_pair: dict[str, list[str]] = {pair.pair: [] for pair in key.pairs}
    table = np.zeros((2, len(raters), len(prompts)))  # wins and losses
    for vote in votes:
        by_pair[vote.pair.pair].append(vote.outcome)
        if vote.choice != "tie":
            where = raters.index(vote.rater), prompts.index(vote.pair.prompt)
            table[0 if vote.outcome == RUN else 1][where] += 1
    counted = [Counter(outcomes) for outcomes in by_pair.values()]
    total = sum(counted, Counter[str]())
    sides = Counter(vote.choice for vote in votes)
    agreement, alpha = krippendorff(counted)
    return Result(
        labels=key.labels,
        pairs=len(key.pairs),
        prompts=len(prompts),
        raters=dict(sorted(Counter(vote.rater for vote in votes).items())),
        tallies={
            "vote": Tally(total[RUN], total["tie"], total[AGAINST]),
            "rater": majority((vote.rater, vote.outcome) for vote in votes),
            "prompt": majority((vote.pair.prompt, vote.outcome) for vote in votes),
        },
        resampled=resampled(table[0], table[1]),
        ties=Share.of(sides["tie"], len(votes)),
        left=Share.of(sides["left"], sides["left"] + sides["right"]),
        one_sided=one_sided(votes, raters),
        agreement=agreement,
        alpha=alpha,
        unseen=sum(not count for count in counted),
    )


def wilson(part: int, count: int, z: float = Z95) -> tuple[float, float]:
    """Wilson's score interval of a binomial share; NaN of nothing."""
    if not count:
        return math.nan, math.nan
    p, scale = part / count, 1 + z * z / count
    centre = (p + z * z / (2 * count)) / scale
    half = z / scale * math.sqrt(p * (1 - p) / count + z * z / (4 * count * count))
    return max(centre - half, 0.0), min(centre + half, 1.0)


def majority(outcomes: Iterable[tuple[str, str]]) -> Tally:
    """How many units the run's model won, tied and lost.  outcomes: (unit, outcome of a vote)"""
    lead: dict[str, int] = {}
    for unit, outcome in outcomes:
        lead[unit] = lead.get(unit, 0) + {RUN: 1, AGAINST: -1, "tie": 0}[outcome]
    signs = [(value > 0) - (value < 0) for value in lead.values()]
    return Tally(signs.count(1), signs.count(0), signs.count(-1))


def resampled(wins: NDArray[np.float64], losses: NDArray[np.float64]) -> tuple[float, float]:
    """95 % interval of the votes' win rate, by resampling raters and prompts at once.

    wins, losses: float64 [raters, prompts]. NaN with fewer than two of either.
    """
    raters, prompts = wins.shape
    if min(raters, prompts) < 2:
        return math.nan, math.nan
    rng = np.random.default_rng(0)
    rows = rng.multinomial(raters, np.full(raters, 1 / raters), size=RESAMPLES)
    columns = rng.multinomial(prompts, np.full(prompts, 1 / prompts), size=RESAMPLES)
    won = ((rows @ wins) * columns).sum(1)
    decided = won + ((rows @ losses) * columns).sum(1)
    if not decided.any():
        return math.nan, math.nan
    rates = won[decided > 0] / decided[decided > 0]
    low, high = np.percentile(rates, [2.5, 97.5])
    return float(low), float(high)


def krippendorff(counted: Sequence[Mapping[str, int]]) -> tuple[float, float]:
    """Observed agreement and Krippendorff's alpha for nominal data.

    counted: for each unit, how many raters chose each category; units with fewer than two votes
    say nothing of agreement. Both are NaN without any others; alpha where all votes are equal.
    """
    units = [count for count in counted if sum(count.values()) > 1]
    total = sum((Counter(count) for count in units), Counter[str]())
    n = total.total()
    if not n:
        return math.nan, math.nan
    agreed = 0.0  # of n votes, each weighed by the share of the unit's others that say the same
    for count in units:
        others = sum(count.values()) - 1
        agreed += sum(same * (same - 1) for same in count.values()) / others
    by_chance = sum(same * (same - 1) for same in total.values()) / (n * (n - 1))
    observed = agreed / n
    alpha = 1 - (1 - observed) / (1 - by_chance) if by_chance < 1 else math.nan
    return observed, alpha


def one_sided(votes: Sequence[Vote], raters: Sequence[str]) -> dict[str, Share]:
    """Raters whose share of left excludes 1/2, at 5 % for all raters together (Bonferroni)."""
    z = NormalDist().inv_cdf(1 - 0.025 / len(raters))
    chosen = {rater: dict.fromkeys(CHOICES, 0) for rater in raters}
    for vote in votes:
        chosen[vote.rater][vote.choice] += 1
    shares = {
        rater: Share.of(own["left"], own["left"] + own["right"], z) for rater, own in chosen.items()
    }
    return {rater: own for rater, own in shares.items() if own.excludes_half}
