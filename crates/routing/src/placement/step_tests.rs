//! What must hold on the way from any placement to any other.

use proptest::prelude::*;

use super::*;
use crate::{
    Candidate, ExpertId, ExpertKey, LayerId,
    placement::{Demand, target},
};

const LAYERS: usize = 2;
const EXPERTS: usize = 24;

fn policy(replicas: usize, moves_max: usize) -> Policy {
    Policy { replicas, hot_replicas_max: 2, moves_max }
}

fn candidates(weights: &[(u8, f64)]) -> Vec<Candidate> {
    weights.iter().map(|&(i, weight)| Candidate { node: format!("n{i}").into(), weight }).collect()
}

fn demand(hot: &[u16]) -> Demand {
    let mut demand = Demand::new(LAYERS, EXPERTS);
    for &expert in hot {
        demand.note(ExpertKey { layer: LayerId(0), expert: ExpertId(expert % EXPERTS as u16) }, 1000);
    }
    (0..4).for_each(|_| demand.settle());
    demand
}

fn goal(nodes: &[Candidate], hot: &[u16], policy: &Policy) -> Placement {
    let extent = Extent { moe_layers: LAYERS, num_experts: EXPERTS, replicas: 1 };
    target(extent, nodes, &demand(hot), policy).unwrap()
}

/// Nodes by distinct number, with weights; some are leaving (0).
fn some_nodes() -> impl Strategy<Value = Vec<Candidate>> {
    let weight = prop_oneof![1 => Just(0.0), 8 => 0.2f64..5.0];
    prop::collection::btree_map(0u8..10, weight, 0..8)
        .prop_map(|nodes| candidates(&nodes.into_iter().collect::<Vec<_>>()))
}

fn names(placement: &Placement, key: ExpertKey) -> Vec<&NodeId> {
    placement.holders(key).collect()
}

