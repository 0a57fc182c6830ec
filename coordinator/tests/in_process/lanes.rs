//! Nodes behind sockets: the same answers as in one process, whatever happens to the connections.

use std::{
    sync::{Arc, atomic::Ordering},
    time::{Duration, Instant},
};

use futures::{StreamExt, future::join_all};
use sida_cluster::{Address, Member, Role};
use sida_coordinator::{
    Coordinator, CoordinatorConfig, EncodeParams, Encoding, GenerateParams, MicroBatching, PredictorSource,
    RequestError, Token,
};
use sida_routing::ExpertKey;
use sida_rpc::{Gate, KeyFile};
use tokio::net::TcpListener;

use crate::{
    noise_predictor::NoisePredictor,
    plain_experts::{Behaviour, PlainExperts, experts, model_dir, start, start_over},
    plain_nodes::{PlainNode, any_port, serve_experts, serve_experts_for, serve_predictor},
};

const TEXT: &str = "sst2 sentence: a gorgeous , witty , seductive movie .";

async fn nodes(count: usize) -> (Vec<Arc<PlainExperts>>, Vec<PlainNode>) {
    let experts: Vec<_> = (0..count).map(|_| experts()).collect();
    let nodes = join_all(experts.iter().map(|experts| serve_experts(experts.clone(), any_port()))).await;
    (experts, nodes)
}

fn addresses(nodes: &[PlainNode]) -> Vec<Address> {
    nodes.iter().map(|node| Address::Grpc(node.address.to_string())).collect()
}

async fn encode(coordinator: &Coordinator) -> Result<Encoding, RequestError> {
    coordinator.encode(EncodeParams { prompt: TEXT.into(), ..Default::default() }).await
}

async fn generate(coordinator: &Coordinator) -> Vec<Token> {
    let params = GenerateParams { prompt: TEXT.into(), min_tokens: Some(12), max_tokens: 12, ..Default::default() };
    let tokens = coordinator.generate(params).await.expect("accepted");
    tokens.map(|token| token.expect("token")).collect().await
}

