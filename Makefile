# Everything a newcomer needs: make demo, make test. Each sets up .venv by itself.

# The first of these that is Python 3.11 or 3.12; name another with make PYTHON=...
PYTHON ?= $(firstword $(foreach p,python3 python3.12 python3.11,$(shell $(p) -c 'import sys; sys.version_info[:2] in ((3, 11), (3, 12)) and print("$(p)")' 2>/dev/null)))
BIN := .venv/bin
# On the CPU, two processes of one thread: matrices this small gain little from a second thread.
LAUNCH := ACCELERATE_USE_CPU=true CUDA_VISIBLE_DEVICES= OMP_NUM_THREADS=1 $(BIN)/accelerate launch --config_file recipes/accelerate/cpu.yaml
# Two test processes, one thread each: more threads only wait for each other on tiny models.
PYTEST := OMP_NUM_THREADS=1 CUDA_VISIBLE_DEVICES= $(BIN)/python -m pytest

# The stand-in for an MLLM is up at OPENAI_BASE_URL while the builder runs.
BUILD := $(BIN)/python -m data.stand_in -- $(BIN)/python -m data.build

.PHONY: demo data-demo ablations test test-slow test-gpu lint

demo: .venv/installed
	$(LAUNCH) train.py --recipe recipes/phantom.yaml
	$(LAUNCH) eval.py --model runs/phantom/final --benchmarks phantom --out runs/phantom/eval/sighted
	$(LAUNCH) eval.py --model runs/phantom/final --benchmarks phantom --out runs/phantom/eval/blind --blind
	$(BIN)/python eval.py --compare runs/phantom/eval/sighted runs/phantom/eval/blind --out runs/phantom/eval/report --require-accuracy 0.90 --require-gain 0.40

# The miniature ablations (recipes/mini/README.md): 18 small trainings on synthetic pictures, two at a time. CPU, half an hour to an hour.
ablations: .venv/installed
	$(BIN)/python -m huatuo_vision.ablate recipes/mini/ablations/alignment.yaml
	$(BIN)/python -m huatuo_vision.ablate recipes/mini/ablations/construction.yaml

data-demo: .venv/data-installed
	$(BIN)/python -m data.phantom_articles --out runs/data-demo/source --articles 60 --seed 0
	$(BIN)/python -m data.filters.classifier --rows runs/data-demo/source/labelled/labels.jsonl --config data/demo.yaml --out runs/data-demo/classifier.json
	$(BUILD) --config data/demo.yaml --source runs/data-demo/source/articles --out runs/data-demo/build
	$(LAUNCH) train.py --recipe recipes/mini/data-demo.yaml --out runs/data-demo/training
	@if [ -n "$(HUATUO_SAMPLES)" ]; then set -ex; \
	  $(BUILD) --config data/demo-figures.yaml --source "$(HUATUO_SAMPLES)/real_sample/samples.jsonl" --out runs/data-demo/figures; \
	  $(BUILD) --config data/demo-articles.yaml --source "$(HUATUO_SAMPLES)/jats_sample" --out runs/data-demo/articles; fi

test: .venv/data-installed
	$(PYTEST) -n 2 -m "not slow and not gpu"

test-slow: .venv/data-installed
	$(PYTEST) -m slow

# What needs a CUDA device; skips without one.
test-gpu: .venv/installed
	$(BIN)/python -m pytest -m gpu

lint: .venv/installed
	$(BIN)/ruff check . && $(BIN)/ruff format --check .

.venv/installed: requirements.txt
	@test -n "$(PYTHON)" || { echo "error: no Python 3.11 or 3.12 found; install one or name it: make PYTHON=/path/to/python3.12"; exit 2; }
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet torch==2.13.0
	$(BIN)/python -m pip install --quiet -r requirements.txt
	touch $@

.venv/data-installed: .venv/installed requirements-data.txt
	$(BIN)/python -m pip install --quiet -r requirements-data.txt
	touch $@
