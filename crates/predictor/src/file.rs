//! A predictor on disk: safetensors whose metadata say for which model it is, what net it holds and what
//! was measured. Everything is checked at opening, so that the nets can index without asking.

use std::{
    collections::{BTreeMap, HashMap},
    fs::{self, File},
    io::Write,
    path::{Path, PathBuf},
};

use half::f16;
use safetensors::{Dtype, SafeTensors, tensor::TensorView};
use serde::{Deserialize, Serialize};
use sida_kernels::matmul::MatrixRef;
use sida_model::{
    Stack, StoredDType, bounded_file,
    manifest::{parse_hex, sha256},
    mistaken_file,
};
use sida_routing::{Digest, LayerId};

use crate::{MadeFor, PredictorError, PredictorShape, calibration::Calibration};

/// A larger file is refused. A net for 32,128 tokens and 256 experts in 12 layers has 50 MB.
const FILE_BYTES_MAX: u64 = 1 << 30;
/// The layout that this code writes and reads.
const FORMAT: &str = "sida-predictor-1";
/// The metadata of the calibrations of alphas, which were the first, and of chances.
const ALPHAS: &str = "calibration";
const CHANCES: &str = "chances";
/// A net of more heads of attention, or of wider ones, is refused.
const HEADS_MAX: usize = 64;
const HEAD_WIDTH_MAX: usize = 256;
/// Experts per token and layer, at most.
pub const TOP_K_MAX: usize = 16;

/// Which net a file holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Net {
    /// The most frequent experts of each token id.
    Table,
    /// SiDA's LSTM with sparsemax attention.
    Lstm,
    /// A transformer for the encoder, and the LSTM for the decoder.
    Transformer,
}

impl Net {
    /// Its name in files, flags and metrics.
    pub fn name(self) -> &'static str {
        match self {
            Self::Table => "table",
            Self::Lstm => "lstm",
            Self::Transformer => "transformer",
        }
    }

    /// The net of a name.
    pub fn from_name(name: &str) -> Option<Self> {
        [Self::Table, Self::Lstm, Self::Transformer].into_iter().find(|net| net.name() == name)
    }
}

/// How often a predictor was right on held-out text, in one MoE layer.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct HitRate {
    /// Which layer.
    pub layer: LayerId,
    /// Tokens measured.
    pub tokens: u64,
    /// Share of tokens whose expert was predicted first.
    pub top1: f64,
    /// Share of tokens whose expert was among the first three.
    pub top3: f64,
    /// By how much the chances of experts were too high or too low, beside the router's choices: 0.01 where one of a hundred
    /// choices was foretold too many or too few. Of chances that were calibrated with other texts. None where it was not
    /// measured.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub chance_error: Option<f64>,
}

/// What a file says of itself.
#[derive(Clone, Debug, PartialEq)]
pub struct Metadata {
    /// The net its tensors are of.
    pub net: Net,
    /// The model it was trained on.
    pub model: Digest,
    /// Experts per token and layer of its tables.
    pub top_k: usize,
    /// One entry per MoE layer.
    pub hit_rates: Vec<HitRate>,
    /// The router's probability by the net's, one entry per MoE layer.
    pub alphas: Vec<Calibration>,
    /// How often the router chooses an expert by the net's probability of it, one entry per MoE layer.
    pub chances: Vec<Calibration>,
}

/// A predictor file in memory, its metadata checked against the model's shape.
pub struct PredictorFile {
    /// Where it came from, for errors.
    path: PathBuf,
    /// What it says of itself.
    pub metadata: Metadata,
    /// The model's shape.
    pub shape: PredictorShape,
    /// SHA-256 of the whole file.
    pub digest: Digest,
    tensors: HashMap<String, Stored>,
}

struct Stored {
    dtype: Dtype,
    shape: Vec<usize>,
    bytes: Vec<u8>,
}

/// A weight matrix of a net, widened to float32.
pub(crate) struct Matrix {
    values: Vec<f32>,
    pub(crate) rows: usize,
    pub(crate) cols: usize,
}

impl Matrix {
    /// Row by row.
    pub(crate) fn values(&self) -> &[f32] {
        &self.values
    }

    pub(crate) fn by_ref(&self) -> MatrixRef<'_> {
        matrix(&self.values, self.rows, self.cols)
    }
}

