//! One request of the benchmark: which text, asked how. Called by [`super::load`] for every request.

use std::{
    path::PathBuf,
    sync::atomic::{AtomicBool, Ordering},
    time::{Duration, Instant},
};

use clap::{Args, ValueEnum};
use futures::TryStreamExt;
use serde::Serialize;
use sida_coordinator::{EncodeParams, GenerateParams, Pooling, ScoreParams};
use sida_proto::v1::Trace;
use tonic::Status;

use super::{
    answer::{Answer, Failure, Pace},
    prompts::{self, Prompt},
    subject::Asked,
};
use crate::{
    answer_report::routed_instead,
    arguments::{generation::GenerationArguments, routing::RoutingArguments},
    bad_configuration::BadConfiguration,
    coordinator_client::CoordinatorClient,
};

/// What a request asks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum, Serialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum Method {
    /// Encoder states, pooled; with --url an embedding
    Encode,
    /// An answer, token by token
    Generate,
    /// With --url: the same, asked as a chat
    Chat,
    /// The likelihood of each of --targets
    Score,
}

impl Method {
    /// Whether tokens come one after another.
    pub(crate) fn generates(self) -> bool {
        matches!(self, Self::Generate | Self::Chat)
    }
}

/// What is asked of which texts.
#[derive(Args, Clone, Debug)]
pub(crate) struct WorkloadArguments {
    /// What a request asks for
    #[arg(long, value_enum, default_value_t = Method::Generate)]
    pub(crate) method: Method,
    /// Texts: a line each, or JSON, an object a line with `prompt` or `text`, and `max_tokens` for an answer of its own length
    /// [default: four built-in sentences]
    #[arg(long, value_name = "FILE", visible_alias = "file")]
    prompts: Option<PathBuf>,
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
    prompts: Vec<Prompt>,
    /// Whether it was said that answers had no hash table.
    is_told: AtomicBool,
}

impl Workload {
    /// Reads the texts.
    pub(crate) fn open(arguments: WorkloadArguments) -> Result<Self, BadConfiguration> {
        let mut prompts = match &arguments.prompts {
            None => prompts::built_in(),
            Some(file) => prompts::of_file(file)?,
        };
        if arguments.texts > 0 {
            prompts.truncate(arguments.texts);
        }
        Ok(Self { arguments, prompts, is_told: AtomicBool::new(false) })
    }

    /// What its requests ask for.
    pub(crate) fn method(&self) -> Method {
        self.arguments.method
    }

    /// How many different texts there are.
    pub(crate) fn texts(&self) -> usize {
        self.prompts.len()
    }

    /// Asks the request of a number, which is given up after `timeout`: texts are taken in turn.
    pub(crate) async fn ask(&self, asked: &Asked, number: u64, timeout: Duration) -> Result<Answer, Failure> {
        let prompt = &self.prompts[(number % self.prompts.len() as u64) as usize];
        let mut params = self.arguments.generation.params(prompt.text.clone(), self.arguments.routing);
        // Servers are told, so that they do not work for nobody, as clients of gRPC do.
        params.deadline = Some(Instant::now() + timeout);
        params.max_tokens = prompt.max_tokens.unwrap_or(params.max_tokens);
        match asked {
            Asked::Cluster(client) => Ok(self.ask_cluster(client, prompt.text.clone(), params).await?),
            Asked::Url(server) => server.ask(self.arguments.method, &prompt.text, &params).await,
        }
    }

    async fn ask_cluster(
        &self,
        client: &CoordinatorClient,
        text: String,
        params: GenerateParams,
    ) -> Result<Answer, Status> {
        let (routing, deadline) = (params.routing, params.deadline);
        match self.arguments.method {
            Method::Encode => {
                let (prompt, pooling) = (text.into(), Pooling::Mean);
                let params = EncodeParams { prompt, routing, pooling, deadline, ..EncodeParams::default() };
                let answer = client.encode(params).await?;
                Ok(self.answer(answer.prompt_tokens.into(), Pace::default(), answer.trace))
            }
            Method::Score => {
                let targets = self.arguments.targets.clone();
                let prompt = text.into();
                let params = ScoreParams { prompt, targets, routing, deadline, ..ScoreParams::default() };
                let answer = client.score(params).await?;
                let tokens = answer.scores.iter().map(|score| u64::from(score.tokens)).sum();
                Ok(self.answer(tokens, Pace::default(), answer.trace))
            }
            Method::Generate | Method::Chat => {
                let mut tokens = client.generate(params).await?;
                let (mut pace, mut finish) = (Pace::default(), None);
                while let Some(token) = tokens.try_next().await? {
                    pace.came(Instant::now());
                    finish = token.finish;
                }
                let finish = finish.ok_or_else(|| Status::data_loss("the answer ended without its last message"))?;
                Ok(self.answer(finish.generated_tokens.into(), pace, finish.trace))
            }
        }
    }

    fn answer(&self, tokens: u64, pace: Pace, trace: Option<Trace>) -> Answer {
        let trace = trace.unwrap_or_default();
        if let Some(instead) = routed_instead(&trace)
            && !self.is_told.swap(true, Ordering::Relaxed)
        {
            tracing::warn!("what is measured is not the mode that was asked for: {instead}");
        }
        let timings = trace.timings.unwrap_or_default();
        let forward = Duration::from_micros(timings.backbone_us + timings.experts_us + timings.load_us);
        Answer { tokens, pace, forward: Some(forward), hash_hits: trace.hash_hits, hash_misses: trace.hash_misses }
    }
}
