#!/usr/bin/env bash
# Measures samplers, steps and guidance:  p1_benchmark.sh   (--help lists the flags)
[ "${BASH_VERSION-}" ] || exec bash "$0" "$@"
set -euo pipefail
source "$(dirname "$(readlink -f "${BASH_SOURCE[0]}" || echo "${BASH_SOURCE[0]}")")/env.sh"
exec "$python" "$scripts/run.py" p1_cfg_ddpm.benchmark "$@"
