//! One connection to etcd, from the first question to the last: registers this node, lists what there is, follows the
//! changes, stands for leader and writes the placement where this node is a coordinator. Started again and again by
//! `follow`; ends when etcd does not answer as it must, or when this node has left.

use std::{fmt, time::Duration};

use etcd_client::{Client, EventType, GetOptions, KeyValue, WatchOptions, WatchResponse, WatchStream};
use tokio::{
    task::JoinSet,
    time::{self, Instant, MissedTickBehavior},
};

use super::{
    connect::{ConnectError, connect},
    election,
    follow::Follower,
    keys::Keys,
    lease,
    listing::{Change, Entry, Listing},
    register,
    writer::{self, Written},
};
use crate::member::Role;

/// How often a writer looks at what was asked for lately.
const DEMAND_INTERVAL: Duration = Duration::from_secs(10);
/// How much of it is left each time: half after half a minute.
const DEMAND_DECAY: f64 = 0.8;
/// A placement is decided on what was listed at most so long ago. A process that was stopped for a while has events
/// that wait to be read, and would decide on what was before them.
const FRESH: Duration = Duration::from_secs(1);

/// Why a connection ended.
#[derive(Debug)]
pub(super) struct ConnectionLost(String);

impl ConnectionLost {
    pub(super) fn new(reason: impl Into<String>) -> Self {
        Self(reason.into())
    }
}

impl fmt::Display for ConnectionLost {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl From<etcd_client::Error> for ConnectionLost {
    fn from(error: etcd_client::Error) -> Self {
        use std::error::Error as _;
        // The text of such an error names only its kind. What happened is in its causes, which etcd-client does not
        // print.
        let (mut reason, mut cause) = match &error {
            etcd_client::Error::TransportError(error) => (error.to_string(), error.source()),
            etcd_client::Error::GRpcStatus(status) => (status.message().to_owned(), status.source()),
            error => (error.to_string(), None),
        };
        while let Some(error) = cause {
            let told = error.to_string();
            if !reason.contains(&told) {
                reason = format!("{reason}: {told}");
            }
            cause = error.source();
        }
        Self(reason)
    }
}

impl From<ConnectError> for ConnectionLost {
    fn from(error: ConnectError) -> Self {
        match error {
            ConnectError::Config(error) => Self(error.to_string()),
            ConnectError::Etcd(error) => error.into(),
        }
    }
}

/// A connection to etcd, and what was read by it.
struct Session<'a> {
    follower: &'a mut Follower,
    client: Client,
    keys: Keys,
    listing: Listing,
    /// When the last listing was asked for.
    listed: Instant,
    /// The revision by which this node is listed.
    registered: i64,
    /// The epoch that this node last reported ready for.
    said_ready: u64,
    patience: Duration,
    /// Whether this node is leaving and has taken itself off the list.
    off_the_list: bool,
}

/// Follows etcd at `endpoint` until it is away, or this node has left.
pub(super) async fn run(follower: &mut Follower, endpoint: &str) -> Result<(), ConnectionLost> {
    let patience = follower.config.call_timeout();
    let mut client = within(patience, connect(&follower.config, endpoint)).await?;
    let renewal = within(patience, lease::hold(&mut client, follower.config.lease_ttl, &mut follower.lease)).await?;
    // Dropping the set aborts its tasks, so the renewal ends with the session.
    let mut renewing = JoinSet::new();
    renewing.spawn(lease::keep(renewal, follower.lease()?, patience));

    let keys = Keys::new(&follower.config.cluster);
    let mut ready = follower.published.ready();
    let ready_epoch = *ready.borrow_and_update();
    let leaving = follower.published.leaving().clone();
    let registered = match leaving.is_cancelled() {
        true => 0,
        false => {
            let lease = follower.lease()?;
            within(patience, register::put(&mut client, &keys, &follower.joining, &lease, ready_epoch)).await?
        }
    };
    let listed = Instant::now();
    let listing = within(patience, list(&mut client, &keys)).await?;
    let mut watch = within(patience, watch(&mut client, &keys, listing.revision + 1)).await?;
    follower.connected(endpoint, &listing);
    let mut session = Session {
        follower,
        client,
        keys,
        listing,
        listed,
        registered,
        said_ready: ready_epoch,
        patience,
        off_the_list: false,
    };

    let mut relist = time::interval(session.follower.config.relist_interval);
    relist.set_missed_tick_behavior(MissedTickBehavior::Delay);
    relist.reset();
    let mut demand = time::interval(DEMAND_INTERVAL);
    demand.set_missed_tick_behavior(MissedTickBehavior::Delay);
    demand.reset();
    loop {
        let again = session.settle().await?;
        if session.off_the_list && session.is_forgotten() {
            session.give_back_lease().await;
            return Ok(());
        }
        tokio::select! {
            ended = renewing.join_next() => {
                return Err(ended.and_then(Result::ok).unwrap_or_else(|| ConnectionLost::new("the lease is not renewed")));
            }
            told = watch.message() => match session.take(told?)? {
                WatchMessage::Changes => {}
                WatchMessage::Compacted => {
                    tracing::info!("the watch is behind what etcd has compacted; listing anew");
                    session.relist().await?;
                    let from = session.listing.revision + 1;
                    watch = within(patience, self::watch(&mut session.client, &session.keys, from)).await?;
                }
            },
            _ = relist.tick() => session.relist().await?,
            _ = ready.changed() => {
                let ready_epoch = *ready.borrow_and_update();
                session.register(ready_epoch).await?;
            }
            _ = demand.tick() => session.follower.settle_demand(DEMAND_DECAY),
            () = leaving.cancelled(), if !session.off_the_list => session.get_off_the_list().await?,
            // A member that was kept for a while may have to go now.
            () = sleep_until(again) => {}
        }
    }
}

