//! How a valid input is damaged: a few edits of the kinds that decoders get wrong. Random bytes alone would be refused
//! by the first check of every format.

use bolero::TypeGenerator;

/// Edits of one seed.
#[derive(Clone, Debug, TypeGenerator)]
pub(crate) struct Damage {
    seed: u8,
    edits: [Edit; 3],
    /// So many of the edits are used, modulo their number plus one.
    used: u8,
}

#[derive(Clone, Debug, TypeGenerator)]
struct Edit {
    kind: Kind,
    /// Near the start of the input, where headers are.
    in_head: bool,
    at: u32,
    value: u32,
}

#[derive(Clone, Copy, Debug, TypeGenerator)]
enum Kind {
    FlipBit,
    SetByte,
    /// Eight bytes become a little-endian number that overflows something.
    SetNumber,
    /// The next decimal number in the text becomes another one, or another kind of value.
    SetDecimal,
    Truncate,
    Delete,
    Duplicate,
    CopyFromElsewhere,
}

const HEAD_BYTES: usize = 1024;
const NUMBERS: [u64; 10] =
    [0, 1, 0x7f, 0xffff, 0x7fff_ffff, 0xffff_ffff, 1 << 32, i64::MAX as u64, u64::MAX - 7, u64::MAX];
const VALUES: [&str; 14] = [
    "0",
    "1",
    "-1",
    "7",
    "65536",
    "2147483648",
    "4294967295",
    "4294967296",
    "9223372036854775807",
    "18446744073709551615",
    "1e308",
    "null",
    "[]",
    "\"x\"",
];

impl Damage {
    /// The damaged copy of one of `seeds`.
    pub(crate) fn of(&self, seeds: &[Vec<u8>]) -> Vec<u8> {
        let mut bytes = seeds[usize::from(self.seed) % seeds.len()].clone();
        let used = usize::from(self.used) % (self.edits.len() + 1);
        self.edits[..used].iter().for_each(|edit| edit.apply(&mut bytes));
        bytes
    }
}

impl Edit {
    fn apply(&self, bytes: &mut Vec<u8>) {
        if bytes.is_empty() {
            return;
        }
        let reach = if self.in_head { bytes.len().min(HEAD_BYTES) } else { bytes.len() };
        let (at, value) = (self.at as usize % reach, self.value as usize);
        let until = (at + 1 + value % 64).min(bytes.len());
        match self.kind {
            Kind::FlipBit => bytes[at] ^= 1 << (value % 8),
            Kind::SetByte => bytes[at] = value as u8,
            Kind::SetNumber => {
                let number = NUMBERS[value % NUMBERS.len()].to_le_bytes();
                bytes.iter_mut().skip(at).zip(number).for_each(|(byte, new)| *byte = new);
            }
            Kind::SetDecimal => set_decimal(bytes, at, VALUES[value % VALUES.len()]),
            Kind::Truncate => bytes.truncate(at),
            Kind::Delete => drop(bytes.drain(at..until)),
            Kind::Duplicate => {
                let copy = bytes[at..until].to_vec();
                bytes.splice(at..at, copy);
            }
            Kind::CopyFromElsewhere => {
                let source = value % bytes.len();
                let length = (until - at).min(bytes.len() - source);
                bytes.copy_within(source..source + length, at);
            }
        }
    }
}

fn set_decimal(bytes: &mut Vec<u8>, at: usize, value: &str) {
    let is_digit = |byte: &u8| byte.is_ascii_digit();
    let Some(start) = bytes[at..].iter().position(is_digit).map(|offset| at + offset) else { return };
    let digits = bytes[start..].iter().take_while(|&byte| is_digit(byte)).count();
    bytes.splice(start..start + digits, value.bytes());
}

/// Targets would be called with one and the same input for ever.
#[test]
fn damage_changes_what_it_should() {
    let edit = |kind, at, value| {
        let mut bytes = br#"{"size": 12, "x": 3}"#.to_vec();
        Edit { kind, in_head: true, at, value }.apply(&mut bytes);
        String::from_utf8_lossy(&bytes).into_owned()
    };
    assert_eq!(edit(Kind::SetDecimal, 2, 2), r#"{"size": -1, "x": 3}"#);
    assert_eq!(edit(Kind::SetDecimal, 12, 11), r#"{"size": 12, "x": null}"#);
    assert_eq!(edit(Kind::Truncate, 5, 0), r#"{"siz"#);
    assert_eq!(edit(Kind::Delete, 0, 7), r#" 12, "x": 3}"#);
    assert_eq!(edit(Kind::Duplicate, 9, 1), r#"{"size": 1212, "x": 3}"#);
    assert_eq!(edit(Kind::FlipBit, 0, 0), r#"z"size": 12, "x": 3}"#);
}
