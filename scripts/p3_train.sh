#!/usr/bin/env bash
# Learns the words of an input.json:  p3_train.sh [INPUT_JSON] [--checkpoint CKPT] [--output runs/p3]   (--help lists the flags)
[ "${BASH_VERSION-}" ] || exec bash "$0" "$@"
set -euo pipefail
source "$(dirname "$(readlink -f "${BASH_SOURCE[0]}" || echo "${BASH_SOURCE[0]}")")/env.sh"
exec "$python" "$scripts/run.py" p3_clip_textual_inversion.train "$@"
