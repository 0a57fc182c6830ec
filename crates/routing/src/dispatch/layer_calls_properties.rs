//! What holds of a layer's calls whatever comes of them.

use proptest::prelude::*;

use super::{
    Next, Why,
    scripted_nodes::{Nodes, layer, lost, ms, send},
};
use crate::failover::{Blame, CallFailure};

/// What may come of a call.
#[derive(Clone, Copy, Debug)]
enum Outcome {
    Computed,
    Lost,
    Stale,
    Unreadable,
    Malformed,
    /// It is not sent.
    Congested,
    /// Nothing comes.
    Nothing,
}

fn outcome() -> impl Strategy<Value = Outcome> {
    use Outcome::*;
    prop::sample::select(vec![Computed, Computed, Lost, Stale, Unreadable, Malformed, Congested, Nothing])
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(2000))]
    #[test]
    fn every_row_is_computed_or_given_up_once(
        experts in prop::collection::btree_map(0u16..6, 1usize..12, 1..5),
        outcomes in prop::collection::vec((outcome(), any::<u8>(), 0u64..60), 1..60),
        (nodes, leaves) in (1usize..4, prop::option::of(0u64..3000)),
    ) {
        // Broken: some order of failures would lose rows, compute them twice, or never come to an end.
        let experts: Vec<(u16, usize)> = experts.into_iter().collect();
        let (mut nodes, mut calls) = (Nodes::new(nodes), layer(&experts, 8));
        let total: usize = experts.iter().map(|(_, rows)| rows).sum();
        let mut over = vec![0; total];
        let (mut now, mut id, mut outcomes) = (ms(0), 0, outcomes.into_iter().cycle());
        let mut coming: Vec<(u64, Outcome)> = Vec::new();
        for step in 0.. {
            prop_assert!(step < 20_000, "it never ends");
            nodes.is_wanted.set(leaves.is_none_or(|leaves| now < ms(leaves)));
            match calls.next(&mut nodes, now) {
                Next::Done => break,
                Next::Ask => for call in calls.ask(&mut nodes, now) {
                    prop_assert!(call.rows() <= 8);
                    let (outcome, up, _) = outcomes.next().unwrap();
                    nodes.up.iter_mut().enumerate().for_each(|(node, is_up)| *is_up = up >> node & 1 == 1);
                    nodes.has_newer = up > 128;
                    id += 1;
                    if let Outcome::Congested = outcome {
                        calls.failed(&mut nodes, call, &CallFailure::Congested { limit: 1 });
                        continue;
                    }
                    send(&mut calls, &nodes, id, call, now, ms(u64::from(up)));
                    coming.push((id, outcome));
                },
                Next::Wait(until) => {
                    let passed = ms(outcomes.next().unwrap().2);
                    let answer = coming.pop();
                    now = if answer.is_none() { now.max(until) + passed } else { now + passed };
                    let failure = match answer {
                        Some((_, Outcome::Nothing)) | None => {
                            calls.look(&mut nodes, now);
                            continue;
                        }
                        Some((_, Outcome::Stale)) => Some(CallFailure::Stale),
                        Some((_, Outcome::Malformed)) => Some(CallFailure::Malformed { reason: String::new() }),
                        Some((_, Outcome::Unreadable)) => {
                            Some(CallFailure::Refused { blame: Blame::Expert, message: String::new() })
                        }
                        Some((_, Outcome::Computed)) => None,
                        Some(_) => Some(lost()),
                    };
                    let Some(call) = answer.and_then(|(id, _)| calls.answered(id)) else { continue };
                    match failure {
                        Some(failure) => calls.failed(&mut nodes, call, &failure),
                        None => {
                            calls.computed(now);
                            calls.travelled(call.node, ms(1));
                            call.places().into_iter().for_each(|place| over[place as usize] += 1);
                        }
                    }
                }
            }
        }
        let finished = calls.finish();
        for one in &finished.given_up {
            prop_assert!(one.why != Why::Unwanted || leaves.is_some());
            over[one.rows.clone()].iter_mut().for_each(|times| *times += 1);
        }
        prop_assert_eq!(over, vec![1; total]);
    }
}
