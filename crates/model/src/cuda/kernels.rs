//! The kernels, for a model on a device: what there is, and how much of the device each takes. Compiled when a model is opened, see
//! [`super::modules`].

use std::sync::Arc;

use cudarc::driver::{CudaFunction, CudaModule, sys::CUfunction_attribute};

use super::{
    device::Gpu,
    error::{CudaError, failed},
    modules::{self, Modules},
    ways::{FEW_TILE, MANY_TILE, WIDE_TILE, Way},
};
use crate::{Precision, StoredDType, expert_slot::Layout};

/// A kernel that is loaded.
#[derive(Debug)]
pub(super) struct Kernel {
    pub(super) function: CudaFunction,
    /// Bytes of shared memory a block is given, beside those that the kernel declares.
    pub(super) shared_bytes: u32,
}

/// One way to multiply, with weights that lie in any way.
#[derive(Debug)]
pub(super) struct ProductKernels {
    plain: KindKernels,
    /// For bf16 only, of few and of many rows.
    packed_experts: Option<ExpertKernels>,
    /// For the formats that they were compiled for.
    formats: Vec<(StoredDType, KindKernels)>,
    pub(super) blocks: Blocks,
}

/// What a way's blocks are.
#[derive(Clone, Copy, Debug)]
pub(super) struct Blocks {
    pub(super) threads: u32,
    /// Outputs and rows that one makes at a time.
    pub(super) tile: (usize, usize),
    shared_bytes: u32,
    /// So many are started, if there are more tiles: one makes several.
    most: Option<usize>,
    /// Whether there are any for packed experts.
    packs: bool,
}

const FEW_F32: Blocks = Blocks { threads: 128, tile: (16, 8), shared_bytes: 0, most: None, packs: false };
const FEW: Blocks = Blocks { tile: FEW_TILE, packs: true, ..FEW_F32 };
const MANY: Blocks =
    Blocks { threads: 256, tile: MANY_TILE, shared_bytes: modules::MANY_SHARED_BYTES, most: None, packs: true };
const WIDE: Blocks =
    Blocks { threads: 384, tile: WIDE_TILE, shared_bytes: modules::WIDE_SHARED_BYTES, most: None, packs: false };

/// A kernel for each thing that can become of a result (see `Kind` of product.cu).
#[derive(Debug)]
pub(super) struct KindKernels {
    pub(super) store: Kernel,
    pub(super) relu: Kernel,
    pub(super) gate: Kernel,
    pub(super) add: Kernel,
    pub(super) logits: Kernel,
    experts: ExpertKernels,
}

/// Both products of experts, and the two ways back.
#[derive(Debug)]
pub(super) struct ExpertKernels {
    pub(super) gather: Kernel,
    /// In place of it where experts are gated: none of those is packed.
    pub(super) gather_gate: Option<Kernel>,
    pub(super) scatter: Kernel,
    pub(super) each: Kernel,
}

/// Attention to caches of more than one run of keys.
#[derive(Debug)]
pub(super) struct LongCacheKernels {
    pub(super) attend: Kernel,
    /// Of steps: what runs make, by themselves or together.
    pub(super) step: Kernel,
    /// What they have made by themselves, together.
    pub(super) join: Kernel,
}

