//! How many files this process may open. Each connection is one, and what systems allow by default (1,024) is less than
//! what a server with two doors may have to hold; so a server takes as many as its user may have.

use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};

/// Ports that take connections of clients, at most.
const DOORS: u64 = 2;
/// What else is open: files of the model, the port of metrics, connections to other nodes.
const OTHERS: u64 = 512;

/// Takes as many as may be had, and warns if those are fewer than `connections` at each door need.
pub(crate) fn allow(connections: u32) {
    let limit = getrlimit(Resource::Nofile);
    // The hard limit is what may be had without asking anybody.
    if limit.current.is_some_and(|current| limit.maximum.is_none_or(|maximum| maximum > current))
        && let Err(error) = setrlimit(Resource::Nofile, Rlimit { current: limit.maximum, maximum: limit.maximum })
    {
        tracing::debug!(%error, "the limit of open files stays as it is");
    }
    let (needed, found) = (needed(connections), getrlimit(Resource::Nofile).current);
    if let Some(found) = found.filter(|found| *found < needed) {
        tracing::warn!(
            found,
            needed,
            "so many files may be open at most: raise the limit (ulimit -n), or lower --connections-max"
        );
    }
}

/// Files that a server may have open. An eighth more connections than stay may be on their way out.
fn needed(connections: u32) -> u64 {
    let connections = u64::from(connections);
    DOORS * (connections + connections / 8) + OTHERS
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_server_takes_as_many_files_as_it_may() {
        // Would break: a coordinator with its default limits runs out of files at half of the connections it may have.
        allow(1);
        let limit = getrlimit(Resource::Nofile);
        assert_eq!(limit.current, limit.maximum);
        assert_eq!(needed(1024), 2816);
    }
}
