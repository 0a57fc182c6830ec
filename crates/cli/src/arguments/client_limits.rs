//! What each client of a coordinator may use, where its line among the keys says nothing else.

use clap::Args;
use sida_routing::client_limits::ClientLimits;

use crate::whole_number::one_or_more;

/// The limits of every client.
#[derive(Args, Clone, Copy, Debug)]
pub(crate) struct ClientLimitArguments {
    /// Requests that each client may send in a minute, where its line in --api-keys says nothing else; a client is who has a
    /// key, a certificate or an address of its own [default: no limit]
    #[arg(long, value_name = "N", value_parser = one_or_more::<u64>)]
    client_requests_per_minute: Option<u64>,
    /// Tokens that each client may have in a minute, of prompts and of answers [default: no limit]
    #[arg(long, value_name = "N", value_parser = one_or_more::<u64>)]
    client_tokens_per_minute: Option<u64>,
    /// Requests of each client at a time, those that wait among them [default: no limit]
    #[arg(long, value_name = "N", value_parser = one_or_more::<u64>)]
    client_requests_max: Option<u64>,
    /// Requests of each client that wait at most [default: its share of the queue]
    #[arg(long, value_name = "N", value_parser = one_or_more::<u64>)]
    client_queue_max: Option<u64>,
    /// Tokens of each client that wait at most, of prompts and of the longest answers to them [default: its share of the queue]
    #[arg(long, value_name = "N", value_parser = one_or_more::<u64>)]
    client_queue_tokens_max: Option<u64>,
}

impl ClientLimitArguments {
    /// As a coordinator knows them.
    pub(crate) fn limits(self) -> ClientLimits {
        ClientLimits {
            requests_per_minute: self.client_requests_per_minute,
            tokens_per_minute: self.client_tokens_per_minute,
            requests_max: self.client_requests_max,
            queue_max: self.client_queue_max,
            queue_tokens_max: self.client_queue_tokens_max,
        }
    }
}
