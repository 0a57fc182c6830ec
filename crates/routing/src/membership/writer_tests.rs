//! The writer, through the life of a cluster.

use super::*;

const EXTENT: Extent = Extent { moe_layers: 2, num_experts: 60, replicas: 2 };
const POLICY: Policy = Policy { replicas: 2, hot_replicas_max: 2, moves_max: 20 };
const PACE: Pace = Pace {
    moves_per_minute: 60,
    step_interval: Duration::from_millis(250),
    absence_borne: Duration::from_secs(5),
    gather: Duration::from_secs(2),
};

fn ms(ms: u64) -> Duration {
    Duration::from_millis(ms)
}

fn members(names: &[&str]) -> Vec<Standing> {
    let member = |name: &&str| Standing { node: (*name).into(), weight: 1.0, is_leaving: false, ready_epoch: u64::MAX };
    names.iter().map(member).collect()
}

fn decide(writer: &mut Writer, now: Duration, stored: Option<&Placement>, members: &[Standing]) -> Decision {
    let known = stored.map_or(0, Placement::epoch);
    writer.decide(now, stored, known, EXTENT, members, &Demand::new(2, 60)).unwrap()
}

fn placed(names: &[&str], epoch: u64) -> Placement {
    let candidates: Vec<_> = names.iter().map(|&name| Candidate { node: name.into(), weight: 1.0 }).collect();
    Placement::compute(epoch, EXTENT, &candidates).unwrap()
}

/// A fourth node, `d`, is there and holds nothing yet.
fn placed_beside_d(names: &[&str], epoch: u64) -> Placement {
    let placement = placed(names, epoch);
    let nodes = names.iter().chain(&["d"]).map(|&name| name.into()).collect();
    let holders: Vec<u32> = placement.all_holders().iter().map(|&holder| holder.into()).collect();
    Placement::from_parts(epoch, EXTENT, nodes, &placement.counts().collect::<Vec<_>>(), &holders).unwrap()
}

/// Follows the writer's decisions from `now` until it has nothing more to do: (time, placement) of each.
fn follow(writer: &mut Writer, mut now: Duration, from: Placement, members: &[Standing]) -> Vec<(Duration, Placement)> {
    let mut written: Vec<(Duration, Placement)> = Vec::new();
    for _ in 0..1000 {
        let stored = written.last().map_or(&from, |(_, placement)| placement).clone();
        match decide(writer, now, Some(&stored), members) {
            Decision::Write(placement) => {
                assert_eq!(placement.epoch(), stored.epoch() + 1);
                writer.written(now, Some(&stored), &placement);
                written.push((now, placement));
            }
            Decision::Wait(Some(until)) => {
                assert!(until > now, "a wait that does not wait");
                now = until;
            }
            Decision::Wait(None) => return written,
        }
    }
    panic!("it never comes to rest");
}

#[test]
fn the_first_placement_waits_for_the_nodes() {
    // Broken: the node that starts first would be given every expert of the model.
    let mut writer = Writer::new(POLICY, PACE, ms(0));
    assert_eq!(decide(&mut writer, ms(10), None, &[]), Decision::Wait(None));
    assert_eq!(decide(&mut writer, ms(100), None, &members(&["a"])), Decision::Wait(Some(ms(2100))));
    assert_eq!(decide(&mut writer, ms(1100), None, &members(&["a", "b"])), Decision::Wait(Some(ms(3100))));
    let Decision::Write(first) = decide(&mut writer, ms(3100), None, &members(&["a", "b"])) else { panic!() };
    assert_eq!(first, placed(&["a", "b"], 1));
}

