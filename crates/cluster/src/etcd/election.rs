//! Elects the writer of the placement: the coordinator that put the leader key, for as long as its lease holds.

use etcd_client::{Client, Compare, CompareOp, PutOptions, Txn, TxnOp};

use super::{keys::Keys, lease::Lease, listing::Leader, session::ConnectionLost};
use sida_routing::NodeId;

/// Stands for leader. `None`: somebody else was first, which the watch will tell.
pub(super) async fn stand(
    client: &mut Client,
    keys: &Keys,
    node: &NodeId,
    lease: &Lease,
) -> Result<Option<Leader>, ConnectionLost> {
    let put = TxnOp::put(keys.leader(), node.as_str(), Some(PutOptions::new().with_lease(lease.id)));
    let vacant = Compare::create_revision(keys.leader(), CompareOp::Equal, 0);
    let answer = client.txn(Txn::new().when([vacant]).and_then([put])).await?;
    let create_revision = answer.header().map_or(0, |header| header.revision());
    Ok(answer.succeeded().then(|| Leader { node: node.clone(), create_revision, lease: lease.id }))
}

/// Gives the leadership back, if it is still this one.
pub(super) async fn resign(client: &mut Client, keys: &Keys, leader: &Leader) -> Result<(), ConnectionLost> {
    let ours = Compare::create_revision(keys.leader(), CompareOp::Equal, leader.create_revision);
    client.txn(Txn::new().when([ours]).and_then([TxnOp::delete(keys.leader(), None)])).await?;
    Ok(())
}
