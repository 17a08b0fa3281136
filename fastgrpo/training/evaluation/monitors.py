"""What held-out clips are measured by beside the rewards: monitors, which nothing is trained on.

Of each clip four measurements of `rewards/video_stats.py`, on at most FRAMES frames: sharpness,
colourfulness, clipped and grid. And how far the clips of one prompt's seeds lie apart, which falls
where a policy draws the same for every noise (figure 7 of the paper): a clip's distance is the mean
to the prompt's other seeds, so that the mean over a prompt's clips is the mean over its pairs.

  distance       root mean square difference of two clips' thumbnails, 0 to 1: FRAMES frames, each
                 the mean of SIDE x SIDE areas, so that layout and colour count and fine noise does
                 not
  clip_distance  1 - cosine of the mean image vectors of a CLIP, where a CLIP reward scores in the
                 trainer's process
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from fastgrpo import rewards
from fastgrpo.core.config import Recipe, RewardSpec
from fastgrpo.parallel.world import World
from fastgrpo.rewards import video_stats
from fastgrpo.rewards.common import frames, options
from fastgrpo.rewards.serving.in_process import ScorerInProcess
from fastgrpo.training.scoring.scorer import Scorer

MEASURED = ("sharpness", "colourfulness", "clipped", "grid")
DISTANCE, CLIP_DISTANCE = "distance", "clip_distance"
FRAMES = 8  # evenly spaced, that a clip is measured by
SIDE = 32  # areas of a thumbnail along each side


@dataclass
class Monitors:
    """The measurements of an evaluation's clips on this rank."""

    period: int  # pixels, of `grid`
    embedder: ScorerInProcess | None  # that has image vectors
    slots: list[int] = field(default_factory=list)
    measured: list[Tensor] = field(default_factory=list)  # float32 [4 + thumbnail], one per clip
    vectors: list[Tensor] = field(default_factory=list)  # float32 [E], one per clip

    @classmethod
    def of(cls, recipe: Recipe, scorer: Scorer) -> "Monitors | None":
        """The monitors of a recipe's evaluations; None where it has none on the way."""
        if not recipe.evaluate.every:
            return None
        inside = (one for one in scorer.sources if isinstance(one, ScorerInProcess))
        embedder = next((one for one in inside if one.has_vectors), None)
        return cls(_period(recipe.rewards), embedder)

    def see(self, slots: Sequence[int], pixels: Tensor) -> None:
        """Measure a batch of B clips.  pixels: uint8 [B, F, H, W, 3]"""
        # not by a list of indices, which would be sent to the GPU first
        stills = torch.stack([pixels[:, n] for n in frames.choose(FRAMES, pixels.shape[1])], 1)
        stills = stills.cpu()
        self.slots += slots
        for clip in stills:
            own = torch.tensor(measure(clip, self.period))
            self.measured.append(torch.cat([own, thumbnail(clip).flatten()]))
        if self.embedder is not None:
            self.vectors += self.embedder.image_vectors(stills).unbind()

    def collect(self, world: World, total: int, seeds: int) -> dict[str, Tensor]:
        """Every rank's measurements by name, float32 [total], in the order of the slots.

        seeds: clips of one prompt; with one there is no distance
        """
        table = self._gather(world, self.measured, total)
        count = len(MEASURED)
        found = dict(zip(MEASURED, table[:, :count].unbind(1), strict=True))
        if seeds == 1:
            return found
        found[DISTANCE] = distance_to_others(table[:, count:], seeds)
        if self.embedder is not None:
            vectors = self._gather(world, self.vectors, total)
            found[CLIP_DISTANCE] = cosine_to_others(vectors, seeds)
        return found

    def _gather(self, world: World, rows: Sequence[Tensor], total: int) -> Tensor:
        """Every rank's rows in order, float32 [total, width]; a rank may have none."""
        width = torch.tensor([[float(len(rows[0]) if rows else 0)]])
        widest = int(world.combine(width, [world.rank], world.size).max())
        own = torch.stack(list(rows)) if rows else torch.zeros(0, widest)
        return world.combine(own, self.slots, total)


def worse_when_higher(recipe: Recipe) -> list[str]:
    """The monitors of which more is worse; of all others less is."""
    found = [part for part in video_stats.WORSE_WHEN_HIGHER if part in MEASURED]
    for spec in recipe.rewards:
        worse = rewards.declared(spec, "WORSE_WHEN_HIGHER", ())
        found += [part for part, weight in spec.weights.items() if not weight and part in worse]
    return list(dict.fromkeys(found))


def _period(specs: Sequence[RewardSpec]) -> int:
    """The period of `grid`, pixels: as the recipe's video_stats has it, else the usual one."""
    own = next((spec for spec in specs if spec.name == "video_stats"), None)
    settings = video_stats.Options() if own is None else options.parse(own, video_stats.Options)
    return settings.grid_period


def measure(clip: Tensor, period: int) -> tuple[float, float, float, float]:
    """The measurements of a clip, uint8 [F, H, W, 3], in the order of MEASURED."""
    y = video_stats.luma(clip)
    return (
        video_stats.sharpness(y),
        video_stats.colourfulness(clip),
        video_stats.clipped(clip),
        video_stats.grid(y, period),
    )


def thumbnail(clip: Tensor) -> Tensor:
    """A clip's areas' mean colours, 0 to 1.

    clip: uint8 [F, H, W, 3];  returns float32 [F, 3, h, w], h and w at most SIDE
    """
    images = rearrange(clip.float() / 255, "f h w c -> f c h w")
    height, width = (min(side, SIDE) for side in clip.shape[1:3])
    return F.adaptive_avg_pool2d(images, (height, width))


def distance_to_others(points: Tensor, seeds: int) -> Tensor:
    """Mean root mean square difference of each point to the others of its prompt.

    points: float32 [prompts * seeds, D], a prompt's in a row, seeds at least 2
    returns float32 [prompts * seeds]
    """
    grouped = rearrange(points, "(p s) d -> p s d", s=seeds)
    pairs = torch.cdist(grouped, grouped, compute_mode="donot_use_mm_for_euclid_dist")
    return pairs.sum(-1).flatten() / (seeds - 1) / points.shape[1] ** 0.5


def cosine_to_others(vectors: Tensor, seeds: int) -> Tensor:
    """Mean 1 - cosine of each vector and the others of its prompt.

    vectors: float32 [prompts * seeds, E], a prompt's in a row;  returns float32 [prompts * seeds]
    """
    unit = F.normalize(rearrange(vectors, "(p s) e -> p s e", s=seeds), dim=-1)
    gaps = 1 - unit @ unit.mT
    gaps.diagonal(dim1=-2, dim2=-1).zero_()
    return gaps.sum(-1).flatten() / (seeds - 1)
