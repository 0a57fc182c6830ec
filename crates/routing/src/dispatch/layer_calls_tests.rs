//! The calls of a layer, driven by hand: nodes fail in every way.

use std::time::Duration;

use super::{
    Finished, Next, Outlook, Why,
    scripted_nodes::{Nodes, PATIENCE, SILENCE, asked, layer, layer_after, lost, ms, send},
};
use crate::failover::{Blame, CallFailure, RetryBudget};

#[test]
fn pieces_for_one_node_make_one_call_as_far_as_they_fit() {
    // Broken: a message per expert, messages that nodes refuse as too large, or rows for a node that is away.
    let mut nodes = Nodes::new(3);
    let calls = layer(&[(0, 5), (1, 3), (3, 4)], 8).ask(&mut nodes, ms(0));
    assert_eq!(asked(&calls), [(0, vec![(0, 5)]), (0, vec![(3, 4)]), (1, vec![(1, 3)])]);
    nodes.up[0] = false;
    let calls = layer(&[(0, 5), (1, 3), (2, 9)], 8).ask(&mut nodes, ms(0));
    assert_eq!(asked(&calls), [(2, vec![(2, 8)]), (1, vec![(0, 5), (1, 3)]), (2, vec![(2, 1)])]);
}

#[test]
fn what_failed_is_asked_of_others_when_the_round_is_over() {
    // Broken: rows are asked of the node that lost them, asked for twice, or not at all.
    let (mut nodes, mut calls) = (Nodes::new(3), layer(&[(0, 1), (1, 1)], 8));
    for (id, call) in calls.ask(&mut nodes, ms(0)).into_iter().enumerate() {
        send(&mut calls, &nodes, id as u64, call, ms(0), ms(500));
    }
    let call = calls.answered(0).unwrap();
    calls.failed(&mut nodes, call, &lost());
    assert_eq!(calls.next(&mut nodes, ms(1)), Next::Wait(SILENCE), "the other call is under way");
    assert!(calls.answered(1).is_some() && calls.answered(1).is_none() && calls.answered(7).is_none());
    assert_eq!(calls.next(&mut nodes, ms(2)), Next::Ask);
    assert_eq!(asked(&calls.ask(&mut nodes, ms(2))), [(1, vec![(0, 1)])]);
    assert_eq!(calls.next(&mut nodes, ms(2)), Next::Done);
    assert_eq!(nodes.notes, ["failed", "asked again"]);
    assert_eq!(calls.finish().failovers, 1);
}

#[test]
fn an_expert_that_cannot_be_loaded_takes_no_other_with_it() {
    // Broken: requests that need the others fail, or load them a second time elsewhere.
    let (mut nodes, mut calls) = (Nodes::new(2), layer(&[(0, 1), (2, 1)], 8));
    let unreadable = CallFailure::Refused { blame: Blame::Expert, message: "unreadable".into() };
    let both = calls.ask(&mut nodes, ms(0)).pop().unwrap();
    calls.failed(&mut nodes, both, &unreadable);
    let mut alone = calls.ask(&mut nodes, ms(1));
    assert_eq!(asked(&alone), [(0, vec![(0, 1)]), (0, vec![(2, 1)])]);
    calls.computed(ms(2));
    calls.failed(&mut nodes, alone.pop().unwrap(), &unreadable);
    let elsewhere = calls.ask(&mut nodes, ms(2));
    assert_eq!(asked(&elsewhere), [(1, vec![(2, 1)])]);
    elsewhere.into_iter().for_each(|call| calls.failed(&mut nodes, call, &unreadable));
    assert!(calls.ask(&mut nodes, ms(3)).is_empty(), "nobody is waited for who would refuse again");
    assert_eq!(calls.next(&mut nodes, ms(3)), Next::Done);
    let Finished { given_up, outlook, .. } = calls.finish();
    let [one] = &given_up[..] else { panic!("{given_up:?}") };
    assert_eq!((one.why, one.rows.clone(), one.tried.len()), (Why::Unavailable, 1..2, 2));
    assert!(is_waited_for(outlook, ms(3)), "nobody was waited for");
}

