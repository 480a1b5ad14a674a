# `make serve` and `make test` are enough to start with; both create the venv on first use.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: serve test check fuzz loadtest soak chaos faults protos manifests checkov image image-test clean

serve: $(STAMP)
	@exec $(BIN)/farsight serve --demo

test: $(STAMP) check
	scripts/prometheus.sh
	scripts/kubectl.sh
	$(BIN)/pytest

check: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# hostile requests, CASES of each kind (300 take about a minute): in process, then over the network to a real service
CASES ?= 1000
RESULTS ?=
fuzz: $(STAMP)
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[fuzz]'
	CASES=$(CASES) RESULTS=$(RESULTS) $(BIN)/pytest -p no:schemathesis \
		tests/fuzz/fuzz_bodies.py tests/fuzz/fuzz_openapi.py tests/fuzz/fuzz_service.py

loadtest: $(STAMP)
	$(BIN)/python -m loadtests --scenario smoke

# half an hour; also checks the growth of memory
soak: $(STAMP)
	$(BIN)/python -m loadtests --scenario soak

# events that must not lose requests: a killed replica, replaced replicas, a killed node, a lost node (nodes need root)
chaos: $(STAMP)
	$(BIN)/python -m loadtests --scenario chaos
	$(BIN)/python -m loadtests --scenario rolling-update
	$(BIN)/python -m loadtests --scenario node-killed
	$(BIN)/python -m loadtests --scenario node-lost

# what dies, fills up or hangs, each on a service of its own; two rows need root
faults: $(STAMP)
	$(BIN)/python -m loadtests.faults --output loadtests/results/faults-2-cores.json

protos: $(STAMP)
	PYTHON=$(BIN)/python scripts/protos.sh

manifests: $(STAMP)
	$(BIN)/python scripts/manifests.py

checkov: $(STAMP)
	test -x .tools/checkov/bin/checkov || { $(PYTHON) -m venv .tools/checkov && .tools/checkov/bin/pip install --quiet checkov==3.3.30; }
	scripts/kubectl.sh
	$(BIN)/python -m scripts.checkov

# builds the image and runs it on a read-only root; needs root and Debian's buildah and debootstrap
image-test: $(STAMP)
	scripts/image_test.sh $(BUILD_FLAGS)

image:
	docker build --build-arg DEVICE=cpu --tag farsight:cpu .

clean:
	rm -rf $(VENV) .tools .mypy_cache .ruff_cache .pytest_cache .hypothesis

$(STAMP): pyproject.toml constraints.txt
	@echo "installing into $(VENV), this takes some minutes ..."
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --upgrade pip
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[dev]'
	@touch $@
