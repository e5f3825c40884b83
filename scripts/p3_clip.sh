#!/usr/bin/env bash
# CLIP zero-shot classification:  p3_clip.sh [--data DIR] [--output DIR] [--model NAME --pretrained TAG]   (--help lists the flags)
[ "${BASH_VERSION-}" ] || exec bash "$0" "$@"
set -euo pipefail
source "$(dirname "$(readlink -f "${BASH_SOURCE[0]}" || echo "${BASH_SOURCE[0]}")")/env.sh"
exec "$python" "$scripts/run.py" p3_clip_textual_inversion.zero_shot "$@"
