#!/usr/bin/env bash
# Draws prompts with learned words:  p3_infer.sh INPUT_JSON OUT CKPT   (--help lists the flags)
[ "${BASH_VERSION-}" ] || exec bash "$0" "$@"
set -euo pipefail
source "$(dirname "$(readlink -f "${BASH_SOURCE[0]}" || echo "${BASH_SOURCE[0]}")")/env.sh"
exec "$python" "$scripts/run.py" p3_clip_textual_inversion.inference "$@"
