//! The border between messages and our own types. A message that came from outside is turned into one of our
//! types by its `check`, which refuses whatever the rest of the code could not bear; our types become
//! messages by `new` or `From`. Called by the nodes at the edge of every RPC, and by the fuzz targets.
//!
//! Invariant: nothing is allocated by a number that a message claims, only by bytes that arrived; and every
//! number is checked against [`Bounds`] before it is used as an index or multiplied.
//!
//! In reading order: [`rows`] (float payloads), [`hash_table`], [`predict`], [`learn`], [`plan`], [`call`] with its
//! `checksum`, [`window`], [`residency`], [`placement`], [`decode`] (all of them from plain bytes).

pub mod call;
mod checksum;
pub mod decode;
pub mod hash_table;
pub mod learn;
pub mod placement;
pub mod plan;
pub mod predict;
pub mod residency;
pub mod rows;
pub mod window;

use sida_routing::{Digest, ExpertId, ExpertKey, HashTableError, LabelsError, LayerId, PlacementError};
use thiserror::Error;

pub use call::{Answer, Call, CallRows};
pub use learn::TakenLabels;
pub use placement::PlacementRecord;
pub use predict::{Prediction, PredictionRequest, Stack};
pub use residency::Residency;
pub use window::Window;

/// What the receiver can bear: the extent of its model, and its own limits.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Bounds {
    /// MoE layers of the model.
    pub moe_layers: usize,
    /// Experts per layer.
    pub num_experts: usize,
    /// Width of a row.
    pub d_model: usize,
    /// Token ids are below this.
    pub vocab_size: usize,
    /// The most rows of one call.
    pub rows_max: usize,
    /// The most tokens of one sequence.
    pub tokens_max: usize,
    /// The most sequences of one prediction.
    pub sequences_max: usize,
}

/// Why a message is refused. `message.field` is the name in `sida/v1/*.proto`.
#[derive(Debug, Error, PartialEq)]
#[allow(missing_docs)]
pub enum WireError {
    #[error("{message} cannot be decoded: {source}")]
    Decode { message: &'static str, source: prost::DecodeError },
    #[error("{field} is {found}, expected less than {expected}")]
    Id { field: &'static str, found: u64, expected: u64 },
    #[error("{field} is {found}, expected {min} to {max}")]
    Count { field: &'static str, found: u64, min: u64, max: u64 },
    #[error("{field} holds {found} {unit}, expected {expected}")]
    Length { field: &'static str, unit: &'static str, found: u64, expected: u64 },
    #[error("{field} has {found} bytes, expected the 32 of a SHA-256")]
    Digest { field: &'static str, found: usize },
    #[error("{field} is {found}, which this node does not take")]
    Kind { field: &'static str, found: i32 },
    #[error("{message} has the checksum {found:08x}, expected {expected:08x}: it was damaged on its way")]
    Damaged { message: &'static str, found: u32, expected: u32 },
    #[error("{field} is missing")]
    Missing { field: &'static str },
    #[error("hash table: {0}")]
    HashTable(#[from] HashTableError),
    #[error(transparent)]
    Labels(#[from] LabelsError),
    #[error("placement: {0}")]
    Placement(#[from] PlacementError),
}

impl Bounds {
    fn layer(&self, field: &'static str, layer: u32) -> Result<LayerId, WireError> {
        below(field, layer, self.moe_layers).map(LayerId)
    }

    fn expert(&self, field: &'static str, expert: u32) -> Result<ExpertId, WireError> {
        below(field, expert, self.num_experts).map(ExpertId)
    }

    fn key(&self, fields: (&'static str, &'static str), layer: u32, expert: u32) -> Result<ExpertKey, WireError> {
        Ok(ExpertKey { layer: self.layer(fields.0, layer)?, expert: self.expert(fields.1, expert)? })
    }
}

/// `found` as an id below `bound`. Ids have 16 bits, so a bound above 2^16 counts as 2^16.
fn below(field: &'static str, found: u32, bound: usize) -> Result<u16, WireError> {
    let id = u16::try_from(found).ok().filter(|&id| usize::from(id) < bound);
    id.ok_or(WireError::Id { field, found: found.into(), expected: bound.min(1 << 16) as u64 })
}

fn within(field: &'static str, found: usize, min: usize, max: usize) -> Result<usize, WireError> {
    let refused = WireError::Count { field, found: found as u64, min: min as u64, max: max as u64 };
    if (min..=max).contains(&found) { Ok(found) } else { Err(refused) }
}

fn length(field: &'static str, unit: &'static str, found: usize, expected: usize) -> Result<(), WireError> {
    let refused = WireError::Length { field, unit, found: found as u64, expected: expected as u64 };
    if found == expected { Ok(()) } else { Err(refused) }
}

fn digest(field: &'static str, bytes: &[u8]) -> Result<Digest, WireError> {
    Digest::from_slice(bytes).ok_or(WireError::Digest { field, found: bytes.len() })
}
