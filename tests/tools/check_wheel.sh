#!/bin/sh
# Installs what would be published, and tests it where no compiler can be found: usage tests/tools/check_wheel.sh PYTHON,
# a Python with torch, pytest, build and setuptools. 1. The wheel, built here: the kernel's tests. 2. The sdist,
# without a compiler: it installs, says that the kernel is missing, and steps.
set -eu
python=$(command -v "${1:-python}")
here=$(cd "$(dirname "$0")/../.." && pwd)
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

mkdir "$work/source"
(cd "$here" && git ls-files -z --cached --others --exclude-standard | xargs -0 cp --parents -t "$work/source")
(cd "$work/source" && "$python" -m build --no-isolation --outdir "$work/dist" . >"$work/log" 2>&1) ||
    { cat "$work/log"; exit 1; }
ls "$work/dist"
case $(echo "$work"/dist/*.whl) in *-py3-none-*) ;; *) echo "the wheel is bound to a Python version"; exit 1 ;; esac
if "$python" -m zipfile -l "$work"/dist/*.whl | grep -q csrc; then echo "the wheel holds sources"; exit 1; fi
"$python" -m zipfile -l "$work"/dist/*.whl | grep -q race/engine.js || { echo "the wheel lacks the live page"; exit 1; }
tar tzf "$work"/dist/*.tar.gz | grep -q csrc/plan.h || { echo "the sdist lacks sources"; exit 1; }

# a venv of its own that borrows torch and pytest, and not this package, from the given Python
fresh() {
    "$python" -m venv --without-pip "$1"
    site=$("$1/bin/python" -c 'import site; print(site.getsitepackages()[0])')
    "$python" -c 'import site; print(site.getsitepackages()[0])' >"$site/borrowed.pth"
}

fresh "$work/wheel"
"$python" -m pip --python "$work/wheel/bin/python" install --quiet --no-deps "$work"/dist/*.whl
cp -r "$here/tests" "$work/tests"
cd "$work/tests"
rm -f conftest.py
env -i HOME="$work" PATH="$work/wheel/bin" "$work/wheel/bin/python" -c "
import rmsprop
from rmsprop.kernels import native
assert rmsprop.__file__.startswith('$work/wheel'), rmsprop.__file__
assert native.missing() is None, native.missing()
print('wheel:', native.path())"
env -i HOME="$work" PATH="$work/wheel/bin" PYTHONPATH="$work/tests/tools" "$work/wheel/bin/python" -m pytest -q \
    -p no:cacheprovider kernels/test_cpu_kernel.py

fresh "$work/sdist"
CC=false CXX=false "$python" -m pip --python "$work/sdist/bin/python" install --quiet --no-deps --no-build-isolation \
    "$work"/dist/*.tar.gz
"$work/sdist/bin/python" -c "
import torch, rmsprop
from rmsprop.kernels import native, explain
from rmsprop.tensors.bucket import Bucket
assert rmsprop.__file__.startswith('$work/sdist'), rmsprop.__file__
assert 'missing' in native.missing()
weight = torch.nn.Parameter(torch.ones(3))
weight.grad = torch.ones(3)
rmsprop.RMSprop([weight]).step()
assert (weight != 1).all()
print('sdist without a compiler:', explain(rmsprop.Rule(), Bucket(param=[weight])))"
