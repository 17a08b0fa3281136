"""The six benchmarks: prompts, images per prompt, columns, and the numbers that the paper states.

Sources: GenEval (Ghosh et al. 2023, arXiv 2310.11513) and its program; HPS (Wu et al. 2023,
arXiv 2306.09341) and its program; DanceGRPO (arXiv 2505.07818), Tables 2 to 5.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

SetName = Literal["geneval", "hps", "test"]

NOT_STATED = "not stated by the paper"


@dataclass(frozen=True, kw_only=True)
class Block:
    """One set of prompts, and the columns that are measured on its pictures."""

    prompts: SetName
    columns: tuple[str, ...]
    images: int | None = None
    """Images per prompt; None: nobody states it, the recipe's evaluate.seeds."""


@dataclass(frozen=True, kw_only=True)
class Protocol:
    """A benchmark, or a table of the paper."""

    title: str
    blocks: tuple[Block, ...]
    family: str | None = None
    """The family of the table's model; None: any."""
    video: bool = False
    paper: Mapping[str, Mapping[str, float]]
    """Row of the paper -> column -> the number that it states."""

    @property
    def columns(self) -> list[str]:
        """Headings, in the paper's order."""
        return [column for block in self.blocks for column in block.columns]


GENEVAL = Block(prompts="geneval", columns=("GenEval",), images=4)
HPS = Block(prompts="hps", columns=("HPS-v2.1",), images=1)


def _rows(columns: str, **rows: tuple[float, ...]) -> dict[str, dict[str, float]]:
    """Rows of a table.  columns: headings, divided by blanks"""
    names = columns.split()
    return {row: dict(zip(names, numbers, strict=True)) for row, numbers in rows.items()}


FOUR = "HPS-v2.1 CLIP Pick-a-Pic GenEval"
_SD = _rows(
    FOUR,
    **{
        "Stable Diffusion v1.4": (0.239, 0.363, 0.202, 0.421),
        "SD v1.4 + HPS-v2.1": (0.365, 0.380, 0.217, 0.521),
        "SD v1.4 + HPS-v2.1 & CLIP": (0.335, 0.395, 0.215, 0.522),
    },
)
_FLUX = _rows(
    FOUR,
    **{
        "FLUX": (0.304, 0.405, 0.224, 0.659),
        "FLUX + HPS-v2.1": (0.372, 0.376, 0.230, 0.561),
        "FLUX + HPS-v2.1 & CLIP": (0.343, 0.427, 0.228, 0.687),
    },
)
_IMAGES = (HPS, Block(prompts="test", columns=("CLIP", "Pick-a-Pic")), GENEVAL)


def _of(column: str) -> dict[str, dict[str, float]]:
    """One column of Tables 2 and 3."""
    return {row: {column: numbers[column]} for row, numbers in (_SD | _FLUX).items()}


PROTOCOLS = {
    "geneval": Protocol(title="GenEval", blocks=(GENEVAL,), paper=_of("GenEval")),
    "hps": Protocol(title="HPS-v2.1 benchmark", blocks=(HPS,), paper=_of("HPS-v2.1")),
    "table2": Protocol(
        title="Table 2: Stable Diffusion v1.4",
        blocks=_IMAGES,
        family="stable_diffusion",
        paper=_SD,
    ),
    "table3": Protocol(title="Table 3: FLUX", blocks=_IMAGES, family="flux", paper=_FLUX),
    "table4": Protocol(
        title="Table 4: methods, each trained on the reward of the column alone",
        blocks=(HPS, Block(prompts="test", columns=("CLIP",))),
        family="stable_diffusion",
        paper=_rows(
            "HPS-v2.1 CLIP",
            **{
                "Stable Diffusion v1.4": (0.239, 0.363),
                "DanceGRPO": (0.365, 0.421),
                "DDPO": (0.297, 0.381),
                "ReFL": (0.357, 0.418),
                "DPO": (0.241, 0.367),
            },
        ),
    ),
    "table5": Protocol(
        title="Table 5: HunyuanVideo, trained on VQ and MQ",
        blocks=(Block(prompts="test", columns=("VQ", "MQ", "TA", "VisionReward")),),
        family="hunyuan_video",
        video=True,
        paper=_rows(
            "VQ MQ TA VisionReward",
            **{
                "HunyuanVideo": (4.51, 1.37, 1.75, 0.124),
                "HunyuanVideo + VQ & MQ": (7.03, 3.85, 1.59, 0.128),
            },
        ),
    ),
}
"""By the name that `--benchmark` takes."""