#[test]
fn silence_and_lateness_are_borne_while_nobody_else_could_answer() {
    // Broken: a hung node holds a request up; or the last node is given up although nobody else is left.
    for (signs, failure) in [(false, "no sign of life, 100.0ms after the call"), (true, "no answer within 500.0ms")] {
        let (mut nodes, mut calls) = (Nodes::new(3), layer(&[(0, 1)], 8));
        let call = calls.ask(&mut nodes, ms(0)).pop().unwrap();
        send(&mut calls, &nodes, 1, call, ms(0), ms(500));
        nodes.up = vec![true, false, false];
        let mut now = ms(0);
        while now < ms(1000) {
            if signs {
                nodes.heard[0] = now;
            }
            let Next::Wait(until) = calls.next(&mut nodes, now) else { panic!("given up at {now:?}") };
            assert!(until > now && until <= now + ms(125), "{until:?} at {now:?}");
            now = until;
            calls.look(&mut nodes, now);
        }
        nodes.up[2] = true;
        let Next::Wait(until) = calls.next(&mut nodes, now) else { panic!("not looked yet") };
        calls.look(&mut nodes, until);
        assert_eq!(nodes.given_up, [(1, 0, true)]);
        assert_eq!(asked(&calls.ask(&mut nodes, until)), [(2, vec![(0, 1)])]);

        // While somebody else is there, it takes no longer than it must.
        let (mut nodes, mut calls) = (Nodes::new(3), layer(&[(0, 1)], 8));
        let call = calls.ask(&mut nodes, ms(0)).pop().unwrap();
        send(&mut calls, &nodes, 1, call, ms(0), ms(500));
        while let Next::Wait(until) = calls.next(&mut nodes, now) {
            if signs {
                nodes.heard[0] = until;
            }
            calls.look(&mut nodes, until);
        }
        nodes.up = vec![false; 3];
        for _ in 0..2 {
            calls.ask(&mut nodes, ms(501)).into_iter().for_each(|call| calls.failed(&mut nodes, call, &lost()));
        }
        assert!(calls.ask(&mut nodes, ms(501)).is_empty());
        calls.look(&mut nodes, ms(511));
        nodes.is_wanted.set(false);
        calls.ask(&mut nodes, ms(511));
        let given_up = calls.finish().given_up;
        assert_eq!((given_up.len(), given_up[0].why), (1, Why::Unwanted));
        assert!(given_up[0].tried[0].1.to_string().starts_with(failure), "{given_up:?}");
    }
}

#[test]
fn the_last_node_is_given_up_at_last() {
    // Broken: a request that waits for the only node, which hangs, would wait for ever.
    let (mut nodes, mut calls) = (Nodes::new(1), layer(&[(0, 1)], 8));
    let call = calls.ask(&mut nodes, ms(0)).pop().unwrap();
    send(&mut calls, &nodes, 1, call, ms(0), ms(500));
    let mut last = ms(0);
    while let Next::Wait(until) = calls.next(&mut nodes, last) {
        last = until;
        calls.look(&mut nodes, last);
    }
    assert_eq!((last, &nodes.given_up[..]), (PATIENCE, &[(1, 0, true)][..]));
}

#[test]
fn who_looks_late_gives_nobody_up_at_once() {
    // Broken: a machine that stood still gives all nodes up for answers that it has not read yet, or never gives one up.
    let (mut nodes, mut calls) = (Nodes::new(3), layer(&[(0, 1)], 8));
    let call = calls.ask(&mut nodes, ms(0)).pop().unwrap();
    send(&mut calls, &nodes, 1, call, ms(0), ms(500));
    let mut now = ms(0);
    for late in 0..5 {
        assert!(nodes.given_up.is_empty(), "after {late} late looks");
        let Next::Wait(until) = calls.next(&mut nodes, now) else { panic!("it is under way") };
        now = until + ms(21);
        calls.look(&mut nodes, now);
    }
    assert_eq!(nodes.given_up, [(1, 0, true)]);
}