#[test]
fn a_store_that_lost_everything_gets_a_greater_epoch() {
    // Broken: every expert-node would refuse every call as older than what it knows, or all experts would move.
    let mut writer = Writer::new(POLICY, PACE, ms(0));
    let mut nodes = members(&["a", "b"]);
    (nodes[0].ready_epoch, nodes[1].ready_epoch) = (9, u64::MAX);
    let demand = Demand::new(2, 60);
    let known = placed(&["a", "b"], 7);
    let mut decide = |current: Option<&Placement>, stored, now| {
        writer.decide(now, current, stored, EXTENT, &nodes, &demand).unwrap()
    };
    decide(None, 0, ms(0));
    let Decision::Write(again) = decide(None, 0, ms(2000)) else { panic!() };
    assert_eq!(again.epoch(), 10, "a member has seen 9");
    for lost in [0, 3, 6] {
        assert_eq!(decide(Some(&known), lost, ms(2000)), Decision::Write(known.clone().with_epoch(10)));
    }
    assert_eq!(decide(Some(&known), 7, ms(2000)), Decision::Wait(None));
}

#[test]
fn the_dead_are_dropped_at_once_and_their_copies_restored_quickly() {
    // Broken: a second failure would meet experts with one copy, or none.
    let mut writer = Writer::new(POLICY, PACE, ms(0));
    let before = placed(&["a", "b", "c", "d"], 4);
    let lost = before.held_by(&"c".into()).count();
    writer.see(&members(&["a", "b", "c", "d"]));
    writer.stepped = Some(ms(990));
    let steps = follow(&mut writer, ms(1000), before, &members(&["a", "b", "d"]));
    let (at, first) = &steps[0];
    assert_eq!(*at, ms(1000), "whatever the pace");
    assert!(first.nodes().iter().all(|node| node.as_str() != "c"));
    let (at, last) = steps.last().unwrap();
    assert!(last.same_holders(&placed(&["a", "b", "d"], 0)));
    assert!(*at <= ms(1000) + PACE.step_interval * (lost as u32 / 20 + 1), "{lost} copies took until {at:?}");
    assert!(decide(&mut writer, *at + ms(1), Some(last), &members(&["a", "b", "d"])) != Decision::Wait(None));
}

#[test]
fn a_new_writer_waits_for_those_it_has_not_seen() {
    // Broken: after the store lost its leases, whoever registers first would get everything. Found by simulation.
    let mut writer = Writer::new(POLICY, PACE, ms(1000));
    let current = placed(&["a", "b", "c"], 4);
    assert_eq!(decide(&mut writer, ms(1000), Some(&current), &members(&["b"])), Decision::Wait(Some(ms(6000))));
    assert_eq!(decide(&mut writer, ms(2000), Some(&current), &members(&["a", "b"])), Decision::Wait(Some(ms(6000))));
    assert_eq!(decide(&mut writer, ms(3000), Some(&current), &members(&["a", "b", "c"])), Decision::Wait(None));
    let dropped = decide(&mut writer, ms(3001), Some(&current), &members(&["b", "c"]));
    assert!(matches!(dropped, Decision::Write(_)), "it was there and is gone");
    let mut later = Writer::new(POLICY, PACE, ms(1000));
    assert!(matches!(decide(&mut later, ms(6000), Some(&current), &members(&["b"])), Decision::Write(_)));
}

#[test]
fn a_joining_node_is_filled_at_the_pace() {
    // Broken: a node that joins would make the disks of the cluster busy all at once.
    let mut writer = Writer::new(POLICY, PACE, ms(0));
    let nodes = ["a", "b", "c", "d"];
    let before = placed(&["a", "b", "c"], 4);
    let missing = moves(&before, &placed(&nodes, 0));
    let steps = follow(&mut writer, ms(0), before.clone(), &members(&nodes));
    let (end, last) = steps.last().unwrap();
    assert!(last.same_holders(&placed(&nodes, 0)));
    let mut made = 0;
    let mut previous = &before;
    for (at, placement) in &steps {
        made += moves(previous, placement);
        assert!(made as f64 <= 1.0 + at.as_secs_f64() * f64::from(PACE.moves_per_minute) / 60.0, "{made} at {at:?}");
        previous = placement;
    }
    assert_eq!(made, missing, "nothing moves twice");
    assert!(*end <= Duration::from_secs(missing as u64 + 10), "{end:?} for {missing} moves");
    assert!(steps.len() <= missing / 5 * 2 + 4, "{} steps for {missing} moves", steps.len());
}

