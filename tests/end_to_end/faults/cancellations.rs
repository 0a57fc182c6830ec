//! Callers that leave, and callers whose time is up, many at once.

use std::time::Duration;

use rand::Rng;
use sida_proto::v1::{self, cluster_client::ClusterClient, inference_client::InferenceClient};
use sida_tests::{Sandbox, SandboxConfig};
use tokio::time::{Instant, sleep};
use tonic::{Code, Request};

use super::{load, random};
use crate::client::{greedy, prompts};

const STORM: usize = 150;

/// What the coordinator has to do now.
async fn work(sandbox: &Sandbox) -> (u64, u64) {
    let status = ClusterClient::new(sandbox.channel()).status(v1::StatusRequest {}).await.expect("a status");
    let status = status.into_inner();
    (status.requests_queued, status.requests_inflight)
}

/// How long until nothing is left to do.
pub(super) async fn idle(sandbox: &Sandbox) -> Duration {
    let start = Instant::now();
    while work(sandbox).await != (0, 0) {
        assert!(start.elapsed() < Duration::from_secs(20), "{:?} is still done for nobody", work(sandbox).await);
        sleep(Duration::from_millis(2)).await;
    }
    start.elapsed()
}

/// Work for nobody would go on, and whoever comes after it would wait, or be refused by a full queue.
#[tokio::test(flavor = "multi_thread")]
async fn storms_leave_nothing_behind() {
    let mut random = random("cancellations");
    let coordinator_flags = ["--queue-max", "40", "--sequences-max", "32"].map(str::to_owned).to_vec();
    let sandbox = Sandbox::start(SandboxConfig { coordinator_flags, ..Default::default() }).await;
    let load = load(&sandbox);
    let expected = load.every_text().await.answers();

    let mut calls = Vec::new();
    for number in 0..STORM {
        let mut endless = greedy(&prompts()[number % prompts().len()], 1024);
        endless.ignore_eos = true;
        let channel = sandbox.channel();
        calls.push(tokio::spawn(async move {
            let mut stream = match InferenceClient::new(channel).generate(endless).await {
                Ok(stream) => stream.into_inner(),
                // More than may wait are refused at once.
                Err(status) => return assert_eq!(status.code(), Code::ResourceExhausted, "{status}"),
            };
            while let Ok(Some(_)) = stream.message().await {}
        }));
    }
    sleep(Duration::from_millis(random.random_range(100..400))).await;
    calls.iter().for_each(tokio::task::JoinHandle::abort);
    for call in calls {
        assert!(call.await.is_ok_or_cancelled(), "a refusal of another kind");
    }
    println!("{STORM} cancelled: idle {:.0?} after", idle(&sandbox).await);

    let mut calls = Vec::new();
    for number in 0..STORM {
        let mut endless = greedy(&prompts()[number % prompts().len()], 1024);
        endless.ignore_eos = true;
        let mut request = Request::new(endless);
        let patience = Duration::from_millis(random.random_range(5..300));
        request.set_timeout(patience);
        let channel = sandbox.channel();
        calls.push(tokio::spawn(async move {
            let start = Instant::now();
            let mut stream = match InferenceClient::new(channel).generate(request).await {
                Ok(stream) => stream.into_inner(),
                Err(_) => return Duration::ZERO,
            };
            while let Ok(Some(token)) = stream.message().await {
                assert!(token.finish.is_none(), "1,024 tokens within {patience:?}");
            }
            start.elapsed().saturating_sub(patience)
        }));
    }
    let mut late = Duration::ZERO;
    for call in calls {
        late = late.max(call.await.expect("no panic"));
    }
    println!("{STORM} past their deadlines: told {late:.0?} late at most; idle {:.0?} after", idle(&sandbox).await);

    load.run(Duration::from_millis(500)).await.assert_as(&expected);
}

trait OkOrCancelled {
    fn is_ok_or_cancelled(&self) -> bool;
}

impl OkOrCancelled for Result<(), tokio::task::JoinError> {
    fn is_ok_or_cancelled(&self) -> bool {
        self.as_ref().err().is_none_or(tokio::task::JoinError::is_cancelled)
    }
}