/// What one step must keep, whatever is ready.
fn check_step(
    before: &Placement,
    after: &Placement,
    target: &Placement,
    allowance: usize,
) -> Result<(), TestCaseError> {
    prop_assert_eq!(after.epoch(), before.epoch() + 1);
    prop_assert_eq!(after.nodes(), target.nodes());
    let mut unbounded = 0;
    for key in before.keys() {
        let (was, is, goal) = (names(before, key), names(after, key), names(target, key));
        let alive: Vec<_> = was.iter().filter(|node| target.node_index(node).is_some()).collect();
        if !alive.is_empty() {
            prop_assert!(is.iter().any(|node| alive.contains(&node)), "{} lost its last live holder", key);
        } else if !goal.is_empty() {
            prop_assert!(!is.is_empty(), "{} is still held by nobody", key);
            unbounded += 1;
        }
        prop_assert!(is.len() <= (goal.len() + 1).max(alive.len()), "{} has {} holders", key, is.len());
        // Those who must load come last.
        let first_new = is.iter().position(|node| !was.contains(node)).unwrap_or(is.len());
        prop_assert!(is[first_new..].iter().all(|node| !was.contains(node)), "{} is asked of one that loads", key);
        prop_assert!(is[first_new..].iter().all(|node| goal.contains(node)), "{} moves astray", key);
    }
    prop_assert!(moves(before, after) <= allowance + unbounded);
    Ok(())
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(400))]

    #[test]
    fn every_step_is_safe_and_the_last_one_arrives(
        (from, to) in (some_nodes(), some_nodes()),
        (hot_before, hot_after) in (prop::collection::vec(0u16..24, 0..9), prop::collection::vec(0u16..24, 0..9)),
        (replicas_before, replicas, moves_max) in (1usize..4, 1usize..4, 1usize..40),
    ) {
        // Broken: requests would meet holes on the way, or copies would move for ever.
        let policy = policy(replicas, moves_max);
        let mut now = goal(&from, &hot_before, &super::tests::policy(replicas_before, 1)).with_epoch(1);
        let target = goal(&to, &hot_after, &policy);
        let missing = moves(&now, &target);
        let bound = missing / moves_max + replicas + policy.hot_replicas_max + 2;
        let mut steps = 0;
        while let Some(next) = step(&now, &target, &|_| u64::MAX, &policy) {
            check_step(&now, &next, &target, moves_max)?;
            steps += 1;
            prop_assert!(steps <= bound, "{} steps for {} moves", steps, missing);
            now = next;
        }
        if to.iter().any(|node| node.weight > 0.0) {
            prop_assert!(now.same_holders(&target));
        }
    }

    #[test]
    fn nothing_is_dropped_for_one_that_is_not_ready(
        (from, to) in (some_nodes(), some_nodes()),
        ready in prop::collection::vec(any::<bool>(), 200),
        (replicas, moves_max) in (1usize..4, 1usize..40),
    ) {
        // Broken: a holder that has an expert loaded would give way to one that has yet to load it.
        let policy = policy(replicas, moves_max);
        let mut now = goal(&from, &[], &policy).with_epoch(1);
        let target = goal(&to, &[], &policy);
        for at in 0..20 {
            let epoch = now.epoch();
            let is_ready = |node: &NodeId| {
                let i = target.node_index(node).map_or(0, usize::from);
                if ready[(at * 10 + i) % ready.len()] { epoch } else { epoch - 1 }
            };
            let Some(next) = step(&now, &target, &is_ready, &policy) else { continue };
            check_step(&now, &next, &target, moves_max)?;
            for key in now.keys() {
                let goal = names(&target, key);
                let alive = |placement| -> Vec<_> {
                    names(placement, key).into_iter().filter(|node| target.node_index(node).is_some()).collect()
                };
                let (was, is) = (alive(&now), alive(&next));
                let ready_goal = is.iter().filter(|node| goal.contains(node) && is_ready(node) >= epoch).count();
                let dropped = was.iter().filter(|node| !is.contains(node)).count();
                // What was dropped left enough: ready ones and others that have held it all along.
                let old = is.iter().filter(|node| was.contains(node) && !goal.contains(node)).count();
                prop_assert!(dropped == 0 || ready_goal + old >= goal.len(), "{} of {}", dropped, key);
            }
            now = next;
        }
    }

    #[test]
    fn the_death_of_a_node_moves_only_its_share(
        weights in prop::collection::btree_map(0u8..12, 0.3f64..4.0, 3..9), dead in 0usize..9, replicas in 1usize..4,
    ) {
        // Broken: when a node dies the others would load what they need not, at the worst moment.
        let all = candidates(&weights.into_iter().collect::<Vec<_>>());
        let mut left = all.clone();
        let gone = left.remove(dead % all.len()).node;
        let policy = policy(replicas, usize::MAX);
        let before = goal(&all, &[3], &policy).with_epoch(1);
        let lost = before.held_by(&gone).count();
        let mut now = before.clone();
        let target = goal(&left, &[3], &policy);
        let mut loaded = 0;
        while let Some(next) = step(&now, &target, &|_| u64::MAX, &policy) {
            loaded += moves(&now, &next);
            now = next;
        }
        prop_assert!(loaded <= lost, "{} loaded for {} lost", loaded, lost);
        for key in before.keys() {
            let stayed: Vec<_> = before.holders(key).filter(|node| **node != gone).collect();
            prop_assert_eq!(&names(&now, key)[..stayed.len()], &stayed[..]);
        }
    }
}

