# megatron_rapo on GPUs: trainer and SGLang servers from one image.
#
#   docker build -t megatron-rapo .
#   docker run --rm --gpus all --ipc host -v /models:/models -v "$PWD/runs:/work/runs" megatron-rapo \
#       train examples/configs/qwen2.5-7b.toml --dry-run
#
# docs/containers.md says more, also what of this file has been run and what not.
#
# The base brings what is compiled together and must not be replaced one by one: CUDA 13, NCCL, torch 2.11,
# Transformer Engine 2.12 and Apex. Versions of all other packages are those of constraints.txt.
FROM nvcr.io/nvidia/pytorch:26.02-py3

SHELL ["/bin/bash", "-o", "pipefail", "-c"]

# SGLang brings a torch of its own, so it lives in an environment of its own, and changes seldom: first.
ARG SGLANG_VERSION=0.5.14
# The base constrains pip to its own versions, which are not SGLang's.
RUN python3 -m venv /opt/sglang \
    && PIP_CONSTRAINT="" /opt/sglang/bin/pip install --no-cache-dir "sglang==${SGLANG_VERSION}"

WORKDIR /opt/megatron_rapo
COPY setup.py pyproject.toml constraints.txt LICENSE README.md ./
COPY megatron_rapo megatron_rapo
# The environment sees the base's torch, Transformer Engine and Apex; torch's pin would replace it.
RUN python3 -m venv --system-site-packages /opt/rapo \
    && sed '/^torch==/d' constraints.txt > constraints.gpu.txt \
    && PIP_CONSTRAINT=constraints.gpu.txt /opt/rapo/bin/pip install --no-cache-dir .

RUN useradd --uid 10001 --create-home rapo \
    && install --directory --owner=rapo /work /work/runs
WORKDIR /work
COPY examples examples

ENV PATH=/opt/rapo/bin:$PATH \
    CUDA_DEVICE_MAX_CONNECTIONS=1 \
    HF_HUB_OFFLINE=1
USER 10001

# A GPU that fell off the bus shows here before a collective times out.
HEALTHCHECK --interval=1m --timeout=30s CMD ["nvidia-smi", "--list-gpus"]
ENTRYPOINT ["megatron-rapo"]
CMD ["--help"]