/// Everything that runs on the device.
#[derive(Debug)]
pub(super) struct Kernels {
    embed: Kernel,
    /// For tables in blocks, of the formats that they were compiled for.
    embed_blocks: Vec<(StoredDType, Kernel)>,
    pub(super) norm: Kernel,
    pub(super) add_rows: Kernel,
    pub(super) fetch_rows: Kernel,
    pub(super) take_rows: Kernel,
    pub(super) combine_few_rows: Kernel,
    pub(super) combine_rows: Kernel,
    pub(super) add_share: Kernel,
    pub(super) best: Kernel,
    pub(super) mean: Kernel,
    pub(super) router_logits: Kernel,
    pub(super) router_logits_many: Kernel,
    pub(super) choose_experts: Kernel,
    pub(super) group_rows: Kernel,
    pub(super) choose_and_group: Kernel,
    pub(super) choose_and_group_few: Kernel,
    pub(super) attend_own_rows: Kernel,
    pub(super) attend_cache: Kernel,
    pub(super) attend_input: Kernel,
    /// Queries of a block of the three above.
    pub(super) queries: usize,
    /// For bf16 only.
    pub(super) long: Option<LongCacheKernels>,
    pub(super) place_heads: Kernel,
    pub(super) few: ProductKernels,
    /// For bf16 only: with float32 `few` multiplies any number of rows.
    pub(super) many: Option<ProductKernels>,
    /// For bf16 only, on devices that can.
    pub(super) wide: Option<ProductKernels>,
}

impl Kernels {
    /// Compiles them, for weights in blocks of these formats and for others; takes some seconds, but for what was compiled in this
    /// process before.
    pub(super) fn compile(
        gpu: &Gpu,
        precision: Precision,
        formats: &[StoredDType],
        d_kv: usize,
    ) -> Result<Self, CudaError> {
        let modules = Modules::compile(gpu, precision, formats, d_kv)?;
        let is_bf16 = precision == Precision::Bf16;
        let attention_bytes = modules.attention_shared_bytes;
        let function = |name: &str| load(&modules.rows, name, 0);
        let few = if is_bf16 { FEW } else { FEW_F32 };
        let wide = Blocks { most: Some(gpu.description().multiprocessors), ..WIDE };
        let attend = |name: &str| load(&modules.rows, name, if is_bf16 { attention_bytes } else { 0 });
        Ok(Self {
            embed: function("embed_rows")?,
            embed_blocks: of_each(&modules.formats, |module| load(module, "embed_rows", 0))?,
            norm: function("rms_norm")?,
            add_rows: function("add_rows")?,
            fetch_rows: function("fetch_rows")?,
            take_rows: function("take_rows")?,
            combine_few_rows: function("combine_few_rows")?,
            combine_rows: function("combine_rows")?,
            add_share: function("add_share")?,
            best: function("best_tokens")?,
            mean: function("mean_rows")?,
            router_logits: function("router_logits")?,
            router_logits_many: function("router_logits_many")?,
            choose_experts: function("choose_experts")?,
            group_rows: function("group_rows")?,
            choose_and_group: function("choose_and_group")?,
            choose_and_group_few: function("choose_and_group_few")?,
            attend_own_rows: attend("attend_own_rows")?,
            attend_cache: attend("attend_cache")?,
            attend_input: attend("attend_input")?,
            queries: if is_bf16 { 64 } else { 8 },
            long: is_bf16
                .then(|| {
                    let (attend, step) = (attend("attend_long_cache")?, attend("attend_step")?);
                    Ok::<_, CudaError>(LongCacheKernels { attend, step, join: function("join_runs")? })
                })
                .transpose()?,
            place_heads: function("place_heads")?,
            few: ProductKernels::load(&modules, "few", few)?,
            many: is_bf16.then(|| ProductKernels::load(&modules, "many", MANY)).transpose()?,
            wide: modules.is_wide.then(|| ProductKernels::load(&modules, "wide", wide)).transpose()?,
        })
    }
}

impl Kernels {
    /// Those of a way; of one that there is not, the next smaller.
    pub(super) fn of(&self, way: Way) -> &ProductKernels {
        let many = self.many.as_ref().unwrap_or(&self.few);
        match way {
            Way::Few => &self.few,
            Way::Many => many,
            Way::Wide => self.wide.as_ref().unwrap_or(many),
        }
    }

    /// The one for a table that lies so.
    pub(super) fn embed_in(&self, layout: Layout) -> Result<&Kernel, CudaError> {
        in_layout(&self.embed, &self.embed_blocks, layout)
    }
}

