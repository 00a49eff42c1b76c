"""The peaks of devices: dense matrix products in bf16, in TFLOP/s, as their makers state them."""

from __future__ import annotations

import platform
from pathlib import Path

import torch

# By a part of the name that CUDA tells; the first that fits. Without sparsity, of SXM boards where there are
# several. Sources: NVIDIA's data sheets of A100, L40S, H100, H200 and DGX B200; halved if with sparsity.
PEAKS_BF16 = {
    "B200": 2250.0,
    "H200": 989.0,
    "H100 PCIe": 756.0,
    "H100 NVL": 835.0,
    "H100": 989.0,
    "H800": 989.0,
    "H20": 148.0,
    "A100": 312.0,
    "A800": 312.0,
    "L40S": 362.0,
}


def peak_tflops(device_name: str) -> float | None:
    """The device's peak in bf16; None of one that is not in the table."""
    return next((peak for part, peak in PEAKS_BF16.items() if part in device_name), None)


def own_peak_tflops(dtype: str) -> float | None:
    """That of this process's device, where it is known for the type."""
    if dtype != "bfloat16" or not torch.cuda.is_available():
        return None
    return peak_tflops(torch.cuda.get_device_name())


def own_device_name() -> str:
    """This machine's GPU, or its CPU where torch sees none."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:  # another system than Linux
        lines = []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())
