#!/bin/bash
#SBATCH --job-name=t2i_qwen_lora
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=1
#SBATCH --cpus-per-task=8
#SBATCH --time=2-00:00:00
#SBATCH --output=slurm-%x-%j.log
#SBATCH --open-mode=append
#SBATCH --requeue
#SBATCH --signal=B:USR1@600
''':'
# torchrun, bash or sbatch FILE [section.key=value ...]; bash reads this half, Python the other.
# slurm runs a copy of FILE, so scontrol must tell where it lies.
file=$(realpath "${BASH_SOURCE[0]}")
[[ -f ${file%/*}/_run.sh || -z ${SLURM_JOB_ID:-} ]] ||
    file=$(scontrol show job "$SLURM_JOB_ID" | sed -n "s/^ *Command=//p")
file=${file% "$*"}
if [[ ! -f ${file%/*}/_run.sh ]]; then
    echo "fastgrpo: $0: runs in launch/ alone; put it there, or use fastgrpo train RECIPE." >&2
    exit 2
fi
exec bash "${file%/*}/_run.sh" "$file" "$@"
: <<'pass'
'''
if __name__ == "__main__":
    import sys
    from pathlib import Path

    recipe = Path(__file__).resolve().with_suffix(".toml")
    sys.path.insert(0, str(recipe.parent.parent))
    from fastgrpo.cli.launch import main

    sys.exit(main(recipe, sys.argv[1:]))
pass
