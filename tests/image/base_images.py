"""Images under the names that deploy/Dockerfile, compose.yaml and the chart use, made of Debian's packages, since their
registries are not asked:

- `rust:1.95-bookworm`: Debian bookworm by debootstrap with gcc, and this machine's toolchain at its place in that image.
- `gcr.io/distroless/cc-debian12:nonroot`: the packages that it is made of, unpacked; no shell, no package manager.
- `nvidia/cuda:13.0.1-runtime-ubuntu24.04`: Debian, with that release's NVRTC from NVIDIA's wheel at its place there.
- etcd, Prometheus and curl: the programs of Debian's packages.

What this cannot show: that those images exist, and that NVIDIA's holds NVRTC where the wheel is put here.
"""

import os
import pathlib
import shutil
import subprocess
import sys

from engine import image_exists, podman

CACHE = pathlib.Path(os.environ.get("SIDA_IMAGE_CACHE", "/var/tmp/sida-image"))
# Of gcr.io/distroless/cc-debian12, as far as a program can see them.
DISTROLESS = ["base-files", "netbase", "tzdata", "ca-certificates", "libc6", "libssl3", "libgcc-s1", "libgomp1", "libstdc++6"]
# Of CUDA 13.0.1.
NVRTC = "nvidia-cuda-nvrtc==13.0.88"


def run(*command, **more):
    subprocess.run(list(map(str, command)), check=True, **more)


def debian(root, include):
    """A Debian by debootstrap."""
    if not (root / "usr/bin/dpkg").exists():
        run("debootstrap", "--variant=minbase", f"--include={include}", "bookworm", root, stdout=subprocess.DEVNULL)
    # A proxy before this machine may have an authority of its own.
    shutil.copy("/etc/ssl/certs/ca-certificates.crt", root / "etc/ssl/certs/ca-certificates.crt")


def unpacked(root, packages):
    """Debian's packages without Debian."""
    kept = CACHE / "packages"
    kept.mkdir(parents=True, exist_ok=True)
    for package in packages:
        if not list(kept.glob(f"{package}_*.deb")):
            run("apt-get", "download", "-q", package, cwd=kept, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        [file] = kept.glob(f"{package}_*.deb")
        run("dpkg-deb", "--extract", file, root)
    for name in ("proc", "dev", "sys", "tmp"):
        (root / name).mkdir(exist_ok=True)
    (root / "tmp").chmod(0o1777)


def fresh(name):
    root = CACHE / f"root-{name}"
    shutil.rmtree(root, ignore_errors=True)
    root.mkdir(parents=True)
    return root


def rust():
    root = CACHE / "root-rust"
    debian(root, "gcc,g++,libc6-dev,make,pkg-config,ca-certificates")
    toolchain = pathlib.Path(subprocess.run(["rustc", "--print", "sysroot"], check=True, capture_output=True, text=True).stdout.strip())
    shutil.rmtree(root / "usr/local/toolchain", ignore_errors=True)
    shutil.copytree(toolchain, root / "usr/local/toolchain", symlinks=True, ignore=shutil.ignore_patterns("share", "etc"))
    return root, ["ENV PATH=/usr/local/toolchain/bin:/usr/sbin:/usr/bin:/sbin:/bin", "ENV CARGO_HOME=/usr/local/cargo"]


def distroless():
    root = fresh("distroless")
    unpacked(root, DISTROLESS)
    return root, ["USER 65532"]


def cuda():
    root = CACHE / "root-cuda"
    debian(root, "ca-certificates")
    libraries = root / "usr/local/cuda-13.0/targets/x86_64-linux/lib"
    if not libraries.exists():
        run(sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", CACHE, NVRTC)
        [wheel] = CACHE.glob("nvidia_cuda_nvrtc-*.whl")
        run(sys.executable, "-m", "zipfile", "-e", wheel, CACHE / "nvrtc")
        shutil.copytree(CACHE / "nvrtc/nvidia/cu13/lib", libraries)
        # The packages' files have whole versions, and links as they are asked for.
        for library in list(libraries.iterdir()):
            whole = library.rename(libraries / (library.name.partition(".so")[0] + ".so." + NVRTC.partition("==")[2]))
            library.symlink_to(whole.name)
        (root / "usr/local/cuda-13.0/lib64").symlink_to("targets/x86_64-linux/lib")
        (root / "usr/local/cuda").symlink_to("cuda-13.0")
    return root, ["ENV PATH=/usr/sbin:/usr/bin:/sbin:/bin"]


def etcd():
    root = fresh("etcd")
    unpacked(root, ["libc6", "etcd-server"])
    return root, ["ENV PATH=/usr/bin"]


def prometheus():
    root = fresh("prometheus")
    unpacked(root, ["libc6", "ca-certificates", "prometheus"])
    # Where Debian's program keeps its data, which in its own image is below the working directory.
    data = root / "var/lib/prometheus/metrics2"
    data.mkdir(parents=True, exist_ok=True)
    data.chmod(0o777)
    return root, ["USER 65534", 'ENTRYPOINT ["/usr/bin/prometheus"]']


IMAGES = {
    "docker.io/library/rust:1.95-bookworm": rust,
    "gcr.io/distroless/cc-debian12:nonroot": distroless,
    "docker.io/nvidia/cuda:13.0.1-runtime-ubuntu24.04": cuda,
    "registry.k8s.io/etcd:3.5.21-0": etcd,
    "docker.io/prom/prometheus:v2.55.1": prometheus,
}


def make(*names):
    """Makes those that are not there."""
    for name in names:
        if not image_exists(name):
            root, changes = IMAGES[name]()
            packed = subprocess.Popen(["tar", "-C", root, "--one-file-system", "-cf", "-", "."], stdout=subprocess.PIPE)
            podman("import", *(word for change in changes for word in ("--change", change)), "-", name, stdin=packed.stdout)
            assert packed.wait() == 0

