//! Connections under abuse: a `sida up` with both doors, honest clients at each, and beside them one abuse at a time. The
//! honest are all answered, offenders are ended, and descriptors and memory stay within bounds.
//!
//! What CI runs is short: tens of offenders, limits set low. The long form has the limits that users have, 10,000 idle
//! connections and 1,000 silent ones, and holds the honest clients' p99 under abuse against twice what it was before.
//! It wants a machine of its own:
//!
//! ```text
//! SIDA_LONG_TESTS=1 cargo test --release -p sida-cli --features etcd --test end_to_end -- abuse --nocapture
//! ```
//!
//! `SIDA_ABUSE` chooses those whose names contain one of these, as `SIDA_ABUSE=idle,PING`.
//!
//! In reading order: [`doors`] (what is asked, and by whom), [`frames`] (HTTP/2 by hand), [`offenders`].

pub(crate) mod doors;
mod frames;
pub(crate) mod offenders;

use std::{
    collections::BTreeMap,
    env,
    net::SocketAddr,
    pin::Pin,
    time::{Duration, Instant},
};

use rustix::{
    process::{Resource, Rlimit, getrlimit, setpriority_process, setrlimit},
    thread::{CpuSet, sched_getaffinity, sched_setaffinity},
};
use tokio::{
    runtime::{self, Handle, Runtime},
    task::JoinSet,
    time,
};

use self::{
    doors::{Asked, Client, Door, Doors},
    offenders::Ended,
};
use crate::faults::is_long;

/// How much one test abuses, and within which limits of the server.
struct Scale {
    connections_max: usize,
    handshake_timeout: Duration,
    stall_timeout: Duration,
    /// How long a peer that is gone may be kept: `--keepalive-interval` and `--keepalive-timeout` are half of it.
    gone_after: Duration,
    idle: usize,
    silent: usize,
    slow: usize,
    floods: usize,
    large: usize,
    /// How long honest clients ask without any abuse, before and after.
    calm: Duration,
    /// How long each abuse lasts at least: offenders who are ended come again until then.
    abused: Duration,
}

impl Scale {
    fn new() -> Self {
        if is_long() {
            return Self {
                connections_max: 1024,
                handshake_timeout: Duration::from_secs(10),
                stall_timeout: Duration::from_secs(10),
                gone_after: Duration::from_secs(10),
                idle: 10_000.min((descriptors() / 2).saturating_sub(512)),
                silent: 1_000,
                slow: 200,
                floods: 8,
                large: 8,
                calm: Duration::from_secs(8),
                abused: Duration::from_secs(10),
            };
        }
        Self {
            connections_max: 48,
            handshake_timeout: Duration::from_secs(2),
            stall_timeout: Duration::from_secs(2),
            gone_after: Duration::from_secs(4),
            idle: 120,
            silent: 40,
            slow: 3,
            floods: 1,
            large: 2,
            calm: Duration::from_millis(200),
            abused: Duration::ZERO,
        }
    }

    fn flags(&self) -> Vec<(&'static str, String)> {
        let time = |time: Duration| format!("{}ms", time.as_millis());
        vec![
            ("--connections-max", self.connections_max.to_string()),
            ("--handshake-timeout", time(self.handshake_timeout)),
            ("--stall-timeout", time(self.stall_timeout)),
            ("--keepalive-interval", time(self.gone_after / 2)),
            ("--keepalive-timeout", time(self.gone_after / 2)),
            ("--log", "warn".to_owned()),
        ]
    }

    /// Descriptors of a server whose places are all taken, and an eighth more by who is on the way out.
    fn descriptors_max(&self, calm: usize) -> usize {
        calm + 2 * (self.connections_max + self.connections_max / 8) + 32
    }
}

/// How many descriptors this process may have: the offenders' ends are some of them.
fn descriptors() -> usize {
    getrlimit(Resource::Nofile).maximum.map_or(usize::MAX, |maximum| maximum as usize)
}

/// What the memory of a server may grow by: requests that are being received, and what it keeps of connections.
const BYTES_MORE_MAX: u64 = 512 << 20;
/// What offenders have a server log, in all.
const LOG_LINES_MAX: usize = 200;
/// Offenders are ended within the limits, which are seconds, and this for a machine that stands still.
const PATIENCE: Duration = Duration::from_secs(180);

type Offence = Box<dyn Fn(SocketAddr, Door) -> Pin<Box<dyn Future<Output = Ended> + Send>> + Send + Sync>;

