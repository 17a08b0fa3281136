"""What is installed, and under which names.

`models/`, `rewards/`, `data/` and `launch/` stand at the top of the repository and install as
`fastgrpo.models`, `fastgrpo.rewards`, `fastgrpo.data` and `fastgrpo.launch`. The links
`fastgrpo/models -> ../models` (likewise the others) let mypy, editors and a checkout that is not
installed see the same names.
Every folder with Python files is listed here; a test checks it.
"""

import re
from pathlib import Path

from setuptools import setup

PACKAGES = {
    "fastgrpo": "fastgrpo",
    "fastgrpo.algorithm": "fastgrpo/algorithm",
    "fastgrpo.cli": "fastgrpo/cli",
    "fastgrpo.cli.evaluation": "fastgrpo/cli/evaluation",
    "fastgrpo.cli.start": "fastgrpo/cli/start",
    "fastgrpo.core": "fastgrpo/core",
    "fastgrpo.core.config": "fastgrpo/core/config",
    "fastgrpo.parallel": "fastgrpo/parallel",
    "fastgrpo.parallel.nvme": "fastgrpo/parallel/nvme",
    "fastgrpo.run": "fastgrpo/run",
    "fastgrpo.run.failures": "fastgrpo/run/failures",
    "fastgrpo.session": "fastgrpo/session",
    "fastgrpo.run.tracking": "fastgrpo/run/tracking",
    "fastgrpo.training": "fastgrpo/training",
    "fastgrpo.training.methods": "fastgrpo/training/methods",
    "fastgrpo.training.rollout": "fastgrpo/training/rollout",
    "fastgrpo.training.scoring": "fastgrpo/training/scoring",
    "fastgrpo.training.conditions": "fastgrpo/training/conditions",
    "fastgrpo.training.evaluation": "fastgrpo/training/evaluation",
    "fastgrpo.checkpoint": "fastgrpo/checkpoint",
    "fastgrpo.tools": "fastgrpo/tools",
    "fastgrpo.tools.check": "fastgrpo/tools/check",
    "fastgrpo.tools.evaluate": "fastgrpo/tools/evaluate",
    "fastgrpo.tools.evaluate.benchmark": "fastgrpo/tools/evaluate/benchmark",
    "fastgrpo.tools.evaluate.reproduce": "fastgrpo/tools/evaluate/reproduce",
    "fastgrpo.tools.export": "fastgrpo/tools/export",
    "fastgrpo.tools.plan": "fastgrpo/tools/plan",
    "fastgrpo.tools.plan.costs": "fastgrpo/tools/plan/costs",
    "fastgrpo.tools.plan.simulation": "fastgrpo/tools/plan/simulation",
    "fastgrpo.tools.plan.tuning": "fastgrpo/tools/plan/tuning",
    "fastgrpo.tools.plan.workload": "fastgrpo/tools/plan/workload",
    "fastgrpo.tools.preflight": "fastgrpo/tools/preflight",
    "fastgrpo.tools.report": "fastgrpo/tools/report",
    "fastgrpo.tools.report.live": "fastgrpo/tools/report/live",
    "fastgrpo.tools.sample": "fastgrpo/tools/sample",
    "fastgrpo.tools.score": "fastgrpo/tools/score",
    "fastgrpo.tools.evaluate.study": "fastgrpo/tools/evaluate/study",
    "fastgrpo.tools.start": "fastgrpo/tools/start",
    "fastgrpo.models": "models",
    "fastgrpo.models.attention": "models/attention",
    "fastgrpo.models.loading": "models/loading",
    "fastgrpo.models.placement": "models/placement",
    "fastgrpo.models.text_encoders": "models/text_encoders",
    "fastgrpo.models.sizes": "models/sizes",
    "fastgrpo.rewards": "rewards",
    "fastgrpo.rewards.common": "rewards/common",
    "fastgrpo.rewards.networks": "rewards/networks",
    "fastgrpo.rewards.networks.clip": "rewards/networks/clip",
    "fastgrpo.rewards.networks.geneval": "rewards/networks/geneval",
    "fastgrpo.rewards.networks.hpsv3": "rewards/networks/hpsv3",
    "fastgrpo.rewards.networks.ocr": "rewards/networks/ocr",
    "fastgrpo.rewards.networks.qwen2_vl": "rewards/networks/qwen2_vl",
    "fastgrpo.rewards.networks.videoalign": "rewards/networks/videoalign",
    "fastgrpo.rewards.networks.vlm": "rewards/networks/vlm",
    "fastgrpo.rewards.serving": "rewards/serving",
    "fastgrpo.rewards.serving.client": "rewards/serving/client",
    "fastgrpo.rewards.serving.server": "rewards/serving/server",
    "fastgrpo.launch": "launch",
    "fastgrpo.data": "data",
    "fastgrpo.data.tiny_world": "data/tiny_world",
}
"""Every package and its folder."""


def version() -> str:
    """The version that the package itself tells."""
    face = Path(__file__).with_name("fastgrpo") / "__init__.py"
    return re.findall(r'__version__ = "(.+)"', face.read_text(encoding="utf-8"))[0]


setup(
    name="fastgrpo",
    version=version(),
    description="Reinforcement learning from reward models for video and image generators (DanceGRPO)",
    long_description=Path(__file__).with_name("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE"],
    python_requires=">=3.11",
    packages=[*PACKAGES],
    package_dir=PACKAGES,
    package_data={
        "fastgrpo": ["py.typed"],
        "fastgrpo.data": [
            "*.txt",
            "*.jsonl",
            "geneval/*",
            "reference_images/*",
            "tiny_hunyuan_video/**",
        ],
        "fastgrpo.launch": ["*.toml", "*.sh", "one_*/*.toml"],
    },
    include_package_data=False,
    install_requires=[
        "torch>=2.13,<2.14",
        "diffusers>=0.42,<0.43",
        "transformers>=5.23,<5.24",
        "safetensors>=0.8,<1",
        "einops>=0.8,<1",
        "wandb>=0.31,<1",
        "pydantic>=2.14,<3",
        "fastapi>=0.165,<1",
        "uvicorn>=0.54,<1",
        "uvloop>=0.23; sys_platform != 'win32'",
        "httptools>=0.9",
        "httpx>=0.28,<1",
        "prometheus-client>=0.26,<1",
        "av>=18,<19",
        "decord>=0.6,<1",
        "ftfy>=6.3,<7",
        "numpy>=2.4,<3",
        "pillow>=13,<14",
        "rich>=15,<16",
        "tomli-w>=1.2,<2",
        "matplotlib>=3.11,<4",
    ],
    extras_require={
        "data": ["pyarrow>=26"],
        "flash": ["flash-attn>=2.8"],
        # distributed.offload=nvme: its asynchronous I/O; benchmarks.speed.cpu_adam: its AdamW
        "deepspeed": ["deepspeed>=0.19,<0.20"],
        "lora": ["peft>=0.19"],
        "swanlab": ["swanlab>=0.10,<1"],
        "ocr": ["rapidocr>=3.10,<3.11", "onnxruntime>=1.20"],
        "dev": [
            "peft>=0.19",
            "pytest>=9",
            "pytest-timeout>=2.4",
            "pytest-xdist>=3.8",
            "ruff>=0.17",
            "mypy>=2.4",
            "setuptools>=77",
            "pyarrow>=26",
            "rapidocr>=3.10,<3.11",
            "onnxruntime>=1.20",
        ],
    },
    entry_points={"console_scripts": ["fastgrpo = fastgrpo.cli.__main__:console"]},
)
