#!/usr/bin/env bash
# Grades faces against references:  p2_grade.sh OUT GT   (--help lists the flags)
[ "${BASH_VERSION-}" ] || exec bash "$0" "$@"
set -euo pipefail
source "$(dirname "$(readlink -f "${BASH_SOURCE[0]}" || echo "${BASH_SOURCE[0]}")")/env.sh"
exec "$python" "$scripts/run.py" p2_ddim.evaluate "$@"
