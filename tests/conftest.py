"""Settings for every test: one thread per process, no network beyond this machine, no display."""

import os

for variable, value in {
    "OMP_NUM_THREADS": "1",  # read when torch is first imported
    "HF_HUB_OFFLINE": "1",
    "WANDB_MODE": "offline",
    "MPLBACKEND": "Agg",
    "TOKENIZERS_PARALLELISM": "false",
}.items():
    os.environ.setdefault(variable, value)
