//! Hash tables from predictor-nodes. A call that takes too long or fails costs the tables only: another node is asked
//! if there is time left, and if none answers, requests run without hints.
//!
//! A predictor-node that hangs must not cost every request its timeout. So a node that failed gets no calls while its
//! breaker is open (`sida_routing::failover`), and no request is spent on finding out whether it is back: a task of its
//! own asks the node to describe itself, and calls go to the node again once it answers. A node whose net reads the model's
//! input predicts prompts only, which is not held against it.

use std::{
    ops::Range,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::{Duration, Instant},
};

use bytes::Bytes;
use parking_lot::{Mutex, MutexGuard};
use sida_cluster::{
    Cluster,
    member::{Address, Member, Role},
};
use sida_proto::{
    v1::{self, predictor_client::PredictorClient},
    wire::{Bounds, Prediction, Stack},
};
use sida_routing::{Digest, HashTable, Labels, NodeId, failover::Breaker};
use sida_rpc::{Channel, ClientConfig, MESSAGE_BYTES_MAX, trace};
use sida_telemetry::{Span, TraceContext};
use tokio::runtime::Handle;
use tonic::{Code, Request};

/// How often a node that failed is asked whether it is back.
const ASK_PERIOD: Duration = Duration::from_millis(250);
/// Nodes that are asked for one prediction at most.
const ATTEMPTS_MAX: usize = 2;
/// How long a node whose net reads the model's input, and so predicts no steps, is not asked for them. By then it may
/// have been started with another predictor.
const STEPS_REFUSED: Duration = Duration::from_secs(60);
/// Sequences of one call.
const SEQUENCES_MAX: usize = 64;
/// How long a node may take for what nobody waits for.
const TEACH_PATIENCE: Duration = Duration::from_secs(5);

/// Asks the predictor-nodes of a cluster in turn.
pub(crate) struct RemotePredictor {
    cluster: Cluster,
    client: ClientConfig,
    runtime: Handle,
    model: Digest,
    bounds: Bounds,
    timeout: Duration,
    /// Links to the nodes that were asked.
    links: Mutex<Vec<Arc<Link>>>,
    next: AtomicUsize,
    /// Breakers count time from here.
    origin: Instant,
}

/// One predictor-node.
pub(crate) struct Link {
    node: NodeId,
    address: String,
    /// Made anew while the node is away, with the certificates and the key that are there then.
    channel: Mutex<Channel>,
    state: Mutex<LinkState>,
}

/// What is known of a node's health.
#[derive(Default)]
struct LinkState {
    breaker: Breaker,
    /// The node failed and has not answered since.
    is_away: bool,
    /// When, after the origin, it said that it predicts no steps.
    refused_steps: Option<Duration>,
}

/// Why a node gave no prediction.
enum Failure {
    /// It is sound, and its net reads what calls do not carry.
    NoSteps(String),
    /// Anything else.
    Failed(String),
}

impl From<String> for Failure {
    fn from(reason: String) -> Self {
        Self::Failed(reason)
    }
}

/// What is asked for: tables of `layers` for `sequences`.
#[derive(Clone)]
struct Ask<'a> {
    stack: Stack,
    sequences: &'a [&'a [u32]],
    /// The predictor's state of each sequence; none for the encoder.
    states: &'a [Bytes],
    layers: Range<u16>,
    trace: Option<TraceContext>,
}

impl RemotePredictor {
    /// Predictions for `model`, whose extent is `bounds`. Each may take `timeout`; `runtime` carries the calls.
    pub(crate) fn new(
        cluster: Cluster,
        client: ClientConfig,
        runtime: Handle,
        model: Digest,
        bounds: Bounds,
        timeout: Duration,
    ) -> Self {
        let (links, next) = Default::default();
        Self { cluster, client, runtime, model, bounds, timeout, links, next, origin: Instant::now() }
    }

    /// Tables of the encoder's `layers`, one per sequence.
    pub(crate) fn encode(
        &self,
        sequences: &[&[u32]],
        layers: Range<u16>,
        trace: Option<TraceContext>,
    ) -> Option<Vec<HashTable>> {
        let ask = Ask { stack: Stack::Encoder, sequences, states: &[], layers, trace };
        self.predict(&ask).map(|prediction| prediction.tables)
    }

