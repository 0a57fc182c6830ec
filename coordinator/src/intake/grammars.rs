//! Grammars of schemas, made off the threads that others wait for, a few at a time, and kept for the requests that come
//! with the same schema: applications have a few, and send them with everything that they ask.

use std::{
    collections::VecDeque,
    sync::{Arc, OnceLock},
    time::Duration,
};

use parking_lot::Mutex;
use sida_model::{GenerationConfig, ModelConfig, Tokenizer};
use tokio::{sync::Semaphore, task, time};

use crate::answer::{
    grammar::{Followed, Grammar, GrammarMaker},
    request_error::RequestError,
};

/// Grammars that are kept.
const KEPT_MAX: usize = 16;
/// Grammars that are made at a time.
const MAKERS_MAX: usize = 2;
/// How long a caller waits for its grammar.
const PATIENCE: Duration = Duration::from_secs(10);

/// The grammars of one model. Cheap to clone; all clones are the same.
#[derive(Clone)]
pub(crate) struct Grammars(Arc<Inner>);

struct Inner {
    tokenizer: Arc<Tokenizer>,
    vocab_size: usize,
    /// Which tokens end an answer, and which none has.
    generation: GenerationConfig,
    /// Made for the first schema: it takes a vocabulary's bytes apart.
    maker: OnceLock<Result<GrammarMaker, String>>,
    /// Those that were asked for last, with what they are of.
    kept: Mutex<VecDeque<(Arc<Followed>, Grammar)>>,
    turns: Arc<Semaphore>,
}

impl Grammars {
    /// Of a model.
    pub(crate) fn new(tokenizer: Arc<Tokenizer>, model: &ModelConfig) -> Self {
        Self(Arc::new(Inner {
            tokenizer,
            vocab_size: model.vocab_size,
            generation: model.generation.clone(),
            maker: OnceLock::new(),
            kept: Mutex::default(),
            turns: Arc::new(Semaphore::new(MAKERS_MAX)),
        }))
    }

    /// The grammar of what an answer follows, for one request.
    pub(crate) async fn of(&self, followed: Followed) -> Result<Grammar, RequestError> {
        if let Some(grammar) = self.0.kept(&followed) {
            return Ok(grammar.apart());
        }
        let late = |_| RequestError::JsonSchema { reason: format!("it was not understood within {PATIENCE:?}") };
        let made = time::timeout(PATIENCE, self.make(followed)).await.map_err(late)?;
        made.map(|grammar| grammar.apart())
    }

    async fn make(&self, followed: Followed) -> Result<Grammar, RequestError> {
        // The turn lasts as long as the work does, although its caller may have gone.
        let turn = self.0.turns.clone().acquire_owned().await.map_err(|_| RequestError::Panicked)?;
        let inner = self.0.clone();
        let made = task::spawn_blocking(move || {
            let _turn = turn;
            inner.kept(&followed).map_or_else(|| inner.make(followed), Ok)
        });
        made.await.unwrap_or(Err(RequestError::Panicked))
    }
}

impl Inner {
    /// A grammar that was made, which is kept the longer for being asked for.
    fn kept(&self, followed: &Followed) -> Option<Grammar> {
        let mut kept = self.kept.lock();
        let place = kept.iter().position(|(of, _)| **of == *followed)?;
        let entry = kept.remove(place)?;
        let grammar = entry.1.clone();
        kept.push_back(entry);
        Some(grammar)
    }

    fn make(&self, followed: Followed) -> Result<Grammar, RequestError> {
        let maker = self.maker.get_or_init(|| {
            let bytes = self.tokenizer.token_bytes(self.vocab_size);
            let mut bytes = bytes.ok_or("the tokens of this model do not spell JSON")?;
            let GenerationConfig { suppress_tokens, eos_token_ids, .. } = &self.generation;
            // A token without bytes is never chosen.
            for &suppressed in suppress_tokens {
                bytes[suppressed as usize].clear();
            }
            GrammarMaker::new(&bytes, eos_token_ids)
        });
        let maker = maker.as_ref().map_err(|reason| RequestError::JsonSchema { reason: reason.clone() })?;
        let grammar = maker.make(&followed)?;
        let mut kept = self.kept.lock();
        if kept.len() == KEPT_MAX {
            kept.pop_front();
        }
        kept.push_back((Arc::new(followed), grammar.clone()));
        Ok(grammar)
    }
}
