"""Executes deploy/Dockerfile without a container engine: the steps of the variants named (`cpu`, `cuda`; both if none is), as
they are written there, each stage in a Debian root of its own, then the image's command as its user on a read-only root.
Needs root, debootstrap, pip and a Rust toolchain; takes as long as a release build from nothing. Run by
`SIDA_IMAGE_TEST=1 bash tests/run.sh`. SIDA_IMAGE_BINARY names a binary to take instead of building one, which leaves the
run-time stage to be tested.

What stands in for the base images, since their registries are not asked:

- `rust:1.95-bookworm`: Debian bookworm by debootstrap with gcc, and this machine's toolchain at its place in that image.
- `gcr.io/distroless/cc-debian12`: the Debian packages that it is made of, unpacked; no shell, no package manager.
- `nvidia/cuda:13.0.1-runtime-ubuntu24.04`: the same Debian, with that release's NVRTC from NVIDIA's wheel at its place there.

What Docker would check and this does not: that those images exist, that NVIDIA's holds NVRTC where the wheel is put here, and
BuildKit's own syntax. There is no GPU: the CUDA variant must say so, serve from the CPU, and compile the kernels by its NVRTC.
"""

import itertools
import json
import os
import pathlib
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time

REPOSITORY = pathlib.Path(__file__).resolve().parents[2]
# Of gcr.io/distroless/cc-debian12, as far as a program can see them.
DISTROLESS = ["base-files", "netbase", "tzdata", "ca-certificates", "libc6", "libssl3", "libgcc-s1", "libgomp1", "libstdc++6"]
# Of CUDA 13.0.1.
NVRTC = "nvidia-cuda-nvrtc==13.0.88"


def run(*command, **more):
    print("+", shlex.join(map(str, command)), flush=True)
    return subprocess.run(list(map(str, command)), check=True, **more)


def instructions(dockerfile):
    """(INSTRUCTION, rest) of every instruction, lines joined."""
    text = re.sub(r"\\\n", " ", "\n".join(l for l in dockerfile.read_text().splitlines() if not l.startswith("#")))
    return [tuple(line.split(maxsplit=1)) for line in text.splitlines() if line.strip()]


class Mounts:
    """What is mounted, to be unmounted in reverse."""

    def __init__(self):
        self.points = []

    def bind(self, source, target, *options):
        target.mkdir(parents=True, exist_ok=True)
        run("mount", "--bind", source, target)
        self.points.append(target)
        if options:
            run("mount", "-o", ",".join(("remount", "bind") + options), target)

    def fresh(self, kind, target):
        target.mkdir(parents=True, exist_ok=True)
        run("mount", "-t", kind, kind, target)
        self.points.append(target)

    def undo(self):
        while self.points:
            run("umount", "--lazy", self.points.pop())


class Stage:
    """One FROM: a root, and what its instructions have set."""

    def __init__(self, root):
        self.root, self.environment, self.arguments = root, {}, {}
        self.directory, self.user, self.entrypoint = "/", "0:0", None


def debian(root, include):
    if not (root / "usr/bin/dpkg").exists():
        run("debootstrap", "--variant=minbase", f"--include={include}", "bookworm", root)


def rust_base(root, mounts, cache):
    """In place of rust:1.95-bookworm."""
    debian(root, "gcc,g++,libc6-dev,make,pkg-config,ca-certificates")
    toolchain = subprocess.run(["rustc", "--print", "sysroot"], check=True, capture_output=True, text=True).stdout.strip()
    mounts.bind(toolchain, root / "usr/local/toolchain", "ro")
    mounts.bind("/dev", root / "dev")
    mounts.fresh("proc", root / "proc")
    shutil.copy("/etc/resolv.conf", root / "etc/resolv.conf")
    # A proxy before this machine may have an authority of its own.
    shutil.copy("/etc/ssl/certs/ca-certificates.crt", root / "etc/ssl/certs/ca-certificates.crt")
    cargo = root / "usr/local/cargo"
    (cargo / "bin").mkdir(parents=True, exist_ok=True)
    stage = Stage(root)
    stage.environment = {"PATH": "/usr/local/toolchain/bin:/usr/sbin:/usr/bin:/sbin:/bin", "CARGO_HOME": "/usr/local/cargo"}
    return stage


