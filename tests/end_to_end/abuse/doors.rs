//! A `sida up` with both doors, and honest clients of each: they ask again as soon as they are answered, mostly on a
//! connection that they keep, and now and then on a new one.

use std::{
    io,
    net::SocketAddr,
    path::Path,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::{Duration, Instant},
};

use parking_lot::Mutex;
use sida_proto::v1::{GenerateRequest, inference_client::InferenceClient};
use sida_rpc::{Channel, ClientConfig};
use sida_tests::Process;
use tokio::{
    io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader},
    net::TcpStream,
    task::JoinHandle,
};

const TEXT: &str = "sst2 sentence: a fine film .";
const TOKENS: u32 = 4;
/// One request of so many comes on a new connection.
const NEW_EVERY: u64 = 8;
/// Clients of each door.
const WORKERS: usize = 2;
/// An answer that takes longer is none.
const PATIENCE: Duration = Duration::from_secs(60);

/// A way into a coordinator.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Door {
    Grpc,
    Http,
}

/// A node with both doors.
pub(super) struct Doors {
    pub(super) process: Process,
}

impl Doors {
    pub(super) fn start(dir: &Path, flags: &[(&str, String)]) -> Self {
        let any = "127.0.0.1:0".to_owned();
        let own = [("--listen", any.clone()), ("--http-listen", any), ("--metrics-listen", "off".to_owned())];
        let flags = own.iter().chain(flags).flat_map(|(flag, value)| [(*flag).to_owned(), value.clone()]);
        let arguments: Vec<String> = ["up".to_owned()].into_iter().chain(flags).collect();
        Self { process: Process::start(dir, "up", &arguments, None) }
    }

    pub(super) fn address(&self, door: Door) -> SocketAddr {
        let address = match door {
            Door::Grpc => self.process.address(),
            Door::Http => self.process.http_address().expect("it serves HTTP"),
        };
        address.parse().expect("an address")
    }

    /// Begins to ask, at both doors.
    pub(super) fn honest(&self) -> Honest {
        Honest::start([Door::Grpc, Door::Http].map(|door| (door, self.address(door))))
    }
}

/// One honest request.
#[derive(Clone, Debug)]
pub(crate) struct Asked {
    pub(super) door: Door,
    /// Whether it came on a new connection.
    pub(super) is_new: bool,
    pub(super) latency: Duration,
    /// Whether a connection that was kept was closed before it, so that it was sent again: as every client does.
    pub(super) again: bool,
    pub(crate) outcome: Result<(), String>,
}

/// Honest clients at work.
pub(crate) struct Honest {
    workers: Vec<JoinHandle<()>>,
    stop: Arc<AtomicBool>,
    asked: Arc<Mutex<Vec<Asked>>>,
}

impl Honest {
    /// Begins to ask at these doors.
    pub(crate) fn start(doors: [(Door, SocketAddr); 2]) -> Self {
        let stop = Arc::new(AtomicBool::new(false));
        let asked = Arc::new(Mutex::new(Vec::new()));
        let workers = doors.into_iter().flat_map(|door| [door; WORKERS]).map(|(door, to)| {
            let (stop, asked) = (stop.clone(), asked.clone());
            tokio::spawn(async move {
                let mut client = Client::new(door, to);
                let mut number = 0;
                while !stop.load(Ordering::Relaxed) {
                    number += 1;
                    let one = client.ask(number % NEW_EVERY == 0).await;
                    asked.lock().push(one);
                }
            })
        });
        Self { workers: workers.collect(), stop, asked }
    }

    /// How many were answered, or not, so far.
    pub(super) fn count(&self) -> usize {
        self.asked.lock().len()
    }

    /// Asks no more, and tells of all.
    pub(crate) async fn stop(self) -> Vec<Asked> {
        self.stop.store(true, Ordering::Relaxed);
        for worker in self.workers {
            worker.await.expect("a client does not panic");
        }
        std::mem::take(&mut *self.asked.lock())
    }
}

