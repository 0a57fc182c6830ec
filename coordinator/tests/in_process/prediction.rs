//! Predictions beside the steps of the decoder: what is not there in time costs hints and no time, and what is counts. And what
//! the routers chose instead, which predictor-nodes that learn are told.

use std::{
    sync::{Arc, atomic::Ordering},
    time::{Duration, Instant},
};

use futures::StreamExt;
use sida_cluster::{Address, Member, Role};
use sida_coordinator::{
    Alpha, Coordinator, CoordinatorConfig, GenerateParams, HashCounts, PredictorSource, RoutingMode, Token,
};
use sida_model::{Reference, RoutedLayer, Tokenizer};
use sida_predictor::entries::top_k;
use sida_routing::{ExpertId, Labels, LabelsExtent};

use crate::{
    noise_predictor::NoisePredictor,
    plain_experts::{decoder_only_dir, experts_of, model_dir, start, start_model_over, start_over},
    plain_nodes::{any_port, serve_experts, serve_predictor, serve_predictor_that_learns},
};

const TOKENS: usize = 24;
const HASH: RoutingMode = RoutingMode::Hash { alpha: Alpha::Router };
const GUIDED: RoutingMode = RoutingMode::Guided;

const PROMPT: &str = "sst2 sentence: a gorgeous , witty , seductive movie .";

async fn generate(coordinator: &Coordinator, routing: RoutingMode) -> Vec<Token> {
    let params = GenerateParams {
        prompt: PROMPT.into(),
        routing,
        min_tokens: Some(TOKENS),
        max_tokens: TOKENS,
        ignore_eos: true,
        ..Default::default()
    };
    let tokens = coordinator.generate(params).await.expect("accepted");
    tokens.map(|token| token.expect("token")).collect().await
}

