//! The lease of this node: what it has put in etcd stays for as long as the lease is renewed. Kept from one
//! connection to the next, so that a restart of etcd costs nobody a place. Held and renewed by `session`.

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use etcd_client::{Client, Error, LeaseKeepAliveStream, LeaseKeeper};
use parking_lot::Mutex;
use tokio::time;

use super::session::ConnectionLost;

/// A lease, and until when it holds for certain. Clones are the same one.
#[derive(Clone, Debug)]
pub(super) struct Lease {
    pub(super) id: i64,
    ttl: Duration,
    /// Until when the lease holds for certain, by this node's clock: counted from before the last renewal was asked
    /// for.
    valid_until: Arc<Mutex<Instant>>,
}

/// The stream by which a lease is renewed.
pub(super) struct Renewal {
    keeper: LeaseKeeper,
    answers: LeaseKeepAliveStream,
}

impl Lease {
    fn new(id: i64, ttl: Duration, asked: Instant) -> Self {
        Self { id, ttl, valid_until: Arc::new(Mutex::new(asked + certain(ttl))) }
    }

    /// Whether the lease may have run out: this node was paused, or etcd did not answer. What follows from the lease is
    /// then no longer certain, whatever was read before.
    pub(super) fn may_have_run_out(&self) -> bool {
        Instant::now() >= *self.valid_until.lock()
    }

    fn renewed(&self, asked: Instant) {
        let mut valid_until = self.valid_until.lock();
        *valid_until = (asked + certain(self.ttl)).max(*valid_until);
    }
}

/// Clocks run at different speeds; a tenth is more than any difference.
fn certain(ttl: Duration) -> Duration {
    ttl - ttl / 10
}

/// Goes on with the lease there was if etcd still knows it, else gets a new one.
pub(super) async fn hold(
    client: &mut Client,
    ttl: Duration,
    held: &mut Option<Lease>,
) -> Result<Renewal, ConnectionLost> {
    if let Some(lease) = held {
        let asked = Instant::now();
        match client.lease_keep_alive(lease.id).await {
            Ok((keeper, answers)) => {
                lease.renewed(asked);
                return Ok(Renewal { keeper, answers });
            }
            Err(Error::LeaseKeepAliveError(_)) => {
                tracing::warn!("the lease in etcd has run out; registering again");
                *held = None;
            }
            Err(error) => return Err(error.into()),
        }
    }
    let asked = Instant::now();
    let granted = client.lease_grant(ttl.as_secs_f64().ceil() as i64, None).await?;
    *held = Some(Lease::new(granted.id(), ttl, asked));
    let (keeper, answers) = client.lease_keep_alive(granted.id()).await?;
    Ok(Renewal { keeper, answers })
}

/// Renews a lease until that fails; says how. `patience` is for one answer.
pub(super) async fn keep(mut renewal: Renewal, lease: Lease, patience: Duration) -> ConnectionLost {
    let mut ticks = time::interval(lease.ttl / 4);
    ticks.set_missed_tick_behavior(time::MissedTickBehavior::Delay);
    loop {
        ticks.tick().await;
        let asked = Instant::now();
        let renewed = async {
            renewal.keeper.keep_alive().await?;
            renewal.answers.message().await
        };
        match time::timeout(patience, renewed).await {
            Ok(Ok(Some(answer))) if answer.ttl() > 0 => lease.renewed(asked),
            Ok(Ok(Some(_))) => return ConnectionLost::new("the lease has run out"),
            Ok(Ok(None)) => return ConnectionLost::new("etcd ended the renewal of the lease"),
            Ok(Err(error)) => return error.into(),
            Err(_) => return ConnectionLost::new(format!("etcd did not renew the lease within {patience:?}")),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_lease_runs_out_by_our_own_clock() {
        // Broken: a coordinator that was paused would write a placement by a leadership that is another's.
        let (now, ttl) = (Instant::now(), Duration::from_secs(10));
        assert!(!Lease::new(1, ttl, now).may_have_run_out());
        let paused = Lease::new(1, ttl, now - Duration::from_secs(9));
        assert!(paused.may_have_run_out());
        let clone = paused.clone();
        paused.renewed(now);
        assert!(!clone.may_have_run_out());
    }
}
