"""What the fork server of tests/harness/forks.py imports: all that runs of the tiny recipe import,
and no thread.
"""

import os
import warnings

from fastgrpo.cli import main as cli

cli.quiet_libraries()  # read by the libraries when they are imported

import torch  # noqa: E402
from diffusers.models.autoencoders import autoencoder_kl_hunyuan_video  # noqa: E402, F401

import fastgrpo.models.hunyuan_video  # noqa: E402
import fastgrpo.rewards.serving.in_process  # noqa: E402
import fastgrpo.rewards.serving.server.process  # noqa: E402
import fastgrpo.rewards.tiny_world  # noqa: E402
import fastgrpo.train  # noqa: E402, F401

torch.set_num_threads(1)
warnings.filterwarnings(
    "ignore", message=".* found in sys.modules", category=RuntimeWarning, module="runpy"
)
assert len(os.listdir("/proc/self/task")) == 1, (
    "a fork has one thread only: another's locks would never be released"
)