/// Offenders of one kind.
struct Abuse {
    name: &'static str,
    doors: &'static [Door],
    /// How many at each door.
    offenders: usize,
    /// How many of them, at each door, the server ends by its limits; others stay as long as their place is not needed.
    ended: usize,
    offence: Offence,
}

const BOTH: &[Door] = &[Door::Grpc, Door::Http];
const GRPC: &[Door] = &[Door::Grpc];
const HTTP: &[Door] = &[Door::Http];

/// Offenders who are all ended.
fn abuse<R>(
    name: &'static str,
    doors: &'static [Door],
    offenders: usize,
    offence: impl Fn(SocketAddr, Door) -> R + Send + Sync + 'static,
) -> Abuse
where
    R: Future<Output = Ended> + Send + 'static,
{
    let offence: Offence = Box::new(move |to, door| Box::pin(offence(to, door)));
    Abuse { name, doors, offenders, ended: offenders, offence }
}

/// What is done, one after the other. In the short form all that only waits is done at once, and so are all floods.
fn abuses(scale: &Scale) -> Vec<Vec<Abuse>> {
    let Scale { idle, silent, slow, floods, large, stall_timeout, connections_max, .. } = *scale;
    let places_max = connections_max + connections_max / 8;
    let waiting = vec![
        abuse("half-open connections", BOTH, slow, offenders::half_open),
        abuse("half-open connections within a call", BOTH, slow, offenders::half_open_in_a_call),
        abuse("slow readers", BOTH, slow, offenders::slow_reader),
        abuse("slow readers of HTTP/1.1", HTTP, slow, move |to, _| offenders::slow_reader_of_http1(to, stall_timeout)),
        abuse("slow senders", BOTH, slow, offenders::slow_sender),
        abuse("slow heads", BOTH, slow, offenders::slow_head),
        abuse("slow bodies of HTTP/1.1", HTTP, slow, |to, _| offenders::slow_body_of_http1(to)),
    ];
    let floods = vec![
        abuse("rapid resets", BOTH, floods, offenders::rapid_resets),
        abuse("resets of calls that were seen", BOTH, floods, offenders::resets_in_turns),
        abuse("CONTINUATION floods", BOTH, floods, offenders::continuations),
        abuse("empty CONTINUATION floods", BOTH, floods, offenders::empty_continuations),
        abuse("PING floods", BOTH, floods, offenders::pings),
        abuse("PING ACK floods", BOTH, floods, offenders::pongs),
        abuse("SETTINGS floods", BOTH, floods, offenders::settings),
        abuse("WINDOW_UPDATE floods", BOTH, floods, offenders::window_updates),
        abuse("PRIORITY floods", BOTH, floods, offenders::priorities),
        abuse("floods of empty DATA", BOTH, floods, offenders::empty_data),
        abuse("floods of unknown frames", BOTH, floods, offenders::unknown_frames),
    ];
    let many = [
        Abuse { ended: idle - places_max, ..abuse("idle connections", BOTH, idle, offenders::idle) },
        abuse("connections that never speak", BOTH, silent, offenders::silent),
        abuse("64 MiB", BOTH, large, offenders::large),
        abuse("64 x 8 MiB that are announced", GRPC, large, offenders::announced),
        // Whoever comes when its own has most places is refused.
        Abuse {
            ended: connections_max - connections_max / 8,
            ..abuse("calls that are held open", GRPC, 2 * connections_max, offenders::holds_a_call)
        },
    ];
    let chosen = env::var("SIDA_ABUSE").unwrap_or_default();
    let is_chosen =
        |abuses: &Vec<Abuse>| abuses.iter().any(|abuse| chosen.split(',').any(|chosen| abuse.name.contains(chosen)));
    let alone = |abuse| vec![abuse];
    let together = |abuses: Vec<Abuse>| if is_long() { abuses.into_iter().map(alone).collect() } else { vec![abuses] };
    together(waiting).into_iter().chain(together(floods)).chain(many.map(alone)).filter(is_chosen).collect()
}

