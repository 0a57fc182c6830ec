//! A running coordinator, as a handle: it takes requests from this process (the command line, tests) and from the
//! doors, and gives back answers. [`crate::start`] makes one; dropping the last clone answers what was accepted and
//! ends the threads.

use std::{
    sync::{Arc, atomic::Ordering},
    thread::JoinHandle,
    time::{Duration, Instant},
};

use futures::future::try_join_all;
use parking_lot::Mutex;
use sida_cluster::Cluster;
use sida_model::{CacheSize, Checkpoint, ModelError, Tokenizer};
use sida_routing::Digest;
use sida_rpc::Client;
use sida_telemetry::TraceContext;
use tokio::sync::{mpsc, oneshot};

use crate::{
    answer::{
        catch_panic::catch_panic,
        grammar::Followed,
        output::{Encoding, Scores},
        request_error::{RequestError, TextOf},
        token_stream::TokenStream,
    },
    config::CoordinatorConfig,
    dispatch::{nodes::Nodes, probe::Probe},
    intake::{
        accept::{Acceptance, EncodeParams, GenerateParams, ScoreParams, within},
        client_uses::ClientUses,
        grammars::Grammars,
        replay::Replay,
        request::Work,
        request_queue::RequestQueue,
        request_span::RequestSpan,
        together::Together,
    },
    measures::{metrics::Metrics, statistics::Statistics},
    predict::predict::Predict,
};

pub(crate) mod read_prompt;
mod submit;

use submit::{Asked, Terms, TokenizedPrompt};

/// A step that takes longer hangs: the expert calls in it end well before.
const STUCK_LIMIT: Duration = Duration::from_secs(600);
/// Requests that arrive together run together, unless the text of one takes longer to tokenize than this much does: a
/// fraction of a millisecond.
const AWAITED_TEXT_BYTES_MAX: usize = 2048;

/// A running coordinator. Cheap to clone; all clones are the same one.
#[derive(Clone)]
pub struct Coordinator {
    pub(crate) inner: Arc<Inner>,
}

/// What the clones of a coordinator share.
pub(crate) struct Inner {
    pub(crate) config: CoordinatorConfig,
    pub(crate) cluster: Cluster,
    pub(crate) tokenizer: Arc<Tokenizer>,
    pub(crate) grammars: Grammars,
    /// What sequences take of the memory of what computes.
    pub(crate) cache_size: CacheSize,
    pub(crate) nodes: Arc<Nodes>,
    pub(crate) predict: Arc<Predict>,
    pub(crate) probe: Arc<Probe>,
    pub(crate) requests: Arc<RequestQueue>,
    /// Recorded routes that requests replay.
    pub(crate) replay: Option<Replay>,
    pub(crate) client_uses: Arc<ClientUses>,
    pub(crate) statistics: Arc<Statistics>,
    pub(crate) metrics: Arc<Metrics>,
    pub(crate) threads: Mutex<Vec<JoinHandle<()>>>,
}

impl Drop for Inner {
    fn drop(&mut self) {
        // The threads answer what is queued, then end by themselves.
        self.requests.close();
    }
}

impl Coordinator {
    /// The encoder's states of a text.
    pub async fn encode(&self, params: EncodeParams) -> Result<Encoding, RequestError> {
        self.encode_together(params, None).await
    }

    /// The same of one of the requests of a call.
    async fn encode_together(
        &self,
        mut params: EncodeParams,
        together: Option<Arc<Together>>,
    ) -> Result<Encoding, RequestError> {
        let request_span = self.begin_span("embeddings", params.trace, params.client.as_ref())?;
        let deadline = self.deadline(params.deadline);
        let (prompt, truncates) = (std::mem::take(&mut params.prompt), params.truncate);
        let asked = Asked { prompt, truncates, behind: 0, target_bytes: 0 };
        let (reply, answer) = oneshot::channel();
        let queue = move |this: &Self, prompt: TokenizedPrompt| {
            let options = this.acceptance().encoding(&params, prompt.tokens.truncated)?;
            let EncodeParams { routing: mode, client, priority, .. } = params;
            let terms = Terms { mode, deadline, client, priority, together };
            this.submit(prompt, terms, Work::Encode { options, reply })
        };
        let answered = async {
            self.tokenize_then(request_span, asked, queue).await?;
            answer.await.unwrap_or(Err(RequestError::Panicked))
        };
        until(deadline, answered).await
    }

