//! `grpc.health.v1`, backed by checks that do what the service does: a service is SERVING only while its check
//! passes, and the whole node (service name "") only while all of them do. Put in place by [`crate::server`].

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

/// What a check finds wrong, for the log.
pub type CheckResult = Result<(), String>;

type CheckFuture = Pin<Box<dyn Future<Output = CheckResult> + Send>>;

/// A service's check.
pub(crate) struct Check {
    pub(crate) service: &'static str,
    run: Box<dyn Fn() -> CheckFuture + Send + Sync>,
}

/// Whether the node is SERVING, for those outside gRPC (`/readyz`). Clones tell the same.
#[derive(Clone, Debug, Default)]
pub struct Readiness(Arc<AtomicBool>);

impl Readiness {
    /// Whether every check passed when it last ran, and the node is not shutting down.
    pub fn is_ready(&self) -> bool {
        self.0.load(Ordering::Relaxed)
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
    /// Time between two rounds of checks, and the longest that one check may take.
    pub(crate) period: Duration,
}

impl Health {
    /// Checks at once and then periodically, until `shutdown`; then publishes NOT_SERVING and returns.
    pub(crate) async fn run(&self, shutdown: &CancellationToken) {
        // Registered before the first check: a service that is not known yet would be NOT_FOUND.
        self.publish_all(ServingStatus::NotServing).await;
        let mut ticks = time::interval(self.period);
        ticks.set_missed_tick_behavior(time::MissedTickBehavior::Delay);
        let mut failing: Vec<bool> = vec![false; self.checks.len()];
        let rounds = async {
            loop {
                ticks.tick().await;
                self.round(&mut failing).await;
            }
        };
        tokio::select! {
            () = rounds => {}
            () = shutdown.cancelled() => self.publish_all(ServingStatus::NotServing).await,
        }
    }

    /// Runs every check once. `failing` remembers the last round, so that only a change is logged.
    async fn round(&self, failing: &mut [bool]) {
        for (check, failing) in self.checks.iter().zip(failing.iter_mut()) {
            let result = match time::timeout(self.period, (check.run)()).await {
                Ok(result) => result,
                Err(_) => Err(format!("no answer within {:?}", self.period)),
            };
            match (&result, *failing) {
                (Err(reason), false) => tracing::warn!(service = check.service, reason, "health check fails"),
                (Ok(()), true) => tracing::info!(service = check.service, "health check passes again"),
                _ => {}
            }
            *failing = result.is_err();
            self.publish(check.service, result.is_ok()).await;
        }
        let ready = failing.iter().all(|failing| !failing);
        self.publish(NODE, ready).await;
        self.readiness.0.store(ready, Ordering::Relaxed);
    }

    async fn publish(&self, service: &str, serving: bool) {
        let status = if serving { ServingStatus::Serving } else { ServingStatus::NotServing };
        self.reporter.set_service_status(service, status).await;
    }

    async fn publish_all(&self, status: ServingStatus) {
        self.readiness.0.store(false, Ordering::Relaxed);
        for service in self.checks.iter().map(|check| check.service).chain([NODE]) {
            self.reporter.set_service_status(service, status).await;
        }
    }
}