def distroless_base(root, mounts, cache):
    """In place of gcr.io/distroless/cc-debian12:nonroot."""
    packages = cache / "packages"
    packages.mkdir(exist_ok=True)
    if not list(packages.iterdir()):
        run("apt-get", "download", *DISTROLESS, cwd=packages)
    shutil.rmtree(root, ignore_errors=True)
    root.mkdir(parents=True)
    for package in packages.iterdir():
        run("dpkg-deb", "--extract", package, root)
    for name in ("proc", "dev", "tmp"):
        (root / name).mkdir(exist_ok=True)
    return Stage(root)


def cuda_base(root, mounts, cache):
    """In place of nvidia/cuda:13.0.1-runtime-ubuntu24.04."""
    debian(root, "ca-certificates")
    libraries = root / "usr/local/cuda-13.0/targets/x86_64-linux/lib"
    if not libraries.exists():
        run(sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", cache, NVRTC)
        (wheel,) = cache.glob("nvidia_cuda_nvrtc-*.whl")
        run(sys.executable, "-m", "zipfile", "-e", wheel, cache / "nvrtc")
        shutil.copytree(cache / "nvrtc/nvidia/cu13/lib", libraries)
        # The packages' files have whole versions, and links as they are asked for.
        for library in list(libraries.iterdir()):
            whole = library.rename(libraries / (library.name.partition(".so")[0] + ".so." + NVRTC.partition("==")[2]))
            library.symlink_to(whole.name)
        (root / "usr/local/cuda-13.0/lib64").symlink_to("targets/x86_64-linux/lib")
        (root / "usr/local/cuda").symlink_to("cuda-13.0")
    stage = Stage(root)
    stage.environment = {"PATH": "/usr/sbin:/usr/bin:/sbin:/bin"}
    return stage


BASES = {
    "rust:1.95-bookworm": rust_base,
    "gcr.io/distroless/cc-debian12:nonroot": distroless_base,
    "nvidia/cuda:13.0.1-runtime-ubuntu24.04": cuda_base,
}


def ignored():
    """Patterns of .dockerignore, as tar takes them."""
    lines = (REPOSITORY / ".dockerignore").read_text().splitlines()
    return [f"--exclude=./{line}" if "*" not in line else f"--exclude={line.split('/')[-1]}" for line in lines if line and line[0] != "#"]


def copy(stage, stages, rest):
    words = shlex.split(rest)
    source = stages[words.pop(0).split("=")[1]].root if words[0].startswith("--from=") else REPOSITORY
    excluded = ignored() if source == REPOSITORY else []
    # docker: relative to WORKDIR; a directory's contents are copied.
    target = pathlib.Path(str(stage.root) + os.path.join(stage.directory, words[1]))
    target.mkdir(parents=True, exist_ok=True)
    packed = subprocess.Popen(["tar", "-C", str(source) + "/" + words[0].lstrip("/"), *excluded, "-cf", "-", "."], stdout=subprocess.PIPE)
    run("tar", "-C", target, "-xf", "-", stdin=packed.stdout)
    assert packed.wait() == 0


def step(stage, rest, mounts, cache):
    """RUN, with its cache mounts."""
    if (binary := os.environ.get("SIDA_IMAGE_BINARY")) and "cargo build" in rest:
        # Only the run-time stage is wanted: the program is one that was built elsewhere.
        rest = "mkdir -p target/release && cp /binary target/release/sida && " + rest[rest.index("install -D"):]
        shutil.copy(binary, stage.root / "binary")
    before = len(mounts.points)
    while rest.startswith("--mount="):
        mount, rest = rest.split(maxsplit=1)
        target = dict(pair.split("=") for pair in mount[len("--mount="):].split(","))["target"]
        kept = cache / target.strip("/").replace("/", "-")
        kept.mkdir(parents=True, exist_ok=True)
        mounts.bind(kept, pathlib.Path(str(stage.root) + target))
    settings = {**stage.environment, **stage.arguments}
    outside = {name: os.environ[name] for name in os.environ if name.lower().endswith("_proxy")}
    run("chroot", stage.root, "/bin/sh", "-ec", f"cd {stage.directory}; {rest}", env={**outside, **settings})
    while len(mounts.points) > before:
        run("umount", mounts.points.pop())


def stages_of(variant):
    """Every stage of the Dockerfile by its name, the last by "": (base, instructions)."""
    stages = {}
    for instruction, rest in instructions(REPOSITORY / "deploy/Dockerfile"):
        if instruction == "FROM":
            base, _, name = rest.replace("${VARIANT}", variant).partition(" AS ")
            stages[name] = (base, [])
        elif stages:
            stages[name][1].append((instruction, rest))
    return stages


def needed(stages, name):
    """The names of a stage and of all that it is made from, in order."""
    base, steps = stages[name]
    sources = [base, *(rest.split()[0].split("=")[1] for instruction, rest in steps if instruction == "COPY" and rest.startswith("--from="))]
    below = [found for source in sources if source in stages for found in needed(stages, source)]
    return list(dict.fromkeys([*below, name]))


def build(variant, mounts, cache):
    """Follows the Dockerfile; returns the last stage."""
    arguments, described, stages = {"VARIANT": variant}, stages_of(variant), {}
    for name in needed(described, ""):
        base, steps = described[name]
        stage = stages[name] = stages[base] if base in stages else BASES[base](cache / f"root-{name}", mounts, cache)
        for instruction, rest in steps:
            execute(stage, stages, instruction, rest, arguments, mounts, cache)
    return stages[""]


def execute(stage, stages, instruction, rest, arguments, mounts, cache):
    if instruction == "ARG":
        name, _, default = rest.partition("=")
        stage.arguments[name] = arguments.get(name, default)
    elif instruction == "WORKDIR":
        stage.directory = rest
    elif instruction == "ENV":
        stage.environment.update(pair.split("=", 1) for pair in shlex.split(rest))
    elif instruction == "COPY":
        copy(stage, stages, rest)
    elif instruction == "RUN":
        step(stage, rest, mounts, cache)
    elif instruction == "USER":
        stage.user = rest
    elif instruction == "ENTRYPOINT":
        stage.entrypoint = json.loads(rest)
    elif instruction not in ("EXPOSE", "CMD"):
        sys.exit(f"{instruction} is not known here")


def container(image, root, *arguments, entrypoint=None, **more):
    """The image's command, as its user, on its read-only root."""
    # Found by its whole name: the image sets no PATH.
    command = [shutil.which("chroot"), f"--userspec={image.user}", "--groups=", root, *(entrypoint or image.entrypoint), *arguments]
    return subprocess.Popen(list(map(str, command)), env=image.environment, text=True, **more)


def told(image, root, *arguments, **more):
    """The exit code and all that was written."""
    process = container(image, root, *arguments, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, **more)
    text, _ = process.communicate(timeout=120)
    print(text, end="", flush=True)
    return process.returncode, text


def check_gpu(variant, image, root, cache):
    """Without a GPU: who asks for one is told what is missing, and everybody else is served."""
    code, text = told(image, root, "doctor")
    assert code == 0 and "no NVIDIA driver: computing on the CPU" in text, code
    missing = {"cpu": "needs a build with the cargo feature cuda", "cuda": "no NVIDIA driver"}[variant]
    for asking in (["up", "--device=cuda:0", "--listen=127.0.0.1:0", "--metrics-listen=off"], ["bench", "--device=cuda:0"]):
        code, text = told(image, root, *asking)
        assert code == 64 and missing in text, code
    if variant == "cuda":
        # NVRTC needs no driver: whether the image has all that it loads can be seen here.
        shutil.copy(REPOSITORY / "tests/image/nvrtc.c", cache / "root-build/tmp/nvrtc.c")
        run("chroot", cache / "root-build", "/usr/bin/gcc", "-o", "/tmp/nvrtc", "/tmp/nvrtc.c")
        shutil.copy(cache / "root-build/tmp/nvrtc", root / "tmp/nvrtc")
        kernels = REPOSITORY / "crates/model/src/cuda"
        names = re.findall(r'include_str!\("(kernels/\w+\.cu)"\)', (kernels / "kernels.rs").read_text())
        assert names
        (root / "tmp/sida.cu").write_text("".join((kernels / name).read_text() for name in names))
        for device, bf16 in itertools.product(("sm_80", "sm_90"), (0, 1)):
            options = [f"--gpu-architecture={device}", "--std=c++17", f"-DBF16={bf16}", "-DD_KV=64", "-DINFINITY=__int_as_float(0x7f800000)"]
            code, _ = told(image, root, "/tmp/sida.cu", *options, entrypoint=["/tmp/nvrtc"])
            assert code == 0, code


def check(variant, image, mounts, cache):
    """Runs the image."""
    shells = [path for path in ("bin/sh", "usr/bin/sh", "bin/bash", "usr/bin/bash") if (image.root / path).exists()]
    assert not shells, shells
    root = cache / f"read-only-{variant}"
    mounts.bind(image.root, root, "ro")
    mounts.fresh("proc", root / "proc")
    mounts.bind("/dev", root / "dev", "ro")
    mounts.fresh("tmpfs", root / "tmp")
    os.chmod(root / "tmp", 0o1777)
    size = sum(path.stat().st_size for path in (image.root / "usr/bin/sida", *(image.root / "usr/share/sida").rglob("*")) if path.is_file())
    print(f"ours in the image: {size / 2**20:.1f} MiB")
    check_gpu(variant, image, root, cache)
    probe = container(image, root, "ask", "--max-tokens", "8", "sst2 sentence: a gorgeous , witty , seductive movie .")
    assert probe.wait(120) == 0
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    listen = [f"--listen=127.0.0.1:{port}", "--metrics-listen=off"]
    server = container(image, root, "up", *listen, stdout=subprocess.PIPE)
    assert server.stdout.readline().startswith("listening on")
    status = pathlib.Path(f"/proc/{server.pid}/status").read_text()
    assert re.search(r"^Uid:\t65532\t65532", status, re.M), status
    asked = container(image, root, "ask", f"--endpoint=http://127.0.0.1:{port}", "--max-tokens=8", "sst2 sentence: a fine film .")
    assert asked.wait(60) == 0
    server.send_signal(signal.SIGTERM)
    assert server.wait(60) == 0
    written = subprocess.run(["chroot", f"--userspec={image.user}", root, "/usr/bin/sida", "convert", "/usr/share/sida/models/switch-tiny-64", "--out", "/usr/share/new"], capture_output=True, text=True)
    assert written.returncode != 0, "the root can be written to"


def main():
    cache = pathlib.Path(os.environ.get("SIDA_IMAGE_CACHE", "/var/tmp/sida-image"))
    cache.mkdir(parents=True, exist_ok=True)
    for variant in sys.argv[1:] or ["cpu", "cuda"]:
        mounts, started = Mounts(), time.monotonic()
        try:
            image = build(variant, mounts, cache)
            print(f"{variant}: built in {time.monotonic() - started:.0f} s")
            check(variant, image, mounts, cache)
            print(f"{variant}: the image builds and runs")
        finally:
            mounts.undo()


main()
