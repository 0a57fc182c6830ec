//! A queue between threads: for the requests that wait to be prepared ([`crate::intake::request_queue`]), and for the
//! prepared ones that wait for the scheduler. Callers decide in which order items wait, how many may, and how many leave at
//! once (`routing::fairness`, `routing::admission`), so the queue only wakes threads, and closes.
//!
//! Items can be announced while they are made. The first to arrive in an empty queue is taken only together with those
//! that were announced by then, so that requests which come together run in one pass and no clock has to be waited for.

use std::{collections::VecDeque, sync::Arc, time::Duration};

use parking_lot::{Condvar, Mutex};

/// The queue. Shared by reference; every method may be called from any thread.
pub(crate) struct Queue<T> {
    state: Mutex<QueueState<T>>,
    /// Something arrived, or the queue was closed.
    arrived: Condvar,
    /// Something was taken, or the queue was closed.
    taken: Condvar,
}

struct QueueState<T> {
    waiting: VecDeque<T>,
    closed: bool,
    /// Announcements that were made, and those that are over.
    announced: u64,
    settled: u64,
    /// How many announcements had been made when the first of `waiting` arrived.
    gathering: u64,
}

impl<T> QueueState<T> {
    /// Whether the waiting items can be taken: none is awaited that was announced before the first of them came.
    fn is_gathered(&self) -> bool {
        !self.waiting.is_empty() && self.settled >= self.gathering
    }
}

/// Says that an item is being made. The announcement is over when this is dropped, whether the item came or not.
pub(crate) struct Announcement<T> {
    queue: Arc<Queue<T>>,
}

impl<T> Drop for Announcement<T> {
    fn drop(&mut self) {
        let mut state = self.queue.state.lock();
        state.settled += 1;
        let wakes = state.is_gathered();
        drop(state);
        if wakes {
            self.queue.arrived.notify_one();
        }
    }
}

/// Whether [`Queue::take`] waits for an item.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Wait {
    /// Until there is one, or the queue is closed.
    Block,
    /// Not at all.
    Poll,
}

impl<T> Queue<T> {
    /// An empty queue.
    pub(crate) fn new() -> Self {
        let state =
            Mutex::new(QueueState { waiting: VecDeque::new(), closed: false, announced: 0, settled: 0, gathering: 0 });
        Self { state, arrived: Condvar::new(), taken: Condvar::new() }
    }

    /// An item is going to be pushed soon: what arrives meanwhile waits for it.
    pub(crate) fn announce(self: &Arc<Self>) -> Announcement<T> {
        self.state.lock().announced += 1;
        Announcement { queue: self.clone() }
    }

    /// Lets `enter` put an item where it belongs among those that wait, or not. `None`: the queue is closed, and it was not
    /// called.
    pub(crate) fn enter<R>(&self, enter: impl FnOnce(&mut VecDeque<T>) -> R) -> Option<R> {
        let mut state = self.state.lock();
        if state.closed {
            return None;
        }
        let was_empty = state.waiting.is_empty();
        let entered = enter(&mut state.waiting);
        if was_empty {
            state.gathering = state.announced;
        }
        let wakes = state.is_gathered();
        drop(state);
        if wakes {
            self.arrived.notify_one();
        }
        Some(entered)
    }

    /// Appends items, together as far as `fits` says that there is room, waiting for room for the rest. Gives back
    /// those that it could not before the queue was closed.
    pub(crate) fn push_all(&self, items: Vec<T>, fits: impl Fn(&VecDeque<T>, &T) -> bool) -> Vec<T> {
        let mut items = items.into_iter();
        let mut state = self.state.lock();
        while let Some(item) = items.next() {
            while !state.closed && !fits(&state.waiting, &item) {
                self.arrived.notify_one();
                self.taken.wait(&mut state);
            }
            if state.closed {
                return std::iter::once(item).chain(items).collect();
            }
            state.waiting.push_back(item);
        }
        drop(state);
        self.arrived.notify_one();
        Vec::new()
    }

    /// Appends as many of the items as `fits` says that there is room for now. Gives back the others, or all once the queue
    /// was closed.
    pub(crate) fn push_fitting(&self, items: Vec<T>, fits: impl Fn(&VecDeque<T>, &T) -> bool) -> Vec<T> {
        let mut items = items.into_iter().peekable();
        let mut state = self.state.lock();
        while let Some(item) = items.next_if(|item| !state.closed && fits(&state.waiting, item)) {
            state.waiting.push_back(item);
        }
        drop(state);
        self.arrived.notify_one();
        items.collect()
    }

    /// Takes the first `choose(waiting)` items. With [`Wait::Block`] it waits for an item, and for those announced
    /// before the first one came. `None`: the queue is closed and empty.
    pub(crate) fn take(&self, wait: Wait, choose: impl Fn(&VecDeque<T>) -> usize) -> Option<Vec<T>> {
        self.take_patiently(wait, choose, |_| Duration::ZERO)
    }

    /// As [`Queue::take`]. With [`Wait::Block`], and as long as all that wait would be taken, it also waits for more, so
    /// long as `patience` with them says.
    pub(crate) fn take_patiently(
        &self,
        wait: Wait,
        choose: impl Fn(&VecDeque<T>) -> usize,
        patience: impl Fn(&VecDeque<T>) -> Duration,
    ) -> Option<Vec<T>> {
        let mut state = self.state.lock();
        let count = loop {
            if wait == Wait::Block && !state.is_gathered() && !state.closed {
                self.arrived.wait(&mut state);
                continue;
            }
            if state.closed && state.waiting.is_empty() {
                return None;
            }
            let waiting = state.waiting.len();
            let count = choose(&state.waiting).min(waiting);
            let longer = if count == waiting && !state.closed { patience(&state.waiting) } else { Duration::ZERO };
            if wait == Wait::Poll || longer.is_zero() {
                break count;
            }
            self.arrived.wait_for(&mut state, longer);
        };
        let items = state.waiting.drain(..count).collect();
        drop(state);
        self.taken.notify_one();
        Some(items)
    }

