#!/usr/bin/env bash
# The grader's call of problem 1:  hw2_1.sh OUT   writes OUT/{mnistm,svhn}/{digit}_{001..050}.png
[ "${BASH_VERSION-}" ] || exec bash "$0" "$@"
set -euo pipefail
source "$(dirname "$(readlink -f "${BASH_SOURCE[0]}" || echo "${BASH_SOURCE[0]}")")/env.sh"
exec "$python" "$scripts/run.py" p1_cfg_ddpm.inference "$@"
