# What people and CI type. `make run` and `make test` need Python 3.11+ and the package registries, nothing else.
PYTHON ?= python3
BIN := .venv/bin
INSTALLED := .venv/installed

FLAVOUR ?= cpu
ENGINE ?= docker

.PHONY: run test test-image check serve tensorboard bento image contents sbom audit fmt clean

run: $(INSTALLED) ## fine-tune: make run ARGS="--backbone resnet18 --data photos/"
	@$(BIN)/python finetune/run.py $(ARGS)

test: $(INSTALLED) ## run the tests: make test ARGS="-k freezing"
	$(BIN)/python -m pytest $(ARGS)

test-image: $(INSTALLED) ## build the image with Debian's buildah and boot it: as root, minutes
	tests/image.sh

check: $(INSTALLED) ## format, lint and types, as CI asks
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

contents: ## what fills the image, with licences: ENGINE=podman where that is the engine
	@$(ENGINE) run --rm -i --entrypoint python3 graft:$(FLAVOUR) - < deploy/contents.py

sbom: ## the image's SBOM, CycloneDX, in sbom-<flavour>.cdx.json
	$(ENGINE) run --rm -i --entrypoint python3 graft:$(FLAVOUR) - --cyclonedx < deploy/contents.py > sbom-$(FLAVOUR).cdx.json

audit: $(INSTALLED) ## known weaknesses of the pins, where the registry publishes them
	$(BIN)/uv tool run pip-audit --disable-pip --no-deps --requirement constraints.txt

fmt: $(INSTALLED) ## format the code and mend what lint can mend
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean: ## remove the environment and what tools left; runs and checkpoints stay
	rm -rf .venv .pytest_cache .mypy_cache .ruff_cache
	find . -name __pycache__ -type d -exec rm -rf {} +

# uv installs the pins, six gigabytes of them, in a third of pip's time. Without --compile-bytecode (20 s for
# all packages) every start of a program would compile instead: torch 1.2 s and timm 1 s.
$(INSTALLED): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt uv
	$(BIN)/uv pip install --quiet --compile-bytecode --python $(BIN)/python \
		--constraints constraints.txt --build-constraints constraints.txt --editable '.[dev]'
	@touch $@
