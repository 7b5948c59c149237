# Everything a newcomer needs: make demo, make test. Each sets up .venv by itself.

# The first of these that is Python 3.11 or 3.12; name another with make PYTHON=...
PYTHON ?= $(firstword $(foreach p,python3 python3.12 python3.11,$(shell $(p) -c 'import sys; sys.version_info[:2] in ((3, 11), (3, 12)) and print("$(p)")' 2>/dev/null)))
BIN := .venv/bin
# On the CPU, two processes of one thread: matrices this small gain little from a second thread.
LAUNCH := ACCELERATE_USE_CPU=true CUDA_VISIBLE_DEVICES= OMP_NUM_THREADS=1 $(BIN)/accelerate launch --config_file recipes/accelerate/cpu.yaml
# Two test processes, one thread each: more threads only wait for each other on tiny models.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest

.PHONY: demo ablations test test-slow lint

demo: .venv/installed
	$(LAUNCH) train.py --recipe recipes/phantom.yaml
	$(LAUNCH) eval.py --model runs/phantom/final --benchmarks phantom --out runs/phantom/eval/sighted
	$(LAUNCH) eval.py --model runs/phantom/final --benchmarks phantom --out runs/phantom/eval/blind --blind
	$(BIN)/python eval.py --compare runs/phantom/eval/sighted runs/phantom/eval/blind --out runs/phantom/eval/report --require-accuracy 0.90 --require-gain 0.40

# The miniature ablations (recipes/mini/README.md): 21 small trainings on synthetic pictures, two at a time. CPU.
ablations: .venv/installed
	$(BIN)/python -m huatuo_vision.ablate recipes/mini/ablations/alignment.yaml
	$(BIN)/python -m huatuo_vision.ablate recipes/mini/ablations/construction.yaml

test: .venv/installed
	$(PYTEST) -n 2 -m "not slow and not gpu"

test-slow: .venv/installed
	$(PYTEST) -m slow

lint: .venv/installed
	$(BIN)/ruff check . && $(BIN)/ruff format --check .

.venv/installed: requirements.txt
	@test -n "$(PYTHON)" || { echo "error: no Python 3.11 or 3.12 found; install one or name it: make PYTHON=/path/to/python3.12"; exit 2; }
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet torch==2.13.0
	$(BIN)/python -m pip install --quiet -r requirements.txt
	touch $@
