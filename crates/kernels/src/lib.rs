//! The arithmetic of processors, on plain slices: no model, no file. Used by `sida-model` and by the hash predictors.
//!
//! Invariant: every output row is computed by itself, in one order of operations that depends on nothing but
//! the row and the weights. The bits of a row are the same whatever else is in its batch, however many
//! threads work, on whichever node and whichever x86 or other machine: this is what lets rows move between
//! nodes and batches without changing a token (docs/decisions/0002).
//!
//! In reading order: [`dtype`], [`fifth_bit`], [`super_blocks`] and [`float8`] (how weights are stored), [`block_parts`] (for who
//! lays them out otherwise); [`lanes`] (16 floats at a time), `block_loads`, `integer_loads` and `super_block_loads` (the same out
//! of few bits), `stored_rows` (a weight matrix where it lies), `tiles` (many dot products at once), [`matmul`]; [`exp`],
//! [`elementwise`], [`norm`]; `panel`, [`position_bias`], [`still_wanted`], [`attention`].

mod aligned_floats;
#[doc(hidden)]
pub mod arbitrary;
pub mod attention;
mod block_loads;
pub mod block_parts;
pub mod dtype;
pub mod elementwise;
pub mod exp;
pub mod fifth_bit;
pub mod float8;
mod integer_loads;
pub mod lanes;
pub mod matmul;
pub mod norm;
mod panel;
pub mod position_bias;
pub mod still_wanted;
mod stored_rows;
mod super_block_loads;
pub mod super_blocks;
mod tiles;

pub use self::dtype::StoredDType;
