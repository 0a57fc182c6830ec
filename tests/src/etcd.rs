//! etcd as real processes, one or three members, on ports that the system picks: started, killed, paused and started
//! again as a test wants, and asked by `etcdctl`. Both come with Debian (`etcd-server`, `etcd-client`); `tests/run.sh`
//! installs them.

use std::{
    fs::{self, File},
    io::{Read, Write},
    net::TcpStream,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    thread,
    time::{Duration, Instant},
};

use tempfile::TempDir;

use crate::ports::free_port;

/// Memory, where the system has a disk of it: etcd waits for every write, and other tests keep the disk busy.
const MEMORY_DISK: &str = "/dev/shm";
/// etcd elects a leader and answers well before this.
const READY_LIMIT: Duration = Duration::from_secs(30);

/// TLS of etcd towards its clients.
#[derive(Clone, Debug)]
pub struct ServerTls {
    /// PEM file of the authorities whose clients are let in.
    pub authorities: PathBuf,
    /// PEM file of the server's certificate, for 127.0.0.1.
    pub certificate: PathBuf,
    /// PEM file of its key.
    pub key: PathBuf,
    /// PEM files of a client's certificate and key, for `etcdctl`.
    pub client: (PathBuf, PathBuf),
}

/// A running etcd. Ends when dropped.
pub struct Etcd {
    members: Vec<Member>,
    tls: Option<ServerTls>,
    /// `name:password`, once authentication is on.
    user: Option<String>,
    dir: TempDir,
}

struct Member {
    name: String,
    client_port: u16,
    peer_port: u16,
    child: Option<Child>,
}

impl Etcd {
    /// Starts so many members and waits until they answer.
    pub fn start(members: usize) -> Self {
        let etcd = Self::prepare(members, None);
        etcd.started()
    }

    /// Starts one member that takes clients by TLS only.
    pub fn start_tls(tls: ServerTls) -> Self {
        Self::prepare(1, Some(tls)).started()
    }

    /// Picks ports and starts nothing yet: nodes can be told where etcd will be.
    pub fn prepare(members: usize, tls: Option<ServerTls>) -> Self {
        let member = |index: usize| Member {
            name: format!("etcd-{index}"),
            client_port: free_port(),
            peer_port: free_port(),
            child: None,
        };
        let dir = tempfile::tempdir_in(MEMORY_DISK).or_else(|_| tempfile::tempdir()).expect("a temporary directory");
        Self { members: (0..members).map(member).collect(), tls, user: None, dir }
    }

    /// Starts every member that does not run, and waits until they answer.
    pub fn started(mut self) -> Self {
        (0..self.members.len()).for_each(|index| self.spawn(index));
        self.wait_until_ready();
        self
    }

    /// As `--etcd` takes it.
    pub fn endpoints(&self) -> String {
        let endpoints: Vec<String> =
            self.members.iter().map(|member| format!("127.0.0.1:{}", member.client_port)).collect();
        endpoints.join(",")
    }

    /// Ends a member as a crash would.
    pub fn kill(&mut self, index: usize) {
        let mut child = self.members[index].child.take().expect("a member that runs");
        child.kill().expect("a member that runs");
        child.wait().expect("its end");
    }

    /// Starts a member again on what it had written, and waits until it answers.
    pub fn restart(&mut self, index: usize) {
        self.spawn(index);
        self.wait_until_ready();
    }

    /// Which member leads the others.
    pub fn leader(&self) -> usize {
        let find = |index: &usize| {
            let endpoint = format!("127.0.0.1:{}", self.members[*index].client_port);
            let status = self.ctl_at(&endpoint, &["endpoint", "status", "-w", "fields"]).unwrap_or_default();
            let field = |name: &str| {
                let line =
                    status.lines().find_map(|line| line.strip_prefix(&format!("\"{name}\" : ")).map(str::to_owned));
                line.unwrap_or_default()
            };
            !field("Leader").is_empty() && field("Leader") == field("MemberID")
        };
        (0..self.members.len()).find(find).expect("a leader")
    }

    /// What `etcdctl` prints when it is asked this. Panics if it fails.
    pub fn ctl(&self, arguments: &[&str]) -> String {
        self.ctl_at(&self.endpoints(), arguments).unwrap_or_else(|error| panic!("etcdctl {arguments:?}: {error}"))
    }

    /// Writes a key again and again, faster than by as many runs of `etcdctl`: by etcd's HTTP gateway. `key` and
    /// `value` are in base64.
    pub fn put_many(&self, key: &str, value: &str, times: usize) {
        let body = format!("{{\"key\":\"{key}\",\"value\":\"{value}\"}}");
        let head = "POST /v3/kv/put HTTP/1.1\r\nHost: etcd\r\nConnection: close\r\nContent-Type: application/json";
        let request = format!("{head}\r\nContent-Length: {}\r\n\r\n{body}", body.len());
        for _ in 0..times {
            let mut stream = TcpStream::connect(("127.0.0.1", self.members[0].client_port)).expect("a connection");
            stream.write_all(request.as_bytes()).expect("it is read");
            let mut answer = String::new();
            stream.read_to_string(&mut answer).expect("an answer");
            assert!(answer.starts_with("HTTP/1.1 200"), "{answer}");
        }
    }

