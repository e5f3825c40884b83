#!/usr/bin/env bash
# Downloads published weights (Stable Diffusion v1.4, CLIP, the course's graders; 5.6 GB in all):  download_weights.sh [NAME ...] [--list]
[ "${BASH_VERSION-}" ] || exec bash "$0" "$@"
set -euo pipefail
source "$(dirname "$(readlink -f "${BASH_SOURCE[0]}" || echo "${BASH_SOURCE[0]}")")/env.sh"
exec "$python" "$scripts/download_weights.py" "$@"
