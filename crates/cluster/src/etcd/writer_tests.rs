//! What etcd itself refuses, whatever a writer believes: forced here, since a writer that works looks at its own clock
//! first and does not even try. Starts an etcd of its own (Debian: `etcd-server`).

use std::{
    net::TcpListener,
    path::PathBuf,
    process::{Child, Command, Stdio},
    time::{Duration, Instant},
};

use sida_routing::{Candidate, Digest, Extent, Placement};

use super::*;
use crate::etcd::{
    EtcdConfig,
    connect::connect,
    election,
    lease::{self, Lease},
};

const START_LIMIT: Duration = Duration::from_secs(30);

/// An etcd of one member. Ends when dropped.
struct OwnEtcd {
    child: Child,
    dir: PathBuf,
    config: EtcdConfig,
}

impl OwnEtcd {
    fn start() -> Self {
        let listeners = [0; 2].map(|_| TcpListener::bind(("127.0.0.1", 0)).expect("a port"));
        let [client, peer] = listeners.map(|l| format!("http://{}", l.local_addr().expect("an address")));
        let dir = std::env::temp_dir().join(format!("sida-writer-{}", std::process::id()));
        let child = Command::new("etcd")
            .arg("--data-dir")
            .arg(&dir)
            .args(["--listen-client-urls", &client, "--advertise-client-urls", &client])
            .args(["--listen-peer-urls", &peer, "--initial-advertise-peer-urls", &peer])
            .args(["--initial-cluster", &format!("default={peer}")])
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .expect("etcd is installed (Debian: etcd-server)");
        Self { child, dir, config: EtcdConfig::new(vec![client], "test".to_owned()) }
    }

    /// A client, once it answers.
    async fn client(&self) -> Client {
        let started = Instant::now();
        loop {
            let tried = async { connect(&self.config, &self.config.endpoints[0]).await.ok()?.status().await.ok() };
            if tried.await.is_some() {
                return connect(&self.config, &self.config.endpoints[0]).await.expect("it has answered");
            }
            assert!(started.elapsed() < START_LIMIT, "etcd does not answer");
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    }
}

impl Drop for OwnEtcd {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
        let _ = std::fs::remove_dir_all(&self.dir);
    }
}

fn record(epoch: u64) -> PlacementRecord {
    let candidates = ["a", "b"].map(|name| Candidate { node: name.into(), weight: 1.0 });
    let extent = Extent { moe_layers: 1, num_experts: 4, replicas: 1 };
    let placement = Placement::compute(epoch, extent, &candidates).expect("two nodes");
    PlacementRecord { model: Digest([7; 32]), placement: Arc::new(placement) }
}

async fn leads(client: &mut Client, keys: &Keys, name: &str) -> (Leader, Lease) {
    let mut held = None;
    let renewal = lease::hold(client, Duration::from_secs(60), &mut held).await.expect("a lease");
    drop(renewal);
    let lease = held.expect("it was granted");
    let leader = election::stand(client, keys, &name.into(), &lease).await.expect("an answer");
    (leader.expect("nobody else leads"), lease)
}

/// The epoch that is stored.
async fn stored(client: &mut Client, keys: &Keys) -> u64 {
    let answer = client.get(keys.placement(), None).await.expect("an answer");
    let value = answer.kvs().first().expect("a placement").value().to_vec();
    sida_proto::wire::decode::placement(&value).expect("it can be read").placement.epoch()
}

/// A writer that was paused, or that is behind, would write over the placement of its successor.
#[tokio::test]
async fn an_old_leadership_or_an_old_placement_is_refused() {
    let etcd = OwnEtcd::start();
    let mut client = etcd.client().await;
    let keys = Keys::new("test");
    let (first, lease) = leads(&mut client, &keys, "first").await;
    let Written::As(one) = write(&mut client, &keys, &first, 0, record(1)).await.expect("an answer") else {
        panic!("a leader may write");
    };
    // The first is paused past its lease, as etcd counts it, and another one takes over.
    client.lease_revoke(lease.id).await.expect("an answer");
    let (second, _) = leads(&mut client, &keys, "second").await;
    let Written::As(two) = write(&mut client, &keys, &second, one.mod_revision, record(2)).await.expect("an answer")
    else {
        panic!("the one that leads now may write");
    };
    // It goes on: with what it believed, with what it has read since, and as if nothing had ever been written.
    for before in [one.mod_revision, two.mod_revision, 0] {
        let written = write(&mut client, &keys, &first, before, record(3)).await.expect("an answer");
        assert!(matches!(written, Written::Refused), "an old leadership wrote over revision {before}");
    }
    // A writer that leads, but has not read what is stored.
    for before in [one.mod_revision, 0] {
        let written = write(&mut client, &keys, &second, before, record(2)).await.expect("an answer");
        assert!(matches!(written, Written::Refused), "a leader that is behind wrote over revision {before}");
    }
    assert_eq!(stored(&mut client, &keys).await, 2);
    let written = write(&mut client, &keys, &second, two.mod_revision, record(3)).await.expect("an answer");
    assert!(matches!(written, Written::As(_)), "who leads and is not behind may write");
    assert_eq!(stored(&mut client, &keys).await, 3);
}