    /// How long its first member has computed so far.
    pub fn cpu(&self) -> Duration {
        let id = self.members[0].child.as_ref().expect("a member that runs").id();
        let stat = fs::read_to_string(format!("/proc/{id}/stat")).expect("it runs");
        // After the name, which may have spaces: state is the third field, the times are the 14th and 15th.
        let fields: Vec<&str> = stat.rsplit(") ").next().expect("fields").split(' ').collect();
        let ticks: u64 = fields[11..13].iter().map(|field| field.parse::<u64>().expect("a number")).sum();
        Duration::from_millis(ticks * 10)
    }

    /// The sum of its first member's metrics whose lines begin so.
    pub fn metric(&self, begins: &str) -> f64 {
        let mut stream = TcpStream::connect(("127.0.0.1", self.members[0].client_port)).expect("a connection");
        stream.write_all(b"GET /metrics HTTP/1.0\r\n\r\n").expect("it is read");
        let mut answer = String::new();
        stream.read_to_string(&mut answer).expect("an answer");
        let values = answer.lines().filter(|line| line.starts_with(begins)).filter_map(|line| line.rsplit(' ').next());
        values.map(|value| value.parse::<f64>().expect("a number")).sum()
    }

    /// The revision that it is at.
    pub fn revision(&self) -> String {
        let status = self.ctl(&["endpoint", "status", "-w", "fields"]);
        let line = status.lines().find_map(|line| line.strip_prefix("\"Revision\" : ")).expect("a revision");
        line.trim().to_owned()
    }

    /// Turns authentication on: `user` may read and write under `prefix`.
    pub fn enable_auth(&mut self, user: &str, password: &str, prefix: &str) {
        self.ctl(&["user", "add", "root:root"]);
        self.ctl(&["user", "grant-role", "root", "root"]);
        self.ctl(&["role", "add", "sida"]);
        self.ctl(&["role", "grant-permission", "sida", "--prefix=true", "readwrite", prefix]);
        self.ctl(&["user", "add", &format!("{user}:{password}")]);
        self.ctl(&["user", "grant-role", user, "sida"]);
        self.ctl(&["auth", "enable"]);
        self.user = Some("root:root".to_owned());
    }

    fn ctl_at(&self, endpoints: &str, arguments: &[&str]) -> Result<String, String> {
        let mut command = Command::new("etcdctl");
        command.env("ETCDCTL_API", "3").args(["--endpoints", endpoints, "--command-timeout", "5s"]);
        if let Some(tls) = &self.tls {
            command
                .arg("--cacert")
                .arg(&tls.authorities)
                .arg("--cert")
                .arg(&tls.client.0)
                .arg("--key")
                .arg(&tls.client.1);
        }
        if let Some(user) = &self.user {
            command.args(["--user", user]);
        }
        let output = command.args(arguments).output().map_err(|error| format!("etcdctl cannot be run: {error}"))?;
        let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
        if output.status.success() { Ok(text(&output.stdout)) } else { Err(text(&output.stderr)) }
    }

    fn spawn(&mut self, index: usize) {
        let scheme = if self.tls.is_some() { "https" } else { "http" };
        let peers: Vec<String> =
            self.members.iter().map(|m| format!("{}=http://127.0.0.1:{}", m.name, m.peer_port)).collect();
        let member = &self.members[index];
        let dir = self.dir.path();
        let (client, peer) =
            (format!("{scheme}://127.0.0.1:{}", member.client_port), format!("http://127.0.0.1:{}", member.peer_port));
        let mut command = Command::new("etcd");
        command
            .args(["--name", &member.name])
            .arg("--data-dir")
            .arg(dir.join(&member.name))
            .args(["--listen-client-urls", &client, "--advertise-client-urls", &client])
            .args(["--listen-peer-urls", &peer, "--initial-advertise-peer-urls", &peer])
            .args(["--initial-cluster", &peers.join(",")]);
        if let Some(tls) = &self.tls {
            command.arg("--cert-file").arg(&tls.certificate).arg("--key-file").arg(&tls.key);
            command.arg("--trusted-ca-file").arg(&tls.authorities).arg("--client-cert-auth");
        }
        let log = log_file(dir, &member.name);
        let child = command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(log).spawn();
        self.members[index].child = Some(child.expect("etcd is installed (Debian: etcd-server)"));
    }

    /// Waits until every member that runs answers.
    fn wait_until_ready(&self) {
        let started = Instant::now();
        for member in self.members.iter().filter(|member| member.child.is_some()) {
            let endpoint = format!("127.0.0.1:{}", member.client_port);
            while let Err(error) = self.ctl_at(&endpoint, &["endpoint", "health"]) {
                if started.elapsed() > READY_LIMIT {
                    let log = fs::read_to_string(self.dir.path().join(format!("{}.log", member.name)));
                    panic!("{} does not answer: {error}\nits log:\n{}", member.name, log.unwrap_or_default());
                }
                thread::sleep(Duration::from_millis(20));
            }
        }
    }
}

impl Drop for Etcd {
    fn drop(&mut self) {
        for member in &mut self.members {
            if let Some(child) = &mut member.child {
                let _ = child.kill();
                let _ = child.wait();
            }
        }
    }
}

fn log_file(dir: &Path, name: &str) -> File {
    let log = dir.join(format!("{name}.log"));
    File::options().create(true).append(true).open(log).expect("a log file")
}
