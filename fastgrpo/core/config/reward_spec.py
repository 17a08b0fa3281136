"""Keys of `[[rewards]]`: which reward, its weights, where and how it scores; and of `[server]`."""

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from fastgrpo.core.config.base import Fraction, Positive, Rate, Section
from fastgrpo.core.config.paths import PATH, LocalOrHub, is_own_file


class RewardSpec(Section):
    name: str
    """A file of rewards/: checklist, clip_score, geneval, geneval_hf, hps, hpsv3, ocr, pick_score,
    tiny_world, video_stats, videoalign, vision_reward, vlm_judge; the name of an installed
    package's; or the path of a file of your own, such as ./my_reward.py, which is then called
    my_reward."""
    file: Annotated[Path, PATH] | None = None
    """A file of your own, where `name` is not its path; None: the file of rewards/."""
    function: str | None = None
    """The function of a file of your own that makes the reward, where it is not load; the name
    ./my_reward.py:bright sets both, and the reward is then called bright."""
    weights: dict[str, float]
    """Weight of each part's advantage; 0 = a held-out monitor: scored and logged, never trained
    on."""
    where: Literal["process", "server"] = "server"
    """In the trainer's process, or behind the reward server. The scores are equal."""
    urls: tuple[str, ...] = ()
    """Running servers that hold this reward; None: those of server.urls, or the one started beside
    the trainer."""
    path: LocalOrHub | None = None
    """File or folder of the reward's weights, or a hub id, where it has any."""
    device: str = "auto"
    """Device of its weights, such as cuda:1; auto = the GPU of its process where there is one, else
    the CPU."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Precision of its weights."""
    batch_size: Positive = 8
    """Clips per forward pass of the reward."""
    frames: Literal["all", "first", "middle"] | Positive | None = None
    """Frames of a clip that an image reward scores and averages, a number = evenly spaced; None:
    the reward's own."""
    fps: Annotated[float, Field(gt=0, le=1000)] | None = None
    """Frames per second that this reward is told; None: video.fps."""
    threshold: dict[str, float] = Field({})
    """Part -> value: adds the part `NAME_above`, 1 where the score is at least the value, else 0
    (binary reward)."""
    options: dict[str, str | int | float | bool] = Field({})
    """What only this reward knows; see docs/guides/rewards/rewards.md."""

    @model_validator(mode="before")
    @classmethod
    def _name_of_file(cls, tree: Any) -> Any:
        """Take a path in place of the name apart: the reward is called as its file."""
        name = tree.get("name") if isinstance(tree, dict) else None
        if not isinstance(name, str) or not is_own_file(name):
            return tree
        text, _, function = name.rpartition(":") if not name.endswith(".py") else (name, "", "load")
        path = Path(text)
        if not path.is_absolute():
            raise ValueError(f"write the path of '{name}' as ./{name}")
        found: dict[str, Any] = {"file": path} | tree
        if function == "load":
            return found | {"name": path.stem}
        return found | {"function": function, "name": function}


class Server(Section):
    urls: tuple[str, ...] = ()
    """Running reward servers; None: the first rank starts one beside the trainer and stops it at
    the end."""
    token_file: Annotated[Path, PATH] | None = None
    """File with the bearer token of the servers in `urls`; unset: FASTGRPO_TOKEN has it."""
    start_timeout_s: Rate = 120.0
    """Seconds to wait until a server is ready."""
    request_timeout_s: Rate = 60.0
    """Seconds that one request may take."""
    outage_s: Rate = 300.0
    """Seconds of failing requests, retried, after which the run ends with a message."""
    max_invalid: Fraction = 0.2
    """Share of samples without a valid score in one iteration above which the run ends."""