/// Copies that failures took would wait behind moves that only improve, and those closest to being lost would
/// wait behind others.
#[test]
fn lost_copies_come_first_and_the_scarcest_of_them_before_all() {
    let extent = Extent { moe_layers: 1, num_experts: 3, replicas: 3 };
    let nodes = |names: &[&str]| names.iter().map(|&name| NodeId::from(name)).collect::<Vec<_>>();
    let goal = Placement::from_parts(0, extent, nodes(&["a", "b", "c", "d"]), &[3, 3, 3], &[3, 1, 2, 0, 1, 2, 0, 1, 2]);
    let goal = goal.unwrap();
    // Expert 0 should move from a to d; expert 1 lost one copy, expert 2 two.
    let now =
        Placement::from_parts(4, extent, nodes(&["a", "b", "c", "x"]), &[3, 3, 3], &[0, 1, 2, 0, 1, 3, 3, 0, 3 - 1]);
    let now = now.unwrap();
    let now_with_two_lost =
        Placement::from_parts(4, extent, nodes(&["a", "b", "c", "x", "y"]), &[3, 3, 3], &[0, 1, 2, 0, 1, 3, 3, 0, 4]);
    let ready = |_: &NodeId| u64::MAX;
    let lengths = |placement: &Placement| placement.counts().collect::<Vec<_>>();
    let within = |copies, moves| {
        lengths(&step_within(now_with_two_lost.as_ref().unwrap(), &goal, &ready, Allowance { copies, moves }).unwrap())
    };
    assert_eq!(within(0, 0), [3, 2, 1], "dead holders go in any case");
    assert_eq!(within(1, 1), [3, 2, 2]);
    assert_eq!(within(2, 2), [3, 3, 2]);
    assert_eq!(within(3, 3), [3, 3, 3]);
    assert_eq!(within(4, 4), [4, 3, 3]);
    assert_eq!(within(9, 0), [3, 3, 3], "moves are held back, restored copies are not");
    assert_eq!(lengths(&step(&now, &goal, &ready, &policy(3, 9)).unwrap()), [4, 3, 3]);
}

/// Moves that are paid for would not be made, because others were counted twice.
#[test]
fn what_one_expert_does_not_need_is_left_to_the_next() {
    let extent = Extent { moe_layers: 1, num_experts: 2, replicas: 1 };
    let nodes = |names: &[&str]| names.iter().map(|&name| NodeId::from(name)).collect::<Vec<_>>();
    // Nobody is left of the first expert's holders, and it should have three; the second has one of two.
    let goal = Placement::from_parts(0, extent, nodes(&["a", "b", "c"]), &[3, 2], &[0, 1, 2, 0, 1]).unwrap();
    let now = Placement::from_parts(4, extent, nodes(&["a", "dead"]), &[1, 1], &[1, 0]).unwrap();
    let within = |copies, moves| -> Vec<u32> {
        step_within(&now, &goal, &|_| 0, Allowance { copies, moves }).unwrap().counts().collect()
    };
    let by_moves = [[1, 1], [2, 1], [3, 1], [3, 2], [3, 2]];
    for (moves, expected) in by_moves.into_iter().enumerate() {
        assert_eq!((within(9, moves), within(moves, 9)), (expected.into(), expected.into()), "{moves} moves");
    }
}

/// A new holder would be asked before it has loaded, or an old one would leave before.
#[test]
fn a_copy_moves_in_three_placements() {
    let extent = Extent { moe_layers: 1, num_experts: 1, replicas: 1 };
    let both = || vec![NodeId::from("new"), NodeId::from("old")];
    let mut now = Placement::from_parts(1, extent, both(), &[1], &[1]).unwrap();
    let goal = Placement::from_parts(0, extent, both(), &[1], &[0]).unwrap();
    let key = ExpertKey { layer: LayerId(0), expert: ExpertId(0) };
    now = step(&now, &goal, &|_| 1, &policy(1, 9)).unwrap();
    assert_eq!((now.epoch(), names(&now, key)), (2, vec![&"old".into(), &"new".into()]));
    assert_eq!(step(&now, &goal, &|_| 1, &policy(1, 9)), None, "nobody has loaded for epoch 2 yet");
    now = step(&now, &goal, &|_| 2, &policy(1, 9)).unwrap();
    assert_eq!((now.epoch(), names(&now, key)), (3, vec![&"new".into()]));
    assert_eq!(step(&now, &goal, &|_| 3, &policy(1, 9)), None);
}
