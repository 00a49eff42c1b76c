# make demo      install, then train RAPO on a tiny model: four processes, no GPU
# make test      install, then check style and types, and run all tests that need no GPU
# make install   into .venv, versions pinned by constraints.txt
# make lint      style and types alone
# make clean     remove .venv and caches; runs/ stays

PYTHON ?= python3.11

# Models and data are local files: no library is to ask the Hugging Face Hub.
export HF_HUB_OFFLINE = 1
# More threads than cores cost an order of magnitude.
export OMP_NUM_THREADS ?= 1

.PHONY: demo test lint install clean

demo: install
	examples/run_cpu.sh

test: lint
	.venv/bin/pytest

lint: install
	.venv/bin/ruff check
	.venv/bin/ruff format --check
	.venv/bin/mypy

install: .venv/installed

.venv/installed: setup.py pyproject.toml constraints.txt
	@$(PYTHON) -c 'import ensurepip, sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { \
		echo "error: '$(PYTHON)' is no Python >= 3.11 with venv; install one (Debian: apt-get install" \
			"python3.11 python3.11-venv), or name yours: make PYTHON=/path/to/python" >&2; exit 1; }
	$(PYTHON) -m venv .venv
	.venv/bin/pip install --constraint constraints.txt --editable '.[dev]'
	@touch $@

clean:
	rm -rf .venv .mypy_cache .pytest_cache .ruff_cache .hypothesis *.egg-info
	find megatron_rapo tests tools -name __pycache__ -prune -exec rm -r {} +
