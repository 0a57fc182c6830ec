//! The tokio runtime of one command: it carries bytes and time, so few threads are plenty beside those that
//! compute. Used by every command that talks to a cluster or is one.

use std::thread;

use tokio::runtime::Builder;

/// Threads that move bytes, at least and at most.
const IO_THREADS: (usize, usize) = (2, 8);

/// Tasks that a thread runs until it looks whose bytes have come: where peers send without a pause there is always a task, and
/// tokio by itself looks after 61.
const TASKS_BETWEEN_LOOKS: u32 = 16;

/// Runs `command` to its end. Threads that still block afterwards (a read from a terminal, say) are left
/// behind, so that the process can end.
pub(crate) fn run<T>(command: impl Future<Output = anyhow::Result<T>>) -> anyhow::Result<T> {
    let (least, most) = IO_THREADS;
    let threads = thread::available_parallelism().map_or(least, |cores| (cores.get() / 2).clamp(least, most));
    let mut builder = Builder::new_multi_thread();
    let runtime = builder.worker_threads(threads).event_interval(TASKS_BETWEEN_LOOKS).enable_all().build()?;
    let result = runtime.block_on(command);
    runtime.shutdown_background();
    result
}