    /// How many wait.
    pub(crate) fn len(&self) -> usize {
        self.state.lock().waiting.len()
    }

    /// Refuses all further items; those that wait can still be taken.
    pub(crate) fn close(&self) {
        self.state.lock().closed = true;
        self.arrived.notify_all();
        self.taken.notify_all();
    }
}

#[cfg(test)]
mod tests {
    use std::{
        sync::Arc,
        thread,
        time::{Duration, Instant},
    };

    use super::*;

    fn push<T>(queue: &Queue<T>, item: T) -> bool {
        queue.enter(|waiting| waiting.push_back(item)).is_some()
    }

    #[test]
    fn push_waits_for_room_and_keeps_order() {
        // Would break: prepared requests overtake each other, or pile up without bound ahead of the scheduler.
        let queue = Arc::new(Queue::new());
        let pusher = thread::spawn({
            let queue = queue.clone();
            move || queue.push_all((0..100).collect(), |waiting, _| waiting.len() < 3)
        });
        let mut seen = Vec::new();
        while seen.len() < 100 {
            let taken = queue.take(Wait::Block, |waiting| waiting.len()).expect("open");
            assert!(taken.len() <= 3);
            seen.extend(taken);
        }
        assert!(pusher.join().expect("pusher").is_empty());
        assert_eq!(seen, (0..100).collect::<Vec<_>>());
    }

    #[test]
    fn what_does_not_fit_now_comes_back() {
        // Would break: who has to predict what it handed over waits for the scheduler, which waits for the prediction.
        let queue = Queue::new();
        let fits = |waiting: &VecDeque<_>, _: &_| waiting.len() < 2;
        assert_eq!(queue.push_fitting(vec![1, 2, 3, 4], fits), [3, 4]);
        assert_eq!(queue.push_fitting(vec![3, 4], fits), [3, 4]);
        assert_eq!(queue.take(Wait::Block, |waiting| waiting.len()), Some(vec![1, 2]));
        assert!(queue.push_fitting(vec![3], fits).is_empty());
        queue.close();
        assert_eq!(queue.push_fitting(vec![4], fits), [4]);
    }

    #[test]
    fn those_announced_are_taken_together() {
        // Would break: requests sent together run in several passes, or one that never comes holds up the others.
        let queue = Arc::new(Queue::new());
        let (comes, fails) = (queue.announce(), queue.announce());
        assert!(push(&queue, 1));
        // Announced too late for the first to wait for it.
        let late = queue.announce();
        let taker = thread::spawn({
            let queue = queue.clone();
            move || queue.take(Wait::Block, |waiting| waiting.len())
        });
        thread::sleep(Duration::from_millis(20));
        assert!(!taker.is_finished(), "taken without those announced");
        drop(fails);
        assert!(push(&queue, 2));
        drop(comes);
        assert_eq!(taker.join().expect("taker"), Some(vec![1, 2]));
        drop(late);
        // What nobody announced is taken at once.
        assert!(push(&queue, 3));
        assert_eq!(queue.take(Wait::Block, |waiting| waiting.len()), Some(vec![3]));
    }

    #[test]
    fn more_are_waited_for() {
        // Would break: a batch begins without those that were worth waiting for, or waits when it is full or its time is over.
        let queue = Arc::new(Queue::new());
        assert!(push(&queue, 1));
        let patience = |waiting: &VecDeque<_>| if waiting.len() < 2 { Duration::from_secs(60) } else { Duration::ZERO };
        assert_eq!(queue.take_patiently(Wait::Poll, VecDeque::len, patience), Some(vec![1]));
        assert!(push(&queue, 2));
        let taker = thread::spawn({
            let queue = queue.clone();
            move || queue.take_patiently(Wait::Block, VecDeque::len, patience)
        });
        thread::sleep(Duration::from_millis(20));
        assert!(!taker.is_finished(), "taken too early");
        assert!(push(&queue, 3));
        assert_eq!(taker.join().expect("taker"), Some(vec![2, 3]));
        // A batch without room for all that wait needs no more.
        assert!(queue.push_all(vec![4, 5], |_, _| true).is_empty());
        let always = |_: &VecDeque<_>| Duration::from_secs(60);
        assert_eq!(queue.take_patiently(Wait::Block, |_| 1, always), Some(vec![4]));
        let end = Instant::now() + Duration::from_millis(5);
        let until = |_: &VecDeque<_>| end.saturating_duration_since(Instant::now());
        assert_eq!(queue.take_patiently(Wait::Block, VecDeque::len, until), Some(vec![5]));
        assert!(Instant::now() >= end);
    }

    #[test]
    fn close_wakes_and_drains() {
        // Would break: shutdown leaves a thread waiting for ever, or drops requests that had been accepted.
        let queue = Arc::new(Queue::new());
        let taker = thread::spawn({
            let queue = queue.clone();
            move || {
                let mut all = Vec::new();
                while let Some(items) = queue.take(Wait::Block, |waiting| waiting.len()) {
                    all.extend(items);
                }
                all
            }
        });
        assert!(queue.push_all(vec![7], |_, _| true).is_empty());
        queue.close();
        assert_eq!(taker.join().expect("taker"), [7]);
        assert!(!push(&queue, 8));
        assert_eq!(queue.push_all(vec![8, 9], |_, _| true), [8, 9]);
    }
}
