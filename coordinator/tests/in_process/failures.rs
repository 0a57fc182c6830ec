//! What a coordinator survives: nodes that refuse, panic or hang, experts that nobody can load, outputs that are
//! not numbers, callers that leave. Whoever can be answered is, with the same tokens as ever.

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use futures::{StreamExt, future::join_all};
use sida_coordinator::{
    EncodeParams, Encoding, GenerateParams, MicroBatching, PredictorSource, RequestError, RoutingMode, ScoreParams,
};
use sida_predictor::{HashPredictor, HitRate, PredictorError, PredictorState};
use sida_routing::{Digest, ExpertKey, HashTable};

use crate::{
    noise_predictor::NoisePredictor,
    plain_experts::{Behaviour, PlainCluster, model_dir, start},
};

const TEXT: &str = "sst2 sentence: a gorgeous , witty , seductive movie .";

async fn encode(cluster: &PlainCluster, text: &str) -> Result<Encoding, RequestError> {
    cluster.coordinator.encode(EncodeParams { prompt: text.into(), ..Default::default() }).await
}

#[tokio::test(flavor = "multi_thread")]
async fn failing_node_costs_a_detour_only() {
    // Would break: the death of one node fails a request or changes its answer.
    let cluster = start(3, PredictorSource::Off, |_| ()).await;
    let expected = encode(&cluster, TEXT).await.expect("all nodes work");
    let key = |layer, expert| ExpertKey { layer: sida_routing::LayerId(layer), expert };
    let used = expected.trace.experts.layers().next().expect("a layer");
    let lacks = Behaviour::Lacks(key(used.0.0, used.1[0]));
    for behaviour in [Behaviour::ShutsDown, Behaviour::DeviceFails, Behaviour::Panics, lacks] {
        let mut failovers = 0;
        for node in &cluster.nodes {
            node.behave(behaviour);
            let encoding = encode(&cluster, TEXT).await.expect("another node answers");
            assert_eq!(encoding.states, expected.states, "{behaviour:?}");
            failovers += encoding.trace.failovers;
            node.behave(Behaviour::Works);
        }
        assert!(failovers > 0, "{behaviour:?} was never noticed");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn missing_expert_fails_only_those_who_need_it() {
    // Would break: one damaged expert takes down every request that shares a batch with one that needs it.
    let cluster = start(2, PredictorSource::Off, |_| ()).await;
    let texts: Vec<String> =
        (0..24).map(|i| format!("sst2 sentence: movie number {i} is {}", "fine ".repeat(i))).collect();
    let whole = join_all(texts.iter().map(|text| encode(&cluster, text))).await;
    let whole: Vec<Encoding> = whole.into_iter().map(|encoding| encoding.expect("all experts are there")).collect();
    let (layer, experts) = whole[5].trace.experts.layers().next().expect("a layer");
    let lost = ExpertKey { layer, expert: experts[0] };
    cluster.nodes.iter().for_each(|node| node.behave(Behaviour::Lacks(lost)));
    let answers = join_all(texts.iter().map(|text| encode(&cluster, text))).await;
    for (before, after) in whole.iter().zip(answers) {
        let needs =
            before.trace.experts.layers().any(|(layer, used)| layer == lost.layer && used.contains(&lost.expert));
        match after {
            Ok(after) => assert!(!needs && after.states == before.states),
            Err(RequestError::ExpertUnavailable { key, tried }) => assert!(needs && key == lost && tried.len() == 2),
            Err(error) => panic!("{error}"),
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn retries_end_with_their_budget() {
    // Would break: nodes that fail for having too much to do get every call of every coordinator once more.
    let cluster = start(2, PredictorSource::Off, |config| config.expert_call_timeout = Duration::from_millis(50)).await;
    let endless = GenerateParams { prompt: TEXT.into(), min_tokens: Some(400), max_tokens: 400, ..Default::default() };
    cluster.nodes[0].behave(Behaviour::ShutsDown);
    let tokens = cluster.coordinator.generate(endless.clone()).await.expect("accepted");
    let tokens: Vec<_> = tokens.collect().await;
    assert!(tokens.len() > 10, "the budget pays for {} tokens only", tokens.len());
    assert!(matches!(tokens.last(), Some(Err(RequestError::RetriesExhausted { .. }))), "{:?}", tokens.last());
    cluster.nodes[0].behave(Behaviour::Works);
    let tokens = cluster.coordinator.generate(endless).await.expect("accepted");
    assert_eq!(tokens.filter(|token| futures::future::ready(token.is_ok())).count().await, 400);
}

#[tokio::test(flavor = "multi_thread")]
async fn retries_wait_for_their_budget() {
    // Would break: requests fail for the failures of others before them, although somebody could answer.
    let cluster = start(2, PredictorSource::Off, |_| ()).await;
    cluster.nodes[0].behave(Behaviour::ShutsDown);
    let long = GenerateParams { prompt: TEXT.into(), min_tokens: Some(150), max_tokens: 150, ..Default::default() };
    let tokens = cluster.coordinator.generate(long).await.expect("accepted");
    let tokens: Vec<_> = tokens.collect().await;
    assert!(tokens.len() == 150 && tokens.iter().all(Result::is_ok), "{:?}", tokens.last());
}

#[tokio::test(flavor = "multi_thread")]
async fn nobody_left_is_an_error_and_passes() {
    // Would break: a coordinator whose nodes were all gone for a moment never answers again.
    let cluster = start(2, PredictorSource::Off, |_| ()).await;
    cluster.nodes.iter().for_each(|node| node.behave(Behaviour::Panics));
    assert!(matches!(encode(&cluster, TEXT).await, Err(RequestError::ExpertUnavailable { .. })));
    let generate = GenerateParams { prompt: TEXT.into(), ..Default::default() };
    let mut stream = cluster.coordinator.generate(generate).await.expect("accepted");
    assert!(matches!(stream.next().await, Some(Err(RequestError::ExpertUnavailable { .. }))));
    assert!(cluster.coordinator.probe().await.is_err());
    cluster.nodes.iter().for_each(|node| node.behave(Behaviour::Works));
    assert!(encode(&cluster, TEXT).await.is_ok());
    assert!(cluster.coordinator.probe().await.is_ok());
}

#[tokio::test(flavor = "multi_thread")]
async fn not_a_number_is_never_an_answer() {
    // Would break: a broken expert's NaN becomes token 0, or a state of NaN is handed out as a result.
    let cluster = start(1, PredictorSource::Off, |_| ()).await;
    cluster.nodes[0].behave(Behaviour::Nan);
    assert!(matches!(encode(&cluster, TEXT).await, Err(RequestError::NotANumber)));
    let generate = GenerateParams { prompt: TEXT.into(), ..Default::default() };
    let mut stream = cluster.coordinator.generate(generate).await.expect("accepted");
    assert!(matches!(stream.next().await, Some(Err(RequestError::NotANumber))));
    let score = ScoreParams { prompt: TEXT.into(), targets: vec!["positive".into()], ..Default::default() };
    assert!(matches!(cluster.coordinator.score(score).await, Err(RequestError::NotANumber)));
    assert!(cluster.coordinator.probe().await.is_err());
}

#[tokio::test(flavor = "multi_thread")]
async fn deadline_and_departure_free_the_batch() {
    // Would break: a request that nobody waits for is computed to its end, or ends its neighbours.
    let cluster = start(1, PredictorSource::Off, |_| ()).await;
    cluster.nodes[0].behave(Behaviour::Slow(Duration::from_millis(5)));
    let endless =
        GenerateParams { prompt: TEXT.into(), min_tokens: Some(1000), max_tokens: 1000, ..Default::default() };
    let deadline = Some(Instant::now() + Duration::from_millis(300));
    let late = cluster.coordinator.generate(GenerateParams { deadline, ..endless.clone() }).await.expect("accepted");
    let mut leaving = cluster.coordinator.generate(endless.clone()).await.expect("accepted");
    assert!(leaving.next().await.expect("a token").is_ok());
    drop(leaving);
    let short = GenerateParams { min_tokens: Some(10), max_tokens: 10, ..endless };
    let neighbour = cluster.coordinator.generate(short).await.expect("accepted");
    let neighbour: Vec<_> = neighbour.collect().await;
    assert!(neighbour.len() == 10 && neighbour.iter().all(Result::is_ok));
    let late: Vec<_> = late.collect().await;
    assert!(matches!(late.last(), Some(Err(RequestError::DeadlineExceeded))), "{:?}", late.last());
    assert!((2..200).contains(&late.len()));
    tokio::time::sleep(Duration::from_millis(200)).await;
    assert_eq!(cluster.coordinator.status().await.requests_inflight, 0);
}

/// Encodes texts that run together, the first of them until a deadline; how long each took.
async fn together(
    cluster: &PlainCluster,
    patience: [Option<Duration>; 2],
) -> Vec<(Result<Encoding, RequestError>, Duration)> {
    let encode = |patience: Option<Duration>| {
        let start = Instant::now();
        let deadline = patience.map(|patience| start + patience);
        let answer = cluster.coordinator.encode(EncodeParams { prompt: TEXT.into(), deadline, ..Default::default() });
        async move { (answer.await, start.elapsed()) }
    };
    join_all(patience.map(encode)).await
}

#[tokio::test(flavor = "multi_thread")]
async fn a_pass_for_nobody_is_given_up_between_layers() {
    // Would break: a pass that outlives its callers keeps the model from all others; a caller is told of its deadline when the
    // pass ends; or a caller who still waits is given up with the others.
    let (layer, short) = (Duration::from_millis(300), Some(Duration::from_millis(100)));
    for micro_batching in [MicroBatching::Never, MicroBatching::Always] {
        let cluster = start(1, PredictorSource::Off, |config| config.micro_batching = micro_batching).await;
        // From the beginning, so that nobody expects it to be in time.
        cluster.nodes[0].behave(Behaviour::Slow(layer));
        let expected = encode(&cluster, TEXT).await.expect("works").states;
        let layers = || cluster.nodes[0].rows_most.lock().len();
        cluster.nodes[0].rows_most.lock().clear();
        for (answer, took) in together(&cluster, [short, short]).await {
            assert!(matches!(answer, Err(RequestError::DeadlineExceeded)), "{answer:?}");
            assert!(took < layer, "told after {took:?}");
        }
        while cluster.coordinator.status().await.requests_inflight > 0 {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        assert_eq!(layers(), 1, "of three MoE layers");
        let both = together(&cluster, [short, None]).await;
        assert!(matches!(both[0].0, Err(RequestError::DeadlineExceeded)) && both[0].1 < layer, "{both:?}");
        assert_eq!(both[1].0.as_ref().expect("it waits").states, expected);
        assert_eq!(layers(), 3);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_deadline_ends_a_stream_at_once() {
    // Would break: a caller whose deadline is over waits for the end of a long pass to be told.
    let cluster = start(1, PredictorSource::Off, |_| ()).await;
    cluster.nodes[0].behave(Behaviour::Slow(Duration::from_millis(400)));
    let start = Instant::now();
    let deadline = Some(start + Duration::from_millis(100));
    let params = GenerateParams { prompt: TEXT.into(), deadline, ..Default::default() };
    let tokens: Vec<_> = cluster.coordinator.generate(params).await.expect("accepted").collect().await;
    assert!(matches!(tokens[..], [Err(RequestError::DeadlineExceeded)]), "{tokens:?}");
    assert!(start.elapsed() < Duration::from_millis(300), "{:?}", start.elapsed());
}

#[tokio::test(flavor = "multi_thread")]
async fn overload_is_refused_at_once() {
    // Would break: callers of an overloaded coordinator wait, or those who were accepted are not answered.
    let cluster = start(1, PredictorSource::Off, |config| {
        config.limits.queue_max = 3;
        config.limits.tokens_max = 20;
    })
    .await;
    cluster.nodes[0].behave(Behaviour::Slow(Duration::from_millis(30)));
    let start = Instant::now();
    let refused_at =
        |answer: &Result<Encoding, RequestError>| matches!(answer, Err(RequestError::QueueFull { limit: 3, .. }));
    let answers = join_all((0..40).map(|_| encode(&cluster, TEXT))).await;
    let refused = answers.iter().filter(|answer| refused_at(answer)).count();
    let answered = answers.iter().filter(|answer| answer.is_ok()).count();
    assert!(refused > 0 && answered >= 3 && refused + answered == 40, "{refused} refused, {answered} answered");
    assert!(start.elapsed() < Duration::from_secs(10));
}

#[tokio::test(flavor = "multi_thread")]
async fn stop_answers_what_was_accepted() {
    // Would break: a node that shuts down drops requests that it had taken.
    let cluster = start(1, PredictorSource::Off, |_| ()).await;
    cluster.nodes[0].behave(Behaviour::Slow(Duration::from_millis(10)));
    let coordinator = cluster.coordinator.clone();
    let pending = tokio::spawn(async move { encode(&cluster, TEXT).await });
    while coordinator.status().await.requests_total == 0 {
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
    coordinator.stop().await;
    assert!(pending.await.expect("no panic").is_ok());
    let after = coordinator.encode(EncodeParams { prompt: TEXT.into(), ..Default::default() }).await;
    assert!(matches!(after, Err(RequestError::ShuttingDown)));
}

/// A predictor that fails or panics every other time.
struct BrokenPredictor(NoisePredictor, std::sync::atomic::AtomicU64);

impl BrokenPredictor {
    fn fail_sometimes(&self) -> Result<(), PredictorError> {
        match self.1.fetch_add(1, std::sync::atomic::Ordering::Relaxed) % 3 {
            0 => Err(PredictorError::State { reason: "as the test asked".to_owned() }),
            1 => panic!("as the test asked"),
            _ => Ok(()),
        }
    }
}

impl HashPredictor for BrokenPredictor {
    fn net(&self) -> &str {
        "broken"
    }
    fn digest(&self) -> Digest {
        self.0.digest()
    }
    fn top_k(&self) -> usize {
        self.0.top_k()
    }
    fn model_digest(&self) -> Digest {
        self.0.model_digest()
    }
    fn hit_rates(&self) -> &[HitRate] {
        &[]
    }
    fn encode(&self, sequences: &[&[u32]]) -> Result<Vec<HashTable>, PredictorError> {
        self.fail_sometimes()?;
        self.0.encode(sequences)
    }
    fn decode(&self, states: &mut [&mut PredictorState], tokens: &[&[u32]]) -> Result<Vec<HashTable>, PredictorError> {
        self.fail_sometimes()?;
        self.0.decode(states, tokens)
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn broken_predictor_costs_hints_only() {
    // Would break: a predictor's error or panic fails requests, changes them, or ends a thread.
    let noise = NoisePredictor::of(&model_dir(), 1);
    let broken = PredictorSource::Local(Arc::new(BrokenPredictor(noise, Default::default())));
    let (cluster, sound) = (start(2, broken, |_| ()).await, start(2, PredictorSource::Off, |_| ()).await);
    for routing in [RoutingMode::Exact, RoutingMode::Hash { alpha: Default::default() }] {
        let params =
            GenerateParams { prompt: TEXT.into(), routing, min_tokens: Some(8), max_tokens: 8, ..Default::default() };
        let tokens: Vec<_> = cluster.coordinator.generate(params.clone()).await.expect("accepted").collect().await;
        let expected: Vec<_> = sound.coordinator.generate(params).await.expect("accepted").collect().await;
        let ids = |tokens: &[Result<sida_coordinator::Token, RequestError>]| -> Vec<u32> {
            tokens.iter().map(|token| token.as_ref().expect("token").id).collect()
        };
        assert_eq!(tokens.len(), 8);
        let finish = tokens[7].as_ref().expect("token").finish.as_ref().expect("the last");
        assert!(finish.trace.unpredicted);
        if routing == RoutingMode::Exact {
            assert_eq!(ids(&tokens), ids(&expected));
        }
    }
}
