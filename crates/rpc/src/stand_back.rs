//! Threads that compute stand back behind those that answer. Where processors are short, a connection would otherwise wait for
//! its turn behind a product that takes milliseconds: to refuse a request took 4 to 6 ms then at the 99th
//! percentile, and takes 3 to 4 (docs/benchmarks.md, "More than it can bear").

/// For threads that compute what somebody waits for. A thread that never rests gets half of a processor's time beside one that
/// does not stand back, instead of an equal share.
pub const COMPUTES: i32 = 3;
/// For threads that nobody waits for.
pub const IN_THE_BACKGROUND: i32 = 10;

/// Has the system prefer other threads to this one and those that it starts, by so much (`nice`, 1 to 19). That it cannot costs
/// time only, and is logged.
pub fn stand_back(by: i32) {
    // Elsewhere it would be the whole process.
    #[cfg(target_os = "linux")]
    if let Err(error) = rustix::process::setpriority_process(None, by) {
        tracing::warn!(%error, "a thread that computes competes with those that answer");
    }
    #[cfg(not(target_os = "linux"))]
    let _ = by;
}

#[cfg(all(test, target_os = "linux"))]
mod tests {
    use rustix::process::getpriority_process;

    use super::*;

    /// All of a process would stand back, and nothing be preferred to anything.
    #[test]
    fn only_this_thread_does() {
        let before = getpriority_process(None).unwrap();
        let within = std::thread::spawn(|| {
            stand_back(COMPUTES);
            getpriority_process(None).unwrap()
        });
        assert_eq!(within.join().unwrap(), COMPUTES.max(before));
        assert_eq!(getpriority_process(None).unwrap(), before);
    }
}