/// What a message of the watch brought.
enum WatchMessage {
    Changes,
    Compacted,
}

impl Session<'_> {
    /// Brings what is known into force: publishes it, stands for leader, writes the placement. Tells when it has to
    /// be done again although nothing changes.
    async fn settle(&mut self) -> Result<Option<Instant>, ConnectionLost> {
        self.check_registration().await?;
        self.follower.publish(&self.listing);
        if self.follower.joining.member.role == Role::Coordinator && !self.off_the_list {
            self.lead().await?;
        }
        Ok(self.follower.publish(&self.listing))
    }

    /// Whether this node is still listed as itself, with what it said last.
    async fn check_registration(&mut self) -> Result<(), ConnectionLost> {
        let own = &self.follower.joining.member;
        if self.off_the_list || self.listing.revision < self.registered {
            return Ok(());
        }
        match self.listing.members.get(&own.node) {
            None => Err(ConnectionLost::new("this node is no longer listed")),
            Some(record) if !record.member.address.is_same(&own.address) => {
                let other = record.member.address.to_string();
                self.follower.warn_of_twin(&other);
                Ok(())
            }
            // A put of an earlier connection, whose answer was not waited for, has come last.
            Some(record) if record.ready_epoch != self.said_ready => self.register(self.said_ready).await,
            Some(_) => Ok(()),
        }
    }

    async fn register(&mut self, ready_epoch: u64) -> Result<(), ConnectionLost> {
        if self.off_the_list {
            return Ok(());
        }
        let lease = self.follower.lease()?;
        let put = register::put(&mut self.client, &self.keys, &self.follower.joining, &lease, ready_epoch);
        self.registered = within(self.patience, put).await?;
        self.said_ready = ready_epoch;
        Ok(())
    }

    /// Stands for leader where there is none; as the leader, writes the next placement if there is one to write.
    async fn lead(&mut self) -> Result<(), ConnectionLost> {
        let lease = self.follower.lease()?;
        if lease.may_have_run_out() {
            return Ok(()); // The renewal will tell whether it has.
        }
        if self.listing.leader.is_none() && self.follower.may_lead(&self.listing) {
            let node = self.follower.joining.member.node.clone();
            let stood = election::stand(&mut self.client, &self.keys, &node, &lease);
            if let Some(leader) = within(self.patience, stood).await? {
                self.listing.leader = Some(leader);
            }
        }
        let leader = self.listing.leader.clone().filter(|leader| leader.lease == lease.id);
        self.follower.set_leads(leader.is_some(), &self.listing);
        let Some(leader) = leader else { return Ok(()) };
        let Some(mut record) = self.follower.next_placement(&self.listing) else { return Ok(()) };
        if self.listed.elapsed() > FRESH {
            self.relist().await?;
            self.follower.publish(&self.listing);
            match self.follower.next_placement(&self.listing) {
                Some(next) if self.listing.leader.as_ref() == Some(&leader) => record = next,
                _ => return Ok(()),
            }
        }
        // The lease is checked again at the last moment, since this process may have been stopped meanwhile.
        if lease.may_have_run_out() {
            return Ok(());
        }
        let before = self.listing.placement.mod_revision;
        let write = writer::write(&mut self.client, &self.keys, &leader, before, record);
        // The next step, if there is one, follows when the watch tells of this one.
        match within(self.patience, write).await? {
            Written::As(stored) => {
                if let Some(record) = &stored.record {
                    self.follower.written(&record.placement);
                }
                self.listing.placement = stored;
                self.follower.publish(&self.listing);
            }
            Written::Refused => {
                tracing::warn!("etcd refused a placement: this node leads no longer, or it was behind");
                self.relist().await?;
            }
            Written::TooLarge => {}
        }
        Ok(())
    }

    fn take(&mut self, told: Option<WatchResponse>) -> Result<WatchMessage, ConnectionLost> {
        let Some(response) = told else { return Err(ConnectionLost::new("etcd ended the watch")) };
        if response.compact_revision() > 0 {
            return Ok(WatchMessage::Compacted);
        }
        if response.canceled() {
            return Err(ConnectionLost::new(format!("etcd ended the watch: {}", response.cancel_reason())));
        }
        // Not the revision of the answer's head: that is the store's, and a watch that catches up is behind it.
        let revisions = response.events().iter().filter_map(|event| event.kv().map(KeyValue::mod_revision));
        let revision = revisions.max().unwrap_or(0);
        let changes = response.events().iter().filter_map(|event| {
            let kv = event.kv()?;
            Some(match event.event_type() {
                EventType::Put => Change::Put(entry(kv)),
                EventType::Delete => Change::Delete { key: kv.key(), mod_revision: kv.mod_revision() },
            })
        });
        self.listing.apply(revision, changes);
        Ok(WatchMessage::Changes)
    }

    async fn relist(&mut self) -> Result<(), ConnectionLost> {
        self.listed = Instant::now();
        self.listing = within(self.patience, list(&mut self.client, &self.keys)).await?;
        self.follower.relisted(&self.listing);
        Ok(())
    }

    /// Gives back what this node holds in etcd, so that the others need not wait for the lease.
    async fn get_off_the_list(&mut self) -> Result<(), ConnectionLost> {
        self.off_the_list = true;
        let lease = self.follower.lease()?;
        if let Some(leader) = self.listing.leader.clone().filter(|leader| leader.lease == lease.id) {
            within(self.patience, election::resign(&mut self.client, &self.keys, &leader)).await?;
        }
        within(self.patience, register::delete(&mut self.client, &self.keys, &self.follower.joining)).await?;
        self.relist().await?;
        tracing::info!(epoch = self.follower.published.placement().epoch(), "left the cluster");
        Ok(())
    }

    /// Revokes the lease, on which nothing depends any more. If that fails, the lease runs out by itself.
    async fn give_back_lease(&mut self) {
        if let Some(lease) = self.follower.lease.take()
            && let Err(lost) = within(self.patience, self.client.lease_revoke(lease.id)).await
        {
            tracing::debug!(reason = %lost, "the lease is left to run out");
        }
    }

    /// Whether nothing is placed on this node any more.
    fn is_forgotten(&self) -> bool {
        let node = &self.follower.joining.member.node;
        let record = self.listing.placement.record.as_ref();
        record.is_none_or(|record| record.placement.held_by(node).next().is_none())
    }
}