    /// Tables of the decoder's `layers` for the new tokens of each sequence, and the states after them.
    pub(crate) fn decode(
        &self,
        sequences: &[&[u32]],
        states: &[Bytes],
        layers: Range<u16>,
        trace: Option<TraceContext>,
    ) -> Option<(Vec<HashTable>, Vec<Bytes>)> {
        let ask = Ask { stack: Stack::Decoder, sequences, states, layers, trace };
        self.predict(&ask).map(|prediction| (prediction.tables, prediction.states))
    }

    fn predict(&self, ask: &Ask<'_>) -> Option<Prediction> {
        let deadline = Instant::now() + self.timeout;
        for _ in 0..ATTEMPTS_MAX {
            let link = self.choose(ask.stack)?;
            match self.ask(&link, ask, deadline) {
                Ok(prediction) => {
                    link.state.lock().breaker.succeeded(self.origin.elapsed());
                    return Some(prediction);
                }
                Err(Failure::NoSteps(reason)) => {
                    tracing::warn!(node = %link.node, reason, "a predictor-node predicts no steps of the decoder");
                    let now = self.origin.elapsed();
                    let mut state = link.state.lock();
                    state.breaker.succeeded(now);
                    state.refused_steps = Some(now);
                }
                Err(Failure::Failed(reason)) => {
                    tracing::warn!(node = %link.node, reason, "a predictor-node failed");
                    self.failed(link);
                }
            }
            if Instant::now() >= deadline {
                break;
            }
        }
        tracing::warn!("no predictor-node answered; requests run without hints");
        None
    }

    /// Asks one node, until `deadline`.
    fn ask(&self, link: &Link, ask: &Ask<'_>, deadline: Instant) -> Result<Prediction, Failure> {
        let Ask { sequences, states, .. } = ask;
        link.state.lock().breaker.begin(self.origin.elapsed());
        let calls = sequences.chunks(SEQUENCES_MAX).enumerate().map(|(chunk, sequences)| {
            let first = (chunk * SEQUENCES_MAX).min(states.len());
            let states = &states[first..(first + sequences.len()).min(states.len())];
            let call = self.call(link, Ask { sequences, states, ..ask.clone() });
            // The timer is made within the future, because it can only be made on the runtime.
            async move { tokio::time::timeout_at(deadline.into(), call).await }
        });
        let all = futures::future::join_all(calls);
        let mut prediction = Prediction { tables: Vec::new(), states: Vec::new() };
        // Blocking is allowed: this runs on the threads of `prepare` and the scheduler, never on the runtime's own.
        for part in self.runtime.block_on(all) {
            let part = part.unwrap_or_else(|_| Err(format!("no answer within {:?}", self.timeout).into()))?;
            prediction.tables.extend(part.tables);
            prediction.states.extend(part.states);
        }
        Ok(prediction)
    }

    /// Leaves a node alone until it answers again.
    fn failed(&self, link: Arc<Link>) {
        let mut state = link.state.lock();
        state.breaker.failed(self.origin.elapsed());
        if std::mem::replace(&mut state.is_away, true) {
            return;
        }
        drop(state);
        let (away, patience, client) = (Arc::downgrade(&link), self.timeout, self.client.clone());
        self.runtime.spawn(async move {
            loop {
                tokio::time::sleep(ASK_PERIOD).await;
                let Some(link) = away.upgrade() else { return };
                let Ok(channel) = sida_rpc::connect_lazy(&link.address, &client) else { continue };
                let mut asking = PredictorClient::new(channel.clone());
                let described = asking.describe(v1::DescribePredictorRequest {});
                if let Ok(Ok(_)) = tokio::time::timeout(patience, described).await {
                    *link.channel.lock() = channel;
                    link.state.lock().is_away = false;
                    return;
                }
            }
        });
    }

