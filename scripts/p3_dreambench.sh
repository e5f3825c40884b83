#!/usr/bin/env bash
# Learns, draws and measures a benchmark of subjects, DreamBench or CustomConcept101:  p3_dreambench.sh [DATA] [OUT] [CKPT]   (--help lists the flags)
[ "${BASH_VERSION-}" ] || exec bash "$0" "$@"
set -euo pipefail
source "$(dirname "$(readlink -f "${BASH_SOURCE[0]}" || echo "${BASH_SOURCE[0]}")")/env.sh"
exec "$python" "$scripts/run.py" p3_clip_textual_inversion.experiments.dreambench "$@"
