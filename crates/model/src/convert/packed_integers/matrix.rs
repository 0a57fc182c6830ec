//! A matrix of packed integers: that its tensors fit together, and the blocks that it becomes.

use std::{
    io::{self, Write},
    path::Path,
};

use half::f16;
use safetensors::Dtype;
use sida_kernels::dtype::BLOCK;

use super::scheme::{Form, Layout, Scheme};
use crate::{
    ModelError, StoredDType, blocks,
    convert::ConvertError,
    shards::TensorSpec,
    weight_files::{StoredTensor, WeightFiles},
};

/// Bits of a word that holds several integers.
const WORD_BITS: usize = 32;

/// A matrix whose tensors were checked, but for its integers, which may be any.
#[derive(Debug)]
pub(super) struct Matrix {
    /// What its tensors' names begin with.
    name: String,
    layout: Layout,
    bits: usize,
    /// Values of a row that share a scale. Invariant: a multiple of a block, of which a row is whole ones.
    group: usize,
    outputs: usize,
    inputs: usize,
}

impl Matrix {
    /// Refuses one with a tensor that is missing, does not fit the others, or says what blocks cannot.
    pub(super) fn open(name: &str, scheme: &Scheme, files: &WeightFiles, dir: &Path) -> Result<Self, ConvertError> {
        let layout = scheme.layout;
        let part = |at: usize| format!("{name}.{}", layout.parts()[at]);
        let tensors = Tensors { files, dir };
        let (words, scales) = (tensors.get(&part(0))?, tensors.get(&part(1))?);
        tensors.expect(&part(0), Dtype::I32, None)?;
        let (outputs, inputs) = match (layout, &words.shape[..]) {
            (Layout::Gptq { .. }, &[rows, outputs]) => (outputs, rows.saturating_mul(WORD_BITS / scheme.forms[0].bits)),
            (Layout::Gptq { .. }, found) => {
                return Err(refused(part(0), format!("{found:?}"), "two dimensions".to_owned()));
            }
            (Layout::CompressedTensors, _) => {
                let words = tensors.expect(&part(2), Dtype::I64, Some(&[2]))?.as_chunks().0;
                let sizes = [words[0], words[1]].map(i64::from_le_bytes);
                let size = |at: usize| {
                    let refuse = || refused(part(2), format!("{sizes:?}"), "sizes of a matrix".to_owned());
                    usize::try_from(sizes[at]).map_err(|_| refuse())
                };
                (size(0)?, size(1)?)
            }
        };
        // A model may have several forms, and the shapes tell which one a matrix has.
        let of = |form: &Form| Self {
            name: name.to_owned(),
            layout,
            bits: form.bits,
            group: form.group.unwrap_or(inputs).max(1),
            outputs,
            inputs,
        };
        let candidates = || scheme.forms.iter().map(of);
        let fits = |matrix: &Self| words.shape == matrix.words_shape();
        let chosen = candidates().find(|matrix| fits(matrix) && scales.shape == matrix.scales_shape());
        let matrix = chosen.or_else(|| candidates().find(fits)).unwrap_or_else(|| of(&scheme.forms[0]));
        if outputs == 0 || inputs == 0 || !inputs.is_multiple_of(matrix.group) || !inputs.is_multiple_of(BLOCK) {
            let expected = format!("rows of whole groups of {} values, and of whole blocks of {BLOCK}", matrix.group);
            return Err(refused(part(0), format!("{outputs} rows of {inputs} values"), expected));
        }
        tensors.expect(&part(0), Dtype::I32, Some(&matrix.words_shape()))?;
        matrix.scales(files, dir)?;
        matrix.check_zeros(tensors)?;
        matrix.check_order(tensors)?;
        matrix.release(files);
        Ok(matrix)
    }

    /// The tensor that it becomes.
    pub(super) fn spec(&self) -> TensorSpec {
        let dtype = if self.bits == 4 { StoredDType::Q4_0 } else { StoredDType::Q8_0 };
        TensorSpec { name: format!("{}.weight", self.name), dtype, shape: vec![self.outputs, self.inputs] }
    }

    /// What a bias of it is called.
    pub(super) fn bias(&self) -> String {
        format!("{}.bias", self.name)
    }

    /// Writes its blocks, row by row.
    pub(super) fn write(&self, files: &WeightFiles, out: &mut dyn Write) -> io::Result<()> {
        let scales = self.scales(files, Path::new("")).map_err(io::Error::other)?;
        let stored = files.get(&self.part(0)).expect("it was opened");
        let words = files.bytes(stored).as_chunks().0;
        let mut row = vec![0; self.spec().dtype.bytes(self.inputs)];
        for output in 0..self.outputs {
            self.write_row(output, words, &scales, &mut row);
            out.write_all(&row)?;
        }
        self.release(files);
        Ok(())
    }

    /// Gives back the memory of what was read: of all matrices together it would be the model's.
    fn release(&self, files: &WeightFiles) {
        self.layout.parts().iter().filter_map(|part| files.get(&format!("{}.{part}", self.name))).for_each(|stored| {
            files.release(stored);
        });
    }

    /// The blocks of one row.
    fn write_row(&self, output: usize, words: &[[u8; 4]], scales: &[f16], row: &mut [u8]) {
        let dtype = self.spec().dtype;
        let (in_word, zero, mask) = (self.in_word(), 1 << (self.bits - 1), (1_u32 << self.bits) - 1);
        for (at, block) in row.chunks_exact_mut(dtype.bytes(BLOCK)).enumerate() {
            let first = at * BLOCK;
            let mut integers = [0; BLOCK];
            for (word, integers) in (first / in_word..).zip(integers.chunks_exact_mut(in_word)) {
                let mut word = u32::from_le_bytes(words[self.place(output, word, self.inputs / in_word)]);
                for integer in integers {
                    *integer = ((word & mask) as i32 - zero) as i8;
                    word >>= self.bits;
                }
            }
            let scale = scales[self.place(output, first / self.group, self.inputs / self.group)];
            blocks::put(scale, integers, dtype, block);
        }
    }