fn ids(tokens: &[Token]) -> Vec<u32> {
    tokens.iter().map(|token| token.id).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn what_takes_long_is_predicted_beside_the_step() {
    // Would break: a prediction that is made by another thread is not compared, or is another step's.
    let noise = || NoisePredictor::of(&model_dir(), 3);
    let local = |predictor| PredictorSource::Local(Arc::new(predictor));
    let quick = start(2, local(noise()), |_| ()).await;
    let slow = start(2, local(noise().slow(Duration::from_millis(2))), |_| ()).await;
    for routing in [RoutingMode::Exact, GUIDED, HASH] {
        let (quick, slow) = (generate(&quick.coordinator, routing).await, generate(&slow.coordinator, routing).await);
        assert_eq!(ids(&slow), ids(&quick));
        let trace = |tokens: &[Token]| tokens[TOKENS - 1].finish.as_ref().expect("the last").trace.clone();
        let (quick, slow) = (trace(&quick), trace(&slow));
        assert!(!slow.unpredicted && slow.hash.misses > 0);
        assert_eq!(slow.hash, quick.hash, "{routing:?}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn where_all_experts_are_resident_few_are_predicted() {
    // Would break: predictions that nobody needs take the time of passes, or change an answer; what is routed by its prediction
    // has none; or nothing is hinted once experts are missing.
    let source =
        || PredictorSource::Local(Arc::new(NoisePredictor::of(&model_dir(), 3).slow(Duration::from_millis(10))));
    let cluster = start(2, source(), |_| ()).await;
    let placement = cluster.coordinator.cluster().placement();
    let hold_all_but = |missing: usize| {
        for (node, name) in cluster.nodes.iter().zip(placement.nodes()) {
            node.resident.store(placement.held_by(name).count() - missing, Ordering::Relaxed);
        }
    };
    let plans = || cluster.nodes.iter().map(|node| node.plans_total.load(Ordering::Relaxed)).sum::<u64>();
    hold_all_but(0);
    let trace = |tokens: &[Token]| tokens[TOKENS - 1].finish.as_ref().expect("the last").trace.clone();
    let first = generate(&cluster.coordinator, RoutingMode::Exact).await;
    assert!(!trace(&first).unpredicted, "who asks seldom is told");
    // Its 24 predictions of 10 ms are a hundredth of 24 s, which have not passed.
    let next = generate(&cluster.coordinator, RoutingMode::Exact).await;
    assert_eq!((trace(&next).unpredicted, trace(&next).hash), (true, HashCounts::default()));
    assert_eq!(ids(&next), ids(&first));
    let guided = generate(&cluster.coordinator, GUIDED).await;
    assert!(!trace(&guided).unpredicted && trace(&guided).rerouted > 0);
    assert_eq!(plans(), 0, "there is nothing to load");
    hold_all_but(1);
    let planned = generate(&cluster.coordinator, RoutingMode::Exact).await;
    assert_eq!((trace(&planned).unpredicted, trace(&planned).hash), (false, trace(&first).hash));
    assert!(plans() > TOKENS as u64);

    let evaluating = start(1, source(), |config| config.evaluates = true).await;
    evaluating.nodes[0].resident.store(usize::MAX, Ordering::Relaxed);
    for _ in 0..2 {
        let evaluated = trace(&generate(&evaluating.coordinator, RoutingMode::Exact).await);
        let layers = evaluated.hash_layers.expect("it evaluates");
        let of_layers = layers.counts().iter().map(|counts| counts.misses).sum::<u64>();
        assert_eq!(
            (evaluated.unpredicted, evaluated.hash, of_layers),
            (false, trace(&first).hash, evaluated.hash.misses)
        );
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn where_no_node_gains_by_plans_few_are_predicted() {
    // Would break: where experts are loaded in no time, or are all there on nodes of other processes, predictions that nobody
    // needs take the time of passes; or none is made when one node begins to gain by them.
    let source =
        || PredictorSource::Local(Arc::new(NoisePredictor::of(&model_dir(), 3).slow(Duration::from_millis(10))));
    let here = start(2, source(), |_| ()).await;
    let served = start(2, PredictorSource::Off, |_| ()).await.nodes;
    let mut addresses = Vec::new();
    let mut serving = Vec::new();
    for node in &served {
        serving.push(serve_experts(node.clone(), any_port()).await);
        addresses.push(Address::Grpc(serving[serving.len() - 1].address.to_string()));
    }
    let elsewhere = start_over(addresses, Vec::new(), source(), |_| ()).await;
    for (coordinator, nodes) in [(&here.coordinator, &here.nodes), (&elsewhere, &served)] {
        let say = |gains_nothing: [bool; 2]| {
            nodes.iter().zip(gains_nothing).for_each(|(node, is)| node.gains_nothing.store(is, Ordering::Relaxed));
        };
        let is_predicted = async |routing| {
            let tokens = generate(coordinator, routing).await;
            (!tokens[TOKENS - 1].finish.as_ref().expect("the last").trace.unpredicted, ids(&tokens))
        };
        say([true, true]);
        let (first, expected) = is_predicted(RoutingMode::Exact).await;
        assert!(first, "who asks seldom is told");
        assert_eq!(is_predicted(RoutingMode::Exact).await, (false, expected.clone()));
        assert!(is_predicted(GUIDED).await.0);
        say([true, false]);
        // What nodes elsewhere say comes with their answers.
        is_predicted(RoutingMode::Exact).await;
        assert_eq!(is_predicted(RoutingMode::Exact).await, (true, expected));
    }
    // The one that gained is away, and the other has all to do.
    serving[1].kill().await;
    generate(&elsewhere, RoutingMode::Exact).await;
    let last = generate(&elsewhere, RoutingMode::Exact).await;
    assert!(last[TOKENS - 1].finish.as_ref().expect("the last").trace.unpredicted);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_slow_predictor_node_keeps_no_step() {
    // Would break: every token waits for a predictor-node that is slow, although its prediction changes nothing; or a
    // request whose rows go where the prediction says is routed without it.
    const DELAY: Duration = Duration::from_millis(100);
    let noise = || NoisePredictor::of(&model_dir(), 4);
    let quick = start(1, PredictorSource::Local(Arc::new(noise())), |_| ()).await;
    let node = serve_predictor(noise().slow(DELAY)).await;
    let address = Address::Grpc(node.address.to_string());
    let predictor = Member { node: "predictor-node-0".into(), role: Role::PredictorNode, address, weight: 1.0 };
    let experts = vec![Address::Local(quick.nodes[0].clone())];
    let patient = |config: &mut sida_coordinator::CoordinatorConfig| config.predict_timeout = Duration::from_secs(5);
    let coordinator = start_over(experts, vec![predictor], PredictorSource::Nodes, patient).await;
    let begun = Instant::now();
    let exact = generate(&coordinator, RoutingMode::Exact).await;
    assert!(begun.elapsed() < DELAY * TOKENS as u32 / 2, "{:?}", begun.elapsed());
    assert_eq!(ids(&exact), ids(&generate(&quick.coordinator, RoutingMode::Exact).await));
    assert!(exact[TOKENS - 1].finish.as_ref().expect("the last").trace.unpredicted);
    // Also while a prediction that came too late for somebody else's step is still under way.
    let (_, guided, hash) = futures::join!(
        generate(&coordinator, RoutingMode::Exact),
        async {
            tokio::time::sleep(DELAY / 4).await;
            generate(&coordinator, GUIDED).await
        },
        async {
            tokio::time::sleep(DELAY / 4).await;
            generate(&coordinator, HASH).await
        }
    );
    for (routing, answer) in [(GUIDED, guided), (HASH, hash)] {
        assert_eq!(ids(&answer), ids(&generate(&quick.coordinator, routing).await), "{routing:?}");
        assert!(!answer[TOKENS - 1].finish.as_ref().expect("the last").trace.unpredicted);
    }
}

/// What a node that learns is told of a prompt.
fn labels(model: &Reference, tokens: Vec<u32>, routed: &[RoutedLayer]) -> Labels {
    let num_experts = model.config().num_experts;
    let kept = num_experts.min(8);
    let (mut experts, mut probabilities) = (Vec::new(), Vec::new());
    for token in 0..tokens.len() {
        for layer in routed {
            let row = &layer.probabilities[token * num_experts..][..num_experts];
            let (mut of_entry, mut likeliest) = (vec![ExpertId(0); kept], vec![0.0; kept]);
            top_k(row, &mut of_entry, &mut likeliest);
            experts.extend(of_entry);
            probabilities.extend(likeliest);
        }
    }
    let extent = LabelsExtent { layers: routed.len(), num_experts, kept };
    Labels::new(tokens, extent, experts, probabilities).expect("labels")
}

#[tokio::test(flavor = "multi_thread")]
async fn who_learns_is_told_of_prompts_that_a_decoder_reads() {
    // Would break: where there is no encoder nothing is learnt, or half of a prompt that is read in several steps, or one of whose
    // beginning nothing was computed.
    let noise = NoisePredictor::of(&decoder_only_dir(), 5);
    let (node, told) = serve_predictor_that_learns(noise).await;
    let address = Address::Grpc(node.address.to_string());
    let predictor = Member { node: "predictor-node-0".into(), role: Role::PredictorNode, address, weight: 1.0 };
    let experts = vec![Address::Local(experts_of(&decoder_only_dir()))];
    let short = |config: &mut CoordinatorConfig| config.limits.tokens_max = 8;
    let coordinator =
        start_model_over(&decoder_only_dir(), experts, vec![predictor], PredictorSource::Nodes, short).await;
    let model = Reference::open(&decoder_only_dir()).expect("the model");
    let begun = Instant::now();
    let (mut asked, mut waiting) = (0, true);
    // It is asked for what it learns as soon as it can be reached, and each prompt begins in its own way.
    while waiting {
        assert!(begun.elapsed() < Duration::from_secs(60), "it is told nothing");
        asked += 1;
        let prompt: Vec<u32> = (0..20).map(|at| 2 + (asked * 7919 + at * 13) % 317).collect();
        // The second one goes on from what the first has computed.
        for prompt in [prompt.clone(), [&prompt[..], &[5, 6]].concat()] {
            let params =
                GenerateParams { prompt: prompt.into(), max_tokens: 2, ignore_eos: true, ..Default::default() };
            let answer = coordinator.generate(params).await.expect("accepted");
            assert!(answer.all(async |token| token.is_ok()).await);
        }
        tokio::time::sleep(Duration::from_millis(100)).await;
        waiting = told.lock().is_empty();
    }
    for labelled in told.lock().iter() {
        let tokens = labelled.tokens().to_vec();
        assert_eq!(tokens.len(), 20);
        let (_, routed) = model.decode(&mut model.start(&[]).expect("a sequence"), &tokens).expect("its routing");
        assert_eq!(*labelled, labels(&model, tokens, &routed));
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn who_learns_is_told_what_the_routers_chose() {
    // Would break: a predictor-node learns other experts than the model's routers chose, learns from modes in which they did not
    // choose freely, or hears nothing more once it has refused.
    let noise = || NoisePredictor::of(&model_dir(), 5);
    let local = start(1, PredictorSource::Local(Arc::new(noise())), |_| ()).await;
    let (node, told) = serve_predictor_that_learns(noise()).await;
    let address = Address::Grpc(node.address.to_string());
    let predictor = Member { node: "predictor-node-0".into(), role: Role::PredictorNode, address, weight: 1.0 };
    let experts = vec![Address::Local(local.nodes[0].clone())];
    let coordinator = start_over(experts, vec![predictor], PredictorSource::Nodes, |_| ()).await;
    let begun = Instant::now();
    let ask = async |routing| {
        let answer = generate(&coordinator, routing).await;
        tokio::time::sleep(Duration::from_millis(100)).await;
        answer
    };
    // It is asked for what it learns as soon as it can be reached.
    let mut answers = Vec::new();
    while told.lock().is_empty() {
        assert!(begun.elapsed() < Duration::from_secs(60), "it is told nothing");
        answers.push(ask(RoutingMode::Exact).await);
    }
    assert!(answers.iter().all(|answer| ids(answer) == ids(&answers[0])));
    let model = Reference::open(&model_dir()).expect("the model");
    let tokens = Tokenizer::open(&model_dir(), model.config()).expect("a tokenizer").encode(PROMPT).expect("tokens");
    let (_, routed) = model.encode(&tokens).expect("its routing");
    let expected = labels(&model, tokens, &routed);
    assert!(told.lock().iter().all(|labels| *labels == expected));

    tokio::time::sleep(Duration::from_secs(1)).await;
    let before = told.lock().len();
    for routing in [GUIDED, HASH] {
        ask(routing).await;
    }
    tokio::time::sleep(Duration::from_secs(1)).await;
    assert_eq!(told.lock().len(), before);
}
