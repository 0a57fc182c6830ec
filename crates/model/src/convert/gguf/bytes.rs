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

    /// A whole number.
    pub(super) fn integer(&mut self, of: IntegerType) -> Result<i64, String> {
        Ok(match of {
            IntegerType::U8 => u8::from_le_bytes(self.array()?).into(),
            IntegerType::I8 => i8::from_le_bytes(self.array()?).into(),
            IntegerType::U16 => u16::from_le_bytes(self.array()?).into(),
            IntegerType::I16 => i16::from_le_bytes(self.array()?).into(),
            IntegerType::U32 => self.u32()?.into(),
            IntegerType::I32 => i32::from_le_bytes(self.array()?).into(),
            IntegerType::I64 => i64::from_le_bytes(self.array()?),
            IntegerType::U64 => {
                let number = self.u64()?;
                i64::try_from(number).map_err(|_| format!("holds a number that is too large: {number}"))?
            }
        })
    }

    /// A fraction.
    pub(super) fn float(&mut self, of: FloatType) -> Result<f64, String> {
        Ok(match of {
            // By its decimals, so that 1e-6 is that, and not the double next to the single.
            FloatType::F32 => f32::from_le_bytes(self.array()?).to_string().parse().unwrap_or(f64::NAN),
            FloatType::F64 => f64::from_le_bytes(self.array()?),
        })
    }
}

/// What a number is stored as.
#[derive(Clone, Copy)]
pub(super) enum NumberType {
    Integer(IntegerType),
    Float(FloatType),
}

#[derive(Clone, Copy)]
pub(super) enum IntegerType {
    U8,
    I8,
    U16,
    I16,
    U32,
    I32,
    U64,
    I64,
}

#[derive(Clone, Copy)]
pub(super) enum FloatType {
    F32,
    F64,
}

impl NumberType {
    /// By GGUF's number of a type; `None` for flags, texts, lists, and what is no type.
    pub(super) fn of(number: u32) -> Option<Self> {
        Some(match number {
            0 => Self::Integer(IntegerType::U8),
            1 => Self::Integer(IntegerType::I8),
            2 => Self::Integer(IntegerType::U16),
            3 => Self::Integer(IntegerType::I16),
            4 => Self::Integer(IntegerType::U32),
            5 => Self::Integer(IntegerType::I32),
            6 => Self::Float(FloatType::F32),
            10 => Self::Integer(IntegerType::U64),
            11 => Self::Integer(IntegerType::I64),
            12 => Self::Float(FloatType::F64),
            _ => return None,
        })
    }
}
