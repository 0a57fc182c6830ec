//! One request of the benchmark: which text, asked how. Called by [`super::load`] for every request.

use std::{
    path::PathBuf,
    sync::atomic::{AtomicBool, Ordering},
    time::Duration,
};

use clap::{Args, ValueEnum};
use futures::TryStreamExt;
use serde::Serialize;
use sida_coordinator::{EncodeParams, Pooling, ScoreParams};
use sida_proto::v1::Trace;
use tonic::Status;

use super::figures::Sample;
use crate::{
    answer_report::routed_instead,
    arguments::{generation::GenerationArguments, routing::RoutingArguments},
    bad_configuration::BadConfiguration,
    coordinator_client::CoordinatorClient,
    text_file,
};

/// What is asked when no file is given: sentences of the length of film reviews.
const BUILT_IN_TEXTS: [&str; 4] = [
    "sst2 sentence: a quiet film that stays with you long after the lights come up .",
    "sst2 sentence: the plot is thin and the jokes are thinner .",
    "sst2 sentence: two hours of noise without a single idea .",
    "sst2 sentence: warm , clever and beautifully played .",
];

/// What a request asks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum, Serialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum Method {
    /// Encoder states, pooled
    Encode,
    /// An answer, token by token
    Generate,
    /// The likelihood of each of --targets
    Score,
}

/// What is asked of which texts.
#[derive(Args, Clone, Debug)]
pub(crate) struct WorkloadArguments {
    /// What a request asks for
    #[arg(long, value_enum, default_value_t = Method::Generate)]
    pub(crate) method: Method,
    /// Texts, one per line [default: four built-in sentences]
    #[arg(long, value_name = "FILE")]
    file: Option<PathBuf>,
    /// Use only so many texts from the beginning of the file; 0: all
    #[arg(long, value_name = "N", default_value_t = 0)]
    texts: usize,
    /// For score: the candidates
    #[arg(long, value_name = "TEXT", value_delimiter = ',', default_value = "negative,positive")]
    targets: Vec<String>,
    #[command(flatten)]
    generation: GenerationArguments,
    #[command(flatten)]
    routing: RoutingArguments,
}

/// Ready to be asked.
pub(crate) struct Workload {
    arguments: WorkloadArguments,
    /// Invariant: not empty.
    texts: Vec<String>,
    /// Whether it was said that answers had no hash table.
    is_told: AtomicBool,
}

impl Workload {
    /// Reads the texts.
    pub(crate) fn open(arguments: WorkloadArguments) -> Result<Self, BadConfiguration> {
        let mut texts = match &arguments.file {
            None => BUILT_IN_TEXTS.map(str::to_owned).to_vec(),
            Some(file) => text_file::lines(file)?,
        };
        if arguments.texts > 0 {
            texts.truncate(arguments.texts);
        }
        Ok(Self { arguments, texts, is_told: AtomicBool::new(false) })
    }

    /// What its requests ask for.
    pub(crate) fn method(&self) -> Method {
        self.arguments.method
    }

    /// How many different texts there are.
    pub(crate) fn texts(&self) -> usize {
        self.texts.len()
    }

    /// Asks the request of a number: texts are taken in turn.
    pub(crate) async fn ask(&self, client: &CoordinatorClient, number: u64) -> Result<Sample, Status> {
        let text = self.texts[(number % self.texts.len() as u64) as usize].clone();
        let routing = self.arguments.routing.into();
        match self.arguments.method {
            Method::Encode => {
                let (prompt, pooling) = (text.into(), Pooling::Mean);
                let params = EncodeParams { prompt, routing, pooling, ..EncodeParams::default() };
                let answer = client.encode(params).await?;
                Ok(self.sample(answer.prompt_tokens.into(), answer.trace))
            }
            Method::Score => {
                let targets = self.arguments.targets.clone();
                let params = ScoreParams { prompt: text.into(), targets, routing, ..ScoreParams::default() };
                let answer = client.score(params).await?;
                let tokens = answer.scores.iter().map(|score| u64::from(score.tokens)).sum();
                Ok(self.sample(tokens, answer.trace))
            }
            Method::Generate => {
                let request = self.arguments.generation.params(text, self.arguments.routing);
                let mut tokens = client.generate(request).await?;
                let mut finish = None;
                while let Some(token) = tokens.try_next().await? {
                    finish = token.finish;
                }
                let finish = finish.ok_or_else(|| Status::data_loss("the answer ended without its last message"))?;
                Ok(self.sample(finish.generated_tokens.into(), finish.trace))
            }
        }
    }

    fn sample(&self, tokens: u64, trace: Option<Trace>) -> Sample {
        let trace = trace.unwrap_or_default();
        if let Some(instead) = routed_instead(&trace)
            && !self.is_told.swap(true, Ordering::Relaxed)
        {
            tracing::warn!("what is measured is not mode hash: {instead}");
        }
        let timings = trace.timings.unwrap_or_default();
        let forward = Duration::from_micros(timings.backbone_us + timings.experts_us + timings.load_us);
        Sample { tokens, forward, hash_hits: trace.hash_hits, hash_misses: trace.hash_misses }
    }
}
