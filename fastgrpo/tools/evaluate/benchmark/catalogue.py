"""The columns of the paper's tables: what judges them, and what has to be downloaded for that.

Sizes are published ones or follow from the number of parameters, and say which; where neither is
known there is none. A folder of weights has the names that the recipes of launch/ use.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True, kw_only=True)
class Download:
    """Weights or data from elsewhere."""

    name: str
    """File or folder below the folder of weights."""
    source: str
    licence: str
    size: str = "size not known here"


@dataclass(frozen=True, kw_only=True)
class Column:
    """A column of the paper's tables."""

    name: str
    reward: str
    part: str
    weights: str | None = None
    """What `rewards.path` names, below the folder of weights."""
    files: Mapping[str, str] = field(default_factory=dict)
    """Option -> what it names, below the folder of weights."""
    options: Mapping[str, str | bool] = field(default_factory=dict)
    """Options without which the numbers would not be on the paper's scale."""
    note: str = ""
    """What the paper leaves open about this judge, and what is taken."""

    @property
    def needs(self) -> list[str]:
        """Names below the folder of weights."""
        own = [] if self.weights is None else [self.weights]
        return [*own, *self.files.values()]


DETECTOR = "mask2former_swin-s-p4-w7-224_lsj_8x2_50e_coco_20220504_001756-743b7d99.pth"
VIT_H = "986 M parameters: 2.0 GB in 16 bits, 3.9 GB in 32, computed"
COLUMNS = {
    column.name: column
    for column in (
        Column(
            name="HPS-v2.1",
            reward="hps",
            part="HPS",
            weights="HPS_v2.1_compressed.pt",
            note="the cosine, as the paper's 0.2 to 0.4 must be; letter-boxed, antialiased",
        ),
        Column(
            name="CLIP",
            reward="clip_score",
            part="CLIP",
            weights="DFN5B-CLIP-ViT-H-14-378",
            note="the paper names no CLIP; its author names DFN5B ViT-H-14-378 (issue 19)",
        ),
        Column(
            name="Pick-a-Pic",
            reward="pick_score",
            part="PickScore",
            weights="PickScore_v1",
            options={"scale": "cosine"},
            note="the paper states no scale; its 0.20 to 0.23 are a cosine's",
        ),
        Column(
            name="GenEval",
            reward="geneval",
            part="GenEval",
            weights=DETECTOR,
            files={"clip": "clip-vit-large-patch14"},
            note="the benchmark's detector weights in plain torch, not its mmdetection program",
        ),
        *(
            Column(
                name=name,
                reward="videoalign",
                part=name,
                weights="VideoReward",
                files={"template": "VideoAlign/prompt_template.py"},
                options={"raw": True},
                note="raw scores, as the paper's values must be; told video.fps",
            )
            for name in ("VQ", "MQ", "TA")
        ),
        Column(
            name="VisionReward",
            reward="vision_reward",
            part="VisionReward_p",
            files={
                "scores": "VisionReward_Video/scores.jsonl",
                "question_weights": "VisionReward_Video/weight.json",
            },
            note='its "probability version" is not published; mean of w p is taken, the literal '
            "reading; the answers come from VisionReward's own environment",
        ),
    )
}
"""By the heading of the paper's tables."""

CARD = "see its card"
DOWNLOADS = {
    download.name: download
    for download in (
        Download(
            name="HPS_v2.1_compressed.pt",
            source="hub: xswu/HPSv2",
            licence="Apache-2.0 for the code; for the weights see its card",
            size=VIT_H,
        ),
        Download(
            name="DFN5B-CLIP-ViT-H-14-378",
            source="hub: apple/DFN5B-CLIP-ViT-H-14-378",
            licence="Apple's own, restrictive",
            size="987 M parameters: 2.0 GB in 16 bits, 3.9 GB in 32, computed",
        ),
        Download(
            name="PickScore_v1",
            source="hub: yuvalkirstain/PickScore_v1",
            licence=CARD,
            size=VIT_H,
        ),
        Download(
            name=DETECTOR,
            source="mmdetection's model zoo",
            licence="Apache-2.0",
            size="68.7 M parameters: 0.27 GB in 32 bits, computed",
        ),
        Download(
            name="clip-vit-large-patch14",
            source="hub: openai/clip-vit-large-patch14",
            licence=CARD,
            size="428 M parameters: 1.7 GB in 32 bits, computed",
        ),
        Download(
            name="VideoReward",
            source="hub: KwaiVGI/VideoReward",
            licence="Apache-2.0 by its card",
            size="5.03 GB, published",
        ),
        Download(
            name="VideoAlign/prompt_template.py",
            source="github.com/KwaiVGI/VideoAlign",
            licence="MIT",
            size="some kB",
        ),
        Download(
            name="VisionReward_Video/weight.json",
            source="github.com/THUDM/VisionReward",
            licence="Apache-2.0",
            size="some kB",
        ),
        Download(
            name="VisionReward_Video/scores.jsonl",
            source="written by VisionReward's own environment (hub: THUDM/VisionReward-Video)",
            licence="cogvlm2's own, for the checkpoint",
        ),
    )
}
"""By name below the folder of weights."""

MODELS = {
    "CompVis/stable-diffusion-v1-4": "CreativeML OpenRAIL-M by its card",
    "black-forest-labs/FLUX.1-dev": "FLUX.1 [dev], non-commercial, by its card",
    "hunyuanvideo-community/HunyuanVideo": "Tencent Hunyuan community licence by its card",
    "Skywork/SkyReels-V1-Hunyuan-I2V": CARD,
}
"""Licences of the models that the paper trains, by hub id."""
