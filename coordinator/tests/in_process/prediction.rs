//! Predictions beside the steps of the decoder: what is not there in time costs hints and no time, and what is counts.

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use futures::StreamExt;
use sida_cluster::{Address, Member, Role};
use sida_coordinator::{Alpha, Coordinator, GenerateParams, PredictorSource, RoutingMode, Token};

use crate::{
    noise_predictor::NoisePredictor,
    plain_experts::{model_dir, start, start_over},
    plain_nodes::serve_predictor,
};

const TOKENS: usize = 24;
const HASH: RoutingMode = RoutingMode::Hash { alpha: Alpha::Router };
const GUIDED: RoutingMode = RoutingMode::Guided;

async fn generate(coordinator: &Coordinator, routing: RoutingMode) -> Vec<Token> {
    let prompt = "sst2 sentence: a gorgeous , witty , seductive movie .".into();
    let params = GenerateParams {
        prompt,
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