#[test]
fn held_back_moves_are_waited_for_no_longer_than_they_must() {
    // Broken: the writer would look again too early, too late or never, or move fewer copies at once than it may.
    let (before, goal) = (placed_beside_d(&["a", "b", "c"], 4), members(&["a", "b", "c", "d"]));
    let missing = moves(&before, &placed(&["a", "b", "c", "d"], 0));
    let waits_for = |moves_per_minute, seconds: f64| {
        let mut writer = Writer::new(POLICY, Pace { moves_per_minute, ..PACE }, ms(1000));
        let at = ms(1000) + Duration::from_secs_f64(seconds);
        for now in [ms(1000), ms(1300)] {
            let Decision::Wait(Some(until)) = decide(&mut writer, now, Some(&before), &goal) else { panic!() };
            assert!(until.abs_diff(at + ms(1)) <= Duration::from_micros(1), "{until:?}, expected {at:?}");
        }
        let Decision::Write(next) = decide(&mut writer, at + ms(1), Some(&before), &goal) else { panic!() };
        moves(&before, &next)
    };
    assert_eq!(waits_for(60, 5.0), 5, "a twelfth of a minute's");
    assert_eq!(waits_for(7, 60.0 / 7.0), 1, "at least one");
    assert_eq!(waits_for(3000, missing as f64 / 50.0), missing.min(POLICY.moves_max), "no more than there are");
}

#[test]
fn who_has_nothing_to_wait_for_does_not_look_again() {
    // Broken: every coordinator that leads would compute the placement again and again for nothing.
    let nodes = ["a", "b", "c", "d"];
    let rest = decide(&mut Writer::new(POLICY, PACE, ms(0)), ms(0), Some(&placed(&nodes, 4)), &members(&nodes));
    assert_eq!(rest, Decision::Wait(None), "an empty bucket, and nothing to move");
    let mut never = Writer::new(POLICY, Pace { moves_per_minute: 0, ..PACE }, ms(0));
    let joined = decide(&mut never, ms(60_000), Some(&placed_beside_d(&["a", "b", "c"], 4)), &members(&nodes));
    assert_eq!(joined, Decision::Wait(None), "moves that are never paid for");
    // Both holders of every expert leave. The second exchange begins when somebody has loaded for the first.
    let pace = Pace { moves_per_minute: 6000, ..PACE };
    let mut writer = Writer::new(Policy { moves_max: usize::MAX, ..POLICY }, pace, ms(0));
    let before = placed(&["a", "b"], 4);
    let mut all = members(&nodes);
    (all[0].is_leaving, all[1].is_leaving) = (true, true);
    all.iter_mut().for_each(|member| member.ready_epoch = 4);
    let Decision::Write(next) = decide(&mut writer, ms(60_000), Some(&before), &all) else { panic!() };
    assert_eq!(moves(&before, &next), EXTENT.experts());
    writer.written(ms(60_000), Some(&before), &next);
    assert_eq!(decide(&mut writer, ms(70_000), Some(&next), &all), Decision::Wait(None));
}

#[test]
fn each_node_speaks_for_itself() {
    // Broken: rows would be sent to a node that has not loaded, because another one has.
    let mut all = members(&["a", "b", "d"]);
    (all[0].is_leaving, all[2].ready_epoch) = (true, 0);
    let mut writer = Writer::new(Policy { moves_max: usize::MAX, ..POLICY }, PACE, ms(0));
    writer.pace.moves_per_minute = 6000;
    let before = placed(&["a", "b"], 4);
    let Decision::Write(next) = decide(&mut writer, ms(60_000), Some(&before), &all) else { panic!() };
    writer.written(ms(60_000), Some(&before), &next);
    assert_eq!(decide(&mut writer, ms(70_000), Some(&next), &all), Decision::Wait(None), "d has not loaded");
    all[2].ready_epoch = next.epoch();
    let Decision::Write(last) = decide(&mut writer, ms(70_000), Some(&next), &all) else { panic!() };
    assert_eq!(last.held_by(&"a".into()).count(), 0);
}