/// A machine in the network would end the service for all others, or fill a server's memory, with connections alone.
#[tokio::test(flavor = "multi_thread")]
async fn honest_clients_are_answered_and_offenders_are_ended() {
    // The offenders' ends are descriptors of this process.
    let maximum = getrlimit(Resource::Nofile).maximum;
    setrlimit(Resource::Nofile, Rlimit { current: maximum, maximum }).expect("as many descriptors as may be had");
    let scale = Scale::new();
    let dir = tempfile::tempdir().expect("a directory");
    let doors = Doors::start(dir.path(), &scale.flags());
    // Warm, so that descriptors and memory are what they are when it is used.
    calm(&doors, scale.calm, &mut Problems::default()).await;
    let descriptors_max = scale.descriptors_max(doors.process.descriptors());
    let bytes_max = doors.process.resident_bytes() + BYTES_MORE_MAX;
    let mut problems = Problems::default();
    let offenders = offenders_runtime();
    let mut before = calm(&doors, scale.calm, &mut problems).await;
    for abuses in abuses(&scale) {
        problems.abuse = abuses.iter().map(|abuse| abuse.name).collect::<Vec<_>>().join(", ");
        println!("{}", problems.abuse);
        let (during, peak) = under(&doors, &abuses, scale.abused, offenders.handle(), &mut problems).await;
        for door in [Door::Grpc, Door::Http] {
            let now = Client::new(door, doors.address(door)).ask(false).await;
            problems.expect(now.outcome.is_ok(), || format!("right after it at {door:?}: {now:?}"));
        }
        let after = calm(&doors, scale.calm, &mut problems).await;
        println!("    descriptors {}, resident {} MiB", peak.descriptors, peak.bytes >> 20);
        for door in [Door::Grpc, Door::Http] {
            tell(door, [&before, &during, &after], &mut problems);
        }
        before = after;
        problems.expect(peak.descriptors <= descriptors_max, || {
            format!("{} descriptors, at most {descriptors_max}", peak.descriptors)
        });
        problems.expect(peak.bytes <= bytes_max, || format!("{} bytes, at most {bytes_max}", peak.bytes));
    }
    offenders.shutdown_background();
    assert!(problems.found.is_empty(), "{:#?}", problems.found);
    let log = doors.process.log();
    let shortages = log.lines().filter(|line| line.contains("all places for connections are taken")).count();
    let is_whole = env::var_os("SIDA_ABUSE").is_none();
    assert!(
        (usize::from(is_whole)..=2 * abuses(&scale).len()).contains(&shortages),
        "{shortages} lines of shortages:\n{log}"
    );
    let lines = log.lines().count();
    assert!(lines <= LOG_LINES_MAX, "{lines} lines are logged");
    assert!(doors.process.terminate().success());
}

/// Threads of the offenders. They mostly give way to the server and to its honest clients, and leave these some processors
/// where there are many: other machines would not take theirs.
fn offenders_runtime() -> Runtime {
    const LATER: i32 = 10;
    let processors = sched_getaffinity(None).expect("some processors");
    let all = (0..CpuSet::MAX_CPU).filter(|&processor| processors.is_set(processor));
    let left = if processors.count() > 4 { 2 } else { 0 };
    let mut own = CpuSet::new();
    all.skip(left).for_each(|processor| own.set(processor));
    let mut builder = runtime::Builder::new_multi_thread();
    builder.enable_all().on_thread_start(move || {
        setpriority_process(None, LATER).expect("anybody may be later");
        sched_setaffinity(None, &own).expect("some of its own processors");
    });
    builder.build().expect("threads")
}

/// What honest clients see while nobody abuses.
async fn calm(doors: &Doors, span: Duration, problems: &mut Problems) -> Vec<Asked> {
    let honest = doors.honest();
    time::sleep(span).await;
    // However slow the machine is, some were asked.
    while honest.count() < 8 {
        time::sleep(Duration::from_millis(10)).await;
    }
    answered(honest.stop().await, problems)
}

/// What did not hold, of every abuse: one failure shall not hide those after it.
#[derive(Default)]
struct Problems {
    abuse: String,
    found: Vec<String>,
}

impl Problems {
    fn expect(&mut self, holds: bool, problem: impl FnOnce() -> String) {
        if !holds {
            self.found.push(format!("{}: {}", self.abuse, problem()));
        }
    }
}

/// `asked`, all of which have to be answered.
fn answered(asked: Vec<Asked>, problems: &mut Problems) -> Vec<Asked> {
    let failed: Vec<&Asked> = asked.iter().filter(|asked| asked.outcome.is_err()).collect();
    problems.expect(failed.is_empty(), || format!("{} honest requests failed, first {:?}", failed.len(), failed[0]));
    asked
}