fn ids(tokens: &[Token]) -> Vec<u32> {
    tokens.iter().map(|token| token.id).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn who_serves_something_else_is_told() {
    // Would break: `sida status` shows a node as serving that no coordinator can use, and nobody finds out why it has no work.
    let (experts, nodes) = nodes(4).await;
    let coordinator = start_over(addresses(&nodes), Vec::new(), PredictorSource::Off, |_| ()).await;
    experts[1].described.lock().model_digest = vec![1; 32].into();
    experts[2].described.lock().experts_digest = vec![1; 32].into();
    experts[3].described.lock().experts_digest = Default::default();
    let status = coordinator.status().await;
    let nodes = status.nodes.iter().filter(|node| node.role == "expert-node");
    let told: Vec<_> = nodes.map(|node| (node.healthy, &*node.problem)).collect();
    let expected = [(true, ""), (false, "serves another model"), (false, "has other experts"), (true, "")];
    assert_eq!(told, expected, "who does not say which experts it has is of an older version");
}

#[tokio::test(flavor = "multi_thread")]
async fn who_cannot_be_used_is_told() {
    // Would break: a node with another key, or one that wants TLS, is shown as if it were not there, and half of the memory is
    // missing without a reason; or a coordinator that can answer nothing is shown as serving.
    let key = tempfile::NamedTempFile::new().expect("a file");
    std::fs::write(&key, "a-key-that-is-not-ours\n").expect("written");
    let gate = Gate::open(KeyFile::Cluster(key.path().into())).expect("a gate");
    let refusing = serve_experts_for(gate, experts(), any_port()).await;
    let closing = TcpListener::bind(any_port()).await.expect("a port");
    let addresses = [refusing.address, closing.local_addr().expect("its address"), ([127, 0, 0, 1], 1).into()];
    tokio::spawn(async move { while closing.accept().await.is_ok() {} });
    let addresses = addresses.map(|address| Address::Grpc(address.to_string())).to_vec();
    // As the coordinators of these tests are called.
    let (node, address) = ("coordinator".into(), Address::Grpc("127.0.0.1:1".into()));
    let itself = Member { node, role: Role::Coordinator, address, weight: 1.0 };
    let coordinator = start_over(addresses, vec![itself], PredictorSource::Off, |_| ()).await;
    let status = coordinator.status().await;
    let told: Vec<_> = status.nodes.iter().map(|node| (node.healthy, &*node.role, &*node.problem)).collect();
    for expected in ["refuses the key", "ends the connection", ""] {
        assert!(told.contains(&(false, "expert-node", expected)), "{told:?}");
    }
    assert!(told.contains(&(false, "coordinator", "not ready")), "{told:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn remote_and_local_answer_alike() {
    // Would break: an answer depends on where its experts live, or hints are lost on their way.
    let here = start(1, PredictorSource::Off, |_| ()).await;
    let (experts, nodes) = nodes(2).await;
    let mixed = [addresses(&nodes), vec![Address::Local(here.nodes[0].clone())]].concat();
    let predictor = || PredictorSource::Local(Arc::new(NoisePredictor::of(&model_dir(), 2)));
    let (states, tokens) =
        (encode(&here.coordinator).await.expect("encoded").states, generate(&here.coordinator).await);
    for addresses in [addresses(&nodes), mixed] {
        let coordinator = start_over(addresses, Vec::new(), predictor(), |_| ()).await;
        assert_eq!(encode(&coordinator).await.expect("encoded").states, states);
        assert_eq!(ids(&generate(&coordinator).await), ids(&tokens));
        coordinator.stop().await;
    }
    assert!(experts.iter().all(|experts| experts.rows.load(Ordering::Relaxed) > 0));
    assert!(experts.iter().all(|experts| experts.plans_total.load(Ordering::Relaxed) > 0));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_pass_that_is_given_up_leaves_nothing_under_way() {
    // Would break: what comes back for a pass that nobody waits for is taken for another's, or its bytes hold up the lane.
    let (experts, nodes) = nodes(1).await;
    let coordinator = start_over(addresses(&nodes), Vec::new(), PredictorSource::Off, |config| {
        config.micro_batching = MicroBatching::Always;
        config.lane_inflight_bytes_max = 1;
    })
    .await;
    // From the beginning, so that nobody expects it to be in time.
    experts[0].behave(Behaviour::Slow(Duration::from_millis(150)));
    let expected = encode(&coordinator).await.expect("encoded").states;
    for _ in 0..3 {
        let deadline = Some(Instant::now() + Duration::from_millis(60));
        let params = EncodeParams { prompt: TEXT.into(), deadline, ..Default::default() };
        let answers = join_all([params.clone(), params].map(|params| coordinator.encode(params))).await;
        assert!(answers.iter().all(|answer| matches!(answer, Err(RequestError::DeadlineExceeded))), "{answers:?}");
    }
    experts[0].behave(Behaviour::Works);
    let start = Instant::now();
    assert_eq!(encode(&coordinator).await.expect("encoded").states, expected);
    assert!(start.elapsed() < Duration::from_secs(2), "{:?}", start.elapsed());
}

#[tokio::test(flavor = "multi_thread")]
async fn micro_batches_are_under_way_together() {
    // Would break: one waits for the answers to the other; or gets them, or its failures.
    let texts: Vec<String> = (0..7).map(|i| format!("sst2 sentence: it is {}", "fine ".repeat(i))).collect();
    let encode = async |coordinator: &Coordinator| {
        let params = |text: &String| EncodeParams { prompt: text.clone().into(), ..Default::default() };
        join_all(texts.iter().map(|text| coordinator.encode(params(text)))).await
    };
    let here = start(1, PredictorSource::Off, |_| ()).await;
    let whole: Vec<Encoding> = encode(&here.coordinator).await.into_iter().map(|one| one.expect("encoded")).collect();
    let (experts, nodes) = nodes(1).await;
    let halved = |config: &mut CoordinatorConfig| config.micro_batching = MicroBatching::Always;
    let coordinator = start_over(addresses(&nodes), Vec::new(), PredictorSource::Off, halved).await;
    experts[0].behave(Behaviour::AwaitsAnother);
    for (whole, halved) in whole.iter().zip(encode(&coordinator).await) {
        assert_eq!(halved.expect("encoded").states, whole.states);
    }
    let needs = |encoding: &Encoding, lost: ExpertKey| {
        encoding.trace.experts.layers().any(|(layer, used)| layer == lost.layer && used.contains(&lost.expert))
    };
    let used = whole[6].trace.experts.layers();
    let mut used = used.flat_map(|(layer, used)| used.into_iter().map(move |expert| ExpertKey { layer, expert }));
    let lost = used.find(|key| !needs(&whole[0], *key)).expect("one of the last text's experts only");
    experts[0].behave(Behaviour::Lacks(lost));
    for (whole, halved) in whole.iter().zip(encode(&coordinator).await) {
        match halved {
            Ok(halved) => assert!(!needs(whole, lost) && halved.states == whole.states),
            Err(RequestError::ExpertUnavailable { key, .. }) => assert!(needs(whole, lost) && key == lost),
            Err(error) => panic!("{error}"),
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn dead_node_costs_a_detour_and_may_come_back() {
    // Would break: a node's crash fails requests, or its return goes unnoticed.
    let (experts, mut nodes) = nodes(2).await;
    let coordinator = start_over(addresses(&nodes), Vec::new(), PredictorSource::Off, |_| ()).await;
    let expected = encode(&coordinator).await.expect("encoded").states;
    let params = GenerateParams { prompt: TEXT.into(), min_tokens: Some(400), max_tokens: 400, ..Default::default() };
    let mut running = coordinator.generate(params).await.expect("accepted");
    for _ in 0..20 {
        running.next().await.expect("a token").expect("before the crash");
    }
    nodes[0].kill().await;
    let rest: Vec<_> = running.collect().await;
    assert!(rest.len() == 380 && rest.iter().all(Result::is_ok), "the crash reached a running request");
    assert_eq!(encode(&coordinator).await.expect("the other answers").states, expected);

    let rows = experts[0].rows.load(Ordering::Relaxed);
    let _back = serve_experts(experts[0].clone(), nodes[0].address).await;
    let deadline = Instant::now() + Duration::from_secs(10);
    while experts[0].rows.load(Ordering::Relaxed) == rows {
        assert!(Instant::now() < deadline, "the node that came back gets no rows");
        assert_eq!(encode(&coordinator).await.expect("encoded").states, expected);
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn the_only_node_may_be_away_for_a_moment() {
    // Would break: a request fails because its node is being started again; or is held although its caller has left.
    let here = start(1, PredictorSource::Off, |_| ()).await;
    let expected = encode(&here.coordinator).await.expect("encoded").states;
    // A port that was free a moment ago, where the node will listen.
    let address = std::net::TcpListener::bind(any_port()).and_then(|port| port.local_addr()).expect("a port");
    let node = vec![Address::Grpc(address.to_string())];
    let coordinator = start_over(node, Vec::new(), PredictorSource::Off, |_| ()).await;
    let leaving = tokio::time::timeout(Duration::from_millis(300), encode(&coordinator)).await;
    assert!(leaving.is_err(), "somebody answered: {leaving:?}");
    tokio::time::sleep(Duration::from_millis(100)).await;
    assert_eq!(coordinator.status().await.requests_inflight, 0, "work for nobody goes on");
    let returning = async {
        tokio::time::sleep(Duration::from_millis(700)).await;
        serve_experts(experts(), address).await
    };
    let (answered, _back) = tokio::join!(encode(&coordinator), returning);
    assert_eq!(answered.expect("it waited").states, expected);
}

#[tokio::test(flavor = "multi_thread")]
async fn hung_node_costs_little() {
    // Would break: a node that stopped answering holds requests until their deadline.
    let (experts, nodes) = nodes(2).await;
    let coordinator = start_over(addresses(&nodes), Vec::new(), PredictorSource::Off, |_| ()).await;
    let expected = encode(&coordinator).await.expect("encoded").states;
    experts[1].behave(Behaviour::Slow(Duration::from_secs(6)));
    // No load was ever seen here, so that its assumed time is in the first call's allowance.
    let start = Instant::now();
    let first = encode(&coordinator).await.expect("the other answers");
    assert_eq!(first.states, expected);
    assert!(first.trace.failovers > 0);
    assert!(start.elapsed() < Duration::from_secs(5), "{:?}", start.elapsed());
    let start = Instant::now();
    assert_eq!(encode(&coordinator).await.expect("it is not asked again at once").states, expected);
    assert!(start.elapsed() < Duration::from_secs(2), "{:?}", start.elapsed());
}

#[tokio::test(flavor = "multi_thread")]
async fn without_any_node_it_says_so() {
    // Would break: a coordinator hangs, or does not start, while its nodes are still coming.
    let node = vec![Address::Grpc("127.0.0.1:1".into())];
    let brief = |config: &mut CoordinatorConfig| config.expert_call_timeout = Duration::from_millis(300);
    let coordinator = start_over(node, Vec::new(), PredictorSource::Off, brief);
    match encode(&coordinator.await).await {
        Err(RequestError::ExpertUnavailable { tried, .. }) => {
            assert!(tried.len() == 1 && tried[0].1.contains("connect"), "{tried:?}");
        }
        other => panic!("{other:?}"),
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn predictions_come_from_predictor_nodes() {
    // Would break: tables of a predictor-node are not used, or its death fails requests.
    let here = start(1, PredictorSource::Off, |_| ()).await;
    let mut node = serve_predictor(NoisePredictor::of(&model_dir(), 9)).await;
    let address = Address::Grpc(node.address.to_string());
    let predictor = Member { node: "predictor-node-0".into(), role: Role::PredictorNode, address, weight: 1.0 };
    let experts = vec![Address::Local(here.nodes[0].clone())];
    let coordinator = start_over(experts, vec![predictor], PredictorSource::Nodes, |_| ()).await;
    let expected = ids(&generate(&here.coordinator).await);
    let predicted = generate(&coordinator).await;
    let trace = &predicted[11].finish.as_ref().expect("the last").trace;
    assert!(!trace.unpredicted && trace.hash.misses > 0);
    assert_eq!(ids(&predicted), expected);
    node.kill().await;
    let unpredicted = generate(&coordinator).await;
    assert!(unpredicted[11].finish.as_ref().expect("the last").trace.unpredicted);
    assert_eq!(ids(&unpredicted), expected);
}
