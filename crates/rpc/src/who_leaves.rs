//! Who has to leave when all places of a server are taken and one more comes. A decision without a clock or a socket; acted
//! on by [`crate::connections`].

use std::{
    collections::HashMap,
    net::{IpAddr, Ipv6Addr},
};

use tokio::time::Instant;

/// Whom a connection comes from, as far as addresses tell: one address, or one network of IPv6, of which a single customer
/// has all addresses.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) struct Origin(IpAddr);

impl Origin {
    /// The address that stands for all of them.
    pub(crate) fn address(self) -> IpAddr {
        self.0
    }
}

impl From<IpAddr> for Origin {
    fn from(address: IpAddr) -> Self {
        Self(match address.to_canonical() {
            IpAddr::V6(address) => {
                let [a, b, c, d, ..] = address.segments();
                Ipv6Addr::new(a, b, c, d, 0, 0, 0, 0).into()
            }
            address @ IpAddr::V4(_) => address,
        })
    }
}

/// A connection that stays, which is one that was not asked to leave yet.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Staying {
    pub(crate) origin: Origin,
    /// Whether a call is open.
    pub(crate) is_busy: bool,
    /// Whether it has only just come and had no time for its first call.
    pub(crate) is_fresh: bool,
    /// Whether its last call has only just ended, so that the next may come at once.
    pub(crate) is_in_use: bool,
    /// When its last call ended, or it came.
    pub(crate) last: Instant,
}

/// What becomes of a newcomer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Room<S> {
    /// It has the place of this one, who leaves; or of the first of these, and the others can be spared for those behind it.
    Of(S),
    /// It has none: its own origin has more than its share, and others shall not wait behind it.
    None,
    /// Somebody's calls have to end first.
    Later,
}

/// What becomes of a `newcomer` when `staying` have all places. Somebody [without a call](idlest) leaves for it, and up to
/// `more` are named: nobody who is in use, while there are others or the newcomer's own origin has more than half of the places.
/// If all have calls, such an origin gives one to another: of those it has had for the longest time. While there is such an
/// origin, nobody else who has only just come or is in use has to leave.
pub(crate) fn room(staying: &[Staying], newcomer: Origin, more: usize) -> Room<Vec<usize>> {
    let greedy = majority(staying);
    let is_spared = |staying: &Staying| {
        (staying.is_fresh || staying.is_in_use) && greedy.is_some_and(|greedy| staying.origin != greedy)
    };
    let is_quiet = |staying: &Staying| !staying.is_busy && !is_spared(staying);
    let idlest = quietest(staying, more, |staying| is_quiet(staying) && !staying.is_in_use);
    if !idlest.is_empty() {
        return Room::Of(idlest);
    }
    if greedy == Some(newcomer) {
        return Room::None;
    }
    let quiet = quietest(staying, more, is_quiet);
    match greedy {
        _ if !quiet.is_empty() => Room::Of(quiet),
        Some(greedy) => Room::Of(longest(staying, 1, |staying| staying.origin == greedy)),
        None => Room::Later,
    }
}

/// The connections that can be spared most, `count_max` of them: of the origin that has most connections without a
/// call, those that have been so for the longest time, and no more than half of what it has. A flood of connections
/// from one machine so makes room for itself, and not at the cost of one that has just come to ask something. None if
/// all have calls.
pub(crate) fn idlest(staying: &[Staying], count_max: usize) -> Vec<usize> {
    quietest(staying, count_max, |staying| !staying.is_busy)
}

/// As [`idlest`], of those that are `quiet`.
fn quietest(staying: &[Staying], count_max: usize, quiet: impl Fn(&Staying) -> bool) -> Vec<usize> {
    let counts = count(staying, &quiet);
    let Some(most) = counts.values().copied().max() else { return Vec::new() };
    let count_max = count_max.min(most / 2).max(1);
    longest(staying, count_max, |staying| quiet(staying) && counts.get(&staying.origin) == Some(&most))
}

