//! Members only: every port of a cluster, by every key and certificate that is none of its own.

use std::{fs, path::Path};

use rcgen::{BasicConstraints, CertificateParams, CertifiedIssuer, IsCa, Issuer, KeyPair, date_time_ymd};
use sida_proto::v1::{
    self, cluster_client::ClusterClient, experts_client::ExpertsClient, predictor_client::PredictorClient,
};
use sida_rpc::{Channel, ClientConfig, ClientTls, OwnKey};
use sida_tests::{Sandbox, SandboxConfig, binary};
use tonic::{Code, Status};
use tonic_health::pb::{HealthCheckRequest, health_client::HealthClient};

use crate::client::{generate, greedy};

const CLUSTER_KEY: &str = "the-key-of-this-cluster";
const OLDER_KEY: &str = "the-older-key-of-this-cluster";
const ALICE: &str = "alice-key-0123456789";
const PORTS: [&str; 3] = ["coordinator-0", "expert-node-0", "predictor-node-0"];

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
        coordinator_flags: ["--api-keys", &shown(&clients), "--cluster-key", &shown(&cluster)].map(String::from).into(),
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

/// The files of one who shows a certificate: of an authority, for a name, good until a year.
fn issue(
    dir: &Path,
    file: &str,
    issuer: &Issuer<'_, KeyPair>,
    name: &str,
    until: i32,
) -> (std::path::PathBuf, std::path::PathBuf) {
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
    ];
    let client = |identity| {
        let tls = ClientTls { authorities: Some(ca.clone()), identity, domain: Some("node-0.sida".into()) };
        ClientConfig { tls: Some(tls), ..ClientConfig::default() }
    };
    let files = [("--tls-cert", &member.0), ("--tls-key", &member.1), ("--tls-ca", &ca), ("--tls-client-ca", &ca)];
    let files = files.into_iter().flat_map(|(flag, file)| [flag.to_owned(), shown(file)]);
    let names = ["--tls-domain=node-0.sida".to_owned(), "--tls-client-names=*.sida,operator".to_owned()];
    let config = SandboxConfig {
        expert_nodes: 1,
        predictor_nodes: 1,
        flags: files.chain(names).collect(),
        client: client(Some(member.clone())),
        ..SandboxConfig::default()
    };
    let sandbox = Sandbox::start(config).await;
    for (what, identity, let_in) in cases {
        for node in PORTS {
            let answer = answer(&sandbox, node, &client(identity.clone())).await;
            assert_eq!(answer.is_ok(), let_in, "{node} by {what}: {answer:?}");
        }
    }
    for node in PORTS {
        let answer = answer(&sandbox, node, &ClientConfig::default()).await;
        assert!(answer.is_err(), "{node} speaks plain text");
    }
    generate(&sandbox.channel(), greedy("sst2 sentence: a fine film .", 4)).await.expect("nodes know each other");
}
