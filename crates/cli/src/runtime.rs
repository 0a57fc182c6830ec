//! The tokio runtime of one command: it carries bytes and time, so two threads are plenty beside those that
//! compute. Used by every command that talks to a cluster or is one.

use tokio::runtime::Builder;

/// Threads that move bytes.
const IO_THREADS: usize = 2;

/// Runs `command` to its end. Threads that still block afterwards (a read from a terminal, say) are left
/// behind, so that the process can end.
pub(crate) fn run<T>(command: impl Future<Output = anyhow::Result<T>>) -> anyhow::Result<T> {
    let runtime = Builder::new_multi_thread().worker_threads(IO_THREADS).enable_all().build()?;
    let result = runtime.block_on(command);
    runtime.shutdown_background();
    result
}