impl ProductKernels {
    /// Those for experts that lie so.
    pub(super) fn experts_in(&self, layout: Layout) -> Result<&ExpertKernels, CudaError> {
        match (layout, &self.packed_experts) {
            (Layout::Packed, Some(packed)) => Ok(packed),
            _ => Ok(&self.kinds_in(layout)?.experts),
        }
    }

    /// Those for a matrix that lies so.
    pub(super) fn kinds_in(&self, layout: Layout) -> Result<&KindKernels, CudaError> {
        in_layout(&self.plain, &self.formats, layout)
    }

    /// The blocks of a product: W has so many rows, and of x there are so many tiles.
    pub(super) fn grid(&self, w_rows: usize, tiles: usize) -> (usize, usize, usize) {
        let across = w_rows / self.blocks.tile.0;
        match self.blocks.most {
            Some(most) => (most.min(across * tiles), 1, 1),
            None => (across, tiles, 1),
        }
    }

    fn load(modules: &Modules, way: &str, blocks: Blocks) -> Result<Self, CudaError> {
        let of = |module: &Arc<CudaModule>, name: &str, kind: &str| {
            // Kernels of `wide` are of every kind, and told it.
            let name = match (way, kind) {
                ("wide", "gate" | "gather_gate") => format!("{name}_gated"),
                ("wide", _) => name.to_owned(),
                _ => format!("{name}_{kind}"),
            };
            load(module, &name, blocks.shared_bytes)
        };
        let experts = |module: &Arc<CudaModule>, name: &str, are_gated: bool| {
            let of = |kind: &str| of(module, name, kind);
            let gather_gate = are_gated.then(|| of("gather_gate")).transpose()?;
            let (gather, scatter, each) = (of("gather")?, of("scatter")?, of("each")?);
            Ok::<_, CudaError>(ExpertKernels { gather, gather_gate, scatter, each })
        };
        let kinds = |module: &Arc<CudaModule>| {
            let of = |kind: &str| of(module, way, kind);
            let (store, relu, gate) = (of("store")?, of("relu")?, of("gate")?);
            let (add, logits) = (of("add")?, of("logits")?);
            Ok::<_, CudaError>(KindKernels { store, relu, gate, add, logits, experts: experts(module, way, true)? })
        };
        let packed = || experts(&modules.plain, &format!("{way}_packed"), false);
        Ok(Self {
            plain: kinds(&modules.plain)?,
            packed_experts: blocks.packs.then(packed).transpose()?,
            formats: of_each(&modules.formats, kinds)?,
            blocks,
        })
    }
}

/// What there is for a layout, of what there is for plain weights and for each format.
fn in_layout<'k, K>(plain: &'k K, blocks: &'k [(StoredDType, K)], layout: Layout) -> Result<&'k K, CudaError> {
    let found = match layout {
        Layout::Plain => Some(plain),
        Layout::Packed => None,
        Layout::Blocks(dtype) => blocks.iter().find(|(of, _)| *of == dtype).map(|(_, own)| own),
    };
    found.ok_or_else(|| CudaError::Unsupported {
        what: "weights in memory",
        found: format!("{layout:?}"),
        expected: "what the kernels of this model were compiled for",
    })
}

/// What `load` gives for the module of each format.
fn of_each<K>(
    formats: &[(StoredDType, Arc<CudaModule>)],
    load: impl Fn(&Arc<CudaModule>) -> Result<K, CudaError>,
) -> Result<Vec<(StoredDType, K)>, CudaError> {
    formats.iter().map(|(dtype, module)| Ok((*dtype, load(module)?))).collect()
}

fn load(module: &Arc<CudaModule>, name: &str, shared_bytes: u32) -> Result<Kernel, CudaError> {
    let function = module.load_function(name).map_err(failed("cuModuleGetFunction"))?;
    if shared_bytes > 0 {
        let most = CUfunction_attribute::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES;
        function.set_attribute(most, shared_bytes as i32).map_err(failed("cuFuncSetAttribute"))?;
    }
    Ok(Kernel { function, shared_bytes })
}
