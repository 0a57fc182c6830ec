//! What one client uses, and whether its next request is within its limits. Nothing here knows a clock: time is what has
//! passed since any beginning.
//!
//! What may be had in a minute is a bucket that holds a minute's worth and is filled evenly (a token bucket). It is kept
//! as the time at which it will be full, so that a limit that changes needs nothing to be counted anew.

use std::time::Duration;

use super::{ClientLimit, ClientLimits, Exceeded, Within};
use crate::fairness::Load;

/// What a bucket holds.
const MINUTE: Duration = Duration::from_secs(60);

/// What a bucket of one of the limits holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Standing {
    /// What a minute's worth is.
    pub allowed: u64,
    /// What of it is there.
    pub remaining: u64,
    /// How long until it is full.
    pub full_in: Duration,
}

/// What a client uses.
#[derive(Clone, Copy, Debug, Default)]
pub struct ClientUse {
    /// When the buckets are full, of requests and of tokens.
    requests_full_at: Duration,
    tokens_full_at: Duration,
    waiting: Load,
    running: u64,
}

/// What a request was let in for: it is given back when the request leaves.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Charge {
    asks: Load,
    /// What it took of the buckets.
    requests: Duration,
    tokens: Duration,
}

impl ClientUse {
    /// Lets in a request that `asks` so much, if that is within `limits`; it waits from then on.
    pub fn comes(&mut self, limits: &ClientLimits, asks: Load, now: Duration) -> Result<Charge, Exceeded> {
        let charge = self.may_come(limits, asks, now)?;
        self.requests_full_at = self.requests_full_at.max(now) + charge.requests;
        self.tokens_full_at = self.tokens_full_at.max(now) + charge.tokens;
        self.waiting.requests += asks.requests;
        self.waiting.tokens = self.waiting.tokens.saturating_add(asks.tokens);
        Ok(charge)
    }

    /// Lets in requests that come together, each of which asks so much, if all of them are within `limits`: all or none.
    pub fn come(&mut self, limits: &ClientLimits, all: &[Load], now: Duration) -> Result<Vec<Charge>, Exceeded> {
        self.may_come(limits, together(all), now)?;
        // What each is charged is rounded down, so that the parts are never more than the whole.
        let charge = |asks: &Load| self.comes(limits, *asks, now).expect("each is within what all are within");
        Ok(all.iter().map(charge).collect())
    }

    /// What it would be charged, and nothing else.
    pub fn may_come(&self, limits: &ClientLimits, asks: Load, now: Duration) -> Result<Charge, Exceeded> {
        let (requests, tokens) = (asks.requests as u64, asks.tokens as u64);
        let waiting = (self.waiting.requests as u64, self.waiting.tokens as u64);
        let counted = |limit, allowed: Option<u64>, used: u64, more: u64| match allowed {
            Some(allowed) if more > allowed => Err(Exceeded { limit, allowed, within: Within::Never }),
            Some(allowed) if used.saturating_add(more) > allowed => {
                Err(Exceeded { limit, allowed, within: Within::WhenOthersEnd })
            }
            _ => Ok(()),
        };
        counted(ClientLimit::Requests, limits.requests_max, waiting.0 + self.running, requests)?;
        counted(ClientLimit::Queue, limits.queue_max, waiting.0, requests)?;
        counted(ClientLimit::QueueTokens, limits.queue_tokens_max, waiting.1, tokens)?;
        let rated = |limit, allowed: Option<u64>, full_at: Duration, more: u64| {
            let Some(allowed) = allowed else { return Ok(Duration::ZERO) };
            if more > allowed {
                return Err(Exceeded { limit, allowed, within: Within::Never });
            }
            let cost = cost(allowed, more);
            let missing = (full_at.saturating_sub(now) + cost).saturating_sub(MINUTE);
            if missing.is_zero() { Ok(cost) } else { Err(Exceeded { limit, allowed, within: Within::After(missing) }) }
        };
        Ok(Charge {
            asks,
            requests: rated(
                ClientLimit::RequestsPerMinute,
                limits.requests_per_minute,
                self.requests_full_at,
                requests,
            )?,
            tokens: rated(ClientLimit::TokensPerMinute, limits.tokens_per_minute, self.tokens_full_at, tokens)?,
        })
    }

