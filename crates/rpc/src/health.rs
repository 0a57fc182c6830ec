//! `grpc.health.v1`, backed by checks that do what the service does: a service is SERVING only while its check
//! passes, and the whole node (service name "") only while all of them do. Put in place by [`crate::server`].
//!
//! Beside that stands [`LIVENESS`], for whoever decides whether to start a process again: it says SERVING from the
//! first moment to the last, and NOT_SERVING only once the node's own work has stopped for good. What the node waits
//! for (its model, etcd, other nodes) never makes it so: starting again would not help.

use std::{
    future::Future,
    pin::Pin,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use tokio::time;
use tokio_util::sync::CancellationToken;
use tonic_health::{ServingStatus, server::HealthReporter};

/// The service name that stands for the whole node.
const NODE: &str = "";

/// The service name that stands for the process being alive.
pub const LIVENESS: &str = "liveness";

/// How long somebody waits for the first round of checks.
const FIRST_CHECK_PATIENCE: Duration = Duration::from_millis(500);

/// Time between two checks of a node that is not ready.
const UNREADY_PERIOD: Duration = Duration::from_millis(500);

/// What a check finds wrong, for the log.
pub type CheckResult = Result<(), String>;

type CheckFuture = Pin<Box<dyn Future<Output = CheckResult> + Send>>;

/// A service's check.
pub(crate) struct Check {
    pub(crate) service: &'static str,
    run: Box<dyn Fn() -> CheckFuture + Send + Sync>,
}

/// Whether what computes in the node still does.
pub(crate) type Alive = Box<dyn Fn() -> bool + Send + Sync>;

/// Whether the node is SERVING, and alive, for those outside gRPC (`/readyz`, `/healthz`). Clones tell the same.
#[derive(Clone, Debug, Default)]
pub struct Readiness(Arc<ReadinessState>);

#[derive(Debug, Default)]
struct ReadinessState {
    is_ready: AtomicBool,
    is_dead: AtomicBool,
    /// Cancelled once every check has run.
    first_checked: CancellationToken,
}

impl Readiness {
    /// Whether every check passed when it last ran, and the node is not shutting down.
    pub fn is_ready(&self) -> bool {
        self.0.is_ready.load(Ordering::Relaxed)
    }

    /// The same, of a node that has just begun once every check has run, which takes a moment: who asks as soon as it listens
    /// shall not be told that it does not serve.
    pub async fn is_ready_once_checked(&self) -> bool {
        // A check that takes longer is as good as one that fails.
        let _ = time::timeout(FIRST_CHECK_PATIENCE, self.0.first_checked.cancelled()).await;
        self.is_ready()
    }

    /// Whether the node can still become ready by itself. One that loads its model, or waits for others, is alive.
    pub fn is_alive(&self) -> bool {
        !self.0.is_dead.load(Ordering::Relaxed)
    }
}

impl Check {
    pub(crate) fn new<F, R>(service: &'static str, check: F) -> Self
    where
        F: Fn() -> R + Send + Sync + 'static,
        R: Future<Output = CheckResult> + Send + 'static,
    {
        Self { service, run: Box::new(move || Box::pin(check())) }
    }
}

/// Runs the checks of a node and publishes what they find.
pub(crate) struct Health {
    pub(crate) reporter: HealthReporter,
    pub(crate) readiness: Readiness,
    pub(crate) checks: Vec<Check>,
    /// Whether the node's own work still goes on; `None` where that is not checked.
    pub(crate) is_alive: Option<Alive>,
    /// Time between two rounds of checks, and the longest that one check may take.
    pub(crate) period: Duration,
}

impl Health {
    /// Publishes that nothing serves yet. To be called before anybody can ask: a service that is not known would be
    /// NOT_FOUND, and the node, by the library's default, SERVING.
    pub(crate) async fn register(&self) {
        self.nothing_serves().await;
        self.publish(LIVENESS, true).await;
    }

    /// Checks at once and then periodically, until `shutdown`; then publishes NOT_SERVING and returns.
    pub(crate) async fn run(&self, shutdown: &CancellationToken) {
        let mut serving = vec![None; self.checks.len()];
        let rounds = async {
            loop {
                self.look_whether_alive().await;
                self.round(&mut serving).await;
                // A node that is not ready is checked often, since others wait for it.
                let pause = if self.readiness.is_ready() { self.period } else { self.period.min(UNREADY_PERIOD) };
                time::sleep(pause).await;
            }
        };
        tokio::select! {
            () = rounds => {}
            () = shutdown.cancelled() => self.nothing_serves().await,
        }
    }

    /// Runs every check once. `serving` remembers the last round: only a change is published and logged, since
    /// every publication wakes every watcher.
    async fn round(&self, serving: &mut [Option<bool>]) {
        for (check, serving) in self.checks.iter().zip(serving.iter_mut()) {
            let result = match time::timeout(self.period, (check.run)()).await {
                Ok(result) => result,
                Err(_) => Err(format!("no answer within {:?}", self.period)),
            };
            if *serving != Some(result.is_ok()) {
                match &result {
                    Ok(()) => tracing::info!(service = check.service, "health check passes"),
                    Err(reason) => tracing::warn!(service = check.service, reason, "health check fails"),
                }
                self.publish(check.service, result.is_ok()).await;
            }
            *serving = Some(result.is_ok());
        }
        let ready = serving.iter().all(|serving| *serving == Some(true));
        if self.readiness.0.is_ready.swap(ready, Ordering::Relaxed) != ready {
            self.publish(NODE, ready).await;
        }
        self.readiness.0.first_checked.cancel();
    }

    async fn look_whether_alive(&self) {
        let is_alive = self.is_alive.as_ref().is_none_or(|is_alive| is_alive());
        if self.readiness.0.is_dead.swap(!is_alive, Ordering::Relaxed) == is_alive {
            if !is_alive {
                tracing::error!("what computes in this node has stopped; it has to be started again");
            }
            self.publish(LIVENESS, is_alive).await;
        }
    }

    async fn publish(&self, service: &str, serving: bool) {
        let status = if serving { ServingStatus::Serving } else { ServingStatus::NotServing };
        self.reporter.set_service_status(service, status).await;
    }

    async fn nothing_serves(&self) {
        self.readiness.0.is_ready.store(false, Ordering::Relaxed);
        for service in self.checks.iter().map(|check| check.service).chain([NODE]) {
            self.publish(service, false).await;
        }
    }
}
