//! Runs every example as a reader would, on the model of this repository.

use std::{path::PathBuf, process::Command, sync::Arc};

use sida_cluster::{Address, Cluster, Member, Role};
use sida_coordinator::{Coordinator, CoordinatorConfig, PredictorSource};
use sida_expert_node::{Engine, ExpertNodeConfig};
use sida_model::Checkpoint;
use sida_predictor as predictor;
use tokio::{net::TcpListener, task::JoinHandle};
use tokio_util::sync::CancellationToken;

/// A cluster in this process, behind a port.
struct Served {
    endpoint: String,
    shutdown: CancellationToken,
    serving: JoinHandle<()>,
}

impl Served {
    async fn start() -> Self {
        let checkpoint = Checkpoint::open(&model()).expect("a model");
        let node = ExpertNodeConfig::new("expert-node-0".into(), model());
        let experts = Arc::new(Engine::of_checkpoint(&node, checkpoint.clone()).expect("experts"));
        let member = Member { node: node.node, role: Role::ExpertNode, address: Address::Local(experts), weight: 1.0 };
        let shape = checkpoint.config();
        let cluster = Cluster::fixed(vec![member], shape.moe_layer_count(), shape.num_experts, 1).expect("a cluster");
        let predictor = predictor::open(&model().join(predictor::FILE_NAME), shape, checkpoint.digest());
        let predictor = PredictorSource::Local(predictor.expect("a predictor"));
        let config = CoordinatorConfig::new("coordinator-0".into(), checkpoint, predictor);
        let coordinator = Coordinator::start(config, cluster).await.expect("a coordinator");
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port");
        let endpoint = format!("http://{}", listener.local_addr().expect("an address"));
        let shutdown = CancellationToken::new();
        let served = sida_coordinator::serve(coordinator, listener, shutdown.clone());
        let serving = tokio::spawn(async { served.await.expect("served") });
        Self { endpoint, shutdown, serving }
    }

    async fn stop(self) {
        self.shutdown.cancel();
        self.serving.await.expect("its end");
    }
}

fn model() -> PathBuf {
    PathBuf::from(concat!(env!("CARGO_MANIFEST_DIR"), "/../models/switch-tiny-64"))
}

/// What an example prints.
fn printed(example: &str, arguments: &[&str]) -> String {
    let output = Command::new(example).args(arguments).output().expect("an example that starts");
    let (out, err) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert!(output.status.success(), "{example} {arguments:?} ended with {}: {out}{err}", output.status);
    out.into_owned()
}

/// The numbers of the line "HITS of ALL expert calls were predicted".
fn predicted(line: &str) -> (u64, u64) {
    let numbers: Vec<u64> = line.split(' ').filter_map(|word| word.parse().ok()).collect();
    let [hits, all] = numbers[..] else { panic!("{line:?} holds no two numbers") };
    (hits, all)
}

/// A reader who copies the client would get no answer, or none of the figures that come with it.
#[tokio::test(flavor = "multi_thread")]
async fn ask_cluster_prints_the_answer_and_how_it_was_predicted() {
    let cluster = Served::start().await;
    let text = "sst2 sentence: a warm and quietly funny film about two brothers who never learned to talk .";
    let out = printed(env!("CARGO_BIN_EXE_ask_cluster"), &[&cluster.endpoint, text]);
    let [answer, figures] = out.lines().collect::<Vec<_>>()[..] else { panic!("two lines expected: {out}") };
    assert_eq!(answer.trim(), "positive");
    let (hits, all) = predicted(figures);
    assert!(all / 2 < hits && hits <= all, "{figures}");
    cluster.stop().await;
}

/// A reader would compare embeddings that say nothing of their texts.
#[tokio::test(flavor = "multi_thread")]
async fn embed_texts_finds_praise_closer_to_praise_than_to_blame() {
    let cluster = Served::start().await;
    let out = printed(env!("CARGO_BIN_EXE_embed_texts"), &[&cluster.endpoint]);
    let numbers = |line: &str| line.split_whitespace().map_while(|word| word.parse().ok()).collect();
    let cosines: Vec<Vec<f32>> = out.lines().map(numbers).collect();
    assert_eq!(cosines.iter().map(Vec::len).collect::<Vec<_>>(), [4; 4], "{out}");
    for (a, others) in cosines.iter().enumerate() {
        assert_eq!(others[a], 1.0, "{out}");
        // Of four sentences the first two praise and the last two blame.
        let (alike, unlike) = (others[a ^ 1], others[a ^ 2].max(others[a ^ 3]));
        assert!(alike > unlike, "sentence {a}: {out}");
    }
    cluster.stop().await;
}

/// A family that is described from outside would not be read, or be computed as another one; or a directory of it be taken
/// for a model by those who do not know it.
#[test]
fn own_family_is_served_as_it_is_described() {
    let parent = tempfile::tempdir().expect("a directory");
    let dir = parent.path().join("model");
    let out = printed(env!("CARGO_BIN_EXE_own_family"), &[dir.to_str().expect("a path in UTF-8")]);
    let [cluster, reference] = out.lines().collect::<Vec<_>>()[..] else { panic!("two lines expected: {out}") };
    let tokens = |line: &str| line.split_once('[').expect("a list").1.to_owned();
    assert_eq!(tokens(cluster), tokens(reference));
    assert_eq!(tokens(cluster).split(", ").count(), 12, "{out}");
    let unknown = Checkpoint::open(&dir).expect_err("a family that is not built in").to_string();
    assert!(unknown.contains("NearAndFarMoeForCausalLM") && unknown.contains("OlmoeForCausalLM"), "{unknown}");
}

/// A predictor that implements the public trait would not be asked, or would change the answer.
#[test]
fn own_predictor_is_asked_and_leaves_the_answer_as_it_is() {
    let model = model();
    let out = printed(env!("CARGO_BIN_EXE_own_predictor"), &[model.to_str().expect("a path in UTF-8")]);
    let [answer, figures] = out.lines().collect::<Vec<_>>()[..] else { panic!("two lines expected: {out}") };
    assert_eq!(answer.trim(), "positive");
    let (hits, all) = predicted(figures);
    // Whoever guesses among 64 experts is right once in 64.
    assert!(all / 4 < hits && hits <= all, "{figures}");
}
