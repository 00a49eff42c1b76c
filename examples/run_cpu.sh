#!/usr/bin/env bash
# Trains the demo on this machine's CPU, each time in a new folder of runs/.
# Arguments are passed on: examples/run_cpu.sh --set run.steps=10
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
PATH="$PWD/.venv/bin:$PATH" # where `make install` puts the command
exec megatron-rapo train examples/configs/demo.toml \
    --set run.directory="runs/demo-$(date +%Y%m%d-%H%M%S)" "$@"