/// The origin of more than half of them, if there is one. Asked for each of many newcomers while places are short: so without a
/// count for each origin. What is left when one of an origin and one of another are struck out together, again and again, is
/// the only one that can be.
fn majority(staying: &[Staying]) -> Option<Origin> {
    let (mut candidate, mut left) = (None, 0usize);
    for Staying { origin, .. } in staying {
        match candidate == Some(*origin) {
            true => left += 1,
            false if left > 0 => left -= 1,
            false => (candidate, left) = (Some(*origin), 1),
        }
    }
    candidate
        .filter(|candidate| 2 * staying.iter().filter(|staying| staying.origin == *candidate).count() > staying.len())
}

/// How many there are of each origin that are `counted`.
fn count(staying: &[Staying], counted: impl Fn(&Staying) -> bool) -> HashMap<Origin, usize> {
    let mut counts = HashMap::new();
    for staying in staying.iter().filter(|staying| counted(staying)) {
        *counts.entry(staying.origin).or_default() += 1;
    }
    counts
}

/// Those that have been as they are for the longest time, the longest first.
fn longest(staying: &[Staying], count_max: usize, chosen: impl Fn(&Staying) -> bool) -> Vec<usize> {
    let mut chosen: Vec<usize> = (0..staying.len()).filter(|index| chosen(&staying[*index])).collect();
    chosen.sort_by_key(|index| staying[*index].last);
    chosen.truncate(count_max);
    chosen
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    fn origin(text: &str) -> Origin {
        text.parse::<IpAddr>().unwrap().into()
    }

    /// Connections as (origin, busy, seconds).
    fn room_for(staying: &[(&str, bool, u64)], newcomer: &str) -> Room<Vec<usize>> {
        room_for_more(staying, newcomer, 1)
    }

    fn room_for_more(staying: &[(&str, bool, u64)], newcomer: &str, more: usize) -> Room<Vec<usize>> {
        let start = Instant::now();
        let staying = staying.iter().map(|&(from, is_busy, second)| Staying {
            origin: origin(from),
            is_busy,
            is_fresh: false,
            is_in_use: false,
            last: start + Duration::from_secs(second),
        });
        room(&staying.collect::<Vec<_>>(), origin(newcomer), more)
    }

    #[test]
    fn who_was_silent_for_the_longest_time_leaves() {
        // Would break: a connection that is used is closed for one that is not.
        assert_eq!(
            room_for(&[("10.0.0.1", false, 5), ("10.0.0.2", false, 3), ("10.0.0.2", true, 1)], "10.0.0.3"),
            Room::Of(vec![1])
        );
        assert_eq!(
            room_for(&[("10.0.0.1", true, 1), ("10.0.0.1", true, 2), ("10.0.0.2", false, 9)], "10.0.0.3"),
            Room::Of(vec![2])
        );
        assert_eq!(room_for(&[], "10.0.0.3"), Room::Later);
    }

    #[test]
    fn who_has_most_silent_ones_makes_room_for_others() {
        // Would break: a machine that connects again and again has others closed that have just come, before they could
        // ask.
        let (flood, a, b) = ("10.0.0.1", "10.0.0.2", "10.0.0.3");
        assert_eq!(
            room_for(&[(a, false, 1), (flood, false, 7), (flood, false, 5), (b, false, 3)], b),
            Room::Of(vec![2])
        );
        assert_eq!(
            room_for(&[(a, false, 1), (flood, true, 7), (flood, true, 5), (b, false, 3)], b),
            Room::Of(vec![0]),
            "silent ones count"
        );
    }

    #[test]
    fn several_leave_while_many_come() {
        // Would break: each of ten thousand newcomers looks at everybody; or one of them costs an origin all it has.
        let flood: Vec<_> = [7, 5, 3, 9, 1].map(|second| ("10.0.0.1", false, second)).into();
        for (more, expected) in [(1, vec![4]), (2, vec![4, 2]), (5, vec![4, 2])] {
            assert_eq!(room_for_more(&flood, "10.0.0.2", more), Room::Of(expected), "{more}");
        }
    }

    #[test]
    fn who_has_most_places_gives_one_to_others() {
        // Would break: one machine that keeps calls open on every connection keeps all others out; or two that share a
        // server take each other's places in turns.
        let busy = |from| (from, true, 0);
        let (a, b, c) = ("10.0.0.1", "10.0.0.2", "10.0.0.3");
        assert_eq!(room_for(&[busy(b), (a, true, 4), (a, true, 2)], c), Room::Of(vec![2]));
        assert_eq!(room_for(&[busy(a), busy(a), busy(b)], b), Room::Of(vec![0]));
        assert_eq!(room_for(&[busy(a), busy(a), busy(a)], a), Room::None, "nobody waits behind the greedy one's own");
        assert_eq!(room_for(&[busy(a), busy(a), busy(b), busy(b)], c), Room::Later, "half is no more than half");
        assert_eq!(room_for(&[busy(a), busy(b), busy(c)], c), Room::Later);
    }

    #[test]
    fn who_has_just_come_to_ask_is_not_the_greedy_ones_room() {
        // Would break: a machine that holds calls on nearly all connections has every other closed that comes, before its
        // first call can arrive.
        let (flood, a) = (origin("10.0.0.1"), origin("10.0.0.2"));
        let last = Instant::now();
        let staying = |origin, is_busy, is_fresh| Staying { origin, is_busy, is_fresh, is_in_use: false, last };
        let held = staying(flood, true, false);
        assert_eq!(room(&[held, held, staying(a, false, true)], flood, 1), Room::None);
        assert_eq!(room(&[held, held, staying(a, false, true)], a, 1), Room::Of(vec![0]), "the greedy one's place");
        assert_eq!(room(&[held, held, staying(a, false, false)], flood, 1), Room::Of(vec![2]), "it had its time");
        let own = staying(flood, false, true);
        assert_eq!(room(&[held, own, staying(a, false, true)], flood, 1), Room::Of(vec![1]));
        assert_eq!(room(&[staying(a, false, true), own], a, 1), Room::Of(vec![0]), "nobody is greedy");
    }

    /// Would break: where one address stands for many callers and one of them holds calls on nearly all connections, the others
    /// lose theirs between two calls.
    #[test]
    fn who_is_in_use_stays_while_it_can() {
        let (flood, a, b) = (origin("10.0.0.1"), origin("10.0.0.2"), origin("10.0.0.3"));
        let last = Instant::now();
        let held = |origin| Staying { origin, is_busy: true, is_fresh: false, is_in_use: false, last };
        let quiet = |origin, is_in_use| Staying { is_busy: false, is_in_use, ..held(origin) };
        assert_eq!(room(&[held(flood), held(flood), quiet(flood, true)], flood, 1), Room::None);
        assert_eq!(room(&[held(flood), held(flood), quiet(flood, true)], a, 1), Room::Of(vec![2]));
        assert_eq!(room(&[held(flood), held(flood), quiet(a, true)], b, 1), Room::Of(vec![0]), "the greedy one's");
        assert_eq!(room(&[held(a), quiet(b, true), quiet(flood, false)], a, 1), Room::Of(vec![2]), "it is not in use");
        assert_eq!(room(&[held(a), quiet(b, true), held(flood)], a, 1), Room::Of(vec![1]), "nobody is greedy");
    }

    /// Would break: an origin with more than half of the places is not found, so that it keeps all others out; or one with half
    /// of them is held for greedy.
    #[test]
    fn more_than_half_is_found_in_any_order() {
        const EACH: usize = 3;
        let origins = ["10.0.0.1", "10.0.0.2", "10.0.0.3"].map(origin);
        let last = Instant::now();
        for length in 0..=7 {
            for code in 0..EACH.pow(length) {
                let at = |place| Staying {
                    origin: origins[code / EACH.pow(place) % EACH],
                    is_busy: true,
                    is_fresh: false,
                    is_in_use: false,
                    last,
                };
                let staying: Vec<Staying> = (0..length).map(at).collect();
                let has_more = |origin: &&Origin| {
                    2 * staying.iter().filter(|staying| staying.origin == **origin).count() > staying.len()
                };
                assert_eq!(majority(&staying).as_ref(), origins.iter().find(has_more), "{staying:?}");
            }
        }
    }

    #[test]
    fn a_network_of_version_6_is_one_origin() {
        // Would break: one customer comes as four billion, or a machine as two for its two kinds of address.
        assert_eq!(origin("2001:db8:1:2::1"), origin("2001:db8:1:2:ffff::9"));
        assert_ne!(origin("2001:db8:1:2::1"), origin("2001:db8:1:3::1"));
        assert_eq!(origin("::ffff:10.0.0.1"), origin("10.0.0.1"));
        assert_ne!(origin("10.0.0.1"), origin("10.0.0.2"));
    }
}
