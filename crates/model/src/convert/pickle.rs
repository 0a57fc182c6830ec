//! Reads the one kind of pickle that a PyTorch checkpoint is: a dictionary from names to tensors.
//!
//! Pickle is a program that builds objects by calling Python functions, so a checkpoint can do anything to
//! whoever loads it. Nothing is called here: the few functions that a state dictionary needs are known by
//! name, and any other name is an error. General readers (candle's among them) allocate by claimed lengths,
//! copy memoised objects, which lets a short program grow without bound, and drop nested objects
//! recursively, which lets one overflow the stack. Here every object is an index into one arena: an opcode
//! adds at most one, a memo holds an index, and dropping is flat. So memory is bounded by the length of the
//! pickle, and a nested object is as cheap as any other.

use std::collections::{HashMap, HashSet};

use thiserror::Error;

use crate::StoredDType;

/// What a pickle says of one tensor. Nothing of it is checked against the storage yet.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct PickledTensor {
    pub(super) name: String,
    pub(super) storage: Storage,
    /// First element within the storage.
    pub(super) offset: u64,
    pub(super) shape: Vec<u64>,
    /// In elements, as long as `shape`.
    pub(super) stride: Vec<u64>,
}

/// What a pickle says of the bytes behind a tensor.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Storage {
    /// Its file within the archive, under `data/`.
    pub(super) key: String,
    pub(super) values: Values,
}

/// What a storage holds.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) enum Values {
    /// What weights are stored as.
    Weights(StoredDType),
    /// What a buffer beside the weights may be stored as, by its name.
    Other(&'static str),
}

/// The storages of PyTorch that hold no weights of ours, and what they hold.
const OTHER_STORAGES: [(&str, &str); 7] = [
    ("DoubleStorage", "float64"),
    ("LongStorage", "int64"),
    ("IntStorage", "int32"),
    ("ShortStorage", "int16"),
    ("CharStorage", "int8"),
    ("ByteStorage", "uint8"),
    ("BoolStorage", "bool"),
];

/// Why a pickle is refused.
#[derive(Debug, Error, PartialEq)]
#[allow(missing_docs)]
pub enum PickleError {
    #[error("pickle ends in the middle of an instruction at byte {at}")]
    Truncated { at: usize },
    #[error("pickle holds instruction {opcode:#04x} at byte {at}, which no checkpoint needs")]
    Opcode { opcode: u8, at: usize },
    #[error("pickle names {module}.{name}, which no checkpoint needs: it may be an attack and is not run")]
    Global { module: String, name: String },
    #[error(
        "pickle stores values as {name}, which is not known; weights are FloatStorage, HalfStorage or BFloat16Storage"
    )]
    Storage { name: String },
    #[error("pickle is not a dictionary of tensors: {expected} expected at byte {at}")]
    Malformed { expected: &'static str, at: usize },
    #[error("pickle holds tensor {name} twice")]
    Twice { name: String },
}

/// Bytes of a storage's key, at most: every tensor holds a copy. PyTorch counts from 0.
const KEY_BYTES_MAX: usize = 64;

/// Index into the arena.
type Id = usize;

/// The functions that a state dictionary is built by.
#[derive(Clone, Copy, PartialEq)]
enum Global {
    OrderedDict,
    RebuildTensor,
    RebuildParameter,
    StorageOf(Values),
}

enum Value {
    /// `None`, a bool or a float: part of a tensor's arguments, of no interest.
    Ignored,
    Int(i64),
    Text(String),
    Global(Global),
    Sequence(Vec<Id>),
    Dict(Vec<(Id, Id)>),
    Storage(Storage),
    Tensor {
        storage: Id,
        offset: u64,
        shape: Vec<u64>,
        stride: Vec<u64>,
    },
}

/// Runs a pickle and returns its tensors in the order it holds them.
pub(super) fn tensors(pickle: &[u8]) -> Result<Vec<PickledTensor>, PickleError> {
    let mut machine =
        Machine { bytes: pickle, at: 0, arena: Vec::new(), stack: Vec::new(), marks: Vec::new(), memo: HashMap::new() };
    while machine.step()? {}
    let root = machine.pop()?;
    machine.state_dict(root)
}

