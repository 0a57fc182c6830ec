"""Builds deploy/Dockerfile as it is, by podman on base images made here (base_images.py), and runs what comes of it: as its
user, on a read-only root. Needs root and what tests/run.sh installs. `SIDA_IMAGE_TEST=1 bash tests/run.sh` builds both
variants, each as long as a release build from nothing.

With SIDA_IMAGE_BINARY, a binary that was built elsewhere, only the run-time stage for CPUs is built, in seconds: every
change runs that.

There is no GPU: the CUDA variant must say so, serve from the CPU, and compile the kernels by its NVRTC.
"""

import itertools
import os
import pathlib
import re
import shutil
import sys
import tempfile
import time

import base_images
from engine import REPOSITORY, image_exists, podman, told

BASES = {
    "cpu": ["docker.io/library/rust:1.95-bookworm", "gcr.io/distroless/cc-debian12:nonroot"],
    "cuda": ["docker.io/library/rust:1.95-bookworm", "gcr.io/distroless/cc-debian12:nonroot", "docker.io/nvidia/cuda:13.0.1-runtime-ubuntu24.04"],
}
TEXT = "sst2 sentence: a gorgeous , witty , seductive movie ."
CONFINED = ["--read-only", "--tmpfs=/tmp", "--cap-drop=ALL", "--security-opt=no-new-privileges"]


def stage_of(binary, directory):
    """What the Dockerfile's stage `build` leaves, of a binary that was built elsewhere."""
    models = pathlib.Path(directory) / "out/usr/share/sida/models"
    shutil.copytree(REPOSITORY / "models/switch-tiny-64", models / "switch-tiny-64")
    (pathlib.Path(directory) / "out/usr/bin").mkdir()
    shutil.copy(binary, pathlib.Path(directory) / "out/usr/bin/sida")
    return directory


def build(variant, name, binary=None):
    """Builds the image."""
    base_images.make(*(base for base in BASES[variant] if not binary or "rust" not in base))
    arguments = ["--pull=never", "--file", REPOSITORY / "deploy/Dockerfile", "--build-arg", f"VARIANT={variant}", "--build-arg", "REVISION=test", "--tag", name]
    # An image of before must not stand in for one that was not built: podman ends well when it is told to stop.
    told("untag", name)
    with tempfile.TemporaryDirectory() as directory:
        given = ["--build-context", f"build={stage_of(binary, directory)}"] if binary else []
        podman("build", *arguments, *given, REPOSITORY)
    assert image_exists(name), f"{name} was not built"


def sida(image, *arguments, options=()):
    """The exit code of one command of the image, and what it said."""
    code, text = told("run", "--rm", *CONFINED, *options, image, *arguments, timeout=120)
    print(text, end="", flush=True)
    return code, text


def check_gpu(has_cuda, image):
    """Without a GPU: who asks for one is told what is missing, and everybody else is served."""
    code, text = sida(image, "doctor")
    assert code == 0 and "no NVIDIA driver: computing on the CPU" in text, code
    missing = "no NVIDIA driver" if has_cuda else "needs a build with the cargo feature cuda"
    for asking in (["up", "--device=cuda:0", "--listen=127.0.0.1:0", "--metrics-listen=off"], ["bench", "--device=cuda:0"]):
        code, text = sida(image, *asking)
        assert code == 64 and missing in text, code


def check_nvrtc(image):
    """NVRTC needs no driver: whether the image has all that it loads can be seen here."""
    with tempfile.TemporaryDirectory() as directory:
        place = pathlib.Path(directory)
        place.chmod(0o755)
        kernels = REPOSITORY / "crates/model/src/cuda"
        source = (kernels / "kernels.rs").read_text()
        names, defined = re.findall(r'include_str!\("(kernels/\w+\.cu)"\)', source), re.findall(r'"-D(\w+)=', source)
        assert names and defined
        (place / "sida.cu").write_text("".join((kernels / name).read_text() for name in names))
        shutil.copy(REPOSITORY / "tests/image/nvrtc.c", place)
        podman("run", "--rm", "--volume", f"{place}:/kernels", BASES["cuda"][0], "gcc", "-o", "/kernels/nvrtc", "/kernels/nvrtc.c")
        for device, bf16 in itertools.product(("sm_80", "sm_90"), (0, 1)):
            value = {"BF16": bf16, "D_KV": 64, "MULTIPROCESSORS": 132, "INFINITY": "__int_as_float(0x7f800000)"}
            options = [f"--gpu-architecture={device}", "--std=c++17", *(f"-D{name}={value[name]}" for name in defined)]
            code, _ = sida(image, "/kernels/sida.cu", *options, options=["--volume", f"{place}:/kernels:ro", "--entrypoint=/kernels/nvrtc"])
            assert code == 0, code


def check_serving(image):
    """A cluster in one container answers, as a user without rights, and ends when it is told to."""
    container = f"sida-image-{os.getpid()}"
    podman("run", "--detach", "--name", container, *CONFINED, image, "up", "--listen=127.0.0.1:50051", "--metrics-listen=off")
    try:
        limit = time.monotonic() + 60
        while (asked := told("exec", container, "/usr/bin/sida", "ask", "--endpoint=http://127.0.0.1:50051", "--max-tokens=8", TEXT))[0] != 0:
            assert time.monotonic() < limit, asked[1] + told("logs", container)[1]
            time.sleep(0.5)
        assert "positive" in asked[1], asked
        number = told("inspect", "--format={{.State.Pid}}", container)[1].strip()
        status = pathlib.Path(f"/proc/{number}/status").read_text()
        assert re.search(r"^Uid:\t65532\t65532", status, re.M), status
        assert re.search(r"^CapEff:\t0+$", status, re.M) and re.search(r"^NoNewPrivs:\t1$", status, re.M), status
        podman("stop", "--time=60", container)
        assert told("inspect", "--format={{.State.ExitCode}}", container)[1].strip() == "0"
    finally:
        told("rm", "--force", container)


def check(has_cuda, image):
    """Runs the image. `has_cuda`: its binary is a build with the cargo feature cuda."""
    for shell in ("/bin/sh", "/bin/bash", "/usr/bin/sh", "/busybox/sh"):
        assert sida(image, "-c", "true", options=[f"--entrypoint={shell}"])[0] == 127, shell
    print("size:", told("image", "inspect", "--format={{.Size}}", image)[1].strip(), "bytes")
    assert told("image", "inspect", "--format={{.User}}", image)[1].strip() == "65532:65532"
    check_gpu(has_cuda, image)
    code, text = sida(image, "ask", "--max-tokens=8", TEXT)
    assert code == 0 and "positive" in text, code
    check_serving(image)
    code, text = sida(image, "verify", "--write-manifest")
    assert code != 0 and "Read-only file system" in text, (code, text)


def main():
    binary = os.environ.get("SIDA_IMAGE_BINARY")
    for variant in sys.argv[1:] or (["cpu"] if binary else ["cpu", "cuda"]):
        started = time.monotonic()
        name = {"cpu": "localhost/sida:0.1.0", "cuda": "localhost/sida:0.1.0-cuda"}[variant]
        build(variant, name, binary)
        print(f"{variant}: built in {time.monotonic() - started:.0f} s")
        # The binary of the tests is a build with every feature.
        check(variant == "cuda" or binary is not None, name)
        if variant == "cuda":
            check_nvrtc(name)
        print(f"{variant}: the image builds and runs")


if __name__ == "__main__":
    main()
