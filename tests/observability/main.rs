//! What a cluster tells about itself, taken by the tools that its users have: a collector of traces, a Prometheus, and
//! the chart's own manifests executed as processes. `tests/run.sh` installs what these tests need.
//!
//! In reading order: [`collector`] and [`traces`].

mod collector;
mod traces;
