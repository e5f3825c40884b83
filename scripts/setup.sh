#!/usr/bin/env bash
# Makes the virtual environment (.venv, or the folder in $VENV) and installs the requirements. Silent when there is nothing to do.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/env.sh" "$@"
