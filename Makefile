PYTHON ?= python3
VENV ?= .venv
STAMP := $(VENV)/.installed
RUN := $(VENV)/bin/

.PHONY: demo test test-slow lint docs bench bench-full

# Pictures of the same prompts, in full and with nine of ten tokens cached, and how long each took.
demo: $(STAMP)
	$(RUN)dit-accel demo

# Tiny models gain nothing from threads: two processes of one thread each take two thirds of the time.
test: $(STAMP)
	OMP_NUM_THREADS=1 $(RUN)python -m pytest -m "not slow" -n 2 --dist loadfile

test-slow: $(STAMP)
	$(RUN)python -m pytest -m slow

lint: $(STAMP)
	$(RUN)ruff check .
	$(RUN)ruff format --check .
	$(RUN)mypy

# The site, in site/: the pages as they lie in the repository, so that their links hold, and those made from the code.
PAGES = README.md CONTRIBUTING.md CHANGELOG.md LICENSE NOTICE docs/*.md docs/site/*.md docs/figures samples/*.md samples/*.png
docs: $(STAMP)
	$(RUN)python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[docs]"
	rm -rf out/docs && mkdir -p out/docs/samples/training
	tar -c $(PAGES) samples/training/README.md | tar -x -C out/docs
	$(RUN)python docs/site/options.py > out/docs/docs/site/options.md
	NO_MKDOCS_2_WARNING=1 $(RUN)python -m mkdocs build --strict

# Part of it, with few prompts: ten minutes to half an hour, and a page about it.
bench: $(STAMP)
	$(RUN)python benchmarks/startup.py --repeats 3 --output out/bench/startup.json
	$(RUN)python benchmarks/overhead.py --rounds 1 --pictures 2 --output out/bench/overhead.json
	$(RUN)python benchmarks/growth.py --tokens 256 --tokens 1024 --output out/bench/growth.json --figure out/bench/growth.png
	$(RUN)python benchmarks/width.py loops --model pixart --pixels 256 --layers 2 --output out/bench/width.json
	$(RUN)python benchmarks/quality.py search --pipeline emoji-flux --rounds 1 --output out/bench/quality
	$(RUN)python benchmarks/quality.py seconds --pipeline emoji-flux --rounds 2 --output out/bench/quality
	$(RUN)python benchmarks/quality.py pictures --pipeline emoji-flux --prompts 4 --seeds 1 --output out/bench/quality
	$(RUN)python benchmarks/page.py out/bench --docs out/bench/page

# All of docs/benchmarks.md anew: hours. What was measured already, in out/bench-full, is not measured again.
bench-full: $(STAMP)
	$(RUN)python benchmarks/startup.py --output out/bench-full/startup.json
	$(RUN)python benchmarks/overhead.py --output out/bench-full/overhead.json
	$(RUN)python benchmarks/growth.py --output out/bench-full/growth.json --figure out/bench-full/growth.png
	$(RUN)python benchmarks/width.py loops --output out/bench-full/width.json
	$(RUN)python benchmarks/width.py memory --output out/bench-full/memory.json
	$(RUN)python benchmarks/quality.py search --output out/bench-full/quality
	$(RUN)python benchmarks/quality.py seconds --output out/bench-full/quality
	$(RUN)python benchmarks/quality.py pictures --output out/bench-full/quality
	$(RUN)python benchmarks/page.py out/bench-full

$(STAMP): pyproject.toml constraints.txt
	test -x $(RUN)python || $(PYTHON) -m venv $(VENV)
	$(RUN)python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[dev]"
	touch $@
