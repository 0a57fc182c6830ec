//! This node's own key: put under the node's lease, put anew when the node reports something else, deleted when it
//! leaves.

use etcd_client::{Client, PutOptions};

use super::{Joining, keys::Keys, lease::Lease, session::ConnectionLost};
use crate::member_record::MemberRecord;

/// Lists this node as ready up to `ready_epoch`. Returns the revision by which it is listed.
pub(super) async fn put(
    client: &mut Client,
    keys: &Keys,
    joining: &Joining,
    lease: &Lease,
    ready_epoch: u64,
) -> Result<i64, ConnectionLost> {
    let record = MemberRecord { member: joining.member.clone(), model: joining.model, ready_epoch };
    let options = PutOptions::new().with_lease(lease.id);
    let answer = client.put(keys.member(joining.member.node.as_str()), record.encode(), Some(options)).await?;
    Ok(answer.header().map_or(0, |header| header.revision()))
}

/// Takes this node off the list.
pub(super) async fn delete(client: &mut Client, keys: &Keys, joining: &Joining) -> Result<(), ConnectionLost> {
    client.delete(keys.member(joining.member.node.as_str()), None).await?;
    Ok(())
}