#[test]
fn who_comes_back_is_asked_again_and_nobody_for_ever() {
    // Broken: requests fail for a second in which all nodes are away, or every batch waits as long for nodes that are gone.
    let (mut nodes, mut calls) = (Nodes::new(2), layer(&[(0, 1)], 8));
    nodes.up = vec![false; 2];
    let mut now = ms(0);
    for _ in 0..2 {
        calls.ask(&mut nodes, now).into_iter().for_each(|call| calls.failed(&mut nodes, call, &lost()));
    }
    while now < ms(500) {
        assert_eq!(calls.next(&mut nodes, now), Next::Ask);
        assert!(calls.ask(&mut nodes, now).is_empty());
        let Next::Wait(until) = calls.next(&mut nodes, now) else { panic!("it waits") };
        now = until;
        calls.look(&mut nodes, now);
    }
    nodes.up[1] = true;
    let back = calls.ask(&mut nodes, now);
    assert_eq!(asked(&back), [(1, vec![(0, 1)])]);
    back.into_iter().for_each(|call| calls.failed(&mut nodes, call, &lost()));
    assert!(calls.ask(&mut nodes, now).is_empty(), "who fails at once is asked after a pause");
    nodes.up[1] = false;
    let mut rounds = 0;
    loop {
        match calls.next(&mut nodes, now) {
            Next::Ask => assert!(calls.ask(&mut nodes, now).is_empty()),
            Next::Wait(until) => {
                now = until;
                calls.look(&mut nodes, now);
            }
            Next::Done => break,
        }
        rounds += 1;
        assert!(rounds < 1000, "it never ends");
    }
    assert!(now >= PATIENCE && now < PATIENCE + ms(50), "{now:?}");
    let finished = calls.finish();
    assert_eq!(finished.given_up[0].why, Why::Unavailable);
    assert_eq!(nodes.notes.iter().filter(|&&note| note == "waits").count(), 1);
    assert!(!is_waited_for(finished.outlook, now), "the same outage is waited out once");
    let mut outlook = finished.outlook;
    let mut answered = layer_after(&[(0, 1)], 8, outlook, now);
    answered.ask(&mut nodes, now);
    answered.computed(now);
    outlook.learn(answered.finish().outlook);
    assert!(is_waited_for(outlook, now), "a node has answered");
}

#[test]
fn nodes_that_fail_later_than_they_are_asked_again_come_to_an_end() {
    // Broken: a layer is asked of nodes for ever that are up whenever it is looked, and lose each call after a while.
    const LOST_AFTER: Duration = ms(600);
    let (mut nodes, mut calls) = (Nodes::new(2), layer(&[(0, 1)], 8));
    let (mut now, mut sent, mut id) = (ms(0), ms(0), 0);
    loop {
        assert!(now < 2 * PATIENCE + 2 * LOST_AFTER, "it never ends");
        match calls.next(&mut nodes, now) {
            Next::Done => break,
            Next::Ask => {
                for call in calls.ask(&mut nodes, now) {
                    (sent, id) = (now, id + 1);
                    send(&mut calls, &nodes, id, call, now, PATIENCE);
                }
            }
            Next::Wait(until) => {
                now = until;
                nodes.heard.fill(now);
                let lost_one = if now >= sent + LOST_AFTER { calls.answered(id) } else { None };
                match lost_one {
                    Some(call) => calls.failed(&mut nodes, call, &lost()),
                    None => calls.look(&mut nodes, now),
                }
            }
        }
    }
    assert!(now >= PATIENCE && id > 2, "{now:?}, {id} calls");
    assert_eq!(calls.finish().given_up[0].why, Why::Unavailable);
}

/// Whether a layer waits whose nodes are all away.
fn is_waited_for(outlook: Outlook, now: Duration) -> bool {
    let (mut nodes, mut calls) = (Nodes::new(2), layer_after(&[(0, 1), (1, 1)], 8, outlook, now));
    nodes.up = vec![false; 2];
    for _ in 0..2 {
        calls.ask(&mut nodes, now).into_iter().for_each(|call| calls.failed(&mut nodes, call, &lost()));
    }
    assert!(calls.ask(&mut nodes, now).is_empty());
    matches!(calls.next(&mut nodes, now), Next::Wait(_))
}

#[test]
fn an_answer_during_a_wait_says_that_waiting_is_worth_while() {
    // Broken: for one expert that nobody can load, requests for all others fail as soon as their nodes blink.
    let (mut nodes, mut calls) = (Nodes::new(2), layer(&[(0, 1)], 8));
    let mut failures = [CallFailure::Refused { blame: Blame::Expert, message: String::new() }, lost()].into_iter();
    let mut now = ms(0);
    loop {
        match calls.next(&mut nodes, now) {
            Next::Ask => {
                for call in calls.ask(&mut nodes, now) {
                    calls.failed(&mut nodes, call, &failures.next().expect("nobody is asked again"));
                    nodes.up[1] = false;
                }
            }
            Next::Wait(until) => {
                now = until;
                calls.look(&mut nodes, now);
            }
            Next::Done => break,
        }
    }
    let in_vain = calls.finish().outlook;
    assert!(!is_waited_for(in_vain, now));
    let mut beside = layer(&[(1, 1)], 8);
    beside.ask(&mut nodes, ms(0));
    beside.computed(ms(500));
    let mut outlook = beside.finish().outlook;
    outlook.learn(in_vain);
    assert!(is_waited_for(outlook, now));
}

