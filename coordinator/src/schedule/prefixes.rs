//! Prompts that begin as others did: a sequence that starts takes the keys and values of the tokens that it shares with
//! another one, of the same client, that runs or has ended. `routing::prefix_cache` decides what is kept, found and let go;
//! what is kept lies in the memory of sequences where nobody who runs needs it.
//!
//! Only prompts that a decoder reads begin so, since what an encoder makes of a token depends on all of the input. And only
//! those in mode `exact`: in the others keys and values depend on what was predicted, too, and where routes are replayed, on
//! these.

use sida_model::{Backend, NewSequence};
use sida_routing::prefix_cache::{Kept, PrefixCache, TOKENS_MIN, shared};
use sida_rpc::Client;

use crate::{
    answer::{catch_panic::catch_panic, request_error::RequestError, routing_mode::RoutingMode},
    intake::request::Request,
    schedule::{
        prefill::start_all,
        scheduler::Scheduler,
        sequence::{Branch, Sequence},
    },
};

/// The sequences that are kept, of each client for itself.
pub(crate) struct Prefixes<B: Backend> {
    /// Whether prompts are looked for at all.
    pub(crate) is_on: bool,
    pub(crate) kept: PrefixCache<Option<Client>, B::Sequence>,
}

/// Who shares beginnings: a client that has a name with itself alone, and all others with each other.
fn shares_with(request: &Request) -> Option<Client> {
    request.client.clone().filter(Client::is_named)
}

impl<B: Backend> Prefixes<B> {
    pub(crate) fn new(is_on: bool) -> Self {
        Self { is_on, kept: PrefixCache::default() }
    }
}

impl<B: Backend> Scheduler<B> {
    /// Starts a sequence of a prompt that the decoder reads, with room for `tokens_max`. Says how many of the prompt's tokens
    /// it holds already: never its last, after which the first answer comes.
    pub(crate) fn start_from_prefix(
        &mut self,
        request: &Request,
        tokens_max: usize,
    ) -> Result<(B::Sequence, usize), RequestError> {
        let wanted = &request.tokens[..request.tokens.len() - 1];
        if self.shares(request) {
            self.metrics.prefix_cache_queried_tokens.increment(request.tokens.len() as u64);
            if let Some((sequence, tokens)) = self.prefix(request, wanted, tokens_max) {
                self.metrics.prefix_cache_hit_tokens.increment(tokens as u64);
                return Ok((sequence, tokens));
            }
        }
        self.make_room(request.cache_bytes);
        let new = [NewSequence { rows: 0..0, tokens_max }];
        let mut start = || start_all(self.forward.backend(), None, &new).into_iter().next().expect("one for each");
        let started = match start() {
            // The budget may be more than there is: whoever runs comes first.
            Err(_) if !self.prefixes.kept.is_empty() => {
                self.prefixes.kept.shrink_to(0);
                start()
            }
            started => started,
        };
        Ok((started?, 0))
    }

    /// A sequence that begins as the one that shares most of the `wanted` tokens, with how many these are; none where too few
    /// are shared, or no memory is left for a copy.
    fn prefix(&mut self, request: &Request, wanted: &[u32], tokens_max: usize) -> Option<(B::Sequence, usize)> {
        let (client, bytes_max) = (shares_with(request), self.bytes_beside(request.cache_bytes));
        let is_ours = |other: &Request| other.mode == RoutingMode::Exact && shares_with(other) == client;
        let others = self.running.iter().filter(|other| is_ours(&other.request) && other.is_sound());
        let running = others.flat_map(|other| &other.branches).map(|one| (shared(&one.past, wanted), &one.state));
        let running = running.filter(|&(tokens, _)| tokens >= TOKENS_MIN);
        let kept = self.prefixes.kept.find(&client, wanted, bytes_max);
        let (tokens, sequence) = running.chain(kept).max_by_key(|&(tokens, _)| tokens)?;
        let forked = catch_panic(|| Ok(self.forward.backend_ref().fork_prefix(sequence, tokens, tokens_max)?));
        let forked = forked.inspect_err(|error| tracing::warn!(%error, tokens, "a beginning is computed, not copied"));
        forked.ok().map(|sequence| (sequence, tokens))
    }

    /// Lets what is kept leave until there is room for so many bytes beside all that run.
    pub(crate) fn make_room(&mut self, bytes: u64) {
        let bytes_max = self.bytes_beside(bytes);
        self.prefixes.kept.shrink_to(bytes_max);
    }

    /// The memory that nobody has reserved beside so many bytes.
    fn bytes_beside(&self, bytes: u64) -> u64 {
        let running: u64 = self.running.iter().map(|sequence| sequence.request.cache_bytes).sum();
        self.limits.cache_bytes_max.saturating_sub(running.saturating_add(bytes))
    }

    /// Keeps what a sequence that is over leaves behind, in the memory that was its own: the first of its branches that is
    /// left. Gives back its request.
    pub(crate) fn keep(&mut self, sequence: Sequence<B>) -> Request {
        let keeps = self.shares(&sequence.request) && sequence.is_sound();
        let Sequence { request, branches, .. } = sequence;
        if let Some(Branch { mut state, past: tokens, .. }) = branches.into_iter().next().filter(|_| keeps) {
            let bytes = self.forward.backend_ref().trim(&mut state);
            self.prefixes.kept.keep(Kept { client: shares_with(&request), tokens, bytes, sequence: state });
        }
        request
    }

    fn shares(&self, request: &Request) -> bool {
        let is_the_models_own = request.mode == RoutingMode::Exact && request.replayed.is_none();
        self.prefixes.is_on && is_the_models_own && !self.forward.config().has_encoder()
    }
}
