# Sourced by the other scripts: sets $python to an interpreter that has the requirements, which setup.py (given $setup_flags) installs where needed.
scripts=$(unset CDPATH; cd -- "$(dirname -- "${BASH_SOURCE[0]}")" && pwd)  # with CDPATH, cd would go elsewhere, and say so
base=$(command -v python3 || command -v python || true)
[ -n "$base" ] || { echo "error: no python3 found; install Python 3.10 or newer" >&2; exit 1; }
python=$("$base" "$scripts/setup.py" ${setup_flags:-})