    /// A request is begun: it waits no longer.
    pub fn begins(&mut self, charge: &Charge) {
        self.leaves_queue(charge);
        self.running += 1;
    }

    /// A request that was not begun is gone: it has taken nothing.
    pub fn is_gone(&mut self, charge: &Charge) {
        self.leaves_queue(charge);
        self.requests_full_at = self.requests_full_at.saturating_sub(charge.requests);
        self.tokens_full_at = self.tokens_full_at.saturating_sub(charge.tokens);
    }

    /// A request that was begun is over, and took so many tokens. What it asked for beyond that is given back.
    pub fn ends(&mut self, charge: &Charge, tokens: usize) {
        self.running = self.running.saturating_sub(1);
        let (asked, unused) = (charge.asks.tokens.max(1), charge.asks.tokens.saturating_sub(tokens));
        let back = charge.tokens.mul_f64(unused as f64 / asked as f64);
        self.tokens_full_at = self.tokens_full_at.saturating_sub(back);
    }

    /// Whether nothing of it needs to be kept.
    pub fn is_idle(&self, now: Duration) -> bool {
        let is_full = self.requests_full_at.max(self.tokens_full_at) <= now;
        is_full && self.running == 0 && self.waiting == Load::default()
    }

    /// What the bucket of requests holds, if that is limited.
    pub fn requests(&self, limits: &ClientLimits, now: Duration) -> Option<Standing> {
        limits.requests_per_minute.map(|allowed| standing(allowed, self.requests_full_at, now))
    }

    /// What the bucket of tokens holds, if that is limited.
    pub fn tokens(&self, limits: &ClientLimits, now: Duration) -> Option<Standing> {
        limits.tokens_per_minute.map(|allowed| standing(allowed, self.tokens_full_at, now))
    }

    fn leaves_queue(&mut self, charge: &Charge) {
        self.waiting.requests = self.waiting.requests.saturating_sub(charge.asks.requests);
        self.waiting.tokens = self.waiting.tokens.saturating_sub(charge.asks.tokens);
    }
}

/// What requests ask for together.
pub fn together(all: &[Load]) -> Load {
    let tokens = all.iter().fold(0_usize, |tokens, asks| tokens.saturating_add(asks.tokens));
    Load { requests: all.iter().map(|asks| asks.requests).sum(), tokens }
}

/// How much of a minute so many are, of which `allowed` are one.
fn cost(allowed: u64, count: u64) -> Duration {
    let nanos = MINUTE.as_nanos() * u128::from(count) / u128::from(allowed.max(1));
    Duration::from_nanos(nanos.min(MINUTE.as_nanos()) as u64)
}

