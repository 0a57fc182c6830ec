//! Replays tests/traces/residency/*.txt: stories of what is planned, called and loaded, with what the residency
//! machine decides written below each step. After a change of the rules run with UPDATE_TRACES=1 and review
//! the difference as text.
//!
//! A line is a command, `> ` its outcome, `#` a comment. Experts are `layer/expert`; `call` opens a call and
//! acquires all it can, `open` only opens it.

use std::{collections::BTreeMap, fmt::Write, fs, path::Path};

use sida_routing::{
    ExpertId, ExpertKey, LayerId, Plan, PlanId,
    residency::{Access, Grant, Load, Pending, Residency, ResidencyConfig, SlotId},
};

/// A call of the story: what it still wants and what it was given.
struct Call {
    pending: Pending,
    granted: Vec<Grant>,
}

struct Story {
    machine: Residency,
    calls: BTreeMap<String, Call>,
}

impl Story {
    fn run(&mut self, line: &str) -> String {
        let words: Vec<&str> = line.split_whitespace().collect();
        let mut out = String::new();
        match words[..] {
            ["slots", slots, "layers", layers, "experts", experts, "plans", plans] => {
                let config = ResidencyConfig {
                    slots: number(slots),
                    layers: number(layers),
                    num_experts: number(experts),
                    plans_max: number(plans),
                };
                *self = Self { machine: Residency::new(config), calls: BTreeMap::new() };
            }
            ["plan" | "begin", id, ref experts @ ..] => {
                let (id, begins) = (PlanId(number(id)), words[0] == "begin");
                let plan = Plan { id, experts: experts.iter().map(|e| key(e)).collect(), begins };
                match self.machine.plan(&plan) {
                    Ok(()) => writeln!(out, "{} queued", self.machine.plans()).unwrap(),
                    Err(error) => writeln!(out, "{error}").unwrap(),
                }
            }
            ["release", id] => self.machine.release(PlanId(number(id))),
            ["open" | "call", name, ref experts @ ..] => {
                let keys: Vec<ExpertKey> = experts.iter().map(|e| key(e)).collect();
                match self.machine.call(keys[0].layer, keys.iter().map(|k| k.expert)) {
                    Ok(pending) => {
                        self.machine.advance(keys[0].layer);
                        self.calls.insert(name.to_owned(), Call { pending, granted: Vec::new() });
                        if words[0] == "call" {
                            out = self.acquire(name, usize::MAX);
                        }
                    }
                    Err(error) => writeln!(out, "{error}").unwrap(),
                }
            }
            ["acquire", name] => out = self.acquire(name, usize::MAX),
            ["acquire", name, loads_max] => out = self.acquire(name, number(loads_max)),
            ["done", name] => {
                let call = self.calls.remove(name).expect("a call of this name");
                call.granted.iter().for_each(|grant| self.machine.unpin(grant.slot));
                self.machine.abandon(call.pending);
            }
            ["unpin", name, expert] => {
                let grant = self.take_grant(name, expert);
                self.machine.unpin(grant.slot);
            }
            ["await", name, expert] => {
                let call = &self.calls[name];
                let grant = call.granted.iter().find(|g| g.key == key(expert)).expect("granted");
                let Access::Await(ticket) = grant.access else { panic!("{expert} is not awaited") };
                writeln!(out, "{:?}", self.machine.awaited(ticket)).unwrap();
            }
            ["again", name, expert] => {
                let grant = self.take_grant(name, expert);
                self.machine.again(&mut self.calls.get_mut(name).expect("call").pending, &grant);
                out = self.acquire(name, usize::MAX);
            }
            ["loaded", slot] => self.machine.loaded(SlotId(number(slot))),
            ["quick", expert] => self.machine.note_pace(key(expert), true),
            ["slow", expert] => self.machine.note_pace(key(expert), false),
            ["failed", slot] => {
                let slot = SlotId(number(slot));
                self.machine.load_failed(slot);
                // Those who were to load it see the failure at once; those who await it are told by `await`.
                for call in self.calls.values_mut() {
                    call.granted.retain(|g| g.slot != slot || matches!(g.access, Access::Await(_)));
                }
            }
            ["prefetch"] => match self.machine.next_prefetch() {
                Some(load) => writeln!(out, "{}", describe_prefetch(&load)).unwrap(),
                None => writeln!(out, "nothing").unwrap(),
            },
            ["prefetch", "all"] => {
                while let Some(load) = self.machine.next_prefetch() {
                    writeln!(out, "{}", describe_prefetch(&load)).unwrap();
                    self.machine.loaded(load.slot);
                }
            }
            ["resident"] => {
                for (key, planned) in self.machine.resident() {
                    let planned = if planned { "planned" } else { "not planned" };
                    writeln!(out, "{} {planned}", show(key)).unwrap();
                }
            }
            _ => panic!("no such command: {line}"),
        }
        out
    }

