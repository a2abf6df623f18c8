# make run: set up, run the series on the bundled model. make test: everything that is checked.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PORT ?= 5092
LEARNERS ?= 8
WORKERS ?= 2
export PATH := $(CURDIR)/$(BIN):$(PATH)
export CHROMIUM ?= chromium
export MPLBACKEND ?= module://matplotlib_inline.backend_inline
# Threads of torch that wait sleep soon: two kernels on the same two cores slowed each other tenfold without it.
export GOMP_SPINCOUNT ?= 1000
# JupyterLab refuses to start as root (rented GPUs, containers) without this option.
ALLOW_ROOT := $(if $(filter 0,$(shell id -u)),--allow-root)
# Jupyter and other libraries make files below HOME.
ifneq ($(shell test -w "$$HOME" && echo yes),yes)
$(info HOME cannot be written, so the libraries keep their files in output/home)
$(shell mkdir -p output/home)
export HOME := $(CURDIR)/output/home
endif
# The language of run, lab and test:  make run COURSE_LANGUAGE=zh
export COURSE_LANGUAGE ?= en

.PHONY: setup run lab dashboard test test-both test-faults test-browser test-other-tools site test-site lint benchmark workshop store translations lock tokenizer model clean

setup: $(VENV)/ready

# First what the lock pins by hash, then torch, whose build pip chooses for this machine: requirements.lock says why.
$(VENV)/ready: requirements.txt requirements.lock
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] < (3, 14))' \
		|| { echo "Python 3.11 to 3.13 is needed; name one with  make run PYTHON=python3.12"; exit 1; }
	@echo "Setting up in $(VENV) (a few minutes, about 2 GB)"
	@$(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install -q --disable-pip-version-check --no-deps --require-hashes -r requirements.lock \
			2>$(VENV)/pip.log \
		&& $(BIN)/python -m pip install -q --disable-pip-version-check -r requirements.txt 2>>$(VENV)/pip.log \
		|| { tail -n 20 $(VENV)/pip.log; exit 1; }
	@touch $@

run: setup
	@$(BIN)/python tools/run_series.py

# The image's settings serve here too: no question about news, no question about updates, and the interface in the
# language of the series until the learner chooses another.
# More options for JupyterLab:  make lab LAB_ARGS="--no-browser --port=8890"
lab: setup
	@$(if $(ALLOW_ROOT),echo "You are root: JupyterLab gets --allow-root. It asks for its token and listens on 127.0.0.1 as for every user.")
	@PYTHONSTARTUP="$(CURDIR)/course/startup.py" JUPYTER_CONFIG_PATH="$(CURDIR)/deploy/jupyter/$(COURSE_LANGUAGE):$(CURDIR)/deploy/jupyter" $(BIN)/python -m jupyterlab --ip=127.0.0.1 --ServerApp.root_dir=. $(ALLOW_ROOT) $(LAB_ARGS) notebooks/$(COURSE_LANGUAGE)/01_environment.ipynb

dashboard: setup
	@folder="$$($(BIN)/python -c 'import utils; print(utils.settings().output)')" \
		&& $(BIN)/python -m swanlab watch "$$folder/swanlab" -p $(PORT)

# Test files side by side; each works with one thread, so that they do not take the cores from each other.
TOGETHER := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n $(WORKERS) --dist loadfile

# Last what uses what the notebooks have left in output/test: figures, the exercises of 06 and 09, and 50 questions.
test: lint
	@$(TOGETHER) tests $(addprefix --ignore=tests/,faults browser site other_tools test_exercises.py test_results.py test_serving.py)
	@$(BIN)/python tools/run_nbval.py notebooks/$(COURSE_LANGUAGE)
	@$(TOGETHER:loadfile=load) $(addprefix tests/test_,exercises.py results.py serving.py)

# After make test: the Chinese series too, on the training that the English one has left in output/test. Those named in
# SKIP are not executed.
test-both: test
	@$(BIN)/python tools/run_nbval.py --share $(addprefix --skip=,$(SKIP)) notebooks/zh

# Killed, cut off, filled up, run out of order: what happens then. The table of faults is tests/faults/README.md.
test-faults: setup
	@$(TOGETHER) tests/faults

# What a learner sees: each notebook run, clicked and read in JupyterLab, by a real browser.
test-browser: setup
	@$(NEEDS_CHROMIUM)
	@$(BIN)/python -m pip install -q --disable-pip-version-check -r tests/browser/requirements.txt
	@$(if $(LONG),BROWSER_LONG=1) $(BIN)/python -m pytest -q tests/browser

NEEDS_CHROMIUM := command -v $(CHROMIUM) >/dev/null \
	|| { echo "Chromium is missing. On Debian: apt-get install chromium fonts-noto-cjk; else name one with CHROMIUM=path"; exit 1; }

# The course as a web site in both languages, in output/site, from the stored outputs:  make site PDF=1  prints each page
# to a PDF too. The packages that it needs change none that the notebooks use.
site: $(VENV)/site
	@$(if $(PDF),$(NEEDS_CHROMIUM))
	@$(BIN)/python tools/website.py $(if $(PDF),--pdf)

$(VENV)/site: docs/site/requirements.txt | setup
	@$(BIN)/python -m pip install -q --disable-pip-version-check --no-deps -r $<
	@touch $@

# After make site: its pages by a real browser, by keyboard, on the width of a phone, in light and dark.
test-site: setup
	@$(NEEDS_CHROMIUM)
	@$(BIN)/python -m pip install -q --disable-pip-version-check -r tests/site/requirements.txt
	@$(BIN)/python -m pytest -q -n $(WORKERS) tests/site

# LLaMA-Factory, ms-swift and TRL still train what docs/other_tools.md says: by hand or once a week. The first run installs
# each in an environment of its own in output/other_tools.
test-other-tools: setup
	@$(BIN)/python -m pytest -q tests/other_tools

# Times LoRA training at the full size on the GPUs of this machine, with random weights.
benchmark: setup
	@$(BIN)/python benchmarks/benchmark.py

# The evening before a workshop: GO or NO-GO for this machine and so many learners (workshop/README.md).
workshop: setup
	@$(BIN)/python workshop/go_or_no_go.py $(LEARNERS) $(if $(BROWSERS),--browsers-elsewhere)

lint: setup $(VENV)/linters
	@$(BIN)/ruff check . && $(BIN)/ruff format --check .
	@$(BIN)/hadolint deploy/Dockerfile && $(BIN)/shellcheck deploy/*.sh deploy/proof/*.sh tools/*.sh

$(VENV)/linters: tools/requirements-lint.txt | setup
	@$(BIN)/python -m pip install -q --disable-pip-version-check -r $<
	@touch $@

# Run the series in both languages and keep the outputs in the notebooks; nothing, if other programs disturbed the run.
store: setup
	@rm -rf output && COURSE_LANGUAGE=en $(BIN)/python tools/run_series.py --store $(if $(DISTURBED),--disturbed-anyway) \
		&& $(BIN)/ruff format -q notebooks
	@$(BIN)/python tools/languages.py sync
	@rm -rf output && COURSE_LANGUAGE=zh $(BIN)/python tools/run_series.py --store

# After a text in the code has changed: what has no Chinese yet is empty or fuzzy in course/locale (tools/README.md).
translations: setup
	@$(BIN)/python tools/translations.py update compile

# After a pin has changed: the lock files anew. It needs a package index.
lock: setup $(VENV)/linters
	@UV="$(CURDIR)/$(BIN)/uv" tools/lock.sh

# Make the next bundled model on a GPU (models/recipe/README.md): make model CORPUS=folder. It keeps the bundled
# tokenizer, because the lessons show its tokens; to pre-train with another one: make tokenizer, then make model
# TOKENIZER=../../output/tokenizer
TOKENIZER ?= ../glm4-moe-mini
tokenizer:
	@corpus="$$(cd "$(CORPUS)" && pwd)" && cd models/recipe \
		&& $(PYTHON) make_tokenizer.py "$$corpus" chat heldout ../glm4-moe-mini/chat_template.jinja ../../output/tokenizer
model:
	@corpus="$$(cd "$(CORPUS)" && pwd)" && cd models/recipe \
		&& $(PYTHON) pretrain.py "$$corpus" "$(TOKENIZER)" chat heldout ../../output/pretrained \
		&& $(PYTHON) chat_tune.py ../../output/pretrained chat heldout ../../output/glm4-moe-mini

clean:
	rm -rf output $(VENV)
