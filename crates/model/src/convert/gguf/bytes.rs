//! A header's bytes, one value after another. Nothing is read, or kept, beyond what is there.

/// What is left of a header, and how much of it was read.
pub(super) struct Bytes<'a> {
    all: &'a [u8],
    at: usize,
}

impl<'a> Bytes<'a> {
    pub(super) fn new(all: &'a [u8]) -> Self {
        Self { all, at: 0 }
    }

    /// How many were read.
    pub(super) fn at(&self) -> usize {
        self.at
    }

    /// So many bytes; or what is wrong.
    pub(super) fn take(&mut self, bytes: u64) -> Result<&'a [u8], String> {
        let left = &self.all[self.at..];
        match usize::try_from(bytes).ok().and_then(|bytes| left.get(..bytes)) {
            Some(taken) => {
                self.at += taken.len();
                Ok(taken)
            }
            None => {
                Err(format!("ends in its header: {bytes} bytes are to follow at byte {}, {} do", self.at, left.len()))
            }
        }
    }

    fn array<const SIZE: usize>(&mut self) -> Result<[u8; SIZE], String> {
        Ok(self.take(SIZE as u64)?.try_into().expect("so many were taken"))
    }

    pub(super) fn u32(&mut self) -> Result<u32, String> {
        self.array().map(u32::from_le_bytes)
    }

    pub(super) fn u64(&mut self) -> Result<u64, String> {
        self.array().map(u64::from_le_bytes)
    }

    /// A length and as many bytes of text.
    pub(super) fn text(&mut self) -> Result<String, String> {
        let bytes = self.u64()?;
        let text = self.take(bytes)?;
        let text =
            std::str::from_utf8(text).map_err(|_| format!("holds a text at byte {} that is no UTF-8", self.at))?;
        Ok(text.to_owned())
    }

    /// A number of one of the types that GGUF has.
    pub(super) fn number(&mut self, of: NumberType) -> Result<Number, String> {
        Ok(match of {
            NumberType::U8 => Number::Integer(u8::from_le_bytes(self.array()?).into()),
            NumberType::I8 => Number::Integer(i8::from_le_bytes(self.array()?).into()),
            NumberType::U16 => Number::Integer(u16::from_le_bytes(self.array()?).into()),
            NumberType::I16 => Number::Integer(i16::from_le_bytes(self.array()?).into()),
            NumberType::U32 => Number::Integer(self.u32()?.into()),
            NumberType::I32 => Number::Integer(i32::from_le_bytes(self.array()?).into()),
            NumberType::I64 => Number::Integer(i64::from_le_bytes(self.array()?)),
            NumberType::U64 => {
                let number = self.u64()?;
                Number::Integer(
                    i64::try_from(number).map_err(|_| format!("holds a number that is too large: {number}"))?,
                )
            }
            // By its decimals, so that 1e-6 is that, and not the double next to the single.
            NumberType::F32 => {
                let number = f32::from_le_bytes(self.array()?);
                Number::Float(number.to_string().parse().unwrap_or(f64::NAN))
            }
            NumberType::F64 => Number::Float(f64::from_le_bytes(self.array()?)),
        })
    }
}

/// A number of a header.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) enum Number {
    Integer(i64),
    Float(f64),
}

/// What a number is stored as.
#[derive(Clone, Copy)]
pub(super) enum NumberType {
    U8,
    I8,
    U16,
    I16,
    U32,
    I32,
    F32,
    U64,
    I64,
    F64,
}

impl NumberType {
    /// By GGUF's number of a type; `None` for flags, texts, lists, and what is no type.
    pub(super) fn of(number: u32) -> Option<Self> {
        Some(match number {
            0 => Self::U8,
            1 => Self::I8,
            2 => Self::U16,
            3 => Self::I16,
            4 => Self::U32,
            5 => Self::I32,
            6 => Self::F32,
            10 => Self::U64,
            11 => Self::I64,
            12 => Self::F64,
            _ => return None,
        })
    }
}
