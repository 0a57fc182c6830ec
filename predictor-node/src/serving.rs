//! The predictor that serves now. A call takes it once and keeps it to its end, so that it can be replaced at any time.

use std::sync::Arc;

use parking_lot::RwLock;
use sida_predictor::HashPredictor;

/// A place for one predictor.
pub(crate) struct Serving(RwLock<Arc<dyn HashPredictor>>);

impl Serving {
    pub(crate) fn new(predictor: Arc<dyn HashPredictor>) -> Self {
        Self(RwLock::new(predictor))
    }

    /// What serves now.
    pub(crate) fn now(&self) -> Arc<dyn HashPredictor> {
        self.0.read().clone()
    }

    /// Serves the next call by another one.
    pub(crate) fn replace(&self, predictor: Arc<dyn HashPredictor>) {
        *self.0.write() = predictor;
    }
}
