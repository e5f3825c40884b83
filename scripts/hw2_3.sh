#!/usr/bin/env bash
# The grader's call of problem 3:  hw2_3.sh INPUT_JSON OUT CKPT   writes 25 pictures a prompt, with the words installed for that model
[ "${BASH_VERSION-}" ] || exec bash "$0" "$@"
set -euo pipefail
source "$(dirname "$(readlink -f "${BASH_SOURCE[0]}" || echo "${BASH_SOURCE[0]}")")/env.sh"
exec "$python" "$scripts/run.py" p3_clip_textual_inversion.inference "$@"
