//! A time in which a server has more connections than places, as the log tells it: a line when it begins and one when it is
//! over, however many come meanwhile. Kept by [`crate::connections`].

use std::time::Duration;

use tokio::time::Instant;

/// A shortage is over when no connection has found all places taken for so long. Shorter, and a server that is full all day
/// would tell of a shortage for every connection.
const OVER_AFTER: Duration = Duration::from_secs(10);

/// Whether places are short, and what that has cost so far.
#[derive(Debug)]
pub(crate) struct Shortage {
    now: Option<Short>,
    over_after: Duration,
}

impl Default for Shortage {
    fn default() -> Self {
        Self::new(OVER_AFTER)
    }
}

/// What one shortage has cost.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Short {
    pub(crate) since: Instant,
    /// When a connection last found all places taken, or waited for one.
    pub(crate) last: Instant,
    /// Connections that had to wait for a place.
    pub(crate) waited: u64,
    /// Connections that were asked to leave for others.
    pub(crate) closed: u64,
    /// Connections that got no place.
    pub(crate) refused: u64,
}

impl Shortage {
    /// None yet. One is over when no connection has found all places taken for `over_after`.
    pub(crate) fn new(over_after: Duration) -> Self {
        Self { now: None, over_after }
    }

    /// A connection found all places taken at `now`. True if nobody did before: then a shortage begins.
    pub(crate) fn begins(&mut self, now: Instant) -> bool {
        let is_new = self.now.is_none();
        self.now.get_or_insert(Short { since: now, last: now, waited: 0, closed: 0, refused: 0 }).last = now;
        is_new
    }

    /// A connection that had to wait found a place at `now`.
    pub(crate) fn lasts(&mut self, now: Instant) {
        if let Some(short) = &mut self.now {
            short.last = now;
        }
    }

    /// A connection has to wait.
    pub(crate) fn waits(&mut self) {
        if let Some(short) = &mut self.now {
            short.waited += 1;
        }
    }

    /// Another was asked to leave.
    pub(crate) fn closes(&mut self) {
        if let Some(short) = &mut self.now {
            short.closed += 1;
        }
    }

    /// A connection got no place.
    pub(crate) fn refuses(&mut self) {
        if let Some(short) = &mut self.now {
            short.refused += 1;
        }
    }

    /// When the shortage is over, if none comes until then that finds all places taken.
    pub(crate) fn over_at(&self) -> Option<Instant> {
        Some(self.now?.last + self.over_after)
    }

    /// What a shortage has cost that is over at `now`.
    pub(crate) fn over(&mut self, now: Instant) -> Option<Short> {
        self.over_at().filter(|over| *over <= now).and_then(|_| self.now.take())
    }

    /// What a shortage has cost that goes on, if there is one, when the server ends.
    pub(crate) fn end(&mut self, now: Instant) -> Option<Short> {
        self.now.take().map(|short| Short { last: now, ..short })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_shortage_begins_once_and_ends_once() {
        // Would break: ten thousand connections write ten thousand lines into the log, or a shortage that goes on is
        // told as many short ones.
        let start = Instant::now();
        let at = |seconds| start + Duration::from_secs(seconds);
        let mut shortage = Shortage::default();
        assert_eq!((shortage.over_at(), shortage.over(at(99))), (None, None));
        let begun: Vec<bool> = [0, 0, 3, 9, 18, 27].into_iter().map(|second| shortage.begins(at(second))).collect();
        assert_eq!(begun, [true, false, false, false, false, false]);
        shortage.waits();
        (0..2).for_each(|_| shortage.closes());
        (0..3).for_each(|_| shortage.refuses());
        assert_eq!((shortage.over_at(), shortage.over(at(36))), (Some(at(37)), None));
        assert_eq!(shortage.over(at(37)), Some(Short { since: start, last: at(27), waited: 1, closed: 2, refused: 3 }));
        assert_eq!(shortage.over(at(38)), None, "it is told once");
        assert!(shortage.begins(at(40)), "the next is another");
        let at_the_end = shortage.end(at(43)).expect("it goes on");
        assert_eq!((at_the_end.since, at_the_end.last, shortage.end(at(43))), (at(40), at(43), None));
    }
}
