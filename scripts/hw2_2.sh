#!/usr/bin/env bash
# The grader's call of problem 2:  hw2_2.sh NOISE_DIR OUT UNET_PT   writes OUT/{noise name}.png
[ "${BASH_VERSION-}" ] || exec bash "$0" "$@"
set -euo pipefail
source "$(dirname "$(readlink -f "${BASH_SOURCE[0]}" || echo "${BASH_SOURCE[0]}")")/env.sh"
exec "$python" "$scripts/run.py" p2_ddim.inference "$@"
