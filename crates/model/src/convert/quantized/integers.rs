//! A matrix of packed integers: that its tensors fit together, and the blocks that it becomes.

use std::{
    array,
    io::{self, Write},
};

use half::f16;
use safetensors::Dtype;
use sida_kernels::dtype::BLOCK;

use super::{
    scheme::{Form, Layout},
    tensors::{Tensors, refused},
};
use crate::{StoredDType, blocks, convert::ConvertError, shards::TensorSpec};

/// Bits of a word that holds several integers.
const WORD_BITS: usize = 32;
/// Which of the 8 half bytes of a word of AWQ, the lowest first, each of 8 neighbours is.
const INTERLEAVED: [usize; 8] = [0, 4, 1, 5, 2, 6, 3, 7];

/// A matrix whose tensors were checked, but for its integers, which may be any.
#[derive(Debug)]
pub(super) struct Integers {
    /// What its tensors' names begin with.
    name: String,
    layout: Layout,
    bits: usize,
    has_zeros: bool,
    /// Values of a row that share a scale. Invariant: a multiple of a block, of which a row is whole ones.
    group: usize,
    outputs: usize,
    inputs: usize,
}

impl Integers {
    /// Refuses one with a tensor that is missing, does not fit the others, or says what blocks cannot.
    pub(super) fn open(name: &str, layout: Layout, forms: &[Form], tensors: Tensors<'_>) -> Result<Self, ConvertError> {
        let part = |at: usize| format!("{name}.{}", layout.parts()[at]);
        let (words, scales) = (tensors.get(&part(0))?, tensors.get(&part(1))?);
        tensors.expect(&part(0), Dtype::I32, None)?;
        let (outputs, inputs) = match (layout, &words.shape[..]) {
            (Layout::Gptq { .. }, &[rows, outputs]) => (outputs, rows.saturating_mul(WORD_BITS / forms[0].bits)),
            (Layout::Awq, &[inputs, columns]) => (columns.saturating_mul(INTERLEAVED.len()), inputs),
            (Layout::Gptq { .. } | Layout::Awq, found) => {
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
            has_zeros: form.has_zeros,
            group: form.group.unwrap_or(inputs).max(1),
            outputs,
            inputs,
        };
        let candidates = || forms.iter().map(of);
        let fits = |matrix: &Self| words.shape == matrix.words_shape();
        let chosen = candidates().find(|matrix| fits(matrix) && scales.shape == matrix.scales_shape());
        let matrix = chosen.or_else(|| candidates().find(fits)).unwrap_or_else(|| of(&forms[0]));
        if outputs == 0 || inputs == 0 || !inputs.is_multiple_of(matrix.group) || !inputs.is_multiple_of(BLOCK) {
            let expected = format!("rows of whole groups of {} values, and of whole blocks of {BLOCK}", matrix.group);
            return Err(refused(part(0), format!("{outputs} rows of {inputs} values"), expected));
        }
        tensors.expect(&part(0), Dtype::I32, Some(&matrix.words_shape()))?;
        matrix.scales(tensors)?;
        matrix.zeros(tensors)?;
        matrix.check_order(tensors)?;
        matrix.release(tensors);
        Ok(matrix)
    }

    /// The tensor that it becomes.
    pub(super) fn spec(&self) -> TensorSpec {
        // An integer less its zero has a bit more.
        let dtype = match (self.bits, self.has_zeros) {
            (4, false) => StoredDType::Q4_0,
            (4, true) => StoredDType::Q5_0,
            _ => StoredDType::Q8_0,
        };
        TensorSpec { name: format!("{}.weight", self.name), dtype, shape: vec![self.outputs, self.inputs] }
    }

    /// What a bias of it is called.
    pub(super) fn bias(&self) -> String {
        format!("{}.bias", self.name)
    }

    /// Writes its blocks, row by row.
    pub(super) fn write(&self, tensors: Tensors<'_>, out: &mut dyn Write) -> io::Result<()> {
        let scales = self.scales(tensors).map_err(io::Error::other)?;
        let zeros = self.zeros(tensors).map_err(io::Error::other)?;
        let stored = tensors.files.get(&self.part(0)).expect("it was opened");
        let words = tensors.files.bytes(stored).as_chunks().0;
        let dtype = self.spec().dtype;
        let mut row = vec![0; dtype.bytes(self.inputs)];
        for output in 0..self.outputs {
            for (at, block) in row.chunks_exact_mut(dtype.bytes(BLOCK)).enumerate() {
                let first = at * BLOCK;
                let group = self.place(output, first / self.group, self.inputs / self.group);
                let integers =
                    array::from_fn(|i| self.integer(words, output, first + i).wrapping_sub(zeros[group]) as i8);
                blocks::put(scales[group], integers, dtype, block);
            }
            out.write_all(&row)?;
        }
        self.release(tensors);
        Ok(())
    }

    /// Gives back the memory of what was read: of all matrices together it would be the model's.
    fn release(&self, tensors: Tensors<'_>) {
        let parts = self.layout.parts().iter().map(|part| format!("{}.{part}", self.name));
        parts.filter_map(|part| tensors.files.get(&part)).for_each(|stored| tensors.files.release(stored));
    }

    /// An integer as it is stored, not below 0.
    fn integer(&self, words: &[[u8; 4]], output: usize, input: usize) -> u8 {
        let in_word = self.in_word();
        let (word, at) = match self.layout {
            Layout::Awq => (input * self.outputs / in_word + output / in_word, INTERLEAVED[output % in_word]),
            _ => (self.place(output, input / in_word, self.inputs / in_word), input % in_word),
        };
        nth(words[word], at, self.bits)
    }

    /// Where what is at `along` of the `count` of a row lies.
    fn place(&self, output: usize, along: usize, count: usize) -> usize {
        if self.layout.is_turned() { along * self.outputs + output } else { output * count + along }
    }

    fn part(&self, at: usize) -> String {
        format!("{}.{}", self.name, self.layout.parts()[at])
    }

    /// Integers of a word.
    fn in_word(&self) -> usize {
        WORD_BITS / self.bits
    }

    fn words_shape(&self) -> [usize; 2] {
        if self.layout == Layout::Awq {
            return [self.inputs, self.outputs / self.in_word()];
        }
        self.turned([self.outputs, self.inputs / self.in_word()])
    }

    fn scales_shape(&self) -> [usize; 2] {
        self.turned([self.outputs, self.inputs / self.group])
    }

    fn turned(&self, [outputs, inputs]: [usize; 2]) -> [usize; 2] {
        if self.layout.is_turned() { [inputs, outputs] } else { [outputs, inputs] }
    }

    /// Its scales, each as it is stored. Refuses those that are no binary16.
    fn scales(&self, tensors: Tensors<'_>) -> Result<Vec<f16>, ConvertError> {
        let name = self.part(1);
        let exact = |value: f32| {
            let scale = f16::from_f32(value);
            let is_exact = scale.is_finite() && scale.to_f32() == value;
            let expected = || "scales that binary16 has exactly".to_owned();
            if is_exact { Ok(scale) } else { Err(refused(name.clone(), format!("{value:e}"), expected())) }
        };
        tensors.scales(&name, self.scales_shape())?.into_iter().map(exact).collect()
    }

    /// For each scale the integer that stands for 0. Refuses others than the middle one where integers are symmetric.
    fn zeros(&self, tensors: Tensors<'_>) -> Result<Vec<u8>, ConvertError> {
        let part = self.part(if self.layout.is_turned() { 2 } else { 4 });
        if self.has_zeros {
            return self.own_zeros(part, tensors);
        }
        self.check_symmetric(part, tensors)?;
        Ok(vec![self.middle(); self.outputs * (self.inputs / self.group)])
    }

    fn check_symmetric(&self, part: String, tensors: Tensors<'_>) -> Result<(), ConvertError> {
        if !self.layout.is_turned() {
            return match tensors.files.get(&part) {
                Some(_) => Err(refused(part, "zeros".to_owned(), "none: integers are symmetric".to_owned())),
                None => Ok(()),
            };
        }
        let shape = [self.inputs / self.group, self.outputs.div_ceil(self.in_word())];
        let words = tensors.expect(&part, Dtype::I32, Some(&shape))?.as_chunks().0;
        let zero = u32::from(self.middle() - self.one_less());
        let expected = (0..self.in_word()).fold(0, |word, at| word | zero << (at * self.bits));
        match words.iter().map(|&word| u32::from_le_bytes(word)).find(|&word| word != expected) {
            Some(found) => {
                let expected = format!("{expected:#010x} all through: zeros of symmetric integers");
                Err(refused(part, format!("{found:#010x}"), expected))
            }
            None => Ok(()),
        }
    }

    /// In the order of scales. All layouts pack them along outputs; compressed-tensors also has them as bytes.
    fn own_zeros(&self, part: String, tensors: Tensors<'_>) -> Result<Vec<u8>, ConvertError> {
        let (in_word, groups) = (self.in_word(), self.inputs / self.group);
        if tensors.get(&part)?.dtype == Dtype::I8 && !self.layout.is_turned() {
            let zeros = tensors.expect(&part, Dtype::I8, Some(&[self.outputs, groups]))?;
            return match zeros.iter().map(|&zero| zero as i8).find(|zero| !(-8..8).contains(zero)) {
                Some(found) => Err(refused(part, found.to_string(), "zeros from -8 to 7".to_owned())),
                None => Ok(zeros.iter().map(|&zero| zero.wrapping_add(self.middle())).collect()),
            };
        }
        let row = self.outputs.div_ceil(in_word);
        let words = tensors.expect(&part, Dtype::I32, Some(&self.turned([row, groups])))?.as_chunks().0;
        let zero = |index: usize| {
            let (output, group, word) = if self.layout.is_turned() {
                let (output, group) = (index % self.outputs, index / self.outputs);
                (output, group, group * row + output / in_word)
            } else {
                let (output, group) = (index / groups, index % groups);
                (output, group, output / in_word * groups + group)
            };
            let at = output % in_word;
            let at = if self.layout == Layout::Awq { INTERLEAVED[at] } else { at };
            match nth(words[word], at, self.bits) + self.one_less() {
                16 => {
                    let expected = "at most 14: some software takes 15 for 16, and some for 0".to_owned();
                    Err(refused(part.clone(), format!("15 for output {output}, group {group}"), expected))
                }
                zero => Ok(zero),
            }
        };
        (0..self.outputs * groups).map(zero).collect()
    }

    /// What stands for 0 in symmetric integers.
    fn middle(&self) -> u8 {
        1 << (self.bits - 1)
    }

    /// By how much zeros are stored less than they are.
    fn one_less(&self) -> u8 {
        u8::from(matches!(self.layout, Layout::Gptq { is_v2: false, .. }))
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

/// One of the integers of a word, the first lowest.
fn nth(word: [u8; 4], at: usize, bits: usize) -> u8 {
    (u32::from_le_bytes(word) >> (at * bits) & ((1 << bits) - 1)) as u8
}