    /// The encoder's states of several texts, which are requests of their own that run together as far as they fit one
    /// pass. All are answered or none: the first that fails is named, and the others are cancelled.
    pub async fn encode_all(&self, all: Vec<EncodeParams>) -> Result<Vec<Encoding>, RequestError> {
        within("texts (their number)", all.len(), 1, self.config().request_limits.texts_max)?;
        self.may_wait("texts (their number)", all.len())?;
        self.may_ask(all.first().and_then(|params| params.client.as_ref()), all.len())?;
        let (count, together) = (all.len(), Together::new(all.len()));
        let encoded = all.into_iter().zip(1..).map(|(params, number)| {
            let encoded = self.encode_together(params, Some(together.clone()));
            async move { encoded.await.map_err(|error| error.of_one(number, count)) }
        });
        try_join_all(encoded).await
    }

    /// The likelihood of each target given a text.
    pub async fn score(&self, params: ScoreParams) -> Result<Scores, RequestError> {
        let request_span = self.begin_span("score", params.trace, params.client.as_ref())?;
        let ScoreParams { prompt, targets, routing: mode, deadline, client, priority, .. } = params;
        let deadline = self.deadline(deadline);
        let target_bytes = targets.iter().map(String::len).sum::<usize>();
        let asked = Asked { prompt, truncates: false, behind: 1, target_bytes };
        let (reply, answer) = oneshot::channel();
        let queue = move |this: &Self, prompt: TokenizedPrompt| {
            let targets = this.acceptance().targets(prompt.tokens.ids.len(), &targets)?;
            let work = Work::Score { targets, top_count: None, reply: Some(reply) };
            this.submit(prompt, Terms { mode, deadline, client, priority, together: None }, work)
        };
        let answered = async {
            self.tokenize_then(request_span, asked, queue).await?;
            answer.await.unwrap_or(Err(RequestError::Panicked))
        };
        until(deadline, answered).await
    }

    /// Generates text: one answer, or as many as there are choices.
    pub async fn generate(&self, params: GenerateParams) -> Result<TokenStream, RequestError> {
        self.generate_together(params, None).await
    }

    /// Generates texts for several prompts, which one client asks for in one call: all of them or none.
    pub(crate) async fn generate_all(&self, all: Vec<GenerateParams>) -> Result<Vec<TokenStream>, RequestError> {
        self.may_wait("prompts (their number)", all.len())?;
        self.may_ask(all.first().and_then(|params| params.client.as_ref()), all.len())?;
        let (count, together) = (all.len(), Together::new(all.len()));
        let generated = all.into_iter().zip(1..).map(|(params, number)| {
            let generated = self.generate_together(params, Some(together.clone()));
            async move { generated.await.map_err(|error| error.of_one(number, count)) }
        });
        try_join_all(generated).await
    }

    /// Refuses a call of more requests than may ever wait: it would be told for ever to come again.
    pub(crate) fn may_wait(&self, what: &'static str, requests: usize) -> Result<(), RequestError> {
        within(what, requests, 1, self.config().limits.queue_max).map(drop)
    }

