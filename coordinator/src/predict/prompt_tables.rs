//! The hash tables of prompts that were prepared together, and the hint that was given for them. In `exact` nobody chooses by
//! the tables, so such prompts join a batch while they are predicted, and its pass begins: expert-nodes are told during the
//! pass what it will use, and how the prediction fared is seen when it is over. So a prediction costs time only if it takes
//! longer than the pass that it is for. (`beside` does the same for the decoder's steps.)

use std::{sync::Arc, time::Duration};

use parking_lot::{Condvar, Mutex};
use sida_routing::HashTable;

use crate::predict::preload::Hint;

/// What the preparing thread predicts and the scheduler takes.
pub(crate) struct PromptTables {
    state: Mutex<State>,
    made: Condvar,
}

enum State {
    /// The prediction is under way. `begun`: a batch with one of the prompts has begun.
    UnderWay { begun: bool },
    /// It is over.
    Made(Made),
}

struct Made {
    /// One for each prompt; none where there is no prediction, or where it was taken.
    tables: Vec<Option<HashTable>>,
    took: Duration,
    /// Stands until the last of the prompts lets go of the tables.
    _hint: Option<Hint>,
}

/// The tables of one prompt of those that were prepared together.
pub(crate) struct PromptTable {
    tables: Arc<PromptTables>,
    prompt: usize,
}

/// Makes the tables. If it is dropped before, there are none.
pub(crate) struct Promise(Arc<PromptTables>);

/// The tables of so many prompts, and who has to make them.
pub(crate) fn promise(prompts: usize) -> (Promise, impl Iterator<Item = PromptTable>) {
    let tables = Arc::new(PromptTables { state: Mutex::new(State::UnderWay { begun: false }), made: Condvar::new() });
    let of_prompts = tables.clone();
    (Promise(tables), (0..prompts).map(move |prompt| PromptTable { tables: of_prompts.clone(), prompt }))
}

impl Promise {
    /// Hands over what was predicted, in so long. `hint` gives the hint, and is told whether a batch with one of the prompts
    /// has begun.
    pub(crate) fn keep(
        self,
        tables: Vec<Option<HashTable>>,
        took: Duration,
        hint: impl FnOnce(&[Option<HashTable>], bool) -> Hint,
    ) {
        let begun = matches!(*self.0.state.lock(), State::UnderWay { begun: true });
        let hint = Some(hint(&tables, begun));
        self.settle(Made { tables, took, _hint: hint });
    }

    fn settle(&self, made: Made) {
        let mut state = self.0.state.lock();
        if matches!(*state, State::UnderWay { .. }) {
            *state = State::Made(made);
        }
        drop(state);
        self.0.made.notify_all();
    }
}

impl Drop for Promise {
    fn drop(&mut self) {
        self.settle(Made { tables: Vec::new(), took: Duration::ZERO, _hint: None });
    }
}

impl PromptTable {
    /// The table if it is made, and how long that took. The prompt's batch begins now.
    pub(crate) fn begin(&self) -> (Option<HashTable>, Duration) {
        match &mut *self.tables.state.lock() {
            State::UnderWay { begun } => {
                *begun = true;
                (None, Duration::ZERO)
            }
            State::Made(made) => (made.take(self.prompt), made.took),
        }
    }

    /// Waits until the prediction is over, and takes the table if nobody has.
    pub(crate) fn wait(&self) -> Option<HashTable> {
        let mut state = self.tables.state.lock();
        loop {
            match &mut *state {
                State::Made(made) => return made.take(self.prompt),
                State::UnderWay { .. } => self.tables.made.wait(&mut state),
            }
        }
    }
}

impl Made {
    fn take(&mut self, prompt: usize) -> Option<HashTable> {
        self.tables.get_mut(prompt).and_then(Option::take)
    }
}

#[cfg(test)]
mod tests {
    use std::{cell::Cell, thread};

    use sida_routing::{Digest, ExpertId, LayerId, hash_table::Shape};

    use super::*;

    const TOOK: Duration = Duration::from_millis(3);

    fn table(expert: u16) -> HashTable {
        let shape = Shape { first_layer: LayerId(0), layers: 1, tokens: 1, top_k: 1 };
        HashTable::new(Digest([0; 32]), Digest([0; 32]), shape, 8, vec![ExpertId(expert)], vec![0.5]).unwrap()
    }

    #[test]
    fn what_is_made_in_time_is_there_when_the_batch_begins() {
        // Would break: a request is judged by the table of another, or one that was predicted runs without its hint.
        let (promise, prompts) = promise(3);
        let prompts: Vec<PromptTable> = prompts.collect();
        let told = Cell::new(None);
        promise.keep(vec![Some(table(1)), None, Some(table(2))], TOOK, |tables, begun| {
            told.set(Some((tables.len(), begun)));
            Hint::of_nobody()
        });
        assert_eq!(told.get(), Some((3, false)));
        assert_eq!(prompts[2].begin(), (Some(table(2)), TOOK));
        assert_eq!(prompts[1].begin(), (None, TOOK));
        assert_eq!(prompts[0].wait(), Some(table(1)));
        // Each table is taken once.
        assert_eq!(prompts[2].wait(), None);
    }

    #[test]
    fn a_batch_that_begins_before_has_its_tables_when_it_is_over() {
        // Would break: what is hinted during a pass waits behind batches that have not begun, or the pass is not judged.
        let (promise, mut prompts) = promise(1);
        let prompt = prompts.next().unwrap();
        assert_eq!(prompt.begin(), (None, Duration::ZERO));
        let pass = thread::spawn(move || prompt.wait());
        promise.keep(vec![Some(table(4))], TOOK, |_, begun| {
            assert!(begun);
            Hint::of_nobody()
        });
        assert_eq!(pass.join().unwrap(), Some(table(4)));
    }

    #[test]
    fn a_prediction_that_ends_in_a_panic_is_over() {
        // Would break: the scheduler waits for ever, and with it every request.
        let (promise, mut prompts) = promise(1);
        let prompt = prompts.next().unwrap();
        let pass = thread::spawn(move || prompt.wait());
        drop(promise);
        assert_eq!(pass.join().unwrap(), None);
    }
}
