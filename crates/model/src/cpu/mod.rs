//! The arithmetic of the CPU backend, on plain slices.
//!
//! Invariant: every output row is computed by itself, in one order of operations that depends on nothing but
//! the row and the weights. The bits of a row are the same whatever else is in its batch, however many
//! threads work, on whichever node and whichever x86 or other machine: this is what lets rows move between
//! nodes and batches without changing a token (docs/decisions/0002).
//!
//! In reading order: [`lanes`] (16 floats at a time), [`block_loads`], [`integer_loads`] and [`super_block_loads`] (the same out of few
//! bits), [`stored_rows`] (a weight matrix where it lies), [`tiles`] (many dot products at once), [`matmul`], [`panel`], [`exp`], [`norm`], [`attention`].

mod aligned_floats;
pub mod attention;
mod block_loads;
pub mod exp;
mod integer_loads;
pub mod lanes;
pub mod matmul;
pub mod norm;
mod panel;
mod stored_rows;
mod super_block_loads;
mod tiles;
