#!/usr/bin/env bash
# Draws the report's figures of P1:  p1_figures.sh   (--help lists the flags)
[ "${BASH_VERSION-}" ] || exec bash "$0" "$@"
set -euo pipefail
source "$(dirname "$(readlink -f "${BASH_SOURCE[0]}" || echo "${BASH_SOURCE[0]}")")/env.sh"
exec "$python" "$scripts/run.py" p1_cfg_ddpm.figures "$@"
