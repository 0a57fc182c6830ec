//! Load at both doors, with random faults and random abuse, for as long as `SIDA_SOAK_SECONDS` says: memory and descriptors
//! of every process stay as they are. Without that variable it is skipped.

use std::{collections::BTreeMap, env, time::Duration};

use rand::{Rng, seq::IndexedRandom};
use sida_tests::{
    Sandbox, SandboxConfig,
    fault_proxy::{Direction, Link},
};
use tokio::{
    task::JoinSet,
    time::{Instant, sleep},
};

use super::{fault_free, load, random};
use crate::abuse::{
    doors::{Door, Honest},
    offenders,
};

/// What a process may hold beyond what it held when it was warm.
const BYTES_MORE_MAX: u64 = 32 << 20;
const DESCRIPTORS_MORE_MAX: usize = 24;

/// A cluster would fill the memory of its machines within days, or run out of sockets.
#[tokio::test(flavor = "multi_thread")]
async fn nothing_grows() {
    let Some(seconds) = env::var("SIDA_SOAK_SECONDS").ok() else {
        return println!("SKIPPED: the soak runs when SIDA_SOAK_SECONDS is set");
    };
    let seconds: u64 = seconds.parse().expect("SIDA_SOAK_SECONDS is a number");
    let mut random = random("soak");
    let config = SandboxConfig {
        expert_nodes: 3,
        predictor_nodes: 1,
        replicas: 2,
        expert_memory: "50%".into(),
        proxies: true,
        // Low, so that whoever does harm is ended before the next does.
        coordinator_flags: ["--http-listen=127.0.0.1:0", "--stall-timeout=5s", "--connections-max=64"]
            .map(String::from)
            .into(),
        ..Default::default()
    };
    let mut sandbox = Sandbox::start(config).await;
    let load = load(&sandbox);
    let normal = fault_free(&load, Duration::from_secs(10)).await.answers();
    let held = |sandbox: &Sandbox| -> BTreeMap<String, (u64, usize)> {
        let of = |(name, process): (&str, &sida_tests::Process)| {
            (name.to_owned(), (process.resident_bytes(), process.descriptors()))
        };
        sandbox.processes().map(of).collect()
    };
    let (mut warm, start) = (None, Instant::now());
    let running = load.start();
    let coordinator = sandbox.process("coordinator-0");
    let addresses = [(Door::Grpc, Some(coordinator.address())), (Door::Http, coordinator.http_address())];
    let doors = addresses.map(|(door, address)| (door, address.expect("it serves it").parse().expect("an address")));
    let honest = Honest::start(doors);
    let mut abuse = JoinSet::new();
    let names = ["expert-node-0", "expert-node-1", "expert-node-2", "predictor-node-0"];
    let (mut faults, mut told) = (0, Duration::ZERO);
    while start.elapsed() < Duration::from_secs(seconds) {
        let name = names.choose(&mut random).expect("a node").to_string();
        let proxy = sandbox.proxy(&name);
        match random.random_range(0..9) {
            0 => proxy.set(Link::Dead),
            1 => proxy.set(Link::Closed),
            2 => proxy.set(Link::Late(Duration::from_millis(random.random_range(1..20)))),
            3 => proxy.set(Link::Slow(random.random_range(20_000..2_000_000))),
            4 => proxy.cut(),
            5 => proxy.reset_within_next(Direction::Back),
            6 => proxy.corrupt_next(Direction::There),
            7 => proxy.corrupt_next(Direction::Back),
            _ => {
                sandbox.process(&name).signal("STOP");
                sleep(Duration::from_millis(random.random_range(10..1500))).await;
                sandbox.process(&name).signal("CONT");
            }
        }
        let (door, to) = *doors.choose(&mut random).expect("a door");
        match random.random_range(0..6) {
            0 => (0..80).for_each(|_| drop(abuse.spawn(offenders::idle(to, door)))),
            1 => drop(abuse.spawn(offenders::slow_reader(to, door))),
            2 => drop(abuse.spawn(offenders::slow_sender(to, door))),
            3 => drop(abuse.spawn(offenders::rapid_resets(to, door))),
            4 => drop(abuse.spawn(offenders::continuations(to, door))),
            _ => drop(abuse.spawn(offenders::large(to, door))),
        }
        faults += 1;
        sleep(Duration::from_millis(random.random_range(50..1500))).await;
        sandbox.proxy(&name).set(Link::Good);
        // A node that is started anew would begin small, so only the one that nothing is held against is killed.
        if random.random_bool(0.1) && name == "expert-node-2" {
            sandbox.take(&name).kill();
            sandbox = tokio::task::spawn_blocking(move || {
                sandbox.restart("expert-node-2");
                sandbox
            })
            .await
            .expect("it starts again");
        }
        // One fault at a time: whoever was cut off is back before the next.
        sleep(Duration::from_millis(700)).await;
        // Whoever is idle stays as long as its place is not needed.
        abuse.abort_all();
        if start.elapsed() > told + Duration::from_secs(300) {
            told = start.elapsed();
            println!("after {:.0?}: {faults} faults, {} requests", told, running.count());
        }
        if warm.is_none() && start.elapsed() > Duration::from_secs(seconds / 4) {
            warm = Some(held(&sandbox));
        }
    }
    let report = running.stop().await;
    let asked = honest.stop().await;
    let failed: Vec<_> = asked.iter().filter(|asked| asked.outcome.is_err()).collect();
    println!("{} requests at both doors, {} failed", asked.len(), failed.len());
    assert!(failed.is_empty(), "first {:?}", failed[0]);
    // What is held is told in any case.
    sleep(Duration::from_secs(6)).await;
    let (warm, end) = (warm.expect("it was warm"), held(&sandbox));
    println!("{faults} faults: {report}");
    for (name, (bytes, descriptors)) in &end {
        let (warm_bytes, warm_descriptors) = warm[name];
        println!(
            "{name}: {} -> {} KiB, {warm_descriptors} -> {descriptors} descriptors",
            warm_bytes >> 10,
            bytes >> 10
        );
    }
    report.assert_as(&normal);
    for (name, (bytes, descriptors)) in end.iter().filter(|(name, _)| *name != "expert-node-2") {
        let (warm_bytes, warm_descriptors) = warm[name];
        assert!(*bytes <= warm_bytes + BYTES_MORE_MAX, "{name} grows");
        assert!(*descriptors <= warm_descriptors + DESCRIPTORS_MORE_MAX, "{name} leaks descriptors");
    }
}