fn standing(allowed: u64, full_at: Duration, now: Duration) -> Standing {
    let full_in = full_at.saturating_sub(now);
    let left = MINUTE.saturating_sub(full_in);
    // A nanosecond more, since what was charged was rounded down.
    let remaining = (left.as_nanos() + 1) * u128::from(allowed) / MINUTE.as_nanos();
    Standing { allowed, remaining: remaining.min(u128::from(allowed)) as u64, full_in }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const SECOND: Duration = Duration::from_secs(1);

    #[test]
    fn requests_that_come_together_are_let_in_together_or_not_at_all() {
        // Would break: a call of several prompts is refused, and its client has paid for some of them; or one that no minute
        // has room for is told to come back.
        let limits = ClientLimits { tokens_per_minute: Some(100), requests_max: Some(3), ..NONE };
        let asks = |tokens| Load { requests: 1, tokens };
        let mut used = ClientUse::default();
        let remaining = |used: &ClientUse| used.tokens(&limits, SECOND).expect("limited").remaining;
        let never = used.come(&limits, &[asks(60), asks(60)], SECOND).unwrap_err();
        assert_eq!((never.limit, never.within), (ClientLimit::TokensPerMinute, Within::Never));
        let many = used.come(&limits, &[asks(1); 4], SECOND).unwrap_err();
        assert_eq!((many.limit, many.within), (ClientLimit::Requests, Within::Never));
        assert!(used.is_idle(SECOND), "nothing is charged for what is refused: {used:?}");
        assert_eq!(used.come(&limits, &[asks(33), asks(33)], SECOND).expect("within").len(), 2);
        assert_eq!(remaining(&used), 34);
        let later = used.come(&limits, &[asks(20), asks(20)], SECOND).unwrap_err();
        assert!(matches!(later.within, Within::WhenOthersEnd | Within::After(_)), "{later:?}");
        assert_eq!(remaining(&used), 34);
        assert!(used.come(&limits, &[asks(34)], SECOND).is_ok());
        assert!(used.come(&limits, &[asks(usize::MAX), asks(usize::MAX)], SECOND).is_err(), "sums do not overflow");
    }

    const NONE: ClientLimits = ClientLimits {
        requests_per_minute: None,
        tokens_per_minute: None,
        requests_max: None,
        queue_max: None,
        queue_tokens_max: None,
    };

    fn asks(tokens: usize) -> Load {
        Load { requests: 1, tokens }
    }

    fn exceeded(limit: ClientLimit, allowed: u64, within: Within) -> Result<Charge, Exceeded> {
        Err(Exceeded { limit, allowed, within })
    }

    #[test]
    fn a_minute_has_so_many_requests() {
        // Would break: a client gets more than it was given, is refused below it, or is told to come back too early.
        let limits = ClientLimits { requests_per_minute: Some(6), ..NONE };
        let mut client = ClientUse::default();
        let now = 1000 * SECOND;
        for left in (0..6).rev() {
            client.comes(&limits, asks(1), now).unwrap();
            assert_eq!(client.requests(&limits, now).unwrap().remaining, left);
        }
        let refused = |after| exceeded(ClientLimit::RequestsPerMinute, 6, Within::After(after));
        assert_eq!(client.comes(&limits, asks(1), now), refused(10 * SECOND));
        assert_eq!(client.comes(&limits, asks(1), now + 7 * SECOND), refused(3 * SECOND));
        assert!(client.comes(&limits, asks(1), now + 10 * SECOND).is_ok(), "one every ten seconds");
        assert_eq!(client.comes(&limits, asks(1), now + 10 * SECOND), refused(10 * SECOND));
        let full = client.requests(&limits, now + 600 * SECOND).unwrap();
        assert_eq!(
            full,
            Standing { allowed: 6, remaining: 6, full_in: Duration::ZERO },
            "no more than a minute's worth"
        );
    }

    #[test]
    fn tokens_that_were_not_taken_are_given_back() {
        // Would break: a client pays for the longest answers that it might have had, or for requests that were refused.
        let limits = ClientLimits { tokens_per_minute: Some(600), requests_per_minute: Some(60), ..NONE };
        let now = SECOND;
        let mut client = ClientUse::default();
        let charge = client.comes(&limits, asks(600), now).unwrap();
        let refused = exceeded(ClientLimit::TokensPerMinute, 600, Within::After(6 * SECOND));
        assert_eq!(client.comes(&limits, asks(60), now), refused);
        client.begins(&charge);
        client.ends(&charge, 100);
        let left = client.tokens(&limits, now).unwrap();
        assert_eq!((left.remaining, left.full_in), (500, 10 * SECOND));
        let charge = client.comes(&limits, asks(300), now).unwrap();
        client.is_gone(&charge);
        assert_eq!(client.tokens(&limits, now).unwrap().remaining, 500);
        assert_eq!(client.requests(&limits, now).unwrap().remaining, 59);
        assert_eq!(client.comes(&limits, asks(601), now), exceeded(ClientLimit::TokensPerMinute, 600, Within::Never));
        assert!(!client.is_idle(now) && client.is_idle(now + 60 * SECOND));
    }

    #[test]
    fn requests_at_a_time_and_places_in_the_queue() {
        // Would break: one client has all places of the queue or of the batch, although its operator gave it few.
        let limits = ClientLimits { requests_max: Some(3), queue_max: Some(2), queue_tokens_max: Some(100), ..NONE };
        let mut client = ClientUse::default();
        let first = client.comes(&limits, asks(60), SECOND).unwrap();
        let others_end = |limit, allowed| exceeded(limit, allowed, Within::WhenOthersEnd);
        assert_eq!(client.comes(&limits, asks(60), SECOND), others_end(ClientLimit::QueueTokens, 100));
        assert_eq!(
            client.comes(&limits, asks(101), SECOND),
            exceeded(ClientLimit::QueueTokens, 100, Within::Never),
            "no queue is empty enough"
        );
        let second = client.comes(&limits, asks(40), SECOND).unwrap();
        assert_eq!(client.comes(&limits, asks(0), SECOND), others_end(ClientLimit::Queue, 2));
        client.begins(&first);
        let third = client.comes(&limits, asks(1), SECOND).unwrap();
        assert_eq!(client.comes(&limits, asks(1), SECOND), others_end(ClientLimit::Requests, 3));
        client.is_gone(&second);
        assert!(client.may_come(&limits, asks(1), SECOND).is_ok());
        client.ends(&first, 60);
        client.begins(&third);
        assert!(!client.is_idle(SECOND));
        client.ends(&third, 1);
        assert!(client.is_idle(SECOND));
        assert!(
            ClientUse::default().comes(&NONE, asks(usize::MAX), SECOND).is_ok(),
            "who has no limits is never refused"
        );
    }

    #[test]
    fn own_limits_go_before_those_of_all() {
        // Would break: what an operator gives one client is ignored, or takes away what holds for everybody.
        let own = ClientLimits { queue_max: Some(9), ..NONE };
        let all = ClientLimits { queue_max: Some(1), requests_max: Some(2), ..NONE };
        assert_eq!(own.or(all), ClientLimits { queue_max: Some(9), requests_max: Some(2), ..NONE });
        let mut each = NONE;
        for (limit, value) in ClientLimit::ALL.into_iter().zip(1..) {
            *each.limit(limit) = Some(value);
        }
        assert_eq!(each.or(NONE), NONE.or(each));
        assert_eq!((each.requests_per_minute, each.queue_tokens_max), (Some(1), Some(5)));
    }

    proptest! {
        #[test]
        fn no_minute_has_more_than_two_buckets(
            allowed in 1u64..500,
            requests in prop::collection::vec((0u64..3_000, 1usize..50), 1..200),
        ) {
            // Would break: some order of requests gets a client more than a full bucket and what fills it in the meantime; or one
            // that comes when it was told to is refused.
            let limits = ClientLimits { tokens_per_minute: Some(allowed), ..NONE };
            let (mut client, mut now, mut taken) = (ClientUse::default(), Duration::ZERO, Vec::new());
            for (pause, tokens) in requests {
                now += Duration::from_millis(pause);
                match client.comes(&limits, asks(tokens), now) {
                    Ok(_) => taken.push((now, tokens as u64)),
                    Err(Exceeded { within: Within::After(later), .. }) => {
                        let mut later_client = client;
                        prop_assert!(later_client.comes(&limits, asks(tokens), now + later).is_ok());
                    }
                    Err(exceeded) => prop_assert!(tokens as u64 > allowed, "{:?}", exceeded),
                }
            }
            for (start, _) in &taken {
                let within = taken.iter().filter(|(at, _)| at >= start && *at < *start + MINUTE);
                let sum: u64 = within.map(|(_, tokens)| tokens).sum();
                prop_assert!(sum <= 2 * allowed + 1, "{} of {}", sum, allowed);
            }
        }
    }
}
