#!/usr/bin/env bash
# Everything that must hold before a change lands. Needs Rust and a C compiler; installs the rest.
set -euo pipefail
cd "$(dirname "$0")/.."

cargo fmt --version >/dev/null 2>&1 || rustup component add rustfmt
cargo clippy --version >/dev/null 2>&1 || rustup component add clippy

cargo fmt --all --check
cargo clippy --release --workspace --all-targets --locked -- -D warnings
# No documentation tests: the examples in comments are sketches.
cargo test --release --workspace --lib --bins --tests --locked
