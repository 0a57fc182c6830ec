//! Hash tables from predictor-nodes. A call that takes too long or fails costs the tables only, so it is tried
//! once, and a node that failed is left alone for a while.

use std::{
    ops::Range,
    sync::atomic::{AtomicUsize, Ordering},
    time::{Duration, Instant},
};

use bytes::Bytes;
use parking_lot::Mutex;
use sida_cluster::{
    Cluster,
    member::{Address, Member, Role},
};
use sida_proto::{
    v1::{self, predictor_client::PredictorClient},
    wire::{Bounds, Prediction, Stack},
};
use sida_routing::{Digest, HashTable, NodeId};
use sida_rpc::{ClientConfig, MESSAGE_BYTES_MAX};
use tokio::runtime::Handle;
use tonic::transport::Channel;

/// How long a node that failed is not asked.
const REST: Duration = Duration::from_secs(1);
/// Sequences of one call.
const SEQUENCES_MAX: usize = 64;

/// Asks the predictor-nodes of a cluster in turn.
pub(crate) struct RemotePredictor {
    cluster: Cluster,
    client: ClientConfig,
    runtime: Handle,
    model: Digest,
    bounds: Bounds,
    timeout: Duration,
    state: Mutex<State>,
    next: AtomicUsize,
}

/// What is remembered of the nodes.
#[derive(Default)]
struct State {
    channels: Vec<(NodeId, String, Channel)>,
    resting: Vec<(NodeId, Instant)>,
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
        let (state, next) = Default::default();
        Self { cluster, client, runtime, model, bounds, timeout, state, next }
    }

    /// Tables of the encoder's `layers`, one per sequence.
    pub(crate) fn encode(&self, sequences: &[&[u32]], layers: Range<u16>) -> Option<Vec<HashTable>> {
        self.predict(Stack::Encoder, sequences, &[], layers).map(|prediction| prediction.tables)
    }

    /// Tables of the decoder's `layers` for the new tokens of each sequence, and the states after them.
    pub(crate) fn decode(
        &self,
        sequences: &[&[u32]],
        states: &[Bytes],
        layers: Range<u16>,
    ) -> Option<(Vec<HashTable>, Vec<Bytes>)> {
        self.predict(Stack::Decoder, sequences, states, layers).map(|prediction| (prediction.tables, prediction.states))
    }

    fn predict(&self, stack: Stack, sequences: &[&[u32]], states: &[Bytes], layers: Range<u16>) -> Option<Prediction> {
        let (node, channel) = self.choose()?;
        let calls = sequences.chunks(SEQUENCES_MAX).enumerate().map(|(chunk, sequences)| {
            let first = (chunk * SEQUENCES_MAX).min(states.len());
            let states = &states[first..(first + sequences.len()).min(states.len())];
            let call = self.call(channel.clone(), stack, sequences, states, layers.clone());
            // Within the future: a timer can only be made on the runtime.
            async move { tokio::time::timeout(self.timeout, call).await }
        });
        let all = futures::future::join_all(calls);
        let mut prediction = Prediction { tables: Vec::new(), states: Vec::new() };
        // Called from the threads of `prepare` and the engine, never from the runtime's own.
        for part in self.runtime.block_on(all) {
            match part.unwrap_or_else(|_| Err(format!("no answer within {:?}", self.timeout))) {
                Ok(part) => {
                    prediction.tables.extend(part.tables);
                    prediction.states.extend(part.states);
                }
                Err(reason) => {
                    tracing::warn!(%node, reason, "a predictor-node failed; requests run without hints");
                    self.state.lock().resting.push((node, Instant::now() + REST));
                    return None;
                }
            }
        }
        Some(prediction)
    }

    async fn call(
        &self,
        channel: Channel,
        stack: Stack,
        sequences: &[&[u32]],
        states: &[Bytes],
        layers: Range<u16>,
    ) -> Result<Prediction, String> {
        let mut client = PredictorClient::new(channel).max_decoding_message_size(MESSAGE_BYTES_MAX);
        let request = v1::PredictRequest::new(self.model, stack, sequences, states);
        let response = client.predict(request).await;
        let response = response.map_err(|status| format!("{:?}: {}", status.code(), status.message()))?;
        let lengths: Vec<usize> = sequences.iter().map(|tokens| tokens.len()).collect();
        let response = response.into_inner();
        response.check(&self.bounds, self.model, stack, layers, &lengths).map_err(|error| error.to_string())
    }

    /// The next node in turn that is not resting.
    fn choose(&self) -> Option<(NodeId, Channel)> {
        let now = Instant::now();
        let mut state = self.state.lock();
        state.resting.retain(|(_, until)| *until > now);
        let members = self.cluster.members_of(Role::PredictorNode);
        let rested: Vec<&Member> =
            members.iter().filter(|m| state.resting.iter().all(|(node, _)| *node != m.node)).collect();
        let turn = self.next.fetch_add(1, Ordering::Relaxed);
        let member = rested.get(turn.checked_rem(rested.len())?)?;
        let Address::Grpc(address) = &member.address else { return None };
        if let Some((_, _, channel)) = state.channels.iter().find(|(node, at, _)| *node == member.node && at == address)
        {
            return Some((member.node.clone(), channel.clone()));
        }
        let _in_runtime = self.runtime.enter();
        let channel = match sida_rpc::connect_lazy(address, &self.client) {
            Ok(channel) => channel,
            Err(error) => {
                tracing::warn!(node = %member.node, %error, "a predictor-node cannot be reached");
                state.resting.push((member.node.clone(), now + REST));
                return None;
            }
        };
        state.channels.retain(|(node, _, _)| *node != member.node);
        state.channels.push((member.node.clone(), address.clone(), channel.clone()));
        Some((member.node.clone(), channel))
    }
}