    /// Where what is at `along` of the `count` of a row lies.
    fn place(&self, output: usize, along: usize, count: usize) -> usize {
        if self.layout.is_gptq() { along * self.outputs + output } else { output * count + along }
    }

    fn part(&self, at: usize) -> String {
        format!("{}.{}", self.name, self.layout.parts()[at])
    }

    /// Integers of a word.
    fn in_word(&self) -> usize {
        WORD_BITS / self.bits
    }

    fn words_shape(&self) -> [usize; 2] {
        self.turned([self.outputs, self.inputs / self.in_word()])
    }

    fn scales_shape(&self) -> [usize; 2] {
        self.turned([self.outputs, self.inputs / self.group])
    }

    fn turned(&self, [outputs, inputs]: [usize; 2]) -> [usize; 2] {
        if self.layout.is_gptq() { [inputs, outputs] } else { [outputs, inputs] }
    }

    /// Its scales, each as it is stored. Refuses those that are no binary16.
    fn scales(&self, files: &WeightFiles, dir: &Path) -> Result<Vec<f16>, ConvertError> {
        let (name, tensors) = (self.part(1), Tensors { files, dir });
        let stored = tensors.get(&name)?;
        let dtype = stored.weights.filter(|dtype| !dtype.is_blocks()).ok_or_else(|| ModelError::TensorDType {
            tensor: name.clone(),
            expected: "F16, BF16 or F32".to_owned(),
            found: format!("{:?}", stored.dtype),
        })?;
        let bytes = tensors.expect(&name, stored.dtype, Some(&self.scales_shape()))?;
        let exact = |value: f32| {
            let scale = f16::from_f32(value);
            let is_exact = scale.is_finite() && scale.to_f32() == value;
            let expected = || "scales that binary16 has exactly".to_owned();
            if is_exact { Ok(scale) } else { Err(refused(name.clone(), format!("{value:e}"), expected())) }
        };
        dtype.widen(bytes).into_iter().map(exact).collect()
    }

    /// Refuses zeros that are not in the middle, which blocks do not have.
    fn check_zeros(&self, tensors: Tensors<'_>) -> Result<(), ConvertError> {
        let Layout::Gptq { is_v2, .. } = self.layout else {
            let zeros = self.part(4);
            return match tensors.files.get(&zeros) {
                Some(_) => Err(refused(zeros, "zeros".to_owned(), "none: integers are symmetric".to_owned())),
                None => Ok(()),
            };
        };
        let zeros = self.part(2);
        let shape = [self.inputs / self.group, self.outputs.div_ceil(self.in_word())];
        let zero = (1_u32 << (self.bits - 1)) - u32::from(!is_v2);
        let expected = (0..self.in_word()).fold(0, |word, at| word | zero << (at * self.bits));
        let words = tensors.expect(&zeros, Dtype::I32, Some(&shape))?.as_chunks().0;
        match words.iter().map(|&word| u32::from_le_bytes(word)).find(|&word| word != expected) {
            Some(found) => {
                let expected = format!("{expected:#010x} all through: zeros of symmetric integers");
                Err(refused(zeros, format!("{found:#010x}"), expected))
            }
            None => Ok(()),
        }
    }

    /// Refuses groups that are not of neighbours.
    fn check_order(&self, tensors: Tensors<'_>) -> Result<(), ConvertError> {
        let groups = self.part(3);
        let must_be = matches!(self.layout, Layout::Gptq { is_by_activation: true, .. });
        if tensors.files.get(&groups).is_none() && !must_be {
            return Ok(());
        }
        let of = tensors.expect(&groups, Dtype::I32, Some(&[self.inputs]))?.as_chunks().0;
        let of = of.iter().map(|&group| i32::from_le_bytes(group)).enumerate();
        match of.into_iter().find(|&(at, group)| usize::try_from(group) != Ok(at / self.group)) {
            Some((at, group)) => {
                let expected = format!("{}: groups by activation (desc_act, actorder) are not read", at / self.group);
                Err(refused(groups, format!("group {group} for value {at} of a row"), expected))
            }
            None => Ok(()),
        }
    }
}

/// Tensors of files, which may be others than are expected.
#[derive(Clone, Copy)]
struct Tensors<'a> {
    files: &'a WeightFiles,
    /// For messages.
    dir: &'a Path,
}

impl<'a> Tensors<'a> {
    fn get(self, name: &str) -> Result<&'a StoredTensor, ModelError> {
        let missing = || ModelError::TensorMissing { dir: self.dir.to_owned(), tensor: name.to_owned() };
        self.files.get(name).ok_or_else(missing)
    }

    /// The bytes of one of this dtype and, if one is given, this shape.
    fn expect(self, name: &str, dtype: Dtype, shape: Option<&[usize]>) -> Result<&'a [u8], ModelError> {
        let stored = self.get(name)?;
        if stored.dtype != dtype {
            let (expected, found) = (format!("{dtype:?}"), format!("{:?}", stored.dtype));
            return Err(ModelError::TensorDType { tensor: name.to_owned(), expected, found });
        }
        match shape {
            Some(shape) if shape != stored.shape => {
                let (expected, found) = (shape.to_owned(), stored.shape.clone());
                Err(ModelError::TensorShape { tensor: name.to_owned(), expected, found })
            }
            _ => Ok(self.files.bytes(stored)),
        }
    }
}

fn refused(tensor: String, found: String, expected: String) -> ConvertError {
    ConvertError::Packed { tensor, found, expected }
}