/// Everything under the cluster's prefix.
async fn list(client: &mut Client, keys: &Keys) -> Result<Listing, ConnectionLost> {
    let answer = client.get(keys.prefix(), Some(GetOptions::new().with_prefix())).await?;
    let revision = answer.header().map_or(0, |header| header.revision());
    Ok(Listing::new(keys, revision, answer.kvs().iter().map(entry)))
}

/// What changes under the cluster's prefix, from this revision on.
async fn watch(client: &mut Client, keys: &Keys, from: i64) -> Result<WatchStream, ConnectionLost> {
    let options = WatchOptions::new().with_prefix().with_start_revision(from);
    Ok(client.watch(keys.prefix(), Some(options)).await?)
}

fn entry(kv: &KeyValue) -> Entry<'_> {
    Entry {
        key: kv.key(),
        value: kv.value(),
        create_revision: kv.create_revision(),
        mod_revision: kv.mod_revision(),
        lease: kv.lease(),
    }
}

/// An answer that has to come soon.
async fn within<T, E>(patience: Duration, answer: impl Future<Output = Result<T, E>>) -> Result<T, ConnectionLost>
where
    ConnectionLost: From<E>,
{
    match time::timeout(patience, answer).await {
        Ok(answer) => Ok(answer?),
        Err(_) => Err(ConnectionLost::new(format!("no answer within {patience:?}"))),
    }
}

async fn sleep_until(deadline: Option<Instant>) {
    match deadline {
        Some(deadline) => time::sleep_until(deadline).await,
        None => std::future::pending().await,
    }
}
