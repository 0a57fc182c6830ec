//! One process of the `sida` binary: started, asked for its address, ended in the way a test wants. Used by
//! [`crate::sandbox`].

use std::{
    fs::{self, OpenOptions},
    io::{BufRead, BufReader},
    path::{Path, PathBuf},
    process::{Child, Command, ExitStatus, Stdio},
    sync::mpsc,
    thread,
    time::{Duration, Instant},
};

use crate::{Namespace, binary};

/// A node says where it listens once its model's files are checked.
const START_LIMIT: Duration = Duration::from_secs(60);
/// A drain ends by itself well before this.
const END_LIMIT: Duration = Duration::from_secs(60);

/// A server that runs. It is killed when dropped.
pub struct Process {
    name: String,
    child: Child,
    address: String,
    http_address: Option<String>,
    log: PathBuf,
}

impl Process {
    /// Starts `sida` with `arguments` and waits until it says where it listens; its log goes to `NAME.log` in `dir`. It
    /// runs in the network `within`, if that is given.
    /// Panics, with the log, if it ends first.
    pub fn start(dir: &Path, name: &str, arguments: &[String], within: Option<&Namespace>) -> Self {
        let log = dir.join(format!("{name}.log"));
        // A node that is started again goes on in the same log.
        let log_file = OpenOptions::new().create(true).append(true).open(&log);
        let mut command = binary::command();
        command.args(arguments);
        if let Some(namespace) = within {
            command = namespace.enter(&command);
        }
        let child = command
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(log_file.expect("a log file"))
            .spawn()
            .expect("sida starts");
        let mut process = Self { name: name.to_owned(), child, address: String::new(), http_address: None, log };
        process.read_addresses();
        process
    }

    fn read_addresses(&mut self) {
        let stdout = BufReader::new(self.child.stdout.take().expect("a pipe"));
        let (sender, lines) = mpsc::channel();
        // Read to its end, so that the node never waits for a reader.
        thread::spawn(move || stdout.lines().map_while(Result::ok).for_each(|line| drop(sender.send(line))));
        let started = Instant::now();
        while let Ok(line) = lines.recv_timeout(START_LIMIT.saturating_sub(started.elapsed())) {
            if let Some(address) = line.strip_prefix("listening for HTTP on ") {
                self.http_address = Some(address.to_owned());
            }
            // The last that it says.
            if let Some(address) = line.strip_prefix("listening on ") {
                self.address = address.to_owned();
                return;
            }
        }
        panic!("{} does not listen", self.name);
    }

    /// `host:port` of its gRPC server.
    pub fn address(&self) -> &str {
        &self.address
    }

    /// `host:port` of its HTTP server, if it says that it has one.
    pub fn http_address(&self) -> Option<&str> {
        self.http_address.as_deref()
    }

    /// What it has logged so far.
    pub fn log(&self) -> String {
        fs::read_to_string(&self.log).unwrap_or_default()
    }

    /// The operating system's number for it.
    pub fn id(&self) -> u32 {
        self.child.id()
    }

    /// Sends it a signal, such as `STOP` or `CONT`.
    pub fn signal(&self, signal: &str) {
        let sent = Command::new("kill").args(["-s", signal, &self.id().to_string()]).status();
        assert!(sent.expect("kill can be run").success(), "{} has ended before: {}", self.name, self.log());
    }

    /// Bytes of it that are in memory.
    pub fn resident_bytes(&self) -> u64 {
        let status = fs::read_to_string(format!("/proc/{}/status", self.id())).expect("it runs");
        let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).expect("its size");
        line.trim().trim_end_matches(" kB").parse::<u64>().expect("a number") << 10
    }

    /// Files and sockets that it has open.
    pub fn descriptors(&self) -> usize {
        fs::read_dir(format!("/proc/{}/fd", self.id())).expect("it runs").count()
    }

    /// Ends it as a crash would: no farewell, no drain.
    pub fn kill(mut self) {
        self.child.kill().expect("a process that runs");
        self.child.wait().expect("its end");
    }

    /// Asks it to end (SIGTERM) and waits until it has. Panics if it does not.
    pub fn terminate(mut self) -> ExitStatus {
        self.signal("TERM");
        let started = Instant::now();
        loop {
            match self.child.try_wait().expect("its state") {
                Some(status) => return status,
                None => assert!(started.elapsed() < END_LIMIT, "{} does not end: {}", self.name, self.log()),
            }
            thread::sleep(Duration::from_millis(5));
        }
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
        if thread::panicking() {
            eprintln!("--- log of {}\n{}", self.name, self.log());
        }
    }
}
