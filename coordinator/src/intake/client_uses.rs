//! What each client uses, and its limits: those that stand behind its key, and those of everybody. What decides is pure
//! ([`sida_routing::client_limits`]); here it is given a clock, and what a request was let in for comes back by itself when
//! the request is over, however that came about.

use std::{
    collections::HashMap,
    sync::Arc,
    time::{Duration, Instant},
};

use parking_lot::Mutex;
use sida_routing::{
    client_limits::{self, Charge, ClientLimit, ClientLimits, ClientUse, Exceeded, Standing, Within},
    fairness::Load,
};
use sida_rpc::{Client, Gate};
use sida_telemetry::{counter, names};

use crate::answer::request_error::RequestError;

/// As many clients are kept before those that use nothing are looked for.
const KEPT_MIN: usize = 64;

/// All clients.
pub(crate) struct ClientUses {
    /// Knows the limits of those who have a key.
    gate: Gate,
    /// Those of everybody, where a key says nothing else.
    limits: ClientLimits,
    start: Instant,
    uses: Mutex<Uses>,
}

/// Invariant: nothing else is locked while this is.
struct Uses {
    of: HashMap<Client, ClientUse>,
    /// How many there may be before it is looked who uses nothing.
    sweep_at: usize,
}

/// A request that was let in, as long as it is there.
pub(crate) struct LetIn {
    uses: Arc<ClientUses>,
    client: Client,
    charge: Charge,
    state: State,
}

enum State {
    Waits,
    /// Ends with so many tokens taken.
    Begun {
        tokens: usize,
    },
}

impl ClientUses {
    /// Nobody uses anything yet.
    pub(crate) fn new(gate: Gate, limits: ClientLimits) -> Arc<Self> {
        let uses = Mutex::new(Uses { of: HashMap::new(), sweep_at: KEPT_MIN });
        Arc::new(Self { gate, limits, start: Instant::now(), uses })
    }

    /// Says why so many requests of a client cannot be let in, whatever they ask for: before they are read.
    pub(crate) fn may_come(&self, client: Option<&Client>, requests: usize) -> Result<(), RequestError> {
        let Some((client, limits)) = self.limited(client) else { return Ok(()) };
        let asks = Load { requests, tokens: 0 };
        let known = self.uses.lock().of.get(&client).copied().unwrap_or_default();
        known.may_come(&limits, asks, self.now()).map(drop).map_err(|exceeded| refused(&client, exceeded, asks))
    }

    /// Lets in requests of a client that come together, each for so many tokens: all of them or none. `None` of each: nothing
    /// is counted of them, since it has no limits.
    pub(crate) fn come(
        self: &Arc<Self>,
        client: Option<&Client>,
        tokens: &[usize],
    ) -> Result<Vec<Option<LetIn>>, RequestError> {
        let Some((client, limits)) = self.limited(client) else { return Ok(tokens.iter().map(|_| None).collect()) };
        let (asks, now) = (tokens.iter().map(|&tokens| Load { requests: 1, tokens }).collect::<Vec<_>>(), self.now());
        let charges = {
            let mut uses = self.uses.lock();
            uses.sweep(now);
            uses.of.entry(client.clone()).or_default().come(&limits, &asks, now)
        };
        let charges = charges.map_err(|exceeded| refused(&client, exceeded, client_limits::together(&asks)))?;
        let let_in = |charge| LetIn { uses: self.clone(), client: client.clone(), charge, state: State::Waits };
        Ok(charges.into_iter().map(let_in).map(Some).collect())
    }

    /// What a client may still have: of requests and of tokens in a minute, where these are limited.
    pub(crate) fn standing(&self, client: &Client) -> [Option<Standing>; 2] {
        let Some((client, limits)) = self.limited(Some(client)) else { return [None, None] };
        let (known, now) = (self.uses.lock().of.get(&client).copied().unwrap_or_default(), self.now());
        [known.requests(&limits, now), known.tokens(&limits, now)]
    }

    /// Who it is and what it may use, if that is limited.
    fn limited(&self, client: Option<&Client>) -> Option<(Client, ClientLimits)> {
        let client = client?;
        let limits = self.gate.limits(client).or(self.limits);
        (limits != ClientLimits::default()).then(|| (client.counted_as(), limits))
    }

