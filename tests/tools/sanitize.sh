#!/bin/sh
# Runs the kernel's tests with the kernel built under AddressSanitizer and UndefinedBehaviorSanitizer, and its parallel
# region under ThreadSanitizer on two and on four threads: usage tests/tools/sanitize.sh PYTHON [pytest arguments]; with
# arguments those tests alone. torch and Python themselves are not instrumented.
set -eu
python=${1:-python}
[ $# -gt 0 ] && shift
here=$(cd "$(dirname "$0")/../.." && pwd)
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cp -r "$here/src" "$here/tests" "$here/fuzz" "$work/"
rm -f "$work/tests/conftest.py"
# function versions are resolved before the sanitizer is ready, so: one target, the widest of this machine
"${CXX:-g++}" -std=c++17 -O2 -g -march=native -DRMSPROP_ONE_TARGET -fno-math-errno -fno-trapping-math \
    -ffp-contract=off -fPIC -shared -fsanitize=address,undefined -fno-sanitize-recover=all \
    -o "$work/src/rmsprop/_native.so" "$work"/src/rmsprop/csrc/*.cpp
preload="$("${CXX:-g++}" -print-file-name=libasan.so) $("${CXX:-g++}" -print-file-name=libubsan.so)"
if [ $# -eq 0 ]; then
    "${CXX:-g++}" -std=c++17 -O0 -g -DRMSPROP_ONE_TARGET -ffp-contract=off -fsanitize=thread -pthread \
        -I "$work/src/rmsprop/csrc" -o "$work/threads" "$work/tests/tools/threads.cpp" "$work/src/rmsprop/csrc/rmsprop.cpp"
    "$work/threads" 2
    "$work/threads" 4
    if "$work/threads" 2 race > /dev/null 2>&1; then
        echo "ThreadSanitizer misses a race that is there: it checks nothing" >&2
        exit 1
    fi
fi
cd "$work/tests"
# leaks: Python keeps what it likes; the kernel allocates nothing
export PYTHONPATH="$work/src:$work/tests/tools" ASAN_OPTIONS=detect_leaks=0:abort_on_error=1 UBSAN_OPTIONS=print_stacktrace=1
[ $# -gt 0 ] || env LD_PRELOAD="$preload" "$python" -W ignore "$work/fuzz/optimizer.py" --count 300 --jobs 1
exec env LD_PRELOAD="$preload" "$python" -m pytest -q -p no:cacheprovider --capture=sys \
    kernels/test_cpu_kernel.py kernels/test_cpu_plan.py kernels/test_cpu_state.py "$@"