#[test]
fn retries_wait_for_their_budget() {
    // Broken: a storm of retries; or requests that fail at once although a retry comes a moment later.
    let (mut nodes, mut calls) = (Nodes::new(3), layer(&[(0, 1)], 8));
    while nodes.budget.take_retry(ms(0)) {}
    let first = calls.ask(&mut nodes, ms(0)).pop().unwrap();
    calls.failed(&mut nodes, first, &lost());
    assert!(calls.ask(&mut nodes, ms(0)).is_empty());
    assert!(calls.ask(&mut nodes, ms(10)).is_empty());
    assert_eq!(calls.ask(&mut nodes, ms(101)).len(), 1);
    assert_eq!(nodes.notes, ["failed", "refused", "asked again"], "it is noted once");

    // Where none comes for as long as may be waited.
    nodes.budget = RetryBudget::new(0.0, 0.0);
    let mut calls = layer(&[(0, 1)], 8);
    let first = calls.ask(&mut nodes, ms(0)).pop().unwrap();
    calls.failed(&mut nodes, first, &lost());
    while nodes.budget.take_retry(ms(0)) {}
    let mut now = ms(0);
    loop {
        match calls.next(&mut nodes, now) {
            Next::Ask => assert!(calls.ask(&mut nodes, now).is_empty()),
            Next::Wait(until) => {
                now = until;
                calls.look(&mut nodes, now);
            }
            Next::Done => break,
        }
    }
    assert!(now >= PATIENCE && now < PATIENCE + ms(50), "{now:?}");
    assert_eq!(calls.finish().given_up[0].why, Why::RetriesExhausted);
}

#[test]
fn rows_are_shared_out_again_under_a_newer_placement_three_times() {
    // Broken: a node that knows more counts as failed, or two that disagree are asked in turns for ever.
    let (mut nodes, mut calls) = (Nodes::new(2), layer(&[(0, 1)], 8));
    nodes.has_newer = true;
    for _ in 0..3 {
        let call = calls.ask(&mut nodes, ms(0)).pop().unwrap();
        assert_eq!(call.node, 0);
        calls.failed(&mut nodes, call, &CallFailure::Stale);
    }
    let call = calls.ask(&mut nodes, ms(0)).pop().unwrap();
    calls.failed(&mut nodes, call, &CallFailure::Stale);
    assert_eq!(asked(&calls.ask(&mut nodes, ms(0))), [(1, vec![(0, 1)])]);
    assert_eq!(nodes.notes, ["reshared", "reshared", "reshared", "failed", "asked again"]);

    let mut calls = layer(&[(0, 1)], 8);
    nodes.has_newer = false;
    let call = calls.ask(&mut nodes, ms(0)).pop().unwrap();
    calls.failed(&mut nodes, call, &CallFailure::Stale);
    assert_eq!(calls.ask(&mut nodes, ms(0)).pop().unwrap().node, 1, "it cannot say what is newer");
}

#[test]
fn calls_that_nobody_wants_speak_against_no_node() {
    // Broken: callers who leave make nodes look dead, or hold calls up until their deadline.
    let (mut nodes, mut calls) = (Nodes::new(2), layer(&[(0, 1)], 8));
    let call = calls.ask(&mut nodes, ms(0)).pop().unwrap();
    send(&mut calls, &nodes, 1, call, ms(0), ms(500));
    nodes.is_wanted.set(false);
    calls.look(&mut nodes, ms(99));
    assert!(nodes.given_up.is_empty(), "it is not its time yet");
    calls.look(&mut nodes, SILENCE);
    assert_eq!(nodes.given_up, [(1, 0, false)]);
    assert!(calls.ask(&mut nodes, SILENCE).is_empty());
    assert_eq!(calls.finish().given_up[0].why, Why::Unwanted);
}

#[test]
fn one_that_is_far_behind_the_others_straggles() {
    // Broken: a node behind a slow link holds up every layer; or one is passed over for what the scheduler took.
    let straggled = |times: &[(usize, u64)]| {
        let (mut nodes, mut calls) = (Nodes::new(3), layer(&[], 8));
        times.iter().for_each(|&(node, took)| calls.travelled(node, ms(took)));
        calls.next(&mut nodes, ms(0));
        calls.next(&mut nodes, ms(0));
        nodes.paces
    };
    assert_eq!(straggled(&[(0, 1), (1, 15), (2, 1)]), [(0, false), (1, true), (2, false)]);
    assert_eq!(straggled(&[(0, 1), (1, 14)]), [(0, false), (1, false)], "it must be far behind");
    assert_eq!(straggled(&[(0, 1), (0, 90)]), [], "there is nobody to compare with");
    assert_eq!(straggled(&[]), []);
}
