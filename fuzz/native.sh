#!/bin/sh
# Fuzzes the kernel's plans and works under AddressSanitizer and UndefinedBehaviorSanitizer.
# Usage: fuzz/native.sh SECONDS [libFuzzer arguments]. Inputs that fail are written to fuzz/found.
set -eu
seconds=${1:-60}
[ $# -gt 0 ] && shift
here=$(cd "$(dirname "$0")" && pwd)
clang=${CLANG:-clang++}
if ! command -v "$clang" > /dev/null; then
    echo "fuzz/native.sh: skipped, $clang is not installed (libFuzzer comes with clang)"
    exit 0
fi
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
mkdir -p "$work/corpus" "$here/found"
"$clang" -w -std=c++17 -O1 -g -DRMSPROP_ONE_TARGET -ffp-contract=off -fno-math-errno \
    -fsanitize=fuzzer,address,undefined -fno-sanitize-recover=all -I "$here/../src/rmsprop/csrc" \
    -o "$work/native" "$here/native.cpp" "$here"/../src/rmsprop/csrc/*.cpp
"$work/native" -max_total_time="$seconds" -max_len=2000 -len_control=0 -verbosity=0 -print_final_stats=1 \
    -artifact_prefix="$here/found/" "$@" "$work/corpus"
