//! Keys over real sockets: who is let in and by what name, files of keys that change, and that no log line holds a key.

mod echo;

use std::{
    fs,
    io::{self, Write},
    path::Path,
    sync::{Arc, Mutex, OnceLock},
    time::Duration,
};

use echo::{Running, count, unary};
use futures::StreamExt;
use sida_rpc::{ClientConfig, ClientError, Gate, KeyFile, OwnKey, Reason, ServerConfig};
use tokio::time;
use tonic::{Code, Request, Status};
use tonic_health::pb::{HealthCheckRequest, health_client::HealthClient};

const ALICE: &str = "alice-key-0123456789";
const BOB: &str = "bob-key-9876543210";
const UNKNOWN: &str = "nobody-key-0123456789";

/// Everything that is logged in this process, at every level.
fn log() -> &'static Arc<Mutex<Vec<u8>>> {
    struct Lines(Arc<Mutex<Vec<u8>>>);
    impl Write for Lines {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            self.0.lock().unwrap().write(bytes)
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }
    static LOG: OnceLock<Arc<Mutex<Vec<u8>>>> = OnceLock::new();
    LOG.get_or_init(|| {
        let log = Arc::<Mutex<Vec<u8>>>::default();
        let lines = log.clone();
        tracing_subscriber::fmt()
            .with_max_level(tracing::Level::TRACE)
            .with_ansi(false)
            .with_writer(move || Lines(lines.clone()))
            .init();
        log
    })
}

fn config(file: KeyFile) -> ServerConfig {
    let gate = Gate::open(file).unwrap();
    ServerConfig { gate, reload_period: Duration::from_millis(20), ..ServerConfig::default() }
}

fn with_keys(file: &Path) -> ServerConfig {
    fs::write(file, format!("# clients\nalice:{ALICE}\nbob:{BOB}\n")).unwrap();
    config(KeyFile::Clients(file.to_owned()))
}

/// What the server says of whose call it is that carries this key.
async fn whose(running: &Running, key: Option<OwnKey>) -> Result<String, Status> {
    let channel = sida_rpc::connect(&running.address, &ClientConfig { key, ..ClientConfig::default() }).await.unwrap();
    let answer = unary(&channel, Request::new(b"client".to_vec())).await?;
    Ok(String::from_utf8(answer.into_inner()).unwrap())
}

fn text(key: &str) -> Option<OwnKey> {
    Some(OwnKey::Text(key.to_owned()))
}

#[tokio::test]
async fn who_has_a_key_is_let_in_by_name() {
    // Would break: anybody uses the model, a client is taken for another, or handlers get hold of keys.
    log();
    let dir = tempfile::tempdir().unwrap();
    let told = Arc::new(Mutex::new(Vec::new()));
    let observed = told.clone();
    let running = Running::start(with_keys(&dir.path().join("keys")), |server| {
        server.observed(move |outcome| {
            let client = outcome.client.map(|client| client.label().to_string());
            observed.lock().unwrap().push((outcome.code, client));
        })
    })
    .await;
    assert_eq!(whose(&running, text(ALICE)).await.unwrap(), "alice false");
    assert_eq!(whose(&running, text(BOB)).await.unwrap(), "bob false");
    for key in [None, text(UNKNOWN), text(&format!("{ALICE}x")), text(&ALICE.to_uppercase())] {
        let status = whose(&running, key).await.unwrap_err();
        assert_eq!((status.code(), Reason::of(&status)), (Code::Unauthenticated, Some(Reason::Unauthenticated)));
    }
    let channel = running.channel().await;
    for value in [format!("Basic {ALICE}"), ALICE.to_owned(), format!("Bearer alice:{ALICE}")] {
        let mut request = Request::new(b"client".to_vec());
        request.metadata_mut().insert("authorization", value.parse().unwrap());
        assert_eq!(unary(&channel, request).await.unwrap_err().code(), Code::Unauthenticated, "{value}");
    }
    let probe = HealthCheckRequest { service: String::new() };
    HealthClient::new(channel).check(probe).await.expect("probes have no key");
    let told = told.lock().unwrap().clone();
    for expected in [(Code::Ok, Some("alice".to_owned())), (Code::Unauthenticated, None)] {
        assert!(told.contains(&expected), "{expected:?} in {told:?}");
    }
    running.stop().await;
}

#[tokio::test]
async fn who_has_no_key_is_called_by_where_it_comes_from() {
    // Would break: without keys all callers are one, or each connection is a caller of its own.
    let running = Running::start(ServerConfig::default(), |server| server).await;
    assert_eq!(whose(&running, None).await.unwrap(), "127.0.0.1 false");
    running.stop().await;
}

