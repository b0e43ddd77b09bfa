# make demo   train, evaluate and draw on a generated data set        make test   the test suite        make lint   ruff
# make        lists everything. PYTHON=python3.12 chooses the interpreter, VENV=DIR another environment.

# The first interpreter that is new enough; asked for only when the environment has to be made.
PYTHON ?= $(shell for name in python3 python3.14 python3.13 python3.12 python3.11 python3.10; do \
	$$name -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null && echo $$name && break; done)
VENV ?= .venv
TEST_JOBS ?= 2
TESTS ?= tests
BIN := $(VENV)/bin
DATA := datasets/synthetic
DEMO := output/demo

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help demo demo-smoke test lint

help:  ## this list
	@sed -n 's/^\([a-z-]*\):.*## /\1\t/p' $(MAKEFILE_LIST) | expand -t 14

demo: $(VENV)/installed $(DATA)/done  ## train a small RetinaNet, evaluate it, draw detections: everything in output/demo
	$(BIN)/python tools/train_net.py --config configs/quickstart.yaml OUTPUT_DIR $(DEMO) --resume
	$(BIN)/python tools/test_net.py --config $(DEMO)/config.yaml MODEL.WEIGHTS $(DEMO)/best.pth --per-class
	$(BIN)/python tools/predict.py --weights $(DEMO)/best.pth --output $(DEMO)/pictures $(DATA)/val
	@echo "demo: weights, log, metrics and TensorBoard events in $(DEMO), detections drawn in $(DEMO)/pictures"

demo-smoke: $(VENV)/installed $(DATA)/done  ## the same path in a few iterations, in a temporary folder
	folder=$$(mktemp -d) && trap 'rm -rf "$$folder"' EXIT && \
	$(BIN)/python tools/train_net.py --config configs/quickstart.yaml OUTPUT_DIR "$$folder/run" \
		SOLVER.MAX_ITER 4 SOLVER.WARMUP_ITERS 1 TEST.EVAL_PERIOD 2 && \
	$(BIN)/python tools/test_net.py --config "$$folder/run/config.yaml" MODEL.WEIGHTS "$$folder/run/best.pth" && \
	$(BIN)/python tools/predict.py --weights "$$folder/run/best.pth" --output "$$folder/pictures" $(DATA)/val

test: $(VENV)/installed-dev  ## the test suite; TESTS=tests/ops runs a part of it
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -m "not slow" -n $(TEST_JOBS) $(TESTS)

lint: $(VENV)/installed-dev  ## ruff
	$(BIN)/ruff check .

$(DATA)/done: retinanet/data/synthetic.py tools/make_synthetic.py | $(VENV)/installed
	$(BIN)/python tools/make_synthetic.py --output $(DATA)
	@touch $@

$(VENV)/bin/python:
	@test -n "$(PYTHON)" || { echo "error: Python 3.10 or newer is needed; install one or set PYTHON=" >&2; exit 1; }
	@.ci/make_venv "$(PYTHON)" "$(VENV)"

$(VENV)/installed: requirements.txt | $(VENV)/bin/python
	@echo "installing requirements.txt into $(VENV): PyTorch is large, this takes some minutes"
	$(BIN)/python -m pip install --quiet -r requirements.txt
	@touch $@

$(VENV)/installed-dev: requirements-dev.txt requirements-export.txt $(VENV)/installed
	$(BIN)/python -m pip install --quiet -r requirements-dev.txt
	@touch $@
