//! When a server ends: the first Ctrl-C or SIGTERM asks it to drain, a second one ends it at once. Used by
//! `up`, the roles and `eval`.

use std::process;

use tokio::signal::unix::{SignalKind, signal};
use tokio_util::sync::CancellationToken;

/// 128 + SIGINT, as a shell reports it.
const EXIT_INTERRUPTED: i32 = 130;

/// A token that is cancelled by the first Ctrl-C or SIGTERM.
pub(crate) fn on_signal() -> anyhow::Result<CancellationToken> {
    let mut interrupts = signal(SignalKind::interrupt())?;
    let mut terminations = signal(SignalKind::terminate())?;
    let shutdown = CancellationToken::new();
    let token = shutdown.clone();
    tokio::spawn(async move {
        for is_first in [true, false] {
            tokio::select! {
                _ = interrupts.recv() => {}
                _ = terminations.recv() => {}
            }
            if is_first {
                tracing::info!("draining; once more to end at once");
                token.cancel();
            }
        }
        process::exit(EXIT_INTERRUPTED);
    });
    Ok(shutdown)
}
