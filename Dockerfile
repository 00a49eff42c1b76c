# megatron_rapo on GPUs: trainer and SGLang servers from one image.
#
#   docker build -t megatron-rapo .
#   docker run --rm --gpus all --ipc host -v /models:/models -v "$PWD/runs:/work/runs" megatron-rapo \
#       train examples/configs/qwen2.5-7b.toml --dry-run
#
# docs/containers.md says more, also what of this file has been run and what not.
#
# The base brings what is compiled together and must not be replaced one by one: CUDA 13.4, NCCL 2.30.7, torch 2.14,
# Transformer Engine 2.17 or later. Versions of all other packages are those of constraints.txt, but for what its
# Python 3.12 allows to be newer (constraints-newest.txt). SGLang's torch has the same NCCL, since weights go from
# the one to the other in one group.
FROM nvcr.io/nvidia/pytorch:26.08-py3

SHELL ["/bin/bash", "-o", "pipefail", "-c"]

# SGLang brings a torch of its own, so it lives in an environment of its own, and changes seldom: first.
ARG SGLANG_VERSION=0.5.23
# The base constrains pip to its own versions, which are not SGLang's.
RUN python3 -m venv /opt/sglang \
    && PIP_CONSTRAINT="" /opt/sglang/bin/pip install --no-cache-dir "sglang==${SGLANG_VERSION}"

WORKDIR /opt/megatron_rapo
COPY setup.py pyproject.toml constraints.txt constraints-newest.txt LICENSE README.md ./
COPY megatron_rapo megatron_rapo
# The environment sees the base's torch and Transformer Engine; torch's pin would replace it. Of two pins the first counts.
ARG CONSTRAINTS="constraints-newest.txt constraints.txt"
RUN python3 -m venv --system-site-packages /opt/rapo \
    && awk -F== '$1 != "torch" && !seen[$1]++' ${CONSTRAINTS} > constraints.gpu.txt \
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
