//! What a coordinator takes on, and how it uses its cluster.

use std::time::Duration;

use clap::Args;
use sida_coordinator::CoordinatorConfig;

use super::client_limits::ClientLimitArguments;
use crate::{share, time_span, whole_number::one_or_more};

/// Bounds of batches and requests; the defaults are those of the design.
#[derive(Args, Clone, Debug)]
pub(crate) struct LimitArguments {
    /// Tokens of one batch at most
    #[arg(long, value_name = "N", default_value_t = 8192, value_parser = one_or_more::<usize>)]
    batch_tokens_max: usize,
    /// Tokens of prompts that one step computes at most, where others are decoding: fewer keep their pace, more begin
    /// answers sooner
    #[arg(long, value_name = "N", default_value_t = 512, value_parser = one_or_more::<usize>)]
    prefill_tokens_max: usize,
    /// Sequences that are generated at the same time at most
    #[arg(long, value_name = "N", default_value_t = 256, value_parser = one_or_more::<usize>)]
    sequences_max: usize,
    /// Requests that wait at most; further ones are refused at once
    #[arg(long, value_name = "N", default_value_t = 1024, value_parser = one_or_more::<usize>)]
    queue_max: usize,
    /// Tokens that wait at most, of prompts and of the longest answers to them
    #[arg(long, value_name = "N", default_value_t = 2 << 20, value_parser = one_or_more::<usize>)]
    queue_tokens_max: usize,
    /// Part of the queue that one client may hold while others wait, as 50%; a client is who has a key, a certificate or an
    /// address of its own
    #[arg(long, value_name = "SHARE", default_value = "50%", value_parser = share::parse)]
    client_queue_share: f64,
    #[command(flatten)]
    clients: ClientLimitArguments,
    /// Tokens of a prompt at most
    #[arg(long, value_name = "N", default_value_t = 512, value_parser = one_or_more::<usize>)]
    prompt_tokens_max: usize,
    /// Tokens of an answer at most
    #[arg(long, value_name = "N", default_value_t = 1024, value_parser = one_or_more::<usize>)]
    answer_tokens_max: usize,
    /// How long a request may take whose caller gives no deadline [default: as long as it takes]
    #[arg(long, value_name = "TIME", value_parser = time_span::parse_some)]
    request_timeout: Option<Duration>,
    /// Experts are loaded ahead that a batch uses with this chance or a greater one; off: none are. In mode guided all that are
    /// predicted are
    #[arg(long, value_name = "SHARE", default_value = "20%", value_parser = share::parse_or_off)]
    plan_chance: f64,
    /// Drop tokens beyond an expert's capacity, per sequence, as transformers does
    #[arg(long)]
    enforce_capacity: bool,
    /// How long an expert is waited for where no node computes it: the last one, or any to come back
    #[arg(long, value_name = "TIME", default_value = "30s", value_parser = time_span::parse_some)]
    expert_call_timeout: Duration,
    /// How long predictor-nodes may take for a batch
    #[arg(long, value_name = "TIME", default_value = "200ms", value_parser = time_span::parse)]
    predict_timeout: Duration,
}

impl LimitArguments {
    /// Puts them into a coordinator's settings.
    pub(crate) fn apply(&self, config: &mut CoordinatorConfig) {
        config.limits.tokens_max = self.batch_tokens_max;
        config.limits.prefill_tokens_max = self.prefill_tokens_max;
        config.limits.sequences_max = self.sequences_max;
        config.limits.queue_max = self.queue_max;
        config.limits.queue_tokens_max = self.queue_tokens_max;
        config.limits.client_queue_share = self.client_queue_share;
        config.client_limits = self.clients.limits();
        config.request_limits.prompt_tokens_max = self.prompt_tokens_max;
        config.request_limits.tokens_max = self.answer_tokens_max;
        config.request_limits.tokens_default = config.request_limits.tokens_default.min(self.answer_tokens_max);
        config.request_limits.timeout = self.request_timeout;
        config.plan_chance = self.plan_chance;
        config.enforce_capacity = self.enforce_capacity;
        config.expert_call_timeout = self.expert_call_timeout;
        config.predict_timeout = self.predict_timeout;
    }
}
