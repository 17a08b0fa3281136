#!/bin/bash
#SBATCH --job-name=t2i_zimage_lora
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
[[ -f ${file%.sh}.toml || -z ${SLURM_JOB_ID:-} ]] ||
    file=$(scontrol show job "$SLURM_JOB_ID" | sed -n "s/^ *Command=//p")
file=${file% "$*"}
run=${file%/*}/_run.sh
if [[ ! -f $run ]]; then # outside a checkout: what is installed
    export FASTGRPO_PYTHON=${FASTGRPO_PYTHON:-python3}
    if ! run=$("$FASTGRPO_PYTHON" -c "import fastgrpo.launch as it; print(*it.__path__)" 2>/dev/null)/_run.sh; then
        echo "fastgrpo: FASTGRPO_PYTHON=$FASTGRPO_PYTHON: no fastgrpo there; activate its environment, or name its python." >&2
        exit 2
    fi
fi
exec bash "$run" "$file" "$@"
: <<'pass'
'''
if __name__ == "__main__":
    import sys
    from importlib.util import find_spec
    from pathlib import Path

    recipe = Path(__file__).resolve().with_suffix(".toml")
    if recipe.with_name("_run.sh").exists():  # in a checkout
        sys.path.insert(0, str(recipe.parent.parent))
    if find_spec("fastgrpo") is None:
        print(f"fastgrpo: python={sys.executable}: no fastgrpo there; activate its environment.", file=sys.stderr)
        sys.exit(2)
    from fastgrpo.cli.launch import main

    sys.exit(main(recipe, sys.argv[1:]))
pass