/// Values in memory as a matrix for [`matmul`](sida_kernels::matmul::matmul).
pub(crate) fn matrix(values: &[f32], rows: usize, cols: usize) -> MatrixRef<'_> {
    assert_eq!(values.len(), rows * cols);
    // SAFETY: any float is four valid bytes, and they live as long as `values`. `matmul` reads a float32 matrix
    // as floats of this machine.
    let bytes = unsafe { std::slice::from_raw_parts(values.as_ptr().cast::<u8>(), std::mem::size_of_val(values)) };
    MatrixRef { bytes, dtype: StoredDType::F32, rows, cols }
}

impl PredictorFile {
    /// Reads a file and checks its header and metadata. Refuses one of another model, before it looks for what does not fit
    /// this one.
    pub fn read(path: &Path, shape: PredictorShape, model: Digest) -> Result<Self, PredictorError> {
        let bytes = bounded_file::read(path, FILE_BYTES_MAX)?;
        let refuse = |reason: String| PredictorError::File { path: path.to_owned(), reason };
        let header = |error| match mistaken_file::recognise(&bytes) {
            Some(found) => refuse(format!("is {found}, expected a predictor's safetensors")),
            None => refuse(format!("not a safetensors file: {error}")),
        };
        let (_, header_metadata) = SafeTensors::read_metadata(&bytes).map_err(header)?;
        let metadata = Metadata::parse(header_metadata.metadata().as_ref()).map_err(refuse)?;
        if metadata.model != model {
            let shapes = Box::new([MadeFor::of_file(&header_metadata, metadata.hit_rates.len()), (&shape).into()]);
            return Err(PredictorError::Model {
                path: path.to_owned(),
                expected: model,
                found: metadata.model,
                shapes,
            });
        }
        metadata.fits(&shape).map_err(refuse)?;
        let tensors = (SafeTensors::deserialize(&bytes).map_err(header)?.tensors().into_iter())
            .map(|(name, view)| {
                let (dtype, shape) = (view.dtype(), view.shape().to_vec());
                (name, Stored { dtype, shape, bytes: view.data().to_vec() })
            })
            .collect();
        Ok(Self { path: path.to_owned(), metadata, shape, digest: sha256(&bytes), tensors })
    }

    /// The dimensions of a tensor; an error if it is missing.
    pub(crate) fn dimensions(&self, tensor: &str) -> Result<&[usize], PredictorError> {
        Ok(&self.stored(tensor)?.shape)
    }

    /// Whether it has a tensor of this name that nobody took.
    pub(crate) fn has(&self, tensor: &str) -> bool {
        self.tensors.contains_key(tensor)
    }

    /// How many heads of attention a tensor (heads, head width, `inputs`) has, and how wide they are.
    pub(crate) fn head_extent(&self, tensor: &str, inputs: usize) -> Result<(usize, usize), PredictorError> {
        match *self.dimensions(tensor)? {
            [heads, width, found]
                if (1..=HEADS_MAX).contains(&heads) && (1..=HEAD_WIDTH_MAX).contains(&width) && found == inputs =>
            {
                Ok((heads, width))
            }
            ref found => {
                let most = format!("at most {HEADS_MAX} heads of at most {HEAD_WIDTH_MAX}");
                Err(self.refuse(tensor, format!("is {found:?}, expected (heads, head width, {inputs}), {most}")))
            }
        }
    }

    /// Takes several matrices of float16 that lie one after another in one tensor, every value finite.
    pub(crate) fn take_matrices(
        &mut self,
        tensor: &str,
        count: usize,
        rows: usize,
        cols: usize,
    ) -> Result<Vec<Matrix>, PredictorError> {
        let values = self.floats(tensor, &[count, rows, cols])?;
        Ok(values.chunks_exact(rows * cols).map(|values| Matrix { values: values.to_vec(), rows, cols }).collect())
    }

    /// Takes a matrix of float16, every value finite.
    pub(crate) fn take_matrix(&mut self, tensor: &str, rows: usize, cols: usize) -> Result<Matrix, PredictorError> {
        Ok(Matrix { values: self.floats(tensor, &[rows, cols])?, rows, cols })
    }

    /// Takes float16 values of a shape, every one finite, widened.
    pub(crate) fn floats(&mut self, tensor: &str, shape: &[usize]) -> Result<Vec<f32>, PredictorError> {
        Ok(self.halves(tensor, shape)?.into_iter().map(f16::to_f32).collect())
    }

