//! When a process ends that is told to. Of a server the first Ctrl-C or SIGTERM asks it to drain, a second one ends it at once:
//! `up`, the roles and `eval`. What writes a model ends at the first, once it has cleaned up: `synth` and `convert`.

use std::{io, process, thread};

use sida_model::fresh_directory;
use tokio::{
    runtime,
    signal::unix::{SignalKind, signal},
};
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

/// Ends the process at the first Ctrl-C or SIGTERM, once the directories are removed that it has not finished: for work that does not
/// look whether it should end.
pub(crate) fn clean_up_on_signal() -> io::Result<()> {
    let runtime = runtime::Builder::new_current_thread().enable_all().build()?;
    let (mut interrupts, mut terminations) = {
        let _entered = runtime.enter();
        (signal(SignalKind::interrupt())?, signal(SignalKind::terminate())?)
    };
    thread::Builder::new().name("signals".into()).spawn(move || {
        runtime.block_on(async {
            tokio::select! {
                _ = interrupts.recv() => {}
                _ = terminations.recv() => {}
            }
        });
        let left = fresh_directory::remove_unfinished();
        for left in &left {
            tracing::warn!("cannot remove {}, which is not finished", left.display());
        }
        if left.is_empty() {
            eprintln!("sida: told to end; nothing is left of what was not finished");
        }
        process::exit(EXIT_INTERRUPTED);
    })?;
    Ok(())
}
