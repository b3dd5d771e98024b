# One word per thing a person does.
PYTHON ?= python3
BIN := .venv/bin
STAMP := .venv/.installed
PATHS := finetune tests benchmarks

.PHONY: help install grid report test faults bench check format clean

help: ## Show this list
	@grep -hE '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z]+):.*## /\1\t/' | expand -t 10

install: $(STAMP) ## Make .venv and install the project with its tested versions

$(STAMP): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt torch==2.13.0
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev,modelscope]'
	touch $@

grid: install ## Run the demo grid, then the report
	$(BIN)/python -m finetune -m model=qwen,llama method=none,lora,qlora,prefix
	$(BIN)/python -m finetune.report multirun

report: install ## Turn the runs under multirun/ into tables
	$(BIN)/python -m finetune.report multirun

test: install ## Run the test suite
	$(BIN)/python -m pytest -q -n auto --dist loadscope

faults: install ## Kill, starve and mislead real runs, and see that nothing is lost (about half an hour)
	$(BIN)/python -m pytest -q -m faults tests

bench: install ## Measure speed against peers (a GPU, trl and datasets are needed)
	$(BIN)/python -m benchmarks.cell --shape 0.5B --who worker,process --methods lora,qlora,prefix,prompt,ptuning
	$(BIN)/python -m benchmarks.cell --shape 0.5B --who process,trl,trl-tuned,trainer,peft
	$(BIN)/python -m benchmarks.cell --shape 0.5B --who process,trl --check 300
	$(BIN)/python -m benchmarks.cell --shape 0.5B --who process,trl,trl-tuned --check 2000
	$(BIN)/python -m benchmarks.cell --shape 0.5B --who process --check 2000 --step compiled
	$(BIN)/python -m benchmarks.training --shapes 0.5B,1.5B,7B --who compiled,graph,compiled-4,eager,trl,trl-tuned,peft,trainer
	$(BIN)/python -m benchmarks.training --shapes 0.5B,1.5B,7B --who trl-no-cudnn,trl-tuned-no-cudnn,peft-no-cudnn,trainer-no-cudnn
	$(BIN)/python -m benchmarks.training --shapes 0.5B,1.5B --who compiled-128,trl-tuned-32,trl-tuned-32-no-cudnn
	$(BIN)/python -m benchmarks.training --shapes 0.5B --who trl-tuned-64,trl-tuned-64-no-cudnn
	$(BIN)/python -m benchmarks.training --shapes 7B --who compiled-64,trl-tuned-16,trl-tuned-16-no-cudnn
	$(BIN)/python -m benchmarks.training --shapes 0.5B --who full-adamw,full-adamw_8bit,full-paged_adamw_8bit --seconds 5
	$(BIN)/python -m benchmarks.training --shapes 7B --who eager-1,qlora-eager-1,qlora-eager --seconds 5
	$(BIN)/python -m benchmarks.kernels --shapes 0.5B,1.5B,7B --rows 8,64
	$(BIN)/python -m benchmarks.decoding
	$(BIN)/python -m benchmarks.logits
	$(BIN)/python -m benchmarks.demo_cell
	$(BIN)/python -m benchmarks.tables benchmarks.jsonl

check: install ## Lint, formatting, types, layers
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	PYTHONPATH=. $(BIN)/lint-imports

format: install ## Format the code
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean: ## Remove the environment and the caches of tools; runs stay
	rm -rf .venv build *.egg-info .mypy_cache .ruff_cache .pytest_cache .import_linter_cache
