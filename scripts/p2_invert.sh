#!/usr/bin/env bash
# Finds the noise of each picture:  p2_invert.sh PICTURES OUT CKPT   then p2_infer.sh OUT AGAIN CKPT --sampler belm   (--help lists the flags)
[ "${BASH_VERSION-}" ] || exec bash "$0" "$@"
set -euo pipefail
source "$(dirname "$(readlink -f "${BASH_SOURCE[0]}" || echo "${BASH_SOURCE[0]}")")/env.sh"
exec "$python" "$scripts/run.py" p2_ddim.edit invert "$@"
