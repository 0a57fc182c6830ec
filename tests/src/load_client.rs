//! Load as an application makes it, and what became of every request: its id, its tokens, its latency, its longest
//! wait for a token. Each of some workers asks again as soon as it is answered (closed loop); where there are
//! several coordinators, a worker that one refuses or loses goes on with the next.
//!
//! What is right is what the same load returned before anything was broken: generation is greedy, so every token
//! of every request can be compared.

use std::{
    collections::BTreeMap,
    error::Error,
    fmt,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use parking_lot::Mutex;
use sida_proto::v1::{GenerateRequest, RoutingMode, RoutingOptions, inference_client::InferenceClient};
use sida_rpc::Channel;
use tokio::task::JoinHandle;
use tonic::{Code, Request, Status};

/// What is asked, by whom.
#[derive(Clone)]
pub struct Load {
    /// The coordinators.
    pub channels: Vec<Channel>,
    /// The prompts, taken in turn.
    pub texts: Vec<String>,
    /// How each is routed. In modes other than `exact` every request is predicted, and answers differ from the model's own.
    pub mode: RoutingMode,
    /// Tokens of an answer; the end of a sequence ends none sooner.
    pub tokens: u32,
    /// How many ask at the same time.
    pub workers: usize,
}

/// What became of one request.
#[derive(Clone, Debug)]
pub struct Asked {
    /// As sent in `x-request-id`.
    pub id: String,
    /// Which of the texts.
    pub text: usize,
    /// From asking to the last token, on all coordinators that were asked.
    pub latency: Duration,
    /// The longest wait for a token, the first included.
    pub wait_max: Duration,
    /// The tokens, or why there are none.
    pub outcome: Result<Vec<u32>, Status>,
    /// Calls to expert-nodes that went elsewhere, as its trace tells.
    pub failovers: u64,
    /// No prediction was had for some of it.
    pub unpredicted: bool,
    /// Coordinators that refused or lost it before it was answered.
    pub moved: u32,
}

/// Load that runs until it is stopped.
pub struct Running {
    stop: Arc<AtomicBool>,
    asked: Arc<Mutex<Vec<Asked>>>,
    workers: Vec<JoinHandle<()>>,
}

/// What a load returned.
#[derive(Clone, Debug, Default)]
pub struct Report {
    /// Every request.
    pub asked: Vec<Asked>,
    /// Requests made before: their answers count, their latencies do not.
    pub before: Vec<Asked>,
}

impl Load {
    /// Begins to ask.
    pub fn start(&self) -> Running {
        static LOADS: AtomicU64 = AtomicU64::new(0);
        let load = LOADS.fetch_add(1, Ordering::Relaxed);
        let (stop, asked) = (Arc::new(AtomicBool::new(false)), Arc::new(Mutex::new(Vec::new())));
        let next = Arc::new(AtomicU64::new(0));
        let worker = |_| {
            let (this, stop, asked, next) = (self.clone(), stop.clone(), asked.clone(), next.clone());
            tokio::spawn(async move {
                while !stop.load(Ordering::Relaxed) {
                    let number = next.fetch_add(1, Ordering::Relaxed);
                    let one = this.ask(format!("load-{load}-{number}"), number as usize % this.texts.len()).await;
                    asked.lock().push(one);
                }
            })
        };
        let workers = (0..self.workers).map(worker).collect();
        Running { stop, asked, workers }
    }

    /// Asks for `duration`.
    pub async fn run(&self, duration: Duration) -> Report {
        let running = self.start();
        tokio::time::sleep(duration).await;
        running.stop().await
    }

    /// Asks every text once, one after the other.
    pub async fn every_text(&self) -> Report {
        let mut report = Report::default();
        for text in 0..self.texts.len() {
            report.asked.push(self.ask(format!("text-{text}"), text).await);
        }
        report
    }

    /// Asks once, of one coordinator after another until one answers.
    pub async fn ask(&self, id: String, text: usize) -> Asked {
        let start = Instant::now();
        let mut asked = Asked {
            id,
            text,
            latency: Duration::ZERO,
            wait_max: Duration::ZERO,
            outcome: Ok(Vec::new()),
            failovers: 0,
            unpredicted: false,
            moved: 0,
        };
        for channel in &self.channels {
            asked.outcome = self.generate(channel.clone(), &mut asked, start).await;
            // Generation is greedy: asked again, a request gets the same answer.
            match &asked.outcome {
                Err(status) if status.code() == Code::Unavailable || is_of_the_connection(status) => asked.moved += 1,
                _ => break,
            }
        }
        asked.latency = start.elapsed();
        asked
    }

    async fn generate(&self, channel: Channel, asked: &mut Asked, start: Instant) -> Result<Vec<u32>, Status> {
        let mut request = Request::new(GenerateRequest {
            text: self.texts[asked.text].clone(),
            routing: Some(RoutingOptions { mode: self.mode.into(), ..Default::default() }),
            max_tokens: self.tokens,
            ignore_eos: true,
            ..Default::default()
        });
        let id = asked.id.parse().map_err(|_| Status::internal("an id that is no header"))?;
        request.metadata_mut().insert("x-request-id", id);
        let mut stream = InferenceClient::new(channel).generate(request).await?.into_inner();
        let (mut tokens, mut last) = (Vec::new(), start);
        while let Some(token) = stream.message().await? {
            let now = Instant::now();
            asked.wait_max = asked.wait_max.max(now - last);
            last = now;
            tokens.push(token.token_id);
            if let Some(trace) = token.finish.and_then(|finish| finish.trace) {
                (asked.failovers, asked.unpredicted) = (trace.failovers, trace.unpredicted);
            }
        }
        Ok(tokens)
    }
}

impl Running {
    /// How many were asked so far.
    pub fn count(&self) -> usize {
        self.asked.lock().len()
    }

    /// Asks no more; waits for those that are being answered.
    pub async fn stop(self) -> Report {
        self.stop.store(true, Ordering::Relaxed);
        for worker in self.workers {
            worker.await.expect("a worker does not panic");
        }
        Report { asked: std::mem::take(&mut *self.asked.lock()), before: Vec::new() }
    }

    /// The same, printed. Panics unless every request was answered with the tokens of `answers`.
    pub async fn stop_as(self, answers: &BTreeMap<usize, Vec<u32>>) {
        let report = self.stop().await;
        println!("{report}");
        report.assert_as(answers);
    }
}

impl Report {
    /// The answer to every text, which must be one.
    pub fn answers(&self) -> BTreeMap<usize, Vec<u32>> {
        let mut answers = BTreeMap::new();
        for asked in self.before.iter().chain(&self.asked) {
            let tokens = asked.outcome.as_ref().unwrap_or_else(|status| panic!("{}: {status}", asked.id));
            let known = answers.entry(asked.text).or_insert_with(|| tokens.clone());
            assert_eq!(known, tokens, "{} was answered otherwise before", asked.id);
        }
        answers
    }

    /// Requests that failed.
    pub fn errors(&self) -> Vec<&Asked> {
        self.asked.iter().filter(|asked| asked.outcome.is_err()).collect()
    }

    /// Requests whose tokens are not those of `answers`.
    pub fn changed(&self, answers: &BTreeMap<usize, Vec<u32>>) -> Vec<&Asked> {
        let differs =
            |asked: &&Asked| asked.outcome.as_ref().is_ok_and(|tokens| answers.get(&asked.text) != Some(tokens));
        self.asked.iter().filter(differs).collect()
    }

    /// Panics unless every request was answered with the tokens of `answers`.
    pub fn assert_as(&self, answers: &BTreeMap<usize, Vec<u32>>) {
        let (errors, changed) = (self.errors(), self.changed(answers));
        assert!(errors.is_empty(), "{} of {} failed, first {:?}", errors.len(), self.asked.len(), errors[0]);
        assert!(changed.is_empty(), "{} of {} changed, first {:?}", changed.len(), self.asked.len(), changed[0]);
    }

    /// The share `quantile` of all requests took at most so long; 1 is the longest.
    pub fn latency(&self, quantile: f64) -> Duration {
        quantile_of(self.asked.iter().map(|asked| asked.latency).collect(), quantile)
    }

    /// The same of the longest waits for a token.
    pub fn wait(&self, quantile: f64) -> Duration {
        quantile_of(self.asked.iter().map(|asked| asked.wait_max).collect(), quantile)
    }

    /// Calls to expert-nodes that went elsewhere, over all requests.
    pub fn failovers(&self) -> u64 {
        self.asked.iter().map(|asked| asked.failovers).sum()
    }
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (count, errors, failovers) = (self.asked.len(), self.errors().len(), self.failovers());
        write!(f, "{count} requests, {errors} errors, {failovers} failovers seen;")?;
        for (name, of) in [("latency", Self::latency as fn(&Self, f64) -> Duration), ("longest wait", Self::wait)] {
            let at = |quantile| of(self, quantile).as_secs_f64() * 1e3;
            write!(f, " {name} p50 {:.1} p99 {:.1} p99.9 {:.1} max {:.1} ms;", at(0.5), at(0.99), at(0.999), at(1.0))?;
        }
        Ok(())
    }
}

/// Whether it was the connection that ended rather than a server that answered: what a server says has no cause here.
fn is_of_the_connection(status: &Status) -> bool {
    status.source().is_some()
}

fn quantile_of(mut durations: Vec<Duration>, quantile: f64) -> Duration {
    durations.sort();
    let at = ((durations.len() as f64 * quantile).ceil() as usize).clamp(1, durations.len().max(1)) - 1;
    durations.get(at).copied().unwrap_or_default()
}
