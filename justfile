# What people type. `just` by itself lists it; the commands are few enough to type them without it, too.

_list:
    @just --list --unsorted

# Everything that must hold before a change lands: 20 minutes on 2 cores from nothing built.
test:
    bash tests/run.sh

# The tests of one crate whose names contain a word: `just try sida-routing placement`.
try crate name='':
    cargo test --release -p {{crate}} {{name}}

# What can be said without running anything. Needs cargo-deny.
lint:
    cargo fmt --all --check
    cargo deny --locked check licenses bans sources
    cargo clippy --release --workspace --all-features --all-targets -- -D warnings

# A whole cluster in this process, on port 50051: `just run --expert-memory 25%`.
run *flags:
    cargo run --release -- up {{flags}}

# Load on such a cluster: `just bench --method encode --file tests/data/sentences.txt --concurrency 8`.
bench *flags:
    cargo run --release -- bench {{flags}}

# An example: `just example embed_texts http://127.0.0.1:50051`.
example name *arguments:
    cargo run --release -p sida-examples --bin {{name}} -- {{arguments}}

# The crates' documentation, opened in a browser.
doc:
    cargo doc --workspace --all-features --no-deps --open

# Writes anew what is made from the source: flags, metrics, the chart's schema and README. Look at the diff.
generate: _tools
    SIDA_REWRITE=1 cargo test --release -p sida-cli --bins command_line
    SIDA_REWRITE=1 cargo test --release -p sida-telemetry names
    {{python}} helm/generate.py

# Writes anew what tests compare with: the chart's manifests, and the traces of the residency machine. Look at the diff.
snapshots: _tools
    SIDA_REWRITE=1 {{python}} tests/chart/test_chart.py
    UPDATE_TRACES=1 cargo test --release -p sida-routing --test residency_traces

python := 'target/test-tools/bin/python'

_tools:
    @test -x {{python}} || { echo 'tests/run.sh installs {{python}}: run it once'; exit 1; }
