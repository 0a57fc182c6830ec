//! Members only: every port of a cluster, by every key and certificate that is none of its own; and certificates that are
//! renewed while the cluster is asked.

use std::{
    fs,
    path::{Path, PathBuf},
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
    time::Duration,
};

use http::StatusCode;
use rcgen::{BasicConstraints, CertificateParams, CertifiedIssuer, IsCa, Issuer, KeyPair, date_time_ymd};
use sida_proto::v1::{
    self, RoutingMode, cluster_client::ClusterClient, experts_client::ExpertsClient, predictor_client::PredictorClient,
};
use sida_rpc::{Channel, ClientConfig, ClientTls, OwnKey};
use sida_tests::{Load, Sandbox, SandboxConfig, binary};
use tonic::{Code, Status};
use tonic_health::pb::{HealthCheckRequest, health_client::HealthClient};

use crate::{
    client::{generate, greedy, prompts},
    https,
};

const CLUSTER_KEY: &str = "the-key-of-this-cluster";
const OLDER_KEY: &str = "the-older-key-of-this-cluster";
const ALICE: &str = "alice-key-0123456789";
const PORTS: [&str; 3] = ["coordinator-0", "expert-node-0", "predictor-node-0"];
/// What a renewed certificate is told by in a node's log, once for each of its ports.
const RENEWED: &str = "changed files were read and are in service";

fn shown(path: &Path) -> String {
    path.display().to_string()
}

fn keyed(key: Option<&str>) -> ClientConfig {
    ClientConfig { key: key.map(|key| OwnKey::Text(key.to_owned())), ..ClientConfig::default() }
}

/// A call that tells something of the node behind a port.
async fn ask(node: &str, channel: Channel) -> Result<(), Status> {
    match node.split_once('-').expect("ROLE-NUMBER").0 {
        "coordinator" => ClusterClient::new(channel).status(v1::StatusRequest {}).await.map(drop),
        "expert" => ExpertsClient::new(channel).residency(v1::ResidencyRequest {}).await.map(drop),
        _ => PredictorClient::new(channel).describe(v1::DescribePredictorRequest {}).await.map(drop),
    }
}

/// How a port answers somebody; an error of the connection is one, too.
async fn answer(sandbox: &Sandbox, node: &str, client: &ClientConfig) -> Result<(), Status> {
    let connected = sida_rpc::connect(sandbox.process(node).address(), client).await;
    ask(node, connected.map_err(|error| Status::unavailable(error.to_string()))?).await
}

/// The same of the coordinator's HTTP port.
async fn answer_by_http(sandbox: &Sandbox, client: &ClientConfig) -> Result<StatusCode, String> {
    let address = sandbox.process("coordinator-0").http_address().expect("it serves HTTP");
    https::status(address, "/v1/models", client.tls.as_ref(), client.key.as_ref()).await
}

