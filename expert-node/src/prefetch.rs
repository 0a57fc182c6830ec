//! The prefetch thread: loads the experts that the residency machine names next, ahead of their use. Demand loads do
//! not come here: the call that needs an expert loads it itself.

use std::{
    io,
    sync::Arc,
    thread::{self, JoinHandle},
    time::{Duration, Instant},
};

use sida_telemetry::Seldom;

use crate::cache::ExpertCache;

/// How often the gauges are set.
const LOOK_INTERVAL: Duration = Duration::from_secs(1);

/// Starts the thread. It ends soon after [`ExpertCache::close`].
pub(crate) fn start(cache: Arc<ExpertCache>) -> io::Result<JoinHandle<()>> {
    thread::Builder::new().name("expert-prefetch".into()).spawn(move || {
        let (mut looked, failures) = (Instant::now(), Seldom::default());
        while !cache.is_closed() {
            if let Some(unfilled) = cache.next_prefetch(LOOK_INTERVAL) {
                let key = unfilled.key();
                if let Err(error) = unfilled.fill() {
                    // Not fatal: a call that needs it loads it itself, and reports what is wrong.
                    cache.note_failure(&error);
                    if let Some(lines_left_out) = failures.next(Instant::now()) {
                        tracing::warn!(%key, %error, lines_left_out, "an expert cannot be loaded ahead");
                    }
                }
            }
            if looked.elapsed() >= LOOK_INTERVAL {
                cache.residency(|residency| cache.measures.look(residency));
                looked = Instant::now();
            }
        }
    })
}
