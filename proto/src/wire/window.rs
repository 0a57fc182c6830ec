//! `Window` -> [`Window`]: memory of a GPU that another process of the machine may read in place. Read by expert-nodes
//! (offers) and coordinators (answers); a handle that leads nowhere is refused by the driver, which nobody else can ask.

use bytes::Bytes;

use super::{WireError, length, within};
use crate::v1;

/// Bytes of a CUDA IPC handle.
pub const HANDLE_BYTES: usize = 64;
/// Bytes of the name of a machine's boot at most: a UUID has 36.
const MACHINE_BYTES_MAX: usize = 64;
/// Bytes of a refusal that are passed on.
const REFUSAL_BYTES_MAX: usize = 1024;

/// A checked offer of memory, or the answer to one.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Window {
    /// The boot of the machine that the handle is good for.
    pub machine: String,
    /// A CUDA IPC handle.
    pub handle: [u8; HANDLE_BYTES],
    /// Rows that it has room for; at least 1.
    pub rows: usize,
    /// Of a row's values.
    pub dtype: v1::DType,
}

impl v1::Window {
    /// An answer that there is none.
    pub fn refused(refusal: String) -> Self {
        Self { refusal, ..Self::default() }
    }

    /// The window of `rows_max` rows at most, or the refusal.
    pub fn check(self, rows_max: usize) -> Result<Result<Window, String>, WireError> {
        if !self.refusal.is_empty() {
            within("Window.refusal (its bytes)", self.refusal.len(), 1, REFUSAL_BYTES_MAX)?;
            return Ok(Err(self.refusal));
        }
        within("Window.machine (its bytes)", self.machine.len(), 1, MACHINE_BYTES_MAX)?;
        length("Window.handle", "bytes", self.handle.len(), HANDLE_BYTES)?;
        let handle = self.handle.as_ref().try_into().expect("as long as checked above");
        let rows = within("Window.rows", self.rows as usize, 1, rows_max)?;
        let dtype = v1::DType::try_from(self.dtype).ok().filter(|&dtype| dtype != v1::DType::DtypeUnspecified);
        let dtype = dtype.ok_or(WireError::Kind { field: "Window.dtype", found: self.dtype })?;
        Ok(Ok(Window { machine: self.machine, handle, rows, dtype }))
    }
}

impl From<&Window> for v1::Window {
    fn from(window: &Window) -> Self {
        Self {
            machine: window.machine.clone(),
            handle: Bytes::copy_from_slice(&window.handle),
            rows: window.rows as u32,
            dtype: window.dtype.into(),
            refusal: String::new(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn window() -> Window {
        Window { machine: "boot".into(), handle: [7; HANDLE_BYTES], rows: 100, dtype: v1::DType::DtypeBf16 }
    }

    #[test]
    fn what_we_send_we_take() {
        // Broken: rows would travel by the network although they need not.
        assert_eq!(v1::Window::from(&window()).check(100), Ok(Ok(window())));
        assert_eq!(v1::Window::refused("another machine".into()).check(100), Ok(Err("another machine".into())));
    }

    #[test]
    fn refusals_name_the_field() {
        // Broken: a handle of another length would be read beyond its end, a claimed size be believed.
        let refused = |spoil: fn(&mut v1::Window)| {
            let mut message = v1::Window::from(&window());
            spoil(&mut message);
            message.check(100).unwrap_err().to_string()
        };
        assert_eq!(refused(|w| w.handle = w.handle.slice(1..)), "Window.handle holds 63 bytes, expected 64");
        assert_eq!(refused(|w| w.rows = 101), "Window.rows is 101, expected 1 to 100");
        assert_eq!(refused(|w| w.rows = 0), "Window.rows is 0, expected 1 to 100");
        assert_eq!(refused(|w| w.dtype = 9), "Window.dtype is 9, which this node does not take");
        assert_eq!(refused(|w| w.dtype = 0), "Window.dtype is 0, which this node does not take");
        assert_eq!(refused(|w| w.machine.clear()), "Window.machine (its bytes) is 0, expected 1 to 64");
        assert_eq!(refused(|w| w.refusal = "x".repeat(2000)), "Window.refusal (its bytes) is 2000, expected 1 to 1024");
    }
}
