# demo   train on real data and look at the result        test   pass the tests, in two to seven minutes on two quiet cores
# test-long  pass the tests that test leaves out: whole tables, large searches, whole runs
# check  format, lint, types, workflows                            bench  measure
# docs   repeat the runs behind the docs' claims          sanitize  the kernel's tests under ASan and UBSan
# fuzz   damage checkpoints in 100,000 ways, and read them; treat 10,000 optimizers badly; both by coverage, for a minute
# fuzz-native  feed plans and works to the kernel for a minute, under sanitizers (needs clang++)
# kill-test  kill a training process 200 times, with two writers and two readers of one file, and resume it
# site  build the site from docs/ into docs/_site, and run its tutorials; warnings are errors
# wheel  build what would be published, and test it without a compiler           all of them set up $(VENV)
# compilers  the kernel's whole suite with clang, and for aarch64 under emulation (needs both, see CONTRIBUTING.md)
# release  date the changelog, commit and tag VERSION (docs/releasing.md)
# integrations  train by other people's trainers, in a venv of their own: $(TRAINERS)

PYTHON ?= python3
VENV ?= .venv
TRAINERS ?= .venv-integrations
FUZZERS ?= .venv-fuzz
CLANG ?= clang++
# What to install beside the package: `make test VENV=.venv-old TORCH=torch==2.13.0` tests on that torch.
TORCH ?=
# Folders of tests to run, in place of all of them: `make test TESTS=tests/kernels`.
TESTS ?=
ORACLES = timm stable-baselines3
BIN = $(VENV)/bin
SITE = import site; print(site.getsitepackages()[0])

.PHONY: demo test test-long coverage check bench bench-gpu docs race sanitize fuzz fuzz-native kill-test wheel site compilers release integrations clean

$(VENV)/ready: pyproject.toml setup.py $(wildcard src/rmsprop/csrc/*)
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "rmsprop needs Python 3.10 or newer, this is " + sys.version.split()[0])'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-compile $(TORCH) --editable '.[test]'
	# one file of each is read, beside ours; what they depend on is not needed
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-compile --no-deps $(ORACLES)
	touch $@

demo: $(VENV)/ready
	$(BIN)/rmsprop demo

race: $(VENV)/ready
	$(BIN)/rmsprop race

test: $(VENV)/ready
	$(BIN)/python -m pytest -m "not long" --numprocesses=auto --dist=worksteal $(COVERED) $(TESTS)

test-long: $(VENV)/ready
	$(BIN)/python -m pytest -m long --numprocesses=auto --dist=worksteal

coverage:
	$(MAKE) test COVERED="--cov=rmsprop --cov-report=term-missing --cov-fail-under=95"

check: $(VENV)/ready
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/zizmor --offline --quiet .github
	$(BIN)/check-jsonschema --builtin-schema vendor.github-workflows .github/workflows/*.yml
	$(BIN)/check-jsonschema --builtin-schema vendor.github-issue-forms .github/ISSUE_TEMPLATE/[!c]*.yml
	$(BIN)/check-jsonschema --builtin-schema vendor.dependabot .github/dependabot.yml
	$(BIN)/check-jsonschema --builtin-schema vendor.citation-file-format CITATION.cff

release:
	.ci/release $(VERSION)

bench: $(VENV)/ready
	$(BIN)/python bench/bench_cpu.py

bench-gpu: $(VENV)/ready
	$(BIN)/python bench/gpu.py

sanitize: $(VENV)/ready
	tests/tools/sanitize.sh $(abspath $(BIN))/python

fuzz: $(VENV)/ready $(FUZZERS)/ready
	$(BIN)/python fuzz/convert.py --count 100000
	$(BIN)/python -W ignore fuzz/optimizer.py --count 10000
	$(FUZZERS)/bin/python -W ignore fuzz/coverage.py --seconds 60

$(FUZZERS)/ready: pyproject.toml setup.py $(wildcard src/rmsprop/csrc/*)
	$(PYTHON) -m venv $(FUZZERS)
	$(FUZZERS)/bin/python -m pip install --quiet --disable-pip-version-check --no-compile $(TORCH) --editable '.[convert,checkpoint]'
	# atheris has no wheel for every Python and system; without it fuzz/coverage.py says so, and passes
	-$(FUZZERS)/bin/python -m pip install --quiet --disable-pip-version-check --no-compile --editable '.[fuzz]'
	touch $@

fuzz-native:
	CLANG="$(CLANG)" fuzz/native.sh 60

kill-test: $(VENV)/ready
	$(BIN)/python tests/tools/kill_and_resume.py --kills 200
	$(BIN)/python tests/tools/kill_and_resume.py --kills 200 --state-dtype float8

wheel: $(VENV)/ready
	tests/tools/check_wheel.sh $(abspath $(BIN))/python

compilers: $(VENV)/ready
	tests/tools/check_clang.sh $(abspath $(BIN))/python
	$(BIN)/python -m pytest tests/kernels/test_cpu_aarch64.py

$(TRAINERS)/ready: $(VENV)/ready
	$(PYTHON) -m venv $(TRAINERS)
	# It borrows what $(VENV) has, torch above all, and pip finds the rest for that torch, torchvision included.
	$(BIN)/python -c '$(SITE)' > "$$($(TRAINERS)/bin/python -c '$(SITE)')/borrowed.pth"
	$(TRAINERS)/bin/python -m pip install --quiet --disable-pip-version-check --no-compile $(TORCH) --editable '.[integrations]'
	touch $@

integrations: $(TRAINERS)/ready
	$(TRAINERS)/bin/python -m pytest --numprocesses=auto --dist=worksteal tests/integrations

site: $(VENV)/ready
	$(BIN)/python -m sphinx -W --keep-going -b html -d docs/_site/.doctrees docs docs/_site
	@echo "open docs/_site/index.html; for excerpts in the search: python3 -m http.server --directory docs/_site"

docs: $(VENV)/ready
	$(BIN)/python docs/build.py

clean:
	rm -rf .venv* build dist src/*.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis .coverage*
