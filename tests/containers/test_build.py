"""Every step of the images that can run without a container runtime, in a Debian root of debootstrap's.

Run by `make test-docker` alone: it takes minutes, root, and a network or a local package index (pip's own
configuration is used; RAPO_TEST_BIND names folders, separated by colons, that it refers to).
"""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.containers.dockerfile import ROOT, Image

WHY_NOT = (
    "make test-docker runs it"
    if not os.environ.get("RAPO_TEST_DOCKER")
    else "it takes root"
    if os.geteuid() != 0
    else "it takes debootstrap (apt-get install debootstrap)"
    if not shutil.which("debootstrap")
    else ""
)
pytestmark = [pytest.mark.skipif(bool(WHY_NOT), reason=WHY_NOT), pytest.mark.timeout(1800)]
BINDS = ["/dev/null", "/dev/urandom", *filter(None, os.environ.get("RAPO_TEST_BIND", "").split(":"))]
CERTIFICATES = "/etc/ssl/certs/ca-certificates.crt"


@pytest.fixture(scope="module")
def debian(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A fresh Debian root with this machine's name service, package sources and certificates."""
    root = tmp_path_factory.mktemp("images") / "root"
    subprocess.run(
        ["debootstrap", "--variant=minbase", "bookworm", str(root)],
        check=True,
        timeout=600,
        stdout=subprocess.DEVNULL,
    )
    mounted: list[Path] = []
    try:
        for path in BINDS:
            target = root / path.lstrip("/")
            if Path(path).is_dir():
                target.mkdir(parents=True, exist_ok=True)
            else:
                target.touch()
            subprocess.run(["mount", "--bind", path, str(target)], check=True, timeout=10)
            mounted.append(target)
        # Every container runtime provides these two.
        for kind, folder, options in (("tmpfs", "dev/shm", "mode=1777"), ("proc", "proc", "nosuid")):
            (root / folder).mkdir(exist_ok=True)
            mount = ["mount", "-t", kind, "-o", options, kind, str(root / folder)]
            subprocess.run(mount, check=True, timeout=10)
            mounted.append(root / folder)
        shutil.copy("/etc/resolv.conf", root / "etc/resolv.conf")
        yield root
    finally:
        for target in reversed(mounted):
            subprocess.run(["umount", "--lazy", str(target)], check=True, timeout=10)
        shutil.rmtree(root)  # It is large, and pytest keeps folders for a while.


@pytest.fixture(scope="module")
def cpu(debian: Path) -> Image:
    """Dockerfile.cpu, followed to its end."""
    image = _image(debian)
    image.build(ROOT / "Dockerfile.cpu")
    return image


def test_the_cpu_image_has_its_command_health_check_and_user(cpu: Image) -> None:
    assert cpu.run([*cpu.entry_point, "--version"]).startswith("megatron-rapo ")
    assert cpu.run(cpu.health_check).startswith("megatron-rapo ")
    assert cpu.run(["id", "--user"]).strip() == "10001"
    installed = cpu.run(["/opt/rapo/bin/pip", "list", "--format=freeze"])
    for pin in ("torch==2.13.0", "megatron-core==0.16.1"):
        assert pin in installed


def test_the_cpu_image_trains(cpu: Image) -> None:
    demo = ["train", "examples/configs/demo.toml", "--set", "run.steps=1", "run.directory=runs/one"]
    evaluate = ["evaluate.problems=4", "evaluate.samples=2", "evaluate.k=[1]"]
    assert "runs/one/model" in cpu.run([*cpu.entry_point, *demo, *evaluate], timeout=300)


def test_the_gpu_images_own_steps_run_over_a_stand_in_base(cpu: Image) -> None:
    """The base's Python is 3.11 here, for which there is no newer Megatron-Core, and its torch CPU's.

    SGLang's step, which takes its torch from PyPI with CUDA, is left out.
    """
    root = cpu.root
    (root / "opt/rapo").rename(root / "opt/base")
    shutil.rmtree(root / "opt/megatron_rapo")
    shutil.rmtree(root / "work")
    (root / "usr/local/lib/python3.11/dist-packages/base.pth").write_text(
        "/opt/base/lib/python3.11/site-packages\n"
    )
    image = _image(root)
    image.run(["userdel", "--remove", "rapo"])
    image.arguments["CONSTRAINTS"] = "constraints.txt"
    image.build(ROOT / "Dockerfile", skip="/opt/sglang")
    assert image.run([*image.entry_point, "--version"]).startswith("megatron-rapo ")
    plan = image.run([*image.entry_point, "train", "examples/configs/qwen2.5-7b.toml", "--dry-run"])
    assert "16 trainer ranks" in plan
    where = "import torch, megatron_rapo; print(torch.__file__, megatron_rapo.__file__)"
    torch, package = image.run(["python", "-c", where]).split()
    assert torch.startswith("/opt/base/"), "the base's torch stays"
    assert package.startswith("/opt/rapo/")


def _image(root: Path) -> Image:
    if Path("/etc/pip.conf").is_file():
        shutil.copy("/etc/pip.conf", root / "etc/pip.conf")
    kept = {name: value for name, value in os.environ.items() if name.startswith("PIP_")}
    certificates = Path(kept.get("PIP_CERT", CERTIFICATES))
    if certificates.is_file():  # This machine may stand behind a proxy with one of its own.
        shutil.copy(certificates, root / "etc/build-certificates.crt")
        kept["PIP_CERT"] = "/etc/build-certificates.crt"
    path = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
    image = Image(root, {"PATH": path, "HOME": "/tmp", "DEBIAN_FRONTEND": "noninteractive"}, {})
    # Only while building: an image's own environment is ENV's.
    image.arguments = {**kept, **image.arguments}
    if kept.get("PIP_EXTRA_INDEX_URL") or BINDS[2:]:
        image.arguments["TORCH_INDEX"] = kept.get("PIP_EXTRA_INDEX_URL", "")
    return image