    fn now(&self) -> Duration {
        self.start.elapsed()
    }
}

impl Uses {
    /// Forgets who uses nothing, now and then: addresses that ask once are many.
    fn sweep(&mut self, now: Duration) {
        if self.of.len() >= self.sweep_at {
            self.of.retain(|_, known| !known.is_idle(now));
            self.sweep_at = (2 * self.of.len()).max(KEPT_MIN);
        }
    }
}

impl LetIn {
    /// The request is begun.
    pub(crate) fn begins(&mut self) {
        // Until its answer is whole it has taken all that it asked for.
        self.state = State::Begun { tokens: usize::MAX };
        self.change(|used, charge| used.begins(charge));
    }

    /// Its answer is whole, and took so many tokens with its prompt.
    pub(crate) fn ends(mut self, taken: usize) {
        if let State::Begun { tokens } = &mut self.state {
            *tokens = taken;
        }
    }

    fn change(&self, change: impl FnOnce(&mut ClientUse, &Charge)) {
        if let Some(used) = self.uses.uses.lock().of.get_mut(&self.client) {
            change(used, &self.charge);
        }
    }
}

impl Drop for LetIn {
    fn drop(&mut self) {
        match self.state {
            State::Waits => self.change(|used, charge| used.is_gone(charge)),
            State::Begun { tokens } => self.change(|used, charge| used.ends(charge, tokens)),
        }
    }
}

/// What a client is told, which is counted.
fn refused(client: &Client, Exceeded { limit, allowed, within }: Exceeded, asks: Load) -> RequestError {
    // What is more than a client may ever ask for is its mistake, and not for lack of what others of its requests have.
    if within != Within::Never {
        let labels = [(names::CLIENT, client.label().to_string()), (names::LIMIT, limit.name().to_owned())];
        counter!(names::CLIENT_LIMITED_TOTAL, &labels).increment(1);
    }
    let asks = match limit {
        ClientLimit::RequestsPerMinute | ClientLimit::Requests | ClientLimit::Queue => asks.requests,
        ClientLimit::TokensPerMinute | ClientLimit::QueueTokens => asks.tokens,
    };
    let limit = limit.name();
    match within {
        Within::After(after) => RequestError::ClientLimit { limit, allowed, retry_after: Some(after) },
        Within::WhenOthersEnd => RequestError::ClientLimit { limit, allowed, retry_after: None },
        Within::Never => RequestError::ClientLimitBelow { limit, allowed, asks },
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn comes(uses: &Arc<ClientUses>, client: Option<&Client>, tokens: usize) -> Result<Option<LetIn>, RequestError> {
        Ok(uses.come(client, &[tokens])?.pop().flatten())
    }

    #[test]
    fn who_uses_nothing_is_forgotten() {
        // Would break: a coordinator that many addresses ask once grows with every one of them, or forgets what one has used.
        let limits = ClientLimits { requests_max: Some(1), ..ClientLimits::default() };
        let uses = ClientUses::new(Gate::default(), limits);
        let alice = Client::of_key("alice");
        let held = comes(&uses, Some(&alice), 1).expect("it is the first");
        for number in 0..10 * KEPT_MIN {
            drop(comes(&uses, Some(&Client::of_key(format!("c{number}"))), 1).expect("it is the only one"));
        }
        assert!(uses.uses.lock().of.len() <= 2 * KEPT_MIN, "{}", uses.uses.lock().of.len());
        assert!(comes(&uses, Some(&alice), 1).is_err());
        drop(held);
        assert!(comes(&uses, Some(&alice), 1).is_ok());
    }

    #[test]
    fn the_own_process_and_who_has_no_limits_are_not_counted() {
        // Would break: `sida ask` is refused by the limits of clients; or every request of an unlimited one takes a lock.
        let uses = ClientUses::new(Gate::default(), ClientLimits::default());
        assert!(comes(&uses, Some(&Client::of_key("alice")), usize::MAX).expect("let in").is_none());
        let limits = ClientLimits { tokens_per_minute: Some(1), ..ClientLimits::default() };
        assert!(comes(&ClientUses::new(Gate::default(), limits), None, 100).expect("let in").is_none());
    }
}
