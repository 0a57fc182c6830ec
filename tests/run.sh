#!/usr/bin/env bash
# Everything that must hold before a change lands. Needs Rust and a C compiler; installs the rest.
set -euo pipefail
cd "$(dirname "$0")/.."

# etcd-client is built by protoc; the tests start real etcd.
missing=()
command -v protoc >/dev/null || missing+=(protobuf-compiler)
command -v etcd >/dev/null || missing+=(etcd-server)
command -v etcdctl >/dev/null || missing+=(etcd-client)
if ((${#missing[@]})); then
    as_root=(); [[ $EUID -eq 0 ]] || as_root=(sudo)
    "${as_root[@]}" apt-get update -q
    "${as_root[@]}" env DEBIAN_FRONTEND=noninteractive apt-get install -y -q --no-install-recommends "${missing[@]}"
fi

cargo fmt --version >/dev/null 2>&1 || rustup component add rustfmt
cargo clippy --version >/dev/null 2>&1 || rustup component add clippy

cargo fmt --all --check
cargo clippy --release --workspace --features sida-cli/etcd --all-targets --locked -- -D warnings
# No documentation tests: the examples in comments are sketches.
cargo test --release --workspace --features sida-cli/etcd --lib --bins --tests --locked
