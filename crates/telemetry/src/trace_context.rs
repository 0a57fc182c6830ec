//! Which trace a piece of work belongs to: the W3C `traceparent` as it comes from callers and goes to other nodes.
//! Made by [`crate::spans`] and by the servers' layer that takes it off the wire; carried by requests and expert
//! calls whether spans are exported or not, so that log lines of all nodes name the same trace.

use std::fmt;

/// The metadata key that carries it.
pub const TRACEPARENT: &str = "traceparent";

/// A place in a trace: what becomes of it is below `span_id`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TraceContext {
    /// Invariant: not 0.
    pub(crate) trace_id: u128,
    /// Invariant: not 0.
    pub(crate) span_id: u64,
    /// Whether whoever began the trace wants its spans recorded.
    pub(crate) sampled: bool,
}

impl TraceContext {
    /// A trace of its own.
    pub(crate) fn root(sampled: bool) -> Self {
        // 0 stands for none; meeting it is as likely as meeting an id twice.
        Self { trace_id: rand::random::<u128>().max(1), span_id: rand::random::<u64>().max(1), sampled }
    }

    /// Another place in the same trace.
    pub(crate) fn sibling(self) -> Self {
        Self { span_id: rand::random::<u64>().max(1), ..self }
    }

    /// `00-<32 hex>-<16 hex>-<2 hex>` (W3C Trace Context, version 0). `None` if it is anything else: a caller's
    /// malformed header begins a new trace.
    pub fn from_traceparent(text: &str) -> Option<Self> {
        let mut fields = text.split('-');
        let mut next = |digits: usize| {
            let field = fields.next().filter(|field| field.len() == digits)?;
            field.bytes().try_fold(0, |value: u128, byte| Some(value << 4 | u128::from(digit(byte)?)))
        };
        let (version, trace_id, span_id, flags) = (next(2)?, next(32)?, next(16)?, next(2)?);
        // Later versions may have more behind the flags, the first may not.
        let is_known = version != 0xff && (version != 0 || text.len() == 55);
        (is_known && trace_id != 0 && span_id != 0).then_some(Self {
            trace_id,
            span_id: span_id as u64,
            sampled: flags & 1 == 1,
        })
    }

    /// The trace's name as collectors show it: 32 hexadecimal digits.
    pub fn trace_id(self) -> impl fmt::Display {
        struct Hex(u128);
        impl fmt::Display for Hex {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, "{:032x}", self.0)
            }
        }
        Hex(self.trace_id)
    }
}

/// As a `traceparent`.
impl fmt::Display for TraceContext {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut text = *b"00-................................-................-0.";
        write_digits(self.trace_id, &mut text[3..35]);
        write_digits(u128::from(self.span_id), &mut text[36..52]);
        write_digits(u128::from(self.sampled), &mut text[54..]);
        f.write_str(str::from_utf8(&text).expect("digits are ASCII"))
    }
}

/// The value of a lower-case hexadecimal digit. By hand, as is its opposite: every expert call carries a traceparent, and
/// the standard library's ways took 2% of an expert-node's instructions.
fn digit(byte: u8) -> Option<u8> {
    match byte {
        b'0'..=b'9' => Some(byte - b'0'),
        b'a'..=b'f' => Some(byte - b'a' + 10),
        _ => None,
    }
}

/// `value` in as many lower-case hexadecimal digits as there is room for.
fn write_digits(mut value: u128, text: &mut [u8]) {
    for place in text.iter_mut().rev() {
        *place = b"0123456789abcdef"[(value & 15) as usize];
        value >>= 4;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_traceparent_comes_back_as_it_was() {
        // Broken: spans of this node would hang below nobody, or in another caller's trace.
        let text = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01";
        let context = TraceContext::from_traceparent(text).unwrap();
        assert!(context.sampled);
        assert_eq!(context.to_string(), text);
        assert_eq!(context.trace_id().to_string(), "4bf92f3577b34da6a3ce929d0e0e4736");
        let root = TraceContext::root(false);
        assert_eq!(TraceContext::from_traceparent(&root.to_string()), Some(root));
    }

    #[test]
    fn what_is_no_traceparent_is_none() {
        // Broken: a caller could give our spans any name, or a header from outside would panic.
        for text in [
            "",
            "00",
            "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-0",
            "00-4BF92F3577B34DA6A3CE929D0E0E4736-00f067aa0ba902b7-01",
            "00-00000000000000000000000000000000-00f067aa0ba902b7-01",
            "00-4bf92f3577b34da6a3ce929d0e0e4736-0000000000000000-01",
            "ff-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01",
            "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01-more",
            "00-4bf92f3577b34da6a3ce929d0e0e473é-00f067aa0ba902b7-01",
        ] {
            assert_eq!(TraceContext::from_traceparent(text), None, "{text:?}");
        }
        let later = "01-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01-more";
        assert!(TraceContext::from_traceparent(later).is_some());
    }
}