struct Machine<'a> {
    bytes: &'a [u8],
    at: usize,
    /// Everything made so far. Invariant: a value refers only to values made before the instruction that
    /// completed it, and every id on the stack, in the memo or in a value is within the arena.
    arena: Vec<Value>,
    stack: Vec<Id>,
    /// Stack heights.
    marks: Vec<usize>,
    memo: HashMap<u32, Id>,
}

impl Machine<'_> {
    /// Runs one instruction. `false`: it was the last.
    fn step(&mut self) -> Result<bool, PickleError> {
        let at = self.at;
        let [opcode] = self.take()?;
        match opcode {
            b'.' => return Ok(false),
            0x80 => drop(self.take::<1>()?), // PROTO
            b'N' | 0x88 | 0x89 => self.push(Value::Ignored),
            b'G' => {
                self.take::<8>()?;
                self.push(Value::Ignored);
            }
            b'K' => self.take().map(|[int]| self.push(Value::Int(int.into())))?,
            b'M' => self.take().map(|int| self.push(Value::Int(u16::from_le_bytes(int).into())))?,
            b'J' => self.take().map(|int| self.push(Value::Int(i32::from_le_bytes(int).into())))?,
            0x8a => self.long()?,
            b'X' => self.text()?,
            b'c' => self.global()?,
            b'q' => self.take().map(|[slot]| self.memoise(slot.into()))??,
            b'r' => self.take().map(|slot| self.memoise(u32::from_le_bytes(slot)))??,
            b'h' => self.take().map(|[slot]| self.recall(slot.into()))??,
            b'j' => self.take().map(|slot| self.recall(u32::from_le_bytes(slot)))??,
            b'(' => self.marks.push(self.stack.len()),
            b')' | b']' => self.push(Value::Sequence(Vec::new())),
            b'}' => self.push(Value::Dict(Vec::new())),
            b't' => {
                let items = self.pop_to_mark()?;
                self.push(Value::Sequence(items));
            }
            0x85..=0x87 => {
                let first =
                    self.stack.len().checked_sub(usize::from(opcode - 0x84)).ok_or(self.malformed("a value"))?;
                let items = self.stack.split_off(first);
                self.push(Value::Sequence(items));
            }
            b'a' | b'e' => self.append(opcode == b'e')?,
            b's' | b'u' => self.set_items(opcode == b'u')?,
            b'R' => self.reduce()?,
            // State of an object (`_metadata` of a state dictionary): not needed.
            b'b' => drop(self.pop()?),
            b'Q' => self.persistent_id()?,
            _ => return Err(PickleError::Opcode { opcode, at }),
        }
        Ok(true)
    }

    fn take<const N: usize>(&mut self) -> Result<[u8; N], PickleError> {
        let bytes = self.bytes.get(self.at..).and_then(|rest| rest.first_chunk()).copied();
        self.at += N;
        bytes.ok_or(PickleError::Truncated { at: self.at - N })
    }

    fn take_slice(&mut self, len: usize) -> Result<&[u8], PickleError> {
        let end = self.at.checked_add(len).ok_or(PickleError::Truncated { at: self.at })?;
        let bytes = self.bytes.get(self.at..end).ok_or(PickleError::Truncated { at: self.at })?;
        self.at = end;
        Ok(bytes)
    }

    /// LONG1: a signed integer of up to 8 bytes.
    fn long(&mut self) -> Result<(), PickleError> {
        let [len] = self.take()?;
        let bytes = self.take_slice(len.into())?;
        let Some(&last) = bytes.last() else {
            self.push(Value::Int(0));
            return Ok(());
        };
        let mut wide = [if last >= 0x80 { 0xff } else { 0 }; 8];
        let Some(low) = wide.get_mut(..bytes.len()) else { return Err(self.malformed("an integer of 8 bytes")) };
        low.copy_from_slice(bytes);
        self.push(Value::Int(i64::from_le_bytes(wide)));
        Ok(())
    }

    fn text(&mut self) -> Result<(), PickleError> {
        let len = u32::from_le_bytes(self.take()?) as usize;
        let text = std::str::from_utf8(self.take_slice(len)?).map(str::to_owned);
        let text = text.map_err(|_| self.malformed("text in UTF-8"))?;
        self.push(Value::Text(text));
        Ok(())
    }

    /// GLOBAL: two lines that name a Python function. Only the harmless ones have a meaning here.
    fn global(&mut self) -> Result<(), PickleError> {
        let (module, name) = (self.line()?, self.line()?);
        let global = match (module.as_str(), name.as_str()) {
            ("collections", "OrderedDict") => Global::OrderedDict,
            ("torch._utils", "_rebuild_tensor_v2") => Global::RebuildTensor,
            ("torch._utils", "_rebuild_parameter") => Global::RebuildParameter,
            ("torch", "FloatStorage") => Global::StorageOf(Values::Weights(StoredDType::F32)),
            ("torch", "HalfStorage") => Global::StorageOf(Values::Weights(StoredDType::F16)),
            ("torch", "BFloat16Storage") => Global::StorageOf(Values::Weights(StoredDType::BF16)),
            ("torch", storage) if storage.ends_with("Storage") => {
                match OTHER_STORAGES.iter().find(|(known, _)| *known == storage) {
                    Some(&(_, values)) => Global::StorageOf(Values::Other(values)),
                    None => return Err(PickleError::Storage { name }),
                }
            }
            _ => return Err(PickleError::Global { module, name }),
        };
        self.push(Value::Global(global));
        Ok(())
    }

    fn line(&mut self) -> Result<String, PickleError> {
        let rest = self.bytes.get(self.at..).unwrap_or_default();
        let len = rest.iter().position(|&byte| byte == b'\n').ok_or(PickleError::Truncated { at: self.at })?;
        let line = self.take_slice(len)?;
        let line = String::from_utf8_lossy(&line[..len.min(100)]).into_owned();
        self.at += 1;
        Ok(line)
    }

    fn push(&mut self, value: Value) {
        self.stack.push(self.arena.len());
        self.arena.push(value);
    }

    /// Takes the top of the stack. Values below the last mark belong to what is outside it.
    fn pop(&mut self) -> Result<Id, PickleError> {
        if self.stack.len() <= self.marks.last().copied().unwrap_or(0) {
            return Err(self.malformed("a value"));
        }
        Ok(self.stack.pop().expect("longer than the mark"))
    }

    fn pop_to_mark(&mut self) -> Result<Vec<Id>, PickleError> {
        let mark = self.marks.pop().filter(|&mark| mark <= self.stack.len()).ok_or(self.malformed("a mark"))?;
        Ok(self.stack.split_off(mark))
    }

    fn top(&self) -> Result<Id, PickleError> {
        self.stack.last().copied().ok_or(self.malformed("a value"))
    }

    fn memoise(&mut self, slot: u32) -> Result<(), PickleError> {
        let top = self.top()?;
        self.memo.insert(slot, top);
        Ok(())
    }

    fn recall(&mut self, slot: u32) -> Result<(), PickleError> {
        let id = *self.memo.get(&slot).ok_or(self.malformed("a memoised value"))?;
        self.stack.push(id);
        Ok(())
    }

    /// APPEND and APPENDS.
    fn append(&mut self, many: bool) -> Result<(), PickleError> {
        let items = if many { self.pop_to_mark()? } else { vec![self.pop()?] };
        let list = self.top()?;
        let Value::Sequence(list) = &mut self.arena[list] else { return Err(self.malformed("a list")) };
        list.extend(items);
        Ok(())
    }

    /// SETITEM and SETITEMS.
    fn set_items(&mut self, many: bool) -> Result<(), PickleError> {
        let items = if many {
            self.pop_to_mark()?
        } else {
            let value = self.pop()?;
            vec![self.pop()?, value]
        };
        let dict = self.top()?;
        let (pairs, []) = items.as_chunks::<2>() else { return Err(self.malformed("a value for every key")) };
        let Value::Dict(dict) = &mut self.arena[dict] else { return Err(self.malformed("a dictionary")) };
        dict.extend(pairs.iter().map(|&[key, value]| (key, value)));
        Ok(())
    }

    /// REDUCE: what Python would call a function for.
    fn reduce(&mut self) -> Result<(), PickleError> {
        let (arguments, function) = (self.pop()?, self.pop()?);
        let Value::Global(function) = self.arena[function] else { return Err(self.malformed("a function")) };
        let Value::Sequence(arguments) = &self.arena[arguments] else { return Err(self.malformed("arguments")) };
        match (function, arguments.as_slice()) {
            (Global::OrderedDict, []) => self.push(Value::Dict(Vec::new())),
            // A parameter is its tensor.
            (Global::RebuildParameter, &[tensor, ..]) => self.stack.push(tensor),
            (Global::RebuildTensor, &[storage, offset, shape, stride, ..]) => {
                let offset = self.unsigned(offset)?;
                let (shape, stride) = (self.extents(shape)?, self.extents(stride)?);
                self.push(Value::Tensor { storage, offset, shape, stride });
            }
            _ => return Err(self.malformed("arguments of this function")),
        }
        Ok(())
    }

    /// BINPERSID: `('storage', class, key, location, elements)`.
    fn persistent_id(&mut self) -> Result<(), PickleError> {
        let id = self.pop()?;
        let Value::Sequence(parts) = &self.arena[id] else { return Err(self.malformed("a storage")) };
        let &[kind, class, key, _location, _elements] = parts.as_slice() else {
            return Err(self.malformed("a storage"));
        };
        match (&self.arena[kind], &self.arena[class], &self.arena[key]) {
            (Value::Text(kind), Value::Global(Global::StorageOf(values)), Value::Text(key))
                if kind == "storage" && key.len() <= KEY_BYTES_MAX =>
            {
                let storage = Storage { key: key.clone(), values: *values };
                self.push(Value::Storage(storage));
                Ok(())
            }
            _ => Err(self.malformed("a storage")),
        }
    }

    fn unsigned(&self, id: Id) -> Result<u64, PickleError> {
        match self.arena[id] {
            Value::Int(int) if int >= 0 => Ok(int as u64),
            _ => Err(self.malformed("a size")),
        }
    }

    fn extents(&self, id: Id) -> Result<Vec<u64>, PickleError> {
        /// Dimensions of a weight, at most.
        const RANK_MAX: usize = 8;
        match &self.arena[id] {
            Value::Sequence(items) if items.len() <= RANK_MAX => items.iter().map(|&id| self.unsigned(id)).collect(),
            _ => Err(self.malformed("a shape")),
        }
    }

    /// The tensors of the finished dictionary.
    fn state_dict(&self, root: Id) -> Result<Vec<PickledTensor>, PickleError> {
        let Value::Dict(entries) = &self.arena[root] else { return Err(self.malformed("a dictionary")) };
        let mut seen = HashSet::new();
        let mut tensors = Vec::new();
        for &(key, value) in entries {
            let Value::Text(name) = &self.arena[key] else { return Err(self.malformed("a name")) };
            let Value::Tensor { storage, offset, shape, stride } = &self.arena[value] else {
                return Err(self.malformed("a tensor"));
            };
            let Value::Storage(storage) = &self.arena[*storage] else { return Err(self.malformed("a storage")) };
            if !seen.insert(name) {
                return Err(PickleError::Twice { name: name.clone() });
            }
            tensors.push(PickledTensor {
                name: name.clone(),
                storage: storage.clone(),
                offset: *offset,
                shape: shape.clone(),
                stride: stride.clone(),
            });
        }
        Ok(tensors)
    }

    fn malformed(&self, expected: &'static str) -> PickleError {
        PickleError::Malformed { expected, at: self.at }
    }
}

#[cfg(test)]
mod tests;