/// A stranger in the network would use the experts, or read what a cluster is doing, with a key that is not of it.
#[tokio::test(flavor = "multi_thread")]
async fn keys() {
    let dir = tempfile::tempdir().expect("a directory");
    let (clients, cluster) = (dir.path().join("clients"), dir.path().join("cluster"));
    fs::write(&clients, format!("alice:{ALICE}\n")).expect("a file");
    fs::write(&cluster, format!("{CLUSTER_KEY}\n{OLDER_KEY}\n")).expect("a file");
    let config = SandboxConfig {
        expert_nodes: 1,
        predictor_nodes: 1,
        log: "trace",
        coordinator_flags: [
            ["--api-keys", &shown(&clients)],
            ["--cluster-key", &shown(&cluster)],
            ["--http-listen", "127.0.0.1:0"],
        ]
        .as_flattened()
        .iter()
        .map(|flag| (*flag).to_owned())
        .collect(),
        node_flags: ["--cluster-key", &shown(&cluster)].map(String::from).into(),
        client: keyed(Some(ALICE)),
        ..SandboxConfig::default()
    };
    let sandbox = Sandbox::start(config).await;
    let [of_clients, of_nodes] = [[true, false, false], [false, true, true]];
    for (key, let_in) in [
        (None, [false; 3]),
        (Some("a-key-that-nobody-gave-out"), [false; 3]),
        (Some(ALICE), of_clients),
        (Some(CLUSTER_KEY), of_nodes),
        (Some(OLDER_KEY), of_nodes),
        (Some("alice:alice-key-0123456789"), [false; 3]),
    ] {
        for (node, let_in) in PORTS.into_iter().zip(let_in) {
            let answer = answer(&sandbox, node, &keyed(key)).await;
            let code = answer.as_ref().err().map(Status::code);
            assert_eq!(code, (!let_in).then_some(Code::Unauthenticated), "{node} by {key:?}: {answer:?}");
        }
        let expected = if let_in[0] { StatusCode::OK } else { StatusCode::UNAUTHORIZED };
        assert_eq!(answer_by_http(&sandbox, &keyed(key)).await, Ok(expected), "HTTP by {key:?}");
    }
    for node in PORTS {
        let stranger = sida_rpc::connect(sandbox.process(node).address(), &keyed(None)).await.expect("a connection");
        let probe = HealthCheckRequest { service: String::new() };
        HealthClient::new(stranger).check(probe).await.expect("probes have no key");
    }
    generate(&sandbox.channel(), greedy("sst2 sentence: a fine film .", 4)).await.expect("nodes know each other");
    let file = dir.path().join("alice");
    fs::write(&file, format!("{ALICE}\n")).expect("a file");
    let status = |key: Option<(&str, &str)>| {
        let mut command = binary::command();
        command.args(["status", "--json", "--endpoint", sandbox.address()]).envs(key);
        let output = command.output().expect("sida runs");
        (output.status.success(), String::from_utf8_lossy(&output.stderr).into_owned())
    };
    for key in [("SIDA_API_KEY", ALICE), ("SIDA_API_KEY_FILE", &shown(&file))] {
        assert_eq!(status(Some(key)), (true, String::new()), "{}", key.0);
    }
    let (succeeded, told) = status(None);
    assert!(!succeeded && told.contains("Unauthenticated"), "{told}");
    for (name, process) in sandbox.processes() {
        let log = process.log();
        assert!(log.contains("TRACE"), "{name} logs everything");
        for key in [CLUSTER_KEY, OLDER_KEY, ALICE, "a-key-that-nobody-gave-out"] {
            let line = log.lines().find(|line| line.contains(key));
            assert_eq!(line, None, "{name} has a key in its log");
        }
    }
}

/// Files of a certificate and its key.
type Identity = (PathBuf, PathBuf);

/// The files of one who shows a certificate: of an authority, for a name, good until a year.
fn issue(dir: &Path, file: &str, issuer: &Issuer<'_, KeyPair>, name: &str, until: i32) -> Identity {
    let key = KeyPair::generate().expect("a key");
    let mut params = CertificateParams::new(vec![name.to_owned()]).expect("parameters");
    params.not_after = date_time_ymd(until, 1, 1);
    let certificate = params.signed_by(&key, issuer).expect("a certificate");
    let files = (dir.join(format!("{file}.pem")), dir.join(format!("{file}.key")));
    fs::write(&files.0, certificate.pem()).expect("a file");
    fs::write(&files.1, key.serialize_pem()).expect("a file");
    files
}

fn authority() -> CertifiedIssuer<'static, KeyPair> {
    let mut params = CertificateParams::new(Vec::<String>::new()).expect("parameters");
    params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    CertifiedIssuer::self_signed(params, KeyPair::generate().expect("a key")).expect("an authority")
}

/// A cluster with every port secured by one certificate and its key, for clients of `ca` with names of the cluster.
fn secured(member: &Identity, ca: &Path, client: ClientConfig) -> SandboxConfig {
    let files = [("--tls-cert", &*member.0), ("--tls-key", &member.1), ("--tls-ca", ca), ("--tls-client-ca", ca)];
    let files = files.into_iter().flat_map(|(flag, file)| [flag.to_owned(), shown(file)]);
    let names = ["--tls-domain=node-0.sida".to_owned(), "--tls-client-names=*.sida,operator".to_owned()];
    SandboxConfig {
        expert_nodes: 1,
        predictor_nodes: 1,
        flags: files.chain(names).collect(),
        coordinator_flags: vec!["--http-listen=127.0.0.1:0".to_owned()],
        client,
        ..SandboxConfig::default()
    }
}

