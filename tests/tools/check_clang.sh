#!/bin/sh
# Runs the whole suite of the CPU kernel with the kernel that clang builds: usage tests/tools/check_clang.sh PYTHON
# [pytest arguments]. Also checks that this build vectorizes, and chooses the instruction set when it is loaded.
set -eu
python=${1:-python}
[ $# -gt 0 ] && shift
here=$(cd "$(dirname "$0")/../.." && pwd)
clang=${CLANG:-clang++}
if ! command -v "$clang" > /dev/null; then
    echo "check_clang.sh: skipped, $clang is not installed"
    exit 0
fi
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
mkdir "$work/tree"
for name in src tests docs setup.py pyproject.toml README.md LICENSE; do cp -r "$here/$name" "$work/tree/"; done
cd "$work/tree"
rm -f src/rmsprop/_native.so
CC="$clang" CXX="$clang" "$python" setup.py -q build_ext --inplace
"$clang" --version | head -1
if [ "$(uname -sm)" = "Linux x86_64" ]; then
    chosen=$(readelf --relocs --wide src/rmsprop/_native.so | grep -c IRELATIV || true)
    wide=$(objdump -d src/rmsprop/_native.so | grep -c 'vsqrtp[sd].*%zmm' || true)
    narrow=$(objdump -d src/rmsprop/_native.so | grep -c 'vsqrtp[sd].*%ymm' || true)
    echo "$chosen functions are chosen at load; vector roots: $wide of AVX-512, $narrow of AVX"
    [ "$chosen" -gt 50 ] && [ "$wide" -gt 50 ] && [ "$narrow" -gt 50 ] || { echo "too few" >&2; exit 1; }
fi
cd tests
rm -f conftest.py
export PYTHONPATH="$work/tree/src:$work/tree/tests/tools"
"$python" -c "
import rmsprop
from rmsprop.kernels import native
assert rmsprop.__file__.startswith('$work'), rmsprop.__file__
assert native.missing() is None, native.missing()"
for part in "not long" long; do
    "$python" -m pytest -q -p no:cacheprovider -m "$part" kernels --ignore-glob='*triton*' \
        --ignore=kernels/test_cpu_aarch64.py "$@"
done
