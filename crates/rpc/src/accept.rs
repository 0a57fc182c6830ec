//! Accepts the connections of a server until it ends, and goes on when accepting fails. Used by [`crate::server`] and
//! [`crate::metrics_port`].

use std::{
    io::{self, ErrorKind},
    sync::Arc,
    time::Duration,
};

use socket2::SockRef;
use tokio::{
    net::{TcpListener, TcpStream},
    task::{JoinError, JoinSet},
    time,
};
use tokio_util::sync::CancellationToken;

use crate::{
    connections::{Connections, Place},
    peer::Peer,
    shortage::Short,
    who_leaves::Origin,
};

/// Newcomers that the system keeps until they are accepted.
const NEWCOMERS_MAX: i32 = 4096;

/// How long to wait after the system refused to accept: what it lacks does not come back at once.
const PAUSE: Duration = Duration::from_millis(100);

/// Serves every connection to `listener` in a task of its own, at most `limit` of them at a time. At `shutdown` it stops
/// listening, asks all to leave, and returns when they have left. Whoever drops this future ends them.
pub(crate) async fn accept<F, R>(listener: TcpListener, limit: usize, shutdown: &CancellationToken, serve: F)
where
    F: Fn(TcpStream, Arc<Peer>) -> R,
    R: Future<Output = ()> + Send + 'static,
{
    if let Err(error) = SockRef::from(&listener).listen(NEWCOMERS_MAX) {
        tracing::debug!(%error, "many newcomers at once may have to come again");
    }
    let port = listener.local_addr().map_or(0, |address| address.port());
    let connections = Connections::new(limit, port);
    let mut tasks = JoinSet::new();
    let accepting = async {
        let mut failures = Failures { are_told: false };
        loop {
            let (stream, origin) = tokio::select! {
                next = next(&listener, &connections, &mut failures) => next,
                short = connections.shortage_over() => {
                    tell(port, &short, "places for connections are no longer short");
                    continue;
                }
            };
            // The newcomer is there already, so that nobody has to leave for one that may never come.
            let Some(place) = connections.place(origin).await else { continue };
            let served = serve(stream, place.peer.clone());
            while let Some(ended) = tasks.try_join_next() {
                told(ended);
            }
            tasks.spawn(hold(place, served));
        }
    };
    tokio::select! {
        () = accepting => {}
        () = shutdown.cancelled() => {}
    }
    // New clients shall be refused, not wait for a server that does not come back.
    drop(listener);
    connections.close();
    if let Some(short) = connections.end_shortage() {
        tell(port, &short, "places for connections were short until the server ended");
    }
    while let Some(ended) = tasks.join_next().await {
        told(ended);
    }
}

fn tell(port: u16, short: &Short, what: &str) {
    let Short { waited, closed, refused, .. } = *short;
    let lasted = short.last - short.since;
    tracing::info!(port, waited, closed, refused, ?lasted, "{what}");
}

/// A panic is a broken invariant of ours. It costs its own connection, and is told.
fn told(ended: Result<(), JoinError>) {
    if let Err(error) = ended {
        tracing::error!(%error, "serving a connection failed");
    }
}

async fn hold(place: Place, served: impl Future<Output = ()>) {
    served.await;
    drop(place);
}

/// The next connection, and whom it is of.
async fn next(listener: &TcpListener, connections: &Connections, failures: &mut Failures) -> (TcpStream, Origin) {
    loop {
        match listener.accept().await {
            Ok((stream, address)) => {
                failures.over();
                return (stream, address.ip().into());
            }
            Err(error) if is_of_one_connection(&error) => tracing::debug!(%error, "a connection was gone at once"),
            Err(error) => {
                failures.tell(&error);
                // What is missing is most likely a file descriptor, and a silent connection has one.
                connections.make_room();
                time::sleep(PAUSE).await;
            }
        }
    }
}

/// Whether accepting failed by the one connection that was to be accepted, so that the next may be tried at once.
fn is_of_one_connection(error: &io::Error) -> bool {
    use ErrorKind::{BrokenPipe, ConnectionAborted, ConnectionRefused, ConnectionReset, Interrupted, TimedOut};
    let kinds = [ConnectionAborted, ConnectionRefused, ConnectionReset, BrokenPipe, Interrupted, TimedOut];
    kinds.contains(&error.kind())
}

/// Tells when accepting begins to fail and when it works again: a line per try would fill the log.
struct Failures {
    are_told: bool,
}

impl Failures {
    fn tell(&mut self, error: &io::Error) {
        if !self.are_told {
            tracing::error!(%error, "no connection can be accepted; tried again until it can");
        }
        self.are_told = true;
    }

    fn over(&mut self) {
        if self.are_told {
            tracing::info!("connections are accepted again");
        }
        self.are_told = false;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_peers_failure_is_not_the_listeners() {
        // Broken: every peer that hangs up early would make all others wait, or a full table of descriptors be tried
        // in a loop without a pause.
        const EMFILE: i32 = 24;
        assert!(is_of_one_connection(&ErrorKind::ConnectionAborted.into()));
        assert!(!is_of_one_connection(&io::Error::from_raw_os_error(EMFILE)));
    }
}
