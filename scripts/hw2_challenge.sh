#!/usr/bin/env bash
# The later challenge's call:  hw2_challenge.sh PROMPTS_JSON OUT [CKPT]   writes 25 pictures an entry, with the words installed for that model, or --embeddings
[ "${BASH_VERSION-}" ] || exec bash "$0" "$@"
set -euo pipefail
source "$(dirname "$(readlink -f "${BASH_SOURCE[0]}" || echo "${BASH_SOURCE[0]}")")/env.sh"
exec "$python" "$scripts/run.py" p3_clip_textual_inversion.inference "$@"
