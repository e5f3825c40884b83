#!/usr/bin/env bash
# Draws the 1,000 digits:  p1_infer.sh OUT   (--help lists the flags)
[ "${BASH_VERSION-}" ] || exec bash "$0" "$@"
set -euo pipefail
source "$(dirname "$(readlink -f "${BASH_SOURCE[0]}" || echo "${BASH_SOURCE[0]}")")/env.sh"
exec "$python" "$scripts/run.py" p1_cfg_ddpm.inference "$@"
