# make serve    install what is missing, fetch the small default model, serve it on 127.0.0.1:8000
#               make serve ARGS="--port 8123 --host 0.0.0.0" passes flags on
# make test     the same set-up, then every test
# make setup    the set-up alone
# make lint     ruff and mypy
# make gate     does the default model still make twice the tokens that transformers makes? (vcli bench gate)
# make interop  checkpoints to and from other libraries, and latencies beside aiperf's, each in an environment of its own
#               below .interop
#               make interop LIBRARIES="gptqmodel llm-compressor" does it with some of them; AutoGPTQ needs Python 3.11

PYTHON ?= python3
BIN := .venv/bin
LIBRARIES ?= gptqmodel llm-compressor autoawq auto-gptq aiperf

.PHONY: serve test setup lint gate interop

serve: setup
	$(BIN)/vcli serve $(ARGS)

# What only computes runs in a process for each core: compiled and emulated kernels take the most. What starts servers and
# measures runs one by one.
COMPUTING := tests/engine $(addprefix tests/bench/,test_quality.py test_gate_on_tape.py test_throughput.py test_charts.py)

test: setup
	$(BIN)/python -m pytest $(COMPUTING) -n auto
	$(BIN)/python -m pytest tests $(COMPUTING:%=--ignore %)

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# Undecided, which is exit code 4, is a noisy machine and no regression.
gate: setup
	$(BIN)/vcli bench gate --against transformers --metric "throughput>=+100%" --budget 150s --device cpu \
	  --concurrency 4 --num-prompts 4 --input-len 32 --output-len 32 $(ARGS) || test $$? -eq 4

interop: setup $(LIBRARIES:%=.interop/%/.installed)
	$(BIN)/python -m pytest tests/interop $(ARGS)

.interop/%/.installed: tests/interop/%.txt
	$(PYTHON) -m venv .interop/$*
	.interop/$*/bin/pip install --disable-pip-version-check --quiet --requirement $<
	@touch $@

# The stamp is newer than pyproject.toml once everything it asks for is installed; the model is looked for each time,
# which takes no time once it is there.
setup: .venv/.installed
	@$(BIN)/python -m engine.hub > /dev/null

.venv/.installed: pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --disable-pip-version-check --quiet --editable '.[dev]'
	@touch $@