    /// Generates text for one of the requests of a call.
    async fn generate_together(
        &self,
        mut params: GenerateParams,
        together: Option<Arc<Together>>,
    ) -> Result<TokenStream, RequestError> {
        let request_span = self.begin_span("text_completion", params.trace, params.client.as_ref())?;
        let deadline = self.deadline(params.deadline);
        let unfinished = params.choices.max(1);
        let prompt = std::mem::take(&mut params.prompt);
        let asked = Asked { prompt, truncates: false, behind: 1, target_bytes: 0 };
        let followed = params.json_schema.take().map(Followed::JsonSchema);
        let grammar = match followed.or_else(|| params.tool_calls.take().map(Followed::ToolCalls)) {
            Some(followed) => Some(until(deadline, self.inner.grammars.of(followed)).await?),
            None => None,
        };
        let (reply, answer) = mpsc::unbounded_channel();
        let queue = move |this: &Self, mut prompt: TokenizedPrompt| {
            let options = this.acceptance().options(&mut params, prompt.tokens.ids.len(), grammar)?;
            prompt.request_span.describe(&options);
            let GenerateParams { routing: mode, client, priority, .. } = params;
            let terms = Terms { mode, deadline, client, priority, together };
            this.submit(prompt, terms, Work::Generate { options, reply })
        };
        until(deadline, self.tokenize_then(request_span, asked, queue)).await?;
        let deadline = deadline.map(|deadline| Box::pin(tokio::time::sleep_until(deadline.into())));
        Ok(TokenStream { tokens: Some(answer), unfinished, deadline })
    }

    /// The tokens of a text as a prompt, however many they are; or, without `special_tokens`, of what is written and nothing
    /// else, for a text that says itself what it begins and ends with.
    pub async fn tokenize(&self, text: &str, special_tokens: bool) -> Result<Vec<u32>, RequestError> {
        type Encode = fn(&Tokenizer, &str) -> Result<Vec<u32>, ModelError>;
        let encode: Encode = if special_tokens { Tokenizer::encode } else { Tokenizer::encode_as_written };
        let (bytes, text) = (text.len(), text.to_owned());
        self.off_thread(bytes, move |this| this.acceptance().tokenize_by(&text, TextOf::Prompt, encode)).await
    }

    /// The text of tokens, as an answer of them has it. So many at most as a text may have bytes.
    pub async fn detokenize(&self, tokens: &[u32]) -> Result<String, RequestError> {
        let limit = self.config().request_limits.text_bytes_max;
        within("tokens (their number)", tokens.len(), 0, limit)?;
        let tokens = self.acceptance().in_vocabulary(tokens.to_vec())?;
        self.off_thread(tokens.len(), move |this| Ok(this.inner.tokenizer.decode(&tokens)?)).await
    }

    /// The text that one token has behind others, of a special token its name: what is shown of tokens one by one.
    pub fn token_text(&self, token: u32) -> Result<String, RequestError> {
        let token = self.acceptance().in_vocabulary(vec![token])?[0];
        Ok(self.inner.tokenizer.token_text(token)?)
    }

    /// Whether all threads run, the device is not lost, and no step has taken longer than any step does.
    pub fn is_alive(&self) -> bool {
        let run = self.inner.threads.lock().iter().all(|thread| !thread.is_finished());
        run && !self.is_device_lost() && self.inner.statistics.stuck_for() < STUCK_LIMIT
    }

    fn is_device_lost(&self) -> bool {
        self.inner.statistics.is_device_lost.load(Ordering::Relaxed)
    }

    /// Whether there are expert-nodes to ask, and the device and the steps are as they should be: as the health check finds, but
    /// without a call of its own.
    pub(crate) fn can_answer(&self) -> bool {
        let (roster, now) = (self.inner.nodes.roster(), self.inner.nodes.clock().now());
        let is_up = roster.links.is_empty() || roster.links.iter().any(|link| link.is_up(now));
        is_up && self.is_alive() && self.inner.statistics.outcomes.failing(Instant::now()).is_none()
    }

    /// Whether the node serves, as its last health check found, and is not ending. Answered at once but before the first one.
    pub(crate) async fn is_ready(&self) -> bool {
        self.config().server.readiness.is_ready_once_checked().await
    }

    /// Whether an expert call succeeds, and steps have not failed again and again. The health check asks this.
    pub async fn probe(&self) -> Result<(), String> {
        if self.is_device_lost() {
            return Err("the device is lost".to_owned());
        }
        if let Some(reason) = self.inner.statistics.outcomes.failing(Instant::now()) {
            return Err(reason);
        }
        let probe = self.inner.probe.clone();
        let outcome = tokio::task::spawn_blocking(move || probe.run()).await;
        outcome.unwrap_or_else(|error| Err(format!("the probe ended: {error}")))
    }