#[tokio::test]
async fn changed_keys_need_no_restart() {
    // Would break: a key that leaked stays good until every node was started again; or a typo locks everybody out.
    log();
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("keys");
    let running = Running::start(with_keys(&file), |server| server).await;
    let is_let_in = async |key| whose(&running, text(key)).await.is_ok();
    let until = async |key, expected| {
        let changed = async {
            while is_let_in(key).await != expected {
                time::sleep(Duration::from_millis(10)).await;
            }
        };
        time::timeout(Duration::from_secs(5), changed).await.expect("the file is read again");
    };
    assert!(is_let_in(ALICE).await && !is_let_in(UNKNOWN).await);
    fs::write(&file, format!("carol:{UNKNOWN}\nbob:{BOB}\n")).unwrap();
    until(UNKNOWN, true).await;
    assert!(!is_let_in(ALICE).await && is_let_in(BOB).await, "one was taken away, one stayed");
    fs::write(&file, format!("alice {ALICE}\n")).unwrap();
    time::sleep(Duration::from_millis(100)).await;
    assert!(is_let_in(BOB).await && !is_let_in(ALICE).await, "a broken file changes nothing");
    fs::write(&file, format!("alice:{ALICE}\n")).unwrap();
    until(ALICE, true).await;
    assert!(!is_let_in(BOB).await);
    running.stop().await;
}

#[tokio::test]
async fn calls_end_with_their_key() {
    // Would break: whoever was locked out keeps what it has open for as long as it likes; or others lose theirs.
    log();
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("keys");
    let running = Running::start(with_keys(&file), |server| server).await;
    let stream = async |key| {
        let config = ClientConfig { key: text(key), ..ClientConfig::default() };
        let channel = sida_rpc::connect(&running.address, &config).await.unwrap();
        count(&channel, Request::new(Vec::new())).await
    };
    let (mut alice, mut bob) = (stream(ALICE).await, stream(BOB).await);
    fs::write(&file, format!("bob:{BOB} requests-max=1\n")).unwrap();
    let ended = async {
        loop {
            if let Err(status) = alice.next().await.expect("a status") {
                return status;
            }
        }
    };
    let status = time::timeout(Duration::from_secs(30), ended).await.expect("it ends");
    assert_eq!((status.code(), Reason::of(&status)), (Code::Unauthenticated, Some(Reason::Unauthenticated)));
    for _ in 0..5 {
        bob.next().await.unwrap().expect("it goes on");
    }
    drop(bob);
    running.stop().await;
}

#[tokio::test]
async fn the_key_of_a_cluster_is_changed_in_steps() {
    // Would break: nodes lose each other while their key is renewed.
    log();
    let dir = tempfile::tempdir().unwrap();
    let (server, own) = (dir.path().join("server"), dir.path().join("own"));
    fs::write(&server, format!("{ALICE}\n")).unwrap();
    fs::write(&own, format!("{ALICE}\n")).unwrap();
    let running = Running::start(config(KeyFile::Cluster(server.clone())), |server| server).await;
    let is_let_in = async || whose(&running, Some(OwnKey::File(own.clone()))).await.is_ok();
    assert!(is_let_in().await);
    fs::write(&server, format!("{ALICE}\n{BOB}\n")).unwrap();
    time::sleep(Duration::from_millis(200)).await;
    assert!(is_let_in().await);
    fs::write(&own, format!("# newer\n{BOB}\n{ALICE}\n")).unwrap();
    assert!(is_let_in().await, "the new one is sent and taken");
    fs::write(&own, "short\n").unwrap();
    let config = ClientConfig { key: Some(OwnKey::File(own)), ..ClientConfig::default() };
    let error = sida_rpc::connect(&running.address, &config).await.unwrap_err();
    assert!(matches!(error, ClientError::Key { .. }) && error.to_string().contains("own, line 1"), "{error}");
    running.stop().await;
}

#[tokio::test]
async fn no_log_line_holds_a_key() {
    // Would break: whoever may read logs may call.
    let log = log();
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("keys");
    let running = Running::start(with_keys(&file), |server| server).await;
    whose(&running, text(ALICE)).await.unwrap();
    whose(&running, text(UNKNOWN)).await.unwrap_err();
    for broken in [format!("alice:{ALICE} {BOB}\n"), format!("{BOB}\n")] {
        fs::write(&file, broken).unwrap();
        time::sleep(Duration::from_millis(100)).await;
    }
    tracing::info!(config = ?with_keys(&file), key = ?text(ALICE), "as a node may tell its settings");
    running.stop().await;
    let lines = String::from_utf8_lossy(&log.lock().unwrap()).into_owned();
    for expected in ["TRACE", "client=alice", "changed files cannot be used", "as a node may tell"] {
        assert!(lines.contains(expected), "{expected:?} is logged");
    }
    for key in [ALICE, BOB, UNKNOWN] {
        let line = lines.lines().find(|line| line.contains(key));
        assert_eq!(line, None, "a key is in the log");
    }
}
