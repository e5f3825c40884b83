#!/usr/bin/env bash
# Loads and runs a full-size Stable Diffusion v1 of random weights from one .ckpt:  p3_fullsize.sh FILE.ckpt   (--help lists the flags)
[ "${BASH_VERSION-}" ] || exec bash "$0" "$@"
set -euo pipefail
source "$(dirname "$(readlink -f "${BASH_SOURCE[0]}" || echo "${BASH_SOURCE[0]}")")/env.sh"
exec "$python" "$scripts/run.py" p3_clip_textual_inversion.experiments.fullsize "$@"