    /// Takes no more requests, answers those that were taken, and ends threads and lanes.
    pub async fn stop(&self) {
        self.inner.requests.close();
        let threads = std::mem::take(&mut *self.inner.threads.lock());
        let join = move || threads.into_iter().filter_map(|thread| thread.join().err()).count();
        // A thread of ours catches the panics of its work, so one that ended by a panic is a bug to be told.
        match tokio::task::spawn_blocking(join).await {
            Ok(0) => {}
            Ok(panicked) => tracing::error!(panicked, "threads of the coordinator had panicked"),
            Err(error) => tracing::error!(%error, "cannot wait for the coordinator's threads"),
        }
        self.inner.nodes.close();
    }

    /// The configuration that this coordinator was started with.
    pub fn config(&self) -> &CoordinatorConfig {
        &self.inner.config
    }

    /// The model that this coordinator serves.
    pub fn checkpoint(&self) -> &Arc<Checkpoint> {
        &self.inner.config.checkpoint
    }

    /// The cluster that this coordinator is part of.
    pub fn cluster(&self) -> &Cluster {
        &self.inner.cluster
    }

    /// The digest of the predictor, where that is in this process.
    pub fn predictor_digest(&self) -> Option<Digest> {
        self.inner.predict.digest()
    }

    pub(crate) fn statistics(&self) -> &Statistics {
        &self.inner.statistics
    }

    pub(crate) fn queued(&self) -> usize {
        self.inner.requests.len()
    }

    fn acceptance(&self) -> Acceptance<'_> {
        let Inner { config, cache_size, tokenizer, .. } = &*self.inner;
        let (limits, batch) = (&config.request_limits, &config.limits);
        Acceptance { limits, batch, cache_size: *cache_size, tokenizer, model: config.checkpoint.config() }
    }

    /// Does the tokenizer's work for so many bytes or tokens: here where it is little, else on a thread for blocking work.
    async fn off_thread<T: Send + 'static>(
        &self,
        length: usize,
        work: impl FnOnce(&Self) -> Result<T, RequestError> + Send + 'static,
    ) -> Result<T, RequestError> {
        if length <= AWAITED_TEXT_BYTES_MAX {
            return catch_panic(|| work(self));
        }
        let this = self.clone();
        let done = tokio::task::spawn_blocking(move || catch_panic(|| work(&this))).await;
        done.unwrap_or(Err(RequestError::Panicked))
    }

    /// Until when an answer is of use: what the caller says, or else what is set for those who say nothing.
    fn deadline(&self, given: Option<Instant>) -> Option<Instant> {
        given.or_else(|| Some(Instant::now() + self.config().request_limits.timeout?))
    }

    /// Refuses a call of so many requests of a `client` that its limits do not allow together: none of them is begun.
    pub(crate) fn may_ask(&self, client: Option<&Client>, requests: usize) -> Result<(), RequestError> {
        self.inner.client_uses.may_come(client, requests)
    }

    /// Begins the span of a `client`'s request for an `operation`, if it may have one more.
    fn begin_span(
        &self,
        operation: &'static str,
        caller: Option<TraceContext>,
        client: Option<&Client>,
    ) -> Result<RequestSpan, RequestError> {
        self.may_ask(client, 1)?;
        Ok(RequestSpan::begin(operation, self.checkpoint().name(), caller, client))
    }
}

/// An answer that is of use until a deadline. Then its caller is told so at once, whatever the model is doing.
async fn until<T>(
    deadline: Option<Instant>,
    answer: impl Future<Output = Result<T, RequestError>>,
) -> Result<T, RequestError> {
    match deadline {
        None => answer.await,
        Some(deadline) => {
            let answer = tokio::time::timeout_at(deadline.into(), answer).await;
            answer.unwrap_or(Err(RequestError::DeadlineExceeded))
        }
    }
}
