#!/usr/bin/env bash
# Draws two learned concepts in one picture, several ways, and scores them:  p3_several.sh   (--help lists the flags)
[ "${BASH_VERSION-}" ] || exec bash "$0" "$@"
set -euo pipefail
source "$(dirname "$(readlink -f "${BASH_SOURCE[0]}" || echo "${BASH_SOURCE[0]}")")/env.sh"
exec "$python" "$scripts/run.py" p3_clip_textual_inversion.experiments.several "$@"
