//! How many rows of a step are prompts'. A decoder that reads its prompt itself can read it in chunks, and those that
//! are decoding get their next token at each step: so a long prompt is read beside them, some rows at a step, and they
//! keep their pace. Prompts that are read at the same time share these rows equally, so that a short one is not kept by
//! a long one.

use crate::admission::{Cost, Limits};

/// What a sequence's branch has to feed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Feed {
    /// The token that was chosen last, or all of a target: rows that are computed in one step.
    Whole(usize),
    /// A prompt, or what is left of it: rows that may be computed in several steps. At least one.
    Prompt(usize),
}

impl Feed {
    /// How many rows there are.
    pub fn rows(self) -> usize {
        match self {
            Self::Whole(rows) | Self::Prompt(rows) => rows,
        }
    }
}

impl Limits {
    /// How many tokens of prompts may be computed in one step: as many as a batch has room for, or, where others are
    /// decoding, as keep their pace.
    pub fn prompt_rows_max(&self, is_decoding: bool) -> usize {
        if is_decoding { self.prefill_tokens_max.min(self.tokens_max) } else { self.tokens_max }
    }

    /// How many of `waiting`, in their order, join those that are `running` at a step: as [`Limits::joining`], but that
    /// prompts beyond those that one step computes wait for the next. A longer one joins by itself.
    pub fn joining_step(&self, running: Cost, waiting: impl Iterator<Item = Cost> + Clone) -> usize {
        let rows_max = running.tokens.saturating_add(self.prompt_rows_max(running.sequences > 0));
        let step = Limits { tokens_max: rows_max.min(self.tokens_max), ..*self };
        match step.joining(running, waiting.clone()) {
            0 => self.joining(running, waiting.take(1)),
            joined => joined,
        }
    }

    /// How many rows of each feed the next step computes. Every prompt gets on by at least a row.
    pub fn step_rows(&self, feeds: &[Feed]) -> Vec<usize> {
        let whole: usize = feeds.iter().filter(|feed| matches!(feed, Feed::Whole(_))).map(|feed| feed.rows()).sum();
        let mut room = self.prompt_rows_max(whole > 0).min(self.tokens_max.saturating_sub(whole));
        let mut rows: Vec<usize> = feeds.iter().map(|feed| feed.rows()).collect();
        let mut prompts: Vec<usize> = (0..feeds.len()).filter(|&at| matches!(feeds[at], Feed::Prompt(_))).collect();
        // From the shortest on, so that what one leaves of its share is the others'.
        prompts.sort_by_key(|&at| rows[at]);
        for (before, &at) in prompts.iter().enumerate() {
            rows[at] = rows[at].min((room / (prompts.len() - before)).max(1));
            room = room.saturating_sub(rows[at]);
        }
        rows
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::{
        Feed::{Prompt, Whole},
        *,
    };

    const LIMITS: Limits = Limits {
        tokens_max: 1000,
        prefill_tokens_max: 100,
        sequences_max: 4,
        cache_bytes_max: 1000,
        queue_max: 10,
        queue_tokens_max: 1000,
        client_queue_share: 1.0,
    };

    #[test]
    fn a_long_prompt_is_read_beside_those_that_decode() {
        // Would break: one long prompt makes everybody's next token wait until all of it is read.
        assert_eq!(LIMITS.step_rows(&[Whole(1), Prompt(500), Whole(1)]), [1, 100, 1]);
        // Nobody waits for it: it is read as fast as it can be.
        assert_eq!(LIMITS.step_rows(&[Prompt(500)]), [500]);
        assert_eq!(LIMITS.step_rows(&[Prompt(1500)]), [1000]);
    }

    #[test]
    fn short_prompts_are_not_kept_by_long_ones() {
        // Would break: a short prompt behind a long one waits for all of it.
        assert_eq!(LIMITS.step_rows(&[Whole(1), Prompt(500), Prompt(10), Prompt(500)]), [1, 45, 10, 45]);
        assert_eq!(LIMITS.step_rows(&[Whole(1), Prompt(20), Prompt(30)]), [1, 20, 30]);
        // So many that there is no row for each: each gets on all the same.
        let many = LIMITS.step_rows(&[[Whole(1)].as_slice(), &[Prompt(9); 150]].concat());
        assert!(many.iter().all(|&rows| rows == 1));
    }

    #[test]
    fn prompts_join_at_the_pace_of_those_that_decode() {
        // Would break: many prompts at once stop all that are decoding; or a long one never gets in.
        let prompt = |tokens| Cost { tokens, sequences: 1, cache_bytes: 0 };
        let running = Cost { tokens: 1, sequences: 1, cache_bytes: 0 };
        assert_eq!(LIMITS.joining_step(running, [prompt(60), prompt(40), prompt(1)].into_iter()), 2);
        assert_eq!(LIMITS.joining_step(running, [prompt(600), prompt(1)].into_iter()), 1);
        assert_eq!(LIMITS.joining_step(running, [prompt(1000), prompt(1)].into_iter()), 0, "more than a batch");
        assert_eq!(LIMITS.joining_step(Cost::default(), [prompt(60), prompt(40), prompt(1)].into_iter()), 3);
    }

    #[test]
    fn targets_are_computed_whole() {
        // Would break: the likelihood of a target misses the rows of an earlier step.
        assert_eq!(LIMITS.step_rows(&[Whole(400), Whole(400), Prompt(300)]), [400, 400, 100]);
        assert_eq!(LIMITS.step_rows(&[Whole(980), Prompt(300)]), [980, 20]);
        assert_eq!(LIMITS.step_rows(&[]), [0; 0]);
    }

    proptest! {
        #[test]
        fn a_step_is_within_its_limits_and_gets_on(
            feeds in prop::collection::vec(
                prop_oneof![(1usize..50).prop_map(Whole), (1usize..2000).prop_map(Prompt)],
                1..40,
            ),
        ) {
            // Would break: a step is longer than others can wait for, or a prompt is never read to its end.
            let rows = LIMITS.step_rows(&feeds);
            let prompts = || feeds.iter().zip(&rows).filter(|(feed, _)| matches!(feed, Prompt(_)));
            let is_decoding = prompts().count() < feeds.len();
            let read: usize = prompts().map(|(_, rows)| rows).sum();
            prop_assert!(read <= LIMITS.prompt_rows_max(is_decoding).max(prompts().count()));
            for (feed, &rows) in feeds.iter().zip(&rows) {
                prop_assert!(rows >= 1 && rows <= feed.rows());
                prop_assert!(rows == feed.rows() || matches!(feed, Prompt(_)));
            }
            // Nobody gets less than another but what it needs.
            let least_cut = prompts().filter(|(feed, rows)| **rows < feed.rows()).map(|(_, rows)| *rows).min();
            if let Some(least_cut) = least_cut {
                prop_assert!(prompts().all(|(_, rows)| *rows <= least_cut + 1));
            }
        }
    }
}
