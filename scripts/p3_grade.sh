#!/usr/bin/env bash
# Grades pictures of learned words:  p3_grade.sh OUT INPUT_JSON   (--help lists the flags)
[ "${BASH_VERSION-}" ] || exec bash "$0" "$@"
set -euo pipefail
source "$(dirname "$(readlink -f "${BASH_SOURCE[0]}" || echo "${BASH_SOURCE[0]}")")/env.sh"
exec "$python" "$scripts/run.py" p3_clip_textual_inversion.evaluate "$@"