/// The most that a server held.
struct Peak {
    descriptors: usize,
    bytes: u64,
}

/// What honest clients see under abuse, until its offenders are ended, and what that takes of the server.
async fn under(
    doors: &Doors,
    abuses: &[Abuse],
    span: Duration,
    runtime: &Handle,
    problems: &mut Problems,
) -> (Vec<Asked>, Peak) {
    const HONEST_MIN: usize = 40;
    let honest = doors.honest();
    let begun = Instant::now();
    let mut offenders = JoinSet::new();
    let come = |offenders: &mut JoinSet<_>, kind: usize, door: Door| {
        let offence = (abuses[kind].offence)(doors.address(door), door);
        offenders.spawn_on(async move { (kind, door, offence.await) }, runtime);
    };
    for (kind, abuse) in abuses.iter().enumerate() {
        for &door in abuse.doors.iter().flat_map(|door| std::iter::repeat_n(door, abuse.offenders)) {
            come(&mut offenders, kind, door);
        }
    }
    let mut peak = Peak { descriptors: 0, bytes: 0 };
    let mut ends = vec![BTreeMap::<&str, usize>::new(); abuses.len()];
    let missing = |ends: &[BTreeMap<&str, usize>]| {
        let kinds = abuses.iter().zip(ends);
        kinds.map(|(abuse, ends)| (abuse.ended * abuse.doors.len()).saturating_sub(ends.values().sum())).sum::<usize>()
    };
    while missing(&ends) > 0 || honest.count() < HONEST_MIN || begun.elapsed() < span {
        if begun.elapsed() > PATIENCE {
            problems.expect(false, || format!("{} offenders were not ended: {ends:?}", missing(&ends)));
            break;
        }
        let ending = async {
            loop {
                let Some(end) = offenders.join_next().await else { std::future::pending().await };
                let (kind, door, end) = end.expect("an offender does not panic");
                if begun.elapsed() < span {
                    come(&mut offenders, kind, door);
                }
                let end = end.or_else(|error| offenders::closed(&error));
                problems.expect(end.is_ok(), || format!("an offender failed: {end:?}"));
                *ends[kind].entry(end.unwrap_or("failed")).or_default() += 1;
            }
        };
        // It never ends by itself: the server is looked at now and then.
        let _: Result<(), _> = time::timeout(Duration::from_millis(20), ending).await;
        peak.descriptors = peak.descriptors.max(doors.process.descriptors());
        peak.bytes = peak.bytes.max(doors.process.resident_bytes());
    }
    for (abuse, ends) in abuses.iter().zip(&ends) {
        println!("    {} times {} at {:?}: {ends:?}", abuse.offenders, abuse.name, abuse.doors);
    }
    println!("    all within {:.1?}", begun.elapsed());
    (answered(honest.stop().await, problems), peak)
}

/// Prints what honest clients of a door saw before, during and after, and holds the one against the other where the machine
/// is this test's own.
fn tell(door: Door, phases: [&Vec<Asked>; 3], problems: &mut Problems) {
    for is_new in [false, true] {
        let shown = phases.map(|asked| {
            let of: Vec<&Asked> = asked.iter().filter(|asked| asked.door == door && asked.is_new == is_new).collect();
            (quantile(&of, 0.5), quantile(&of, 0.99), of.len(), of.iter().filter(|asked| asked.again).count())
        });
        let [before, during, after] = shown.map(|(p50, p99, count, again)| match count {
            0 => "none".to_owned(),
            _ => format!("p50 {p50:.1} p99 {p99:.1} ms of {count} ({again} asked again)"),
        });
        let on = if is_new { "on new connections" } else { "on kept ones" };
        println!("    {door:?} {on}: before {before}; during {during}; after {after}");
        if is_long() && !is_new {
            let ratio = shown[1].1 / shown[0].1;
            problems.expect(ratio <= 2.0, || format!("{door:?}: the honest p99 is {ratio:.2} times what it was"));
        }
    }
}

/// In milliseconds.
fn quantile(asked: &[&Asked], quantile: f64) -> f64 {
    let mut latencies: Vec<Duration> = asked.iter().map(|asked| asked.latency).collect();
    latencies.sort();
    let at = ((latencies.len() as f64 * quantile).ceil() as usize).clamp(1, latencies.len().max(1)) - 1;
    latencies.get(at).map_or(f64::NAN, |latency| latency.as_secs_f64() * 1e3)
}
