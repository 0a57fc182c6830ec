//! Asks a running cluster over gRPC and prints the answer token by token.
//!
//! ```sh
//! cargo run --release -- up
//! cargo run --release -p sida-examples --bin ask_cluster -- http://127.0.0.1:50051 "sst2 sentence: a warm film ."
//! ```
//!
//! A client in any language does the same with `proto/sida/v1/inference.proto` alone.

use std::{
    env,
    io::{self, Write},
};

use anyhow::bail;
use sida_proto::v1::{GenerateRequest, inference_client::InferenceClient};

#[tokio::main]
async fn main() -> anyhow::Result<()> {
    let arguments: Vec<String> = env::args().skip(1).collect();
    let [endpoint, text] = &arguments[..] else { bail!("usage: ask_cluster ENDPOINT TEXT") };

    let mut cluster = InferenceClient::connect(endpoint.clone()).await?;
    let request = GenerateRequest { text: text.clone(), max_tokens: 32, ..Default::default() };
    let mut answer = cluster.generate(request).await?.into_inner();

    while let Some(token) = answer.message().await? {
        print!("{}", token.text);
        io::stdout().flush()?;
        // The last token says how the answer ended, and what happened to it on its way.
        if let Some(trace) = token.finish.and_then(|finish| finish.trace) {
            let routed = trace.hash_hits + trace.hash_misses;
            println!("\n{} of {routed} expert calls were predicted", trace.hash_hits);
        }
    }
    Ok(())
}
