//! Embeds sentences by a running cluster, and tells how close each is to each other by the cosine of their embeddings.
//!
//! ```sh
//! cargo run --release -- up
//! cargo run --release -p sida-examples --bin embed_texts -- http://127.0.0.1:50051
//! ```

use std::env;

use anyhow::{Context, bail};
use futures::future::try_join_all;
use sida_proto::v1::{EncodeRequest, Pooling, inference_client::InferenceClient};
use tonic::transport::Channel;

const SENTENCES: [&str; 4] = [
    "sst2 sentence: a tender and funny film about two brothers .",
    "sst2 sentence: a warm , funny story of two sisters .",
    "sst2 sentence: loud , long and hollow .",
    "sst2 sentence: dull , loud and far too long .",
];

#[tokio::main]
async fn main() -> anyhow::Result<()> {
    let endpoint = env::args().nth(1).context("usage: embed_texts ENDPOINT")?;
    let cluster = InferenceClient::connect(endpoint).await?;

    // Sent together, they are computed as one batch.
    let embeddings = try_join_all(SENTENCES.map(|text| embed(cluster.clone(), text))).await?;

    for (sentence, embedding) in SENTENCES.iter().zip(&embeddings) {
        let row: Vec<String> = embeddings.iter().map(|other| format!("{:5.2}", cosine(embedding, other))).collect();
        println!("{}  {sentence}", row.join(" "));
    }
    Ok(())
}

/// The mean of the encoder's states over the tokens of `text`: (d_model,).
async fn embed(mut cluster: InferenceClient<Channel>, text: &str) -> anyhow::Result<Vec<f32>> {
    let request = EncodeRequest { text: text.to_owned(), pooling: Pooling::Mean.into(), ..Default::default() };
    let encoding = cluster.encode(request).await?.into_inner();
    let (values, []) = encoding.states.as_chunks::<4>() else {
        bail!("{} bytes are no float32s", encoding.states.len())
    };
    Ok(values.iter().map(|&value| f32::from_le_bytes(value)).collect())
}

/// 1 where two embeddings point the same way, 0 where they have nothing in common.
fn cosine(a: &[f32], b: &[f32]) -> f32 {
    let dot = |x: &[f32], y: &[f32]| x.iter().zip(y).map(|(x, y)| x * y).sum::<f32>();
    dot(a, b) / (dot(a, a) * dot(b, b)).sqrt()
}
