#!/usr/bin/env bash
# Grades a folder of digits:  p1_grade.sh OUT   (--help lists the flags)
[ "${BASH_VERSION-}" ] || exec bash "$0" "$@"
set -euo pipefail
source "$(dirname "$(readlink -f "${BASH_SOURCE[0]}" || echo "${BASH_SOURCE[0]}")")/env.sh"
exec "$python" "$scripts/run.py" p1_cfg_ddpm.evaluate "$@"
