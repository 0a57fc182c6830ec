//! A predictor-node over a real socket: what it answers, what it refuses, and how it ends.

use std::{path::Path, sync::Arc, time::Duration};

use bytes::Bytes;
use sida_cluster::{Address, Cluster, Member, Role};
use sida_model::Checkpoint;
use sida_predictor::{HashPredictor, HitRate, PredictorError, PredictorShape, PredictorState};
use sida_predictor_node::{LearnConfig, PredictorLimits, PredictorNodeConfig, PredictorNodeError, run};
use sida_proto::{
    v1::{self, predictor_client::PredictorClient},
    wire::{Bounds, Stack},
};
use sida_routing::{Digest, ExpertId, HashTable, Labels, LabelsExtent, LayerId, hash_table::Shape};
use sida_rpc::{Channel, ClientConfig, Reason, ServerConfig, connect};
use tokio::{net::TcpListener, task::JoinHandle};
use tokio_util::sync::CancellationToken;
use tonic::Code;

const MODEL: Digest = Digest([3; 32]);
const EXPERTS: usize = 8;
const BOUNDS: Bounds = Bounds {
    moe_layers: 3,
    num_experts: EXPERTS,
    d_model: 4,
    vocab_size: 100,
    rows_max: 10,
    tokens_max: 64,
    sequences_max: 4,
};
/// Panics at this token.
const POISON: u32 = 99;

/// Predicts the expert `token % EXPERTS`; its state counts the tokens it has seen.
#[derive(Default)]
struct Modulo {
    reads_input: bool,
}

impl Modulo {
    fn table(first_layer: u16, layers: usize, tokens: &[u32]) -> HashTable {
        assert!(!tokens.contains(&POISON), "as asked");
        let shape = Shape { first_layer: LayerId(first_layer), layers, tokens: tokens.len(), top_k: 1 };
        let experts: Vec<_> = tokens.iter().map(|token| ExpertId((token % EXPERTS as u32) as u16)).collect();
        let entries = layers * tokens.len();
        HashTable::new(MODEL, Digest([4; 32]), shape, EXPERTS, experts.repeat(layers), vec![0.5; entries]).unwrap()
    }
}

impl HashPredictor for Modulo {
    fn net(&self) -> &str {
        "modulo"
    }
    fn digest(&self) -> Digest {
        Digest([4; 32])
    }
    fn top_k(&self) -> usize {
        1
    }
    fn model_digest(&self) -> Digest {
        MODEL
    }
    fn hit_rates(&self) -> &[HitRate] {
        &[]
    }
    fn reads_input(&self) -> bool {
        self.reads_input
    }
    fn encode(&self, sequences: &[&[u32]]) -> Result<Vec<HashTable>, PredictorError> {
        Ok(sequences.iter().map(|tokens| Self::table(0, 2, tokens)).collect())
    }
    fn decode(&self, states: &mut [&mut PredictorState], tokens: &[&[u32]]) -> Result<Vec<HashTable>, PredictorError> {
        for (state, tokens) in states.iter_mut().zip(tokens) {
            let seen = state.to_bytes().try_into().map_or(0.0, f32::from_le_bytes);
            **state = PredictorState::from_bytes(&(seen + tokens.len() as f32).to_le_bytes())?;
        }
        Ok(tokens.iter().map(|tokens| Self::table(2, 1, tokens)).collect())
    }
}

fn config(limits: PredictorLimits) -> PredictorNodeConfig {
    PredictorNodeConfig {
        node: "p0".into(),
        shape: PredictorShape {
            vocab_size: BOUNDS.vocab_size,
            num_experts: EXPERTS,
            chosen: 1,
            encoder_layers: 0..2,
            decoder_layers: 2..3,
            encoder_width: Some(4),
        },
        predictor: Arc::new(Modulo::default()),
        limits,
        learn: None,
        server: ServerConfig { health_period: Duration::from_millis(50), ..ServerConfig::default() },
    }
}

fn cluster(name: &str, role: Role) -> Cluster {
    let member = Member { node: name.into(), role, address: Address::Grpc("127.0.0.1:1".into()), weight: 1.0 };
    Cluster::fixed(vec![member], 3, EXPERTS, 1).unwrap()
}

async fn start(limits: PredictorLimits) -> (Channel, CancellationToken, JoinHandle<Result<(), PredictorNodeError>>) {
    start_with(config(limits)).await
}

async fn start_with(
    config: PredictorNodeConfig,
) -> (Channel, CancellationToken, JoinHandle<Result<(), PredictorNodeError>>) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap().to_string();
    let shutdown = CancellationToken::new();
    let node = tokio::spawn(run(config, listener, cluster("p0", Role::PredictorNode), shutdown.clone()));
    (connect(&address, &ClientConfig::default()).await.unwrap(), shutdown, node)
}

