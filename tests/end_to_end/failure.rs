//! Nodes that die: no failed request, no changed token.

use sida_proto::v1::inference_client::InferenceClient;
use sida_tests::{Sandbox, SandboxConfig};
use tokio_stream::StreamExt;

use crate::client::{Oracle, generate, greedy, prompts};

const TOKENS_MAX: u32 = 40;

/// The death of an expert-node in the middle of an answer would end it, or change a token.
#[tokio::test(flavor = "multi_thread")]
async fn an_expert_node_dies_in_the_middle_of_answers() {
    for replicas in [1, 2] {
        let mut sandbox = Sandbox::start(SandboxConfig { expert_nodes: 3, replicas, ..Default::default() }).await;
        let oracle = Oracle::open();
        let mut streams = Vec::new();
        for text in prompts() {
            let asked = InferenceClient::new(sandbox.channel()).generate(greedy(&text, TOKENS_MAX)).await;
            streams.push((text, asked.expect("a stream").into_inner()));
        }
        sandbox.take("expert-node-1").kill();
        for (text, mut stream) in streams {
            let mut ids = Vec::new();
            while let Some(token) = stream.next().await {
                ids.push(token.expect("no failure reaches the client").token_id);
            }
            assert_eq!(ids, oracle.greedy(&text, TOKENS_MAX), "{text}, {replicas} replicas");
        }
        for text in prompts() {
            let answer = generate(&sandbox.channel(), greedy(&text, TOKENS_MAX)).await.expect("an answer");
            assert_eq!(answer.ids, oracle.greedy(&text, TOKENS_MAX), "{text}, {replicas} replicas, afterwards");
        }
    }
}

/// Requests would wait for a predictor-node that is gone, or fail without it.
#[tokio::test(flavor = "multi_thread")]
async fn the_predictor_node_dies() {
    let mut sandbox = Sandbox::start(SandboxConfig { predictor_nodes: 1, ..Default::default() }).await;
    let oracle = Oracle::open();
    sandbox.take("predictor-node-0").kill();
    for text in prompts() {
        let answer = generate(&sandbox.channel(), greedy(&text, TOKENS_MAX)).await.expect("an answer");
        assert_eq!(answer.ids, oracle.greedy(&text, TOKENS_MAX), "{text}");
    }
    let answer = generate(&sandbox.channel(), greedy(&prompts()[0], TOKENS_MAX)).await.expect("an answer");
    assert!(answer.trace().unpredicted, "it says that nothing was predicted");
}