#[test]
fn absurd_epochs_are_not_believed() {
    // Broken: one damaged record of a member would use up all epochs, or one that tells the truth be taken for damaged.
    let known = placed(&["a", "b"], 7);
    let written = |ready_epoch| {
        let mut nodes = members(&["a", "b"]);
        nodes[0].ready_epoch = ready_epoch;
        let decision = Writer::new(POLICY, PACE, ms(0)).decide(
            ms(0),
            Some(&known),
            3,
            EXTENT,
            &nodes,
            &Demand::new(EXTENT.moe_layers, EXTENT.num_experts),
        );
        let Ok(Decision::Write(placement)) = decision else { panic!("{decision:?}") };
        placement.epoch()
    };
    assert_eq!(written(0), 8);
    assert_eq!(written(7 + EPOCHS_LOST_MAX - 1), 7 + EPOCHS_LOST_MAX);
    assert_eq!(written(7 + EPOCHS_LOST_MAX), 8);
}

#[test]
fn only_what_restores_nothing_is_paid_for() {
    // Broken: after a failure nothing could be moved for a minute, or moves would be had for nothing.
    let mut writer = Writer::new(POLICY, PACE, ms(0));
    let minute = ms(60_000);
    let before = placed(&["a", "b", "c"], 4);
    let lost = before.held_by(&"c".into()).count();
    assert!(lost < PACE.moves_per_minute as usize * 2);
    writer.written(minute, Some(&before), &placed(&["a", "b"], 5));
    assert_eq!(writer.moves, 60.0, "{lost} copies were restored");
    writer.written(minute, Some(&before), &placed(&["a", "d"], 5));
    assert_eq!(writer.moves, 60.0, "so they are where all holders of an expert were lost");
    let joined = placed(&["a", "b", "c", "d"], 5);
    let made = moves(&before, &joined);
    writer.written(minute, None, &joined);
    assert_eq!(writer.moves, 60.0, "a first placement moves nothing");
    writer.written(minute, Some(&before), &joined);
    assert_eq!(writer.moves, (60.0 - made as f64).max(0.0));
    writer.fill(minute + ms(1500));
    writer.fill(minute);
    assert_eq!(writer.moves, (60.0 - made as f64).max(0.0) + 1.5, "time that goes back gives nothing");
}

#[test]
fn a_leaving_node_is_asked_last_and_dropped_when_others_have_loaded() {
    // Broken: a drained node would take experts with it that nobody else has.
    let mut writer = Writer::new(Policy { replicas: 1, ..POLICY }, PACE, ms(0));
    let extent = Extent { replicas: 1, ..EXTENT };
    let candidates: Vec<_> = ["a", "b"].map(|name| Candidate { node: name.into(), weight: 1.0 }).into();
    let before = Placement::compute(1, extent, &candidates).unwrap();
    let mut nodes = members(&["a", "b"]);
    nodes[0].is_leaving = true;
    let steps = follow(&mut writer, Duration::from_secs(60), before.clone(), &nodes);
    let (mut held, mut previous) = (before.held_by(&"a".into()).count(), before);
    for (_, placement) in steps {
        for key in placement.keys() {
            assert!(placement.holders(key).any(|node| previous.holders(key).any(|old| old == node)));
        }
        let holds = placement.held_by(&"a".into()).count();
        assert!(holds <= held);
        (held, previous) = (holds, placement);
    }
    assert_eq!(held, 0);
    nodes[1].is_leaving = true;
    let wait = decide(&mut writer, Duration::from_secs(9999), Some(&previous), &nodes);
    assert_eq!(wait, Decision::Wait(None), "with everybody leaving, everything stays");
    assert_eq!(decide(&mut writer, Duration::from_secs(9999), Some(&previous), &[]), Decision::Wait(None));
}
