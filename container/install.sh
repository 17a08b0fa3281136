#!/bin/bash
# What both images install, a step each: packages, libraries, fastgrpo. Run as root in the image.
#   FLASH_ATTN=WHEEL container/install.sh libraries   with flash-attn, from a file or an address
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

PIP=(python3 -m pip install --no-cache-dir --disable-pip-version-check --root-user-action ignore)

packages() { # g++: torch.compile; the rest: NCCL over InfiniBand, ranks bound to their cores
    export DEBIAN_FRONTEND=noninteractive
    apt-get update
    apt-get install -y --no-install-recommends \
        g++ git ibverbs-providers libibverbs1 librdmacm1 numactl openssh-client
    rm -rf /var/lib/apt/lists/*
}

libraries() { # torch first and alone, as `make` does; its wheel brings CUDA
    "${PIP[@]}" torch==2.13.0
    "${PIP[@]}" -r requirements.lock
    # a wheel for this torch, this CUDA and this Python: no compiler of CUDA is in the image
    if [[ -n ${FLASH_ATTN:-} ]]; then
        "${PIP[@]}" --no-deps "$FLASH_ATTN"
    fi
}

fastgrpo() {
    "${PIP[@]}" --no-deps --no-build-isolation .
    cd / && command fastgrpo --version
}

[[ $# == 1 && " packages libraries fastgrpo " == *" $1 "* ]] || {
    echo "install.sh: name one step: packages, libraries or fastgrpo" >&2
    exit 2
}
"$1"