    /// Takes float16 values of a shape, every one finite.
    pub(crate) fn halves(&mut self, tensor: &str, shape: &[usize]) -> Result<Vec<f16>, PredictorError> {
        let bytes = self.take(tensor, Dtype::F16, shape)?;
        let values: Vec<f16> = bytes.as_chunks().0.iter().map(|&value| f16::from_le_bytes(value)).collect();
        match values.iter().all(|value| value.is_finite()) {
            true => Ok(values),
            false => Err(self.refuse(tensor, "holds a value that is not finite".to_owned())),
        }
    }

    /// Takes unsigned 16-bit values of a shape.
    pub(crate) fn integers(&mut self, tensor: &str, shape: &[usize]) -> Result<Vec<u16>, PredictorError> {
        let bytes = self.take(tensor, Dtype::U16, shape)?;
        Ok(bytes.as_chunks().0.iter().map(|&value| u16::from_le_bytes(value)).collect())
    }

    /// The tensors, to be written again.
    pub(crate) fn into_tensors(self) -> Tensors {
        let tensors = self.tensors.into_iter();
        Tensors(tensors.map(|(name, stored)| (name, (stored.dtype, stored.shape, stored.bytes))).collect())
    }

    /// Refuses tensors that nobody took: they belong to another net.
    pub(crate) fn finish(&self) -> Result<(), PredictorError> {
        match self.tensors.keys().min() {
            Some(tensor) => Err(self.refuse(tensor, "is not part of this net".to_owned())),
            None => Ok(()),
        }
    }

    /// An error about one tensor.
    pub(crate) fn refuse(&self, tensor: &str, reason: String) -> PredictorError {
        PredictorError::Tensor { path: self.path.clone(), tensor: tensor.to_owned(), reason }
    }

    fn stored(&self, tensor: &str) -> Result<&Stored, PredictorError> {
        self.tensors.get(tensor).ok_or_else(|| self.refuse(tensor, "is missing".to_owned()))
    }

    fn take(&mut self, tensor: &str, dtype: Dtype, shape: &[usize]) -> Result<Vec<u8>, PredictorError> {
        let found = self.stored(tensor)?;
        if found.dtype != dtype || found.shape != shape {
            let reason = format!("is {:?} {:?}, expected {dtype:?} {shape:?}", found.dtype, found.shape);
            return Err(self.refuse(tensor, reason));
        }
        Ok(self.tensors.remove(tensor).map(|stored| stored.bytes).unwrap_or_default())
    }
}

impl Metadata {
    /// What the net's confidence is worth in each MoE layer of a stack: [`Metadata::alphas`], and [`Metadata::chances`].
    pub(crate) fn calibrations_of(&self, shape: &PredictorShape, stack: Stack) -> [&[Calibration]; 2] {
        let encoder = shape.encoder_layers.len();
        [&self.alphas, &self.chances].map(|all| match stack {
            Stack::Encoder => &all[..encoder],
            Stack::Decoder => &all[encoder..],
        })
    }

    fn parse(stored: Option<&HashMap<String, String>>) -> Result<Self, String> {
        let empty = HashMap::new();
        let stored = stored.unwrap_or(&empty);
        let field = |name: &str| stored.get(name).map(String::as_str).ok_or_else(|| format!("metadata lack {name:?}"));
        let format = field("format")?;
        if format != FORMAT {
            return Err(format!("format is {format:?}, expected {FORMAT:?}"));
        }
        let net = field("net")?;
        let net = Net::from_name(net)
            .ok_or_else(|| format!("net is {net:?}, expected \"table\", \"lstm\" or \"transformer\""))?;
        let model = parse_hex(field("model")?).ok_or("model is not 64 hex digits")?;
        let top_k = field("top_k")?.parse().ok().filter(|top_k| (1..=TOP_K_MAX).contains(top_k));
        let top_k = top_k.ok_or_else(|| format!("top_k is not 1 to {TOP_K_MAX}"))?;
        let hit_rates: Vec<HitRate> =
            serde_json::from_str(field("hit_rates")?).map_err(|error| format!("hit_rates: {error}"))?;
        let layers: Vec<u16> = hit_rates.iter().map(|rate| rate.layer.0).collect();
        let calibration = |name: &str| {
            let calibration: Vec<Calibration> = match stored.get(name) {
                Some(calibration) => serde_json::from_str(calibration).map_err(|error| format!("{name}: {error}"))?,
                // Files that were written before there was any.
                None => layers.iter().map(|&layer| Calibration::none(LayerId(layer))).collect(),
            };
            if !calibration.iter().map(|calibration| calibration.layer.0).eq(layers.iter().copied()) {
                return Err(format!("{name} speaks of other layers than hit_rates"));
            }
            match calibration.iter().find_map(Calibration::fault) {
                Some(fault) => Err(format!("{name}: {fault}")),
                None => Ok(calibration),
            }
        };
        let (alphas, chances) = (calibration(ALPHAS)?, calibration(CHANCES)?);
        Ok(Self { net, model, top_k, hit_rates, alphas, chances })
    }

