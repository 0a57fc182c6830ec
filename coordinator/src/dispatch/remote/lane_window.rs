//! Whether a lane's rows may stay on devices. The results of a call lie in the node's memory, each at its place in the
//! layer, so a call that was given up may still write where the results of a later call are expected. Until the answer
//! of such a call has come, or the connection has ended, rows travel.

use std::{collections::HashSet, sync::Arc};

/// A lane's window, as this coordinator sees it.
pub(crate) struct LaneWindow<W> {
    opened: Option<Arc<W>>,
    /// Calls through the window that were given up and not answered yet.
    astray: HashSet<u64>,
}

impl<W> LaneWindow<W> {
    /// A lane that has no window yet.
    pub(crate) fn closed() -> Self {
        Self { opened: None, astray: HashSet::new() }
    }

    /// The node has opened its side.
    pub(crate) fn open(&mut self, window: W) {
        self.opened = Some(Arc::new(window));
    }

    /// The window, if no call that was given up may still write there.
    pub(crate) fn free(&self) -> Option<&Arc<W>> {
        self.opened.as_ref().filter(|_| self.astray.is_empty())
    }

    /// Notes that a call through the window is given up.
    pub(crate) fn gave_up(&mut self, call_id: u64) {
        self.astray.insert(call_id);
    }

    /// Notes the answer to a call that was given up.
    pub(crate) fn answered(&mut self, call_id: u64) {
        self.astray.remove(&call_id);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn closed_while_a_late_call_may_write() {
        // Broken: the results of a call that was given up would be taken for those of another, and tokens be wrong.
        let mut window = LaneWindow::closed();
        assert!(window.free().is_none());
        window.open(());
        assert!(window.free().is_some());
        window.gave_up(7);
        window.gave_up(9);
        window.answered(7);
        window.answered(8);
        assert!(window.free().is_none());
        window.answered(9);
        assert!(window.free().is_some());
    }
}
