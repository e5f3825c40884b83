# Sourced by the other scripts: sets $python to an interpreter that has the requirements, which setup.py (given $setup_flags) installs where needed.
scripts=$(unset CDPATH; cd -- "$(dirname -- "${BASH_SOURCE[0]}")" && pwd)  # with CDPATH, cd would go elsewhere, and say so
base=
for one in python3 python3.13 python3.12 python3.11 python3.10 python; do
  command -v "$one" >/dev/null || continue
  base=${base:-$one}  # if none is new enough, setup.py says so, where that matters
  if "$one" -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null; then base=$one; break; fi
done
[ -n "$base" ] || { echo "error: no python3 found; install Python 3.10 or newer" >&2; exit 1; }
python=$("$base" "$scripts/setup.py" ${setup_flags:-})
