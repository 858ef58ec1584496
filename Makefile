# What people and CI type. It needs Python 3.11 or newer and the package registries.
PYTHON ?= python3
BIN := .venv/bin
INSTALLED := .venv/installed

FLAVOUR ?= cpu
ENGINE ?= docker
# Test processes share the cores: two threads of linear algebra in each would only wait for each other.
ONE_THREAD := OMP_NUM_THREADS=1 OPENBLAS_NUM_THREADS=1
PARALLEL := --numprocesses auto --maxprocesses 8 --dist worksteal

.PHONY: run test test-image check serve tensorboard bento image contents sbom audit fmt clean

run: $(INSTALLED) ## fine-tune: make run ARGS="--backbone resnet18 --data photos/"
	@$(BIN)/python finetune/run.py $(ARGS)

test: $(INSTALLED) ## run the tests, a process per core: make test ARGS="-k freezing"
	$(ONE_THREAD) $(BIN)/python -m pytest $(PARALLEL) $(ARGS)

test-image: $(INSTALLED) ## build the image with Debian's buildah and boot it: as root, minutes
	tests/image.sh

check: $(INSTALLED) ## format, lint and types, as in CI
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

serve: $(INSTALLED) ## serve the newest checkpoints on port 3000
	$(BIN)/bentoml serve --timeout-keep-alive 75 $(ARGS)

tensorboard: $(INSTALLED) ## show the runs on port 6006
	$(BIN)/tensorboard --logdir runs $(ARGS)

bento: $(INSTALLED) ## pack the service and the checkpoints into a Bento
	$(BIN)/bentoml build $(ARGS)

image: $(INSTALLED) ## the Bento's container image, graft:cpu; FLAVOUR=cuda for graft:cuda
	$(BIN)/python deploy/image.py --flavour $(FLAVOUR) $(ARGS)

contents: ## what the image contains, with licences; ENGINE=podman for podman
	@$(ENGINE) run --rm -i --entrypoint python3 graft:$(FLAVOUR) - < deploy/contents.py

sbom: ## the image's SBOM, CycloneDX, in sbom-<flavour>.cdx.json
	$(ENGINE) run --rm -i --entrypoint python3 graft:$(FLAVOUR) - --cyclonedx \
		< deploy/contents.py > sbom-$(FLAVOUR).cdx.json

audit: $(INSTALLED) ## known vulnerabilities of the pins, if the registry publishes them
	$(BIN)/uv tool run pip-audit --disable-pip --no-deps --requirement constraints.txt

fmt: $(INSTALLED) ## format the code and fix what lint can fix
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean: ## remove the environment and caches; runs and checkpoints stay
	rm -rf .venv .pytest_cache .mypy_cache .ruff_cache
	find . -name __pycache__ -type d -exec rm -rf {} +

# uv installs the pins, six gigabytes, in a third of pip's time. --compile-bytecode takes 20 s for all
# packages; without it programs start 3 s later, because torch and timm would be compiled each time.
$(INSTALLED): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt uv
	$(BIN)/uv pip install --quiet --compile-bytecode --python $(BIN)/python \
		--constraints constraints.txt --build-constraints constraints.txt --editable '.[dev]'
	@touch $@
