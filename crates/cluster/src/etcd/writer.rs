//! Writes the placement, one step at a time. What to write is decided by `sida_routing`; that nobody else writes is
//! decided by etcd: the transaction compares the leadership by which this node writes and the placement that it
//! started from.

use std::sync::Arc;

use etcd_client::{Client, Compare, CompareOp, Txn, TxnOp};
use sida_proto::wire::PlacementRecord;
use sida_telemetry::{counter, names};

use super::{
    keys::Keys,
    listing::{Leader, Stored},
    session::ConnectionLost,
};

/// What became of a placement that was to be written.
pub(super) enum Written {
    /// The placement is in force.
    As(Stored),
    /// Another coordinator leads, or has written since.
    Refused,
    /// The placement is larger than any reader would take. The log says so.
    TooLarge,
}

/// Writes `record` after the placement of the revision `before` (0: none), as `leader`.
pub(super) async fn write(
    client: &mut Client,
    keys: &Keys,
    leader: &Leader,
    before: i64,
    record: PlacementRecord,
) -> Result<Written, ConnectionLost> {
    let bytes = match record.encode() {
        Ok(bytes) => bytes,
        Err(error) => {
            tracing::error!(%error, "the placement cannot be written; the last one stays");
            return Ok(Written::TooLarge);
        }
    };
    let compares = [
        Compare::create_revision(keys.leader(), CompareOp::Equal, leader.create_revision),
        Compare::mod_revision(keys.placement(), CompareOp::Equal, before),
    ];
    let answer = client.txn(Txn::new().when(compares).and_then([TxnOp::put(keys.placement(), bytes, None)])).await?;
    let outcome = if answer.succeeded() { "written" } else { "refused" };
    counter!(names::PLACEMENT_WRITES_TOTAL, names::OUTCOME => outcome).increment(1);
    if !answer.succeeded() {
        return Ok(Written::Refused);
    }
    let mod_revision = answer.header().map_or(0, |header| header.revision());
    let (epoch, nodes) = (record.placement.epoch(), record.placement.nodes().len());
    tracing::info!(epoch, nodes, "wrote the placement");
    Ok(Written::As(Stored { record: Some(Arc::new(record)), mod_revision }))
}

#[cfg(test)]
#[path = "writer_tests.rs"]
mod tests;