    fn acquire(&mut self, name: &str, loads_max: usize) -> String {
        let call = self.calls.get_mut(name).expect("a call of this name");
        let before = call.granted.len();
        self.machine.acquire(&mut call.pending, loads_max, &mut call.granted);
        let mut out = String::new();
        for grant in &call.granted[before..] {
            let (expert, slot) = (show(grant.key), grant.slot);
            match grant.access {
                Access::Resident => writeln!(out, "{expert} resident in slot {slot}"),
                Access::Load { evicted: None } => writeln!(out, "{expert} load into slot {slot}"),
                Access::Load { evicted: Some(evicted) } => {
                    writeln!(out, "{expert} load into slot {slot}, {} leaves", show(evicted))
                }
                Access::Await(_) => writeln!(out, "{expert} await slot {slot}"),
            }
            .unwrap();
        }
        if !call.pending.is_empty() {
            writeln!(out, "more to come").unwrap();
        }
        out
    }

    fn take_grant(&mut self, name: &str, expert: &str) -> Grant {
        let granted = &mut self.calls.get_mut(name).expect("a call of this name").granted;
        let at = granted.iter().position(|g| g.key == key(expert)).expect("granted");
        granted.remove(at)
    }
}

fn describe_prefetch(load: &Load) -> String {
    match load.evicted {
        None => format!("{} into slot {}", show(load.key), load.slot),
        Some(evicted) => format!("{} into slot {}, {} leaves", show(load.key), load.slot, show(evicted)),
    }
}

fn number<T: std::str::FromStr<Err: std::fmt::Debug>>(word: &str) -> T {
    word.parse().unwrap_or_else(|error| panic!("{word}: {error:?}"))
}

fn key(word: &str) -> ExpertKey {
    let (layer, expert) = word.split_once('/').expect("layer/expert");
    ExpertKey { layer: LayerId(number(layer)), expert: ExpertId(number(expert)) }
}

fn show(key: ExpertKey) -> String {
    format!("{}/{}", key.layer, key.expert)
}

fn replay(story: &str) -> String {
    let config = ResidencyConfig { slots: 1, layers: 1, num_experts: 1, plans_max: 1 };
    let mut state = Story { machine: Residency::new(config), calls: BTreeMap::new() };
    let mut text = String::new();
    for line in story.lines().filter(|line| !line.starts_with('>')) {
        writeln!(text, "{line}").unwrap();
        if !line.is_empty() && !line.starts_with('#') {
            println!("{line}"); // shown if this step panics
            state.run(line).lines().for_each(|outcome| writeln!(text, "> {outcome}").unwrap());
        }
    }
    text
}

#[test]
fn traces_are_as_written() {
    // Broken: a rule of residency changed without anybody looking at what it changes.
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/traces/residency");
    let mut stories = 0;
    for entry in fs::read_dir(&folder).expect("tests/traces/residency") {
        let path = entry.expect("a directory entry").path();
        let written = fs::read_to_string(&path).expect("a readable trace");
        let replayed = replay(&written);
        if std::env::var_os("UPDATE_TRACES").is_some() {
            fs::write(&path, &replayed).expect("a writable trace");
        } else {
            assert_eq!(written, replayed, "{} (UPDATE_TRACES=1 rewrites it)", path.display());
        }
        stories += 1;
    }
    assert!(stories > 0, "no traces in {}", folder.display());
}
