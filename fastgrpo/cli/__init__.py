"""The `fastgrpo` command: options and what they ask for, one file for each kind of command.

Read `main.py` first. Each file has `add(commands)`, whose parsers say what to run. Heavy imports
wait until one runs, so that every `--help`, `plan` and `status` start without torch.
"""