#[tokio::test]
async fn it_predicts_for_both_stacks_and_carries_the_state() {
    // Broken: coordinators with remote predictors would run without hints, or decode with a stale state.
    let (channel, shutdown, node) = start(PredictorLimits::default()).await;
    let mut client = PredictorClient::new(channel);
    let sequences: [&[u32]; 2] = [&[1, 9], &[7]];
    let answer = client.predict(v1::PredictRequest::new(MODEL, Stack::Encoder, &sequences, &[])).await.unwrap();
    let answer = answer.into_inner().check(&BOUNDS, MODEL, Stack::Encoder, 0..2, &[2, 1]).unwrap();
    assert_eq!(answer.tables[0].experts(LayerId(1), 1), [ExpertId(1)]);
    assert_eq!(answer.tables[1].experts(LayerId(0), 0), [ExpertId(7)]);

    let mut states = vec![Bytes::new(); 2];
    for _ in 0..3 {
        let request = v1::PredictRequest::new(MODEL, Stack::Decoder, &sequences, &states);
        let answer = client.predict(request).await.unwrap().into_inner();
        states = answer.check(&BOUNDS, MODEL, Stack::Decoder, 2..3, &[2, 1]).unwrap().states;
    }
    assert_eq!(states, [6f32.to_le_bytes().to_vec(), 3f32.to_le_bytes().to_vec()]);

    let described = client.describe(v1::DescribePredictorRequest {}).await.unwrap().into_inner();
    assert_eq!((described.net.as_str(), &described.model_digest[..]), ("modulo", &MODEL.0[..]));
    shutdown.cancel();
    node.await.unwrap().unwrap();
}

#[tokio::test]
async fn bad_calls_are_told_what_is_bad_and_nothing_else_suffers() {
    // Broken: a table for another model would be used, or one bad call would take the node down.
    let limits =
        PredictorLimits { sequence_tokens_max: 64, sequences_max: 4, call_tokens_max: 100, ..Default::default() };
    let (channel, shutdown, node) = start(limits).await;
    let mut client = PredictorClient::new(channel);
    let long = [1; 65];
    let most = [1; 60];
    let encode = |model, sequences: &[&[u32]]| v1::PredictRequest::new(model, Stack::Encoder, sequences, &[]);
    let bad_state = [Bytes::from_static(b"odd")];
    let cases = [
        (encode(Digest([5; 32]), &[&[1]]), Code::FailedPrecondition, Reason::ModelMismatch),
        (encode(MODEL, &[&[100]]), Code::InvalidArgument, Reason::MalformedMessage),
        (encode(MODEL, &[&[]]), Code::InvalidArgument, Reason::MalformedMessage),
        (encode(MODEL, &[&long]), Code::InvalidArgument, Reason::MalformedMessage),
        (encode(MODEL, &[&[1][..]; 5]), Code::InvalidArgument, Reason::MalformedMessage),
        (encode(MODEL, &[&most, &most]), Code::InvalidArgument, Reason::InvalidRequest),
        (
            v1::PredictRequest::new(MODEL, Stack::Decoder, &[&[1]], &bad_state),
            Code::InvalidArgument,
            Reason::MalformedMessage,
        ),
        (v1::PredictRequest::default(), Code::InvalidArgument, Reason::MalformedMessage),
        (encode(MODEL, &[&[POISON]]), Code::Internal, Reason::Internal),
    ];
    for (request, code, reason) in cases {
        let status = client.predict(request).await.unwrap_err();
        assert_eq!((status.code(), Reason::of(&status)), (code, Some(reason)), "{status}");
    }
    assert!(client.predict(encode(MODEL, &[&[1]])).await.is_ok());
    shutdown.cancel();
    node.await.unwrap().unwrap();
}

#[tokio::test]
async fn a_net_that_reads_the_input_predicts_prompts_only() {
    // Broken: steps would be predicted from nothing; or coordinators could not tell a node that predicts no steps from one
    // that is broken, and would have no hints for prompts either.
    let predictor = Arc::new(Modulo { reads_input: true });
    let (channel, shutdown, node) = start_with(PredictorNodeConfig { predictor, ..config(Default::default()) }).await;
    let mut client = PredictorClient::new(channel);
    let step = v1::PredictRequest::new(MODEL, Stack::Decoder, &[&[1]], &[Bytes::new()]);
    let refused = client.predict(step).await.unwrap_err();
    assert_eq!((refused.code(), Reason::of(&refused)), (Code::Unimplemented, Some(Reason::Unsupported)));
    assert!(refused.message().contains("encoder's output"), "{}", refused.message());
    let prompt = v1::PredictRequest::new(MODEL, Stack::Encoder, &[&[9]], &[]);
    let answer = client.predict(prompt).await.unwrap().into_inner();
    let answer = answer.check(&BOUNDS, MODEL, Stack::Encoder, 0..2, &[1]).unwrap();
    assert_eq!(answer.tables[0].experts(LayerId(0), 0), [ExpertId(1)]);
    shutdown.cancel();
    node.await.unwrap().unwrap();
}