    async fn call(&self, link: &Link, ask: Ask<'_>) -> Result<Prediction, Failure> {
        let Ask { stack, sequences, states, layers, trace } = ask;
        let span = trace.map(|trace| Span::below(trace, "sida.v1.Predictor/Predict").as_client());
        let mut client = PredictorClient::new(link.channel.lock().clone()).max_decoding_message_size(MESSAGE_BYTES_MAX);
        let mut request = Request::new(v1::PredictRequest::new(self.model, stack, sequences, states));
        if let Some(span) = &span {
            trace::pass_on(span.context(), request.metadata_mut());
        }
        let response = client.predict(request).await;
        let response = response.map_err(|status| {
            let reason = format!("{:?}: {}", status.code(), status.message());
            match (stack, status.code()) {
                (Stack::Decoder, Code::Unimplemented) => Failure::NoSteps(reason),
                _ => Failure::Failed(reason),
            }
        })?;
        drop(span);
        let lengths: Vec<usize> = sequences.iter().map(|tokens| tokens.len()).collect();
        let response = response.into_inner();
        let checked = response.check(&self.bounds, self.model, stack, layers, &lengths);
        checked.map_err(|error| error.to_string().into())
    }

    /// What carries the calls.
    pub(crate) fn runtime(&self) -> &Handle {
        &self.runtime
    }

    /// The nodes that learn from what this model's routers choose, as far as they answer in time.
    pub(crate) async fn learners(&self) -> Vec<Arc<Link>> {
        let links = self.follow_members().clone();
        let learns = links.into_iter().map(|link| async move {
            let mut client = PredictorClient::new(link.channel.lock().clone());
            let described = client.describe(v1::DescribePredictorRequest {});
            let described = tokio::time::timeout(TEACH_PATIENCE, described).await.ok()?.ok()?.into_inner();
            (described.learns && described.model_digest == self.model.0[..]).then_some(link)
        });
        futures::future::join_all(learns).await.into_iter().flatten().collect()
    }

    /// Tells a node what the routers of a stack chose.
    pub(crate) async fn teach(&self, link: &Link, stack: Stack, labels: &[Labels]) -> Result<(), String> {
        let mut client = PredictorClient::new(link.channel.lock().clone());
        let told = client.learn(v1::LearnRequest::new(self.model, stack, labels));
        match tokio::time::timeout(TEACH_PATIENCE, told).await {
            Ok(Ok(_)) => Ok(()),
            Ok(Err(status)) => Err(format!("{}: {:?}: {}", link.node, status.code(), status.message())),
            Err(_) => Err(format!("{}: no answer within {TEACH_PATIENCE:?}", link.node)),
        }
    }

    /// A link to each predictor-node that is a member now.
    fn follow_members(&self) -> MutexGuard<'_, Vec<Arc<Link>>> {
        let mut links = self.links.lock();
        let members = self.cluster.members_of(Role::PredictorNode);
        links.retain(|link| members.iter().any(|member| leads_to(link, member)));
        for member in &members {
            if !links.iter().any(|link| leads_to(link, member)) {
                links.extend(self.link(member));
            }
        }
        links
    }

    /// The next node in turn that may be asked for predictions of a stack.
    fn choose(&self, stack: Stack) -> Option<Arc<Link>> {
        let links = self.follow_members();
        let now = self.origin.elapsed();
        let may_be_asked = |link: &&Arc<Link>| {
            let state = link.state.lock();
            let refuses = |refused: Duration| stack == Stack::Decoder && now < refused + STEPS_REFUSED;
            !state.is_away && state.breaker.allows(now) && !state.refused_steps.is_some_and(refuses)
        };
        let up: Vec<&Arc<Link>> = links.iter().filter(may_be_asked).collect();
        let turn = self.next.fetch_add(1, Ordering::Relaxed);
        up.get(turn.checked_rem(up.len())?).map(|link| Arc::clone(link))
    }

    /// A way to a member, if its address can be one.
    fn link(&self, member: &Member) -> Option<Arc<Link>> {
        let Address::Grpc(address) = &member.address else { return None };
        let _in_runtime = self.runtime.enter();
        match sida_rpc::connect_lazy(address, &self.client) {
            Ok(channel) => {
                let (node, address) = (member.node.clone(), address.clone());
                Some(Arc::new(Link { node, address, channel: Mutex::new(channel), state: Mutex::default() }))
            }
            Err(error) => {
                tracing::warn!(node = %member.node, %error, "a predictor-node cannot be reached");
                None
            }
        }
    }
}

fn leads_to(link: &Link, member: &Member) -> bool {
    link.node == member.node && matches!(&member.address, Address::Grpc(address) if *address == link.address)
}