    /// Why it cannot be of a model of this shape, if so.
    fn fits(&self, shape: &PredictorShape) -> Result<(), String> {
        let (top_k, num_experts) = (self.top_k, shape.num_experts);
        if top_k > num_experts {
            return Err(format!("top_k is {top_k}, expected 1 to {num_experts}"));
        }
        let layers: Vec<u16> = self.hit_rates.iter().map(|rate| rate.layer.0).collect();
        let expected: Vec<u16> = shape.encoder_layers.clone().chain(shape.decoder_layers.clone()).collect();
        if layers != expected {
            return Err(format!("hit_rates speak of layers {layers:?}, the model has {expected:?}"));
        }
        Ok(())
    }

    fn to_map(&self) -> HashMap<String, String> {
        let hit_rates = serde_json::to_string(&self.hit_rates).expect("numbers are valid JSON");
        let calibrations = [&self.alphas, &self.chances];
        let [alphas, chances] = calibrations.map(|all| serde_json::to_string(all).expect("numbers are valid JSON"));
        HashMap::from([
            ("format".to_owned(), FORMAT.to_owned()),
            ("net".to_owned(), self.net.name().to_owned()),
            ("model".to_owned(), self.model.to_string()),
            ("top_k".to_owned(), self.top_k.to_string()),
            ("hit_rates".to_owned(), hit_rates),
            (ALPHAS.to_owned(), alphas),
            (CHANCES.to_owned(), chances),
        ])
    }
}

/// The tensors of a predictor that is about to be written.
#[derive(Default, PartialEq)]
pub struct Tensors(BTreeMap<String, (Dtype, Vec<usize>, Vec<u8>)>);

impl Tensors {
    /// Adds values as float16, the nearest.
    pub(crate) fn floats(&mut self, name: &str, shape: &[usize], values: &[f32]) {
        let bytes = values.iter().flat_map(|&value| f16::from_f32(value).to_le_bytes()).collect();
        self.0.insert(name.to_owned(), (Dtype::F16, shape.to_vec(), bytes));
    }

    /// Adds integers.
    pub(crate) fn integers(&mut self, name: &str, shape: &[usize], values: &[u16]) {
        let bytes = values.iter().flat_map(|value| value.to_le_bytes()).collect();
        self.0.insert(name.to_owned(), (Dtype::U16, shape.to_vec(), bytes));
    }

    /// Writes them as a predictor file, whole or not at all.
    pub fn write(&self, metadata: &Metadata, path: &Path) -> Result<(), PredictorError> {
        let refuse = |error| PredictorError::File { path: path.to_owned(), reason: format!("{error}") };
        let views = (self.0.iter())
            .map(|(name, (dtype, shape, bytes))| Ok((name, TensorView::new(*dtype, shape.clone(), bytes)?)))
            .collect::<Result<Vec<_>, safetensors::SafeTensorError>>()
            .map_err(refuse)?;
        let bytes = safetensors::serialize(views, Some(metadata.to_map())).map_err(refuse)?;
        let name = path.file_name().unwrap_or_default().to_string_lossy();
        let partial = path.with_file_name(format!(".{name}.{}.partial", std::process::id()));
        let written = File::create(&partial).and_then(|mut file| {
            file.write_all(&bytes)?;
            // Before it takes the place of another: a machine that fails then would leave neither.
            file.sync_all()?;
            fs::rename(&partial, path)
        });
        written.map_err(|source| {
            // Why it could not be written says more than why what there is of it cannot be removed.
            let _ = fs::remove_file(&partial);
            PredictorError::Write { path: path.to_owned(), source }
        })
    }
}