/// A node that learns with the predictor that ships, in `dir`.
fn learning(dir: &Path, limits: PredictorLimits) -> PredictorNodeConfig {
    let model = Path::new(env!("CARGO_MANIFEST_DIR")).join("../models/switch-tiny-64");
    let checkpoint = Checkpoint::open(&model).unwrap();
    let file = model.join(sida_predictor::FILE_NAME);
    let predictor = sida_predictor::open(&file, checkpoint.config(), checkpoint.digest()).unwrap();
    let learn = LearnConfig { file, dir: dir.to_owned(), tokens_max: 4096, cpu_share: 1.0 };
    let named = PredictorNodeConfig::new("p0".into(), checkpoint.config(), predictor);
    PredictorNodeConfig { limits, learn: Some(learn), ..named }
}

#[tokio::test]
async fn labels_are_taken_by_who_learns_and_bad_ones_by_nobody() {
    // Broken: a net would learn what routers of another model chose, or numbers that none gave; or a coordinator would go on
    // telling a node that does not listen.
    let dir = tempfile::tempdir().unwrap();
    let learning = learning(dir.path(), PredictorLimits { call_tokens_max: 100, ..Default::default() });
    let model = learning.predictor.model_digest();
    let labels = |layers: usize, tokens: usize| {
        let extent = LabelsExtent { layers, num_experts: 64, kept: 2 };
        let entries = layers * tokens;
        Labels::new(vec![7; tokens], extent, [63, 0].map(ExpertId).repeat(entries), [0.5, 0.25].repeat(entries))
            .unwrap()
    };
    let request = |model, stack, labels: Labels| v1::LearnRequest::new(model, stack, &[labels]);
    let sound = request(model, Stack::Encoder, labels(3, 2));
    let damaged = v1::LearnRequest { kept: 1, ..sound.clone() };

    let (channel, shutdown, node) = start(PredictorLimits::default()).await;
    let mut client = PredictorClient::new(channel);
    assert!(!client.describe(v1::DescribePredictorRequest {}).await.unwrap().into_inner().learns);
    let refused = client.learn(sound.clone()).await.unwrap_err();
    assert_eq!((refused.code(), Reason::of(&refused)), (Code::Unimplemented, Some(Reason::Unsupported)));
    shutdown.cancel();
    node.await.unwrap().unwrap();

    let (channel, shutdown, node) = start_with(learning).await;
    let mut client = PredictorClient::new(channel);
    assert!(client.describe(v1::DescribePredictorRequest {}).await.unwrap().into_inner().learns);
    let cases = [
        (request(MODEL, Stack::Encoder, labels(3, 2)), Code::FailedPrecondition, Reason::ModelMismatch),
        (request(model, Stack::Decoder, labels(3, 2)), Code::Unimplemented, Reason::Unsupported),
        (request(model, Stack::Encoder, labels(2, 3)), Code::InvalidArgument, Reason::MalformedMessage),
        (request(model, Stack::Encoder, labels(3, 101)), Code::InvalidArgument, Reason::InvalidRequest),
        (v1::LearnRequest::new(model, Stack::Encoder, &[]), Code::InvalidArgument, Reason::MalformedMessage),
        (damaged, Code::InvalidArgument, Reason::MalformedMessage),
    ];
    for (request, code, reason) in cases {
        let status = client.learn(request).await.unwrap_err();
        assert_eq!((status.code(), Reason::of(&status)), (code, Some(reason)), "{status}");
    }
    client.learn(sound).await.unwrap();
    shutdown.cancel();
    node.await.unwrap().unwrap();
}

#[tokio::test]
async fn where_nothing_can_be_kept_nothing_is_learnt() {
    // Broken: a node would learn for hours and then find that it cannot keep what it has learnt.
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("a file");
    std::fs::write(&file, "").unwrap();
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let cluster = cluster("p0", Role::PredictorNode);
    let learning = learning(&file, PredictorLimits::default());
    let refused = run(learning, listener, cluster, CancellationToken::new()).await.unwrap_err().to_string();
    assert!(refused.starts_with("cannot learn in") && refused.contains("a file"), "{refused}");
}

#[tokio::test]
async fn too_many_calls_are_refused_at_once() {
    // Broken: a slow predictor would gather calls without a bound.
    let (channel, shutdown, node) = start(PredictorLimits { calls_max: 0, ..Default::default() }).await;
    let mut client = PredictorClient::new(channel);
    let request = v1::PredictRequest::new(MODEL, Stack::Encoder, &[&[1]], &[]);
    let status = client.predict(request).await.unwrap_err();
    assert_eq!((status.code(), Reason::of(&status)), (Code::ResourceExhausted, Some(Reason::QueueFull)));
    shutdown.cancel();
    node.await.unwrap().unwrap();
}

#[tokio::test]
async fn a_node_the_cluster_does_not_know_says_so() {
    // Broken: a mistyped name would leave a node idle for ever, without a word.
    for cluster in [cluster("p1", Role::PredictorNode), cluster("p0", Role::ExpertNode)] {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let ended = run(config(PredictorLimits::default()), listener, cluster, CancellationToken::new()).await;
        assert!(matches!(ended, Err(PredictorNodeError::NotAMember { node }) if node.as_str() == "p0"));
    }
}