/// One that asks.
pub(super) struct Client {
    pub(super) door: Door,
    pub(super) to: SocketAddr,
    grpc: Option<Channel>,
    http: Option<BufReader<TcpStream>>,
}

impl Client {
    pub(super) fn new(door: Door, to: SocketAddr) -> Self {
        Self { door, to, grpc: None, http: None }
    }

    /// Asks once, on a connection of its own if it `is_new`.
    pub(super) async fn ask(&mut self, is_new: bool) -> Asked {
        let begun = Instant::now();
        let mut fresh = Self::new(self.door, self.to);
        let client = if is_new { &mut fresh } else { self };
        let answer = async {
            let was_kept = client.grpc.is_some() || client.http.is_some();
            match client.answer().await {
                Err(error) if was_kept => {
                    (client.grpc, client.http) = (None, None);
                    (true, client.answer().await.map_err(|again| format!("{error}; again: {again}")))
                }
                outcome => (false, outcome),
            }
        };
        let late = |_| (false, Err(format!("no answer within {PATIENCE:?}")));
        let (again, outcome) = tokio::time::timeout(PATIENCE, answer).await.unwrap_or_else(late);
        let door = client.door;
        Asked { door, is_new, latency: begun.elapsed(), again, outcome }
    }

    async fn answer(&mut self) -> Result<(), String> {
        match self.door {
            Door::Grpc => self.answer_of_grpc().await,
            Door::Http => self.answer_of_http().await.map_err(|error| error.to_string()),
        }
    }

    async fn answer_of_grpc(&mut self) -> Result<(), String> {
        let channel = match &self.grpc {
            Some(channel) => channel.clone(),
            None => {
                let connected = sida_rpc::connect(&self.to.to_string(), &ClientConfig::default()).await;
                self.grpc.insert(connected.map_err(|error| error.to_string())?).clone()
            }
        };
        let request = GenerateRequest { text: TEXT.into(), max_tokens: TOKENS, ignore_eos: true, ..Default::default() };
        let told = |status: tonic::Status| status.to_string();
        let mut tokens = InferenceClient::new(channel).generate(request).await.map_err(told)?.into_inner();
        let mut count = 0;
        while tokens.message().await.map_err(told)?.is_some() {
            count += 1;
        }
        if count == TOKENS { Ok(()) } else { Err(format!("{count} tokens of {TOKENS}")) }
    }

    async fn answer_of_http(&mut self) -> io::Result<()> {
        let mut stream = match self.http.take() {
            Some(stream) => stream,
            None => BufReader::new(TcpStream::connect(self.to).await?),
        };
        let body = format!("{{\"model\":\"switch-tiny-64\",\"prompt\":\"{TEXT}\",\"max_tokens\":{TOKENS}}}");
        let head = "POST /v1/completions HTTP/1.1\r\nhost: sida\r\ncontent-type: application/json\r\ncontent-length";
        stream.get_mut().write_all(format!("{head}: {}\r\n\r\n{body}", body.len()).as_bytes()).await?;
        let (mut line, mut status, mut length) = (String::new(), String::new(), 0);
        loop {
            line.clear();
            if stream.read_line(&mut line).await? == 0 {
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
            let (name, value) = line.trim_end().split_once(": ").unwrap_or((line.trim_end(), ""));
            match name {
                "" => break,
                "content-length" => length = value.parse().map_err(io::Error::other)?,
                _ if status.is_empty() => status = name.to_owned(),
                _ => {}
            }
        }
        let mut answer = vec![0; length];
        stream.read_exact(&mut answer).await?;
        if status != "HTTP/1.1 200 OK" {
            return Err(io::Error::other(format!("{status}: {}", String::from_utf8_lossy(&answer))));
        }
        self.http = Some(stream);
        Ok(())
    }
}
