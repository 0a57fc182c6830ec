//! A network of its own for one node (Linux, root only), so that a partition is real: packets that nobody answers,
//! not a proxy that swallows bytes. Used by [`crate::sandbox`].

use std::{
    process::Command,
    sync::atomic::{AtomicU8, Ordering},
};

/// A network namespace, joined to this one by a cable. It goes when dropped.
pub struct Namespace {
    name: String,
    inside: String,
    outside: String,
    address: String,
}

impl Namespace {
    /// Makes one, or says why this machine does not allow it.
    pub fn create() -> Result<Self, String> {
        static NEXT: AtomicU8 = AtomicU8::new(1);
        let (process, number) = (std::process::id(), NEXT.fetch_add(1, Ordering::Relaxed));
        // Names of interfaces have 15 characters at most.
        let of = |what: &str| format!("sida{what}{}x{number}", process % 1_000_000);
        let subnet = format!("10.{}.{}", 64 + process % 128, number);
        let (address, host) = (format!("{subnet}.2"), format!("{subnet}.1"));
        let namespace = Self { name: of("n"), inside: of("i"), outside: of("o"), address };
        let Self { name, inside, outside, address } = &namespace;
        ip(&["netns", "add", name])?;
        ip(&["link", "add", outside, "type", "veth", "peer", "name", inside])?;
        ip(&["link", "set", inside, "netns", name])?;
        ip(&["addr", "add", &format!("{host}/24"), "dev", outside])?;
        ip(&["link", "set", outside, "up"])?;
        ip(&["-n", name, "addr", "add", &format!("{address}/24"), "dev", inside])?;
        ip(&["-n", name, "link", "set", "lo", "up"])?;
        namespace.heal();
        Ok(namespace)
    }

    /// What a node in it listens on.
    pub fn address(&self) -> &str {
        &self.address
    }

    /// Runs a command in it.
    pub(crate) fn enter(&self, command: &Command) -> Command {
        let mut inside = Command::new("ip");
        inside.args(["netns", "exec", &self.name]).arg(command.get_program()).args(command.get_args());
        for (name, value) in command.get_envs() {
            match value {
                Some(value) => inside.env(name, value),
                None => inside.env_remove(name),
            };
        }
        inside
    }

    /// Pulls the cable: nothing passes, and nobody is told.
    pub fn cut(&self) {
        ip(&["-n", &self.name, "link", "set", &self.inside, "down"]).expect("a link that was made");
    }

    /// Puts it back.
    pub fn heal(&self) {
        ip(&["-n", &self.name, "link", "set", &self.inside, "up"]).expect("a link that was made");
    }
}

impl Drop for Namespace {
    fn drop(&mut self) {
        // What `create` did not get to is not there to be removed.
        let _ = ip(&["link", "del", &self.outside]);
        let _ = ip(&["netns", "del", &self.name]);
    }
}

fn ip(arguments: &[&str]) -> Result<(), String> {
    let run = Command::new("ip").args(arguments).output().map_err(|error| format!("ip cannot be run: {error}"))?;
    let said = String::from_utf8_lossy(&run.stderr);
    if run.status.success() { Ok(()) } else { Err(format!("ip {}: {}", arguments.join(" "), said.trim())) }
}