/// A stranger in the network would use the experts with a certificate that is another's, over, or of another authority.
#[tokio::test(flavor = "multi_thread")]
async fn certificates() {
    let dir = tempfile::tempdir().expect("a directory");
    let (ours, theirs) = (authority(), authority());
    let ca = dir.path().join("ca.pem");
    fs::write(&ca, ours.pem()).expect("a file");
    let issue = |file: &str, issuer, name: &str, until| issue(dir.path(), file, issuer, name, until);
    let member = issue("member", &ours, "node-0.sida", 2999);
    let cases = [
        ("no certificate", None, false),
        ("a member", Some(member.clone()), true),
        ("another member", Some(issue("other", &ours, "node-1.SIDA", 2999)), true),
        ("a wrong name", Some(issue("name", &ours, "sida.example.org", 2999)), false),
        ("one that is over", Some(issue("over", &ours, "node-0.sida", 2001)), false),
        ("another authority", Some(issue("stranger", &theirs, "node-0.sida", 2999)), false),
        ("another's key", Some((member.0.clone(), issue("key", &ours, "node-0.sida", 2999).1)), false),
    ];
    let client = |identity| {
        let tls = ClientTls { authorities: Some(ca.clone()), identity, domain: Some("node-0.sida".into()) };
        ClientConfig { tls: Some(tls), ..ClientConfig::default() }
    };
    let sandbox = Sandbox::start(secured(&member, &ca, client(Some(member.clone())))).await;
    for (what, identity, let_in) in cases {
        for node in PORTS {
            let answer = answer(&sandbox, node, &client(identity.clone())).await;
            assert_eq!(answer.is_ok(), let_in, "{node} by {what}: {answer:?}");
        }
        let answer = answer_by_http(&sandbox, &client(identity)).await;
        assert_eq!(answer == Ok(StatusCode::OK), let_in, "HTTP by {what}: {answer:?}");
    }
    let plain = answer_by_http(&sandbox, &ClientConfig::default()).await;
    assert_ne!(plain, Ok(StatusCode::OK), "HTTP is answered in plain text");
    for node in PORTS {
        let answer = answer(&sandbox, node, &ClientConfig::default()).await;
        assert!(answer.is_err(), "{node} speaks plain text");
    }
    generate(&sandbox.channel(), greedy("sst2 sentence: a fine film .", 4)).await.expect("nodes know each other");
}

/// A certificate that is renewed would cost answers that are under way, or callers that come at that moment, at some port.
#[tokio::test(flavor = "multi_thread")]
async fn certificates_are_renewed_under_load() {
    const RENEWALS: usize = 2;
    let dir = tempfile::tempdir().expect("a directory");
    let authority = authority();
    let ca = dir.path().join("ca.pem");
    fs::write(&ca, authority.pem()).expect("a file");
    let issue = |file: &str| issue(dir.path(), file, &authority, "node-0.sida", 2999);
    let (node, caller) = (issue("node"), issue("caller"));
    let tls = ClientTls { authorities: Some(ca.clone()), identity: Some(caller), domain: Some("node-0.sida".into()) };
    let client = ClientConfig { tls: Some(tls), ..ClientConfig::default() };
    let config = SandboxConfig { log: "info", ..secured(&node, &ca, client.clone()) };
    let sandbox = Arc::new(Sandbox::start(config).await);
    // On connections that are kept, and on a new one for each question.
    let kept = Load { channels: sandbox.channels(), texts: prompts(), mode: RoutingMode::Exact, tokens: 8, workers: 2 }
        .start();
    let (ends, asked) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicUsize::new(0)));
    let new = {
        let (sandbox, client, ends, asked) = (sandbox.clone(), client.clone(), ends.clone(), asked.clone());
        tokio::spawn(async move {
            while !ends.load(Ordering::Relaxed) {
                for node in PORTS {
                    answer(&sandbox, node, &client).await.unwrap_or_else(|status| panic!("{node}: {status}"));
                }
                assert_eq!(answer_by_http(&sandbox, &client).await, Ok(StatusCode::OK));
                asked.fetch_add(1, Ordering::Relaxed);
            }
        })
    };
    let renewed = |name: &str| sandbox.process(name).log().matches(RENEWED).count();
    for renewal in 1..=RENEWALS {
        let (certificate, key) = issue("new");
        // Each is whole, but they are not both new at the same moment.
        fs::rename(key, &node.1).expect("a file");
        fs::rename(certificate, &node.0).expect("a file");
        // The coordinator has two ports.
        for (node, ports) in PORTS.into_iter().zip([2, 1, 1]) {
            while renewed(node) < renewal * ports {
                assert!(!new.is_finished(), "a question on a new connection failed");
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
        }
        let before = asked.load(Ordering::Relaxed);
        while asked.load(Ordering::Relaxed) < before + 2 && !new.is_finished() {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }
    ends.store(true, Ordering::Relaxed);
    new.await.expect("every question on a new connection is answered");
    let report = kept.stop().await;
    println!("{} questions on new connections; on kept ones {report}", asked.load(Ordering::Relaxed));
    assert!(report.errors().is_empty() && report.asked.iter().all(|asked| asked.moved == 0), "{:?}", report.errors());
}
