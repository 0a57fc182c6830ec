//! Ports for servers that must be told theirs before they start. Those that the system picks (port 0) are also given
//! to outgoing connections, which would take them in between; these are below that range.

use std::{
    net::TcpListener,
    process,
    sync::atomic::{AtomicU16, Ordering},
};

/// Between the services with known ports and where Linux begins to pick (`net.ipv4.ip_local_port_range`).
const FIRST: u16 = 20_000;
const COUNT: u16 = 12_000;

/// A port that nobody listens on, and that no other test is given.
pub fn free_port() -> u16 {
    static TAKEN: AtomicU16 = AtomicU16::new(0);
    // Tests of two processes at once begin at different ports.
    let start = process::id() * 64;
    let next = || {
        let step = u32::from(TAKEN.fetch_add(1, Ordering::Relaxed));
        FIRST + u16::try_from(start.wrapping_add(step) % u32::from(COUNT)).expect("less than COUNT")
    };
    let is_free = |port: &u16| TcpListener::bind(("127.0.0.1", *port)).is_ok();
    (0..COUNT).map(|_| next()).find(is_free).expect("a free port")
}
