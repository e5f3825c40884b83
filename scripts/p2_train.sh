#!/usr/bin/env bash
# Trains a face UNet on a folder of pictures:  p2_train.sh --data FOLDER --output runs/p2   (--help lists the flags)
[ "${BASH_VERSION-}" ] || exec bash "$0" "$@"
set -euo pipefail
source "$(dirname "$(readlink -f "${BASH_SOURCE[0]}" || echo "${BASH_SOURCE[0]}")")/env.sh"
exec "$python" "$scripts/run.py" p2_ddim.train "$@"
