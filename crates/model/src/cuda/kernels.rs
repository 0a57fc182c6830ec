//! The kernels, compiled for the device that was found when a model is opened on it: by NVRTC, from the sources under
//! `kernels/`, for one dtype and one width of heads.

use std::{ffi::CString, sync::Arc};

use cudarc::{
    driver::{CudaFunction, CudaModule, sys::CUfunction_attribute},
    nvrtc::{Ptx, result as nvrtc, sys},
};

use super::{
    device::Gpu,
    error::{CudaError, failed},
    ways::{FEW_TILE, MANY_TILE, RUN, WIDE_TILE, Way},
};
use crate::{Precision, StoredDType, expert_slot::Layout};

/// In the order in which they build on each other.
const SOURCES: [(&str, &str); 15] = [
    ("numbers.cu", include_str!("kernels/numbers.cu")),
    ("rows.cu", include_str!("kernels/rows.cu")),
    ("product.cu", include_str!("kernels/product.cu")),
    ("product_scalar.cu", include_str!("kernels/product_scalar.cu")),
    ("product_tensor.cu", include_str!("kernels/product_tensor.cu")),
    ("product_packed.cu", include_str!("kernels/product_packed.cu")),
    ("product_blocks.cu", include_str!("kernels/product_blocks.cu")),
    ("product_wide.cu", include_str!("kernels/product_wide.cu")),
    ("routing.cu", include_str!("kernels/routing.cu")),
    ("attention.cu", include_str!("kernels/attention.cu")),
    ("heads.cu", include_str!("kernels/heads.cu")),
    ("attention_scalar.cu", include_str!("kernels/attention_scalar.cu")),
    ("attention_tensor.cu", include_str!("kernels/attention_tensor.cu")),
    ("attention_steps.cu", include_str!("kernels/attention_steps.cu")),
    ("mean.cu", include_str!("kernels/mean.cu")),
];

/// What a block of `many` is given: what product_tensor.cu cuts into stages.
const MANY_SHARED_BYTES: u32 = 96 << 10;

/// And a block of `wide`, which a multiprocessor has one of.
const WIDE_SHARED_BYTES: u32 = 222 << 10;

/// The devices with the instructions of `wide`: those of one generation only.
const WIDE_CAPABILITY: (i32, i32) = (9, 0);

/// `KEY_STAGES` of attention_tensor.cu.
const KEY_STAGES: usize = 4;

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
const MANY: Blocks = Blocks { threads: 256, tile: MANY_TILE, shared_bytes: MANY_SHARED_BYTES, most: None, packs: true };
const WIDE: Blocks =
    Blocks { threads: 384, tile: WIDE_TILE, shared_bytes: WIDE_SHARED_BYTES, most: None, packs: false };

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
    /// Compiles them, for weights in blocks of these formats and for others; takes a few seconds.
    pub(super) fn compile(
        gpu: &Gpu,
        precision: Precision,
        formats: &[StoredDType],
        d_kv: usize,
    ) -> Result<Self, CudaError> {
        let (major, minor) = gpu.description().capability;
        let formats: Vec<StoredDType> =
            StoredDType::BLOCKS.into_iter().filter(|dtype| formats.contains(dtype)).collect();
        let attention_bytes = (KEY_STAGES * 2 * 32 * (d_kv + 8) * precision.size()) as u32;
        let is_bf16 = precision == Precision::Bf16;
        let is_wide = is_bf16 && (major, minor) == WIDE_CAPABILITY;
        let target = format!("sm_{major}{minor}{}", if is_wide { "a" } else { "" });
        let options = [
            format!("--gpu-architecture={target}"),
            "--std=c++17".to_owned(),
            format!("-DBF16={}", u8::from(is_bf16)),
            format!("-DWIDE={}", u8::from(is_wide)),
            format!("-DD_KV={d_kv}"),
            format!("-DMULTIPROCESSORS={}", gpu.description().multiprocessors),
            format!("-DRUN={RUN}"),
            format!("-DMANY_SHARED_BYTES={MANY_SHARED_BYTES}"),
            format!("-DWIDE_SHARED_BYTES={WIDE_SHARED_BYTES}"),
            format!("-DATTENTION_SHARED_BYTES={attention_bytes}"),
            "-DINFINITY=__int_as_float(0x7f800000)".to_owned(),
        ];
        // What is done for each format, given its kernels' name and its structure of product_blocks.cu.
        let of_each_format: Vec<String> =
            formats.iter().map(|dtype| format!("OF({}, {dtype}) ", name_of(*dtype))).collect();
        let formats_macro = format!("#define FORMATS(OF) {}\n", of_each_format.concat());
        let sources = SOURCES.iter().map(|(name, text)| format!("#line 1 \"{name}\"\n{text}"));
        let source: String = std::iter::once(formats_macro).chain(sources).collect();
        let cubin = compile(&source, &options, &target)?;
        let module = gpu.context().load_module(Ptx::from_binary(cubin)).map_err(failed("cuModuleLoadData"))?;
        let function = |name: &str| load(&module, name, 0);
        let few = if is_bf16 { FEW } else { FEW_F32 };
        let wide = Blocks { most: Some(gpu.description().multiprocessors), ..WIDE };
        let attend = |name: &str| load(&module, name, if is_bf16 { attention_bytes } else { 0 });
        Ok(Self {
            embed: function("embed_rows")?,
            embed_blocks: of_each(&formats, |format| function(&format!("embed_{format}")))?,
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
            few: ProductKernels::load(&module, "few", few, &formats)?,
            many: is_bf16.then(|| ProductKernels::load(&module, "many", MANY, &formats)).transpose()?,
            wide: is_wide.then(|| ProductKernels::load(&module, "wide", wide, &formats)).transpose()?,
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

    fn load(module: &Arc<CudaModule>, way: &str, blocks: Blocks, formats: &[StoredDType]) -> Result<Self, CudaError> {
        let of = |name: &str, kind: &str| {
            // Kernels of `wide` are of every kind, and told it.
            let name = match (way, kind) {
                ("wide", "gate" | "gather_gate") => format!("{name}_gated"),
                ("wide", _) => name.to_owned(),
                _ => format!("{name}_{kind}"),
            };
            load(module, &name, blocks.shared_bytes)
        };
        let experts = |name: &str, are_gated: bool| {
            let gather_gate = are_gated.then(|| of(name, "gather_gate")).transpose()?;
            let (gather, scatter, each) = (of(name, "gather")?, of(name, "scatter")?, of(name, "each")?);
            Ok::<_, CudaError>(ExpertKernels { gather, gather_gate, scatter, each })
        };
        let kinds = |name: &str| {
            Ok::<_, CudaError>(KindKernels {
                store: of(name, "store")?,
                relu: of(name, "relu")?,
                gate: of(name, "gate")?,
                add: of(name, "add")?,
                logits: of(name, "logits")?,
                experts: experts(name, true)?,
            })
        };
        Ok(Self {
            plain: kinds(way)?,
            packed_experts: blocks.packs.then(|| experts(&format!("{way}_packed"), false)).transpose()?,
            formats: of_each(formats, |format| kinds(&format!("{way}_{format}")))?,
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

/// What `load` gives for the name of each format.
fn of_each<K>(
    formats: &[StoredDType],
    load: impl Fn(&str) -> Result<K, CudaError>,
) -> Result<Vec<(StoredDType, K)>, CudaError> {
    formats.iter().map(|&dtype| Ok((dtype, load(&name_of(dtype))?))).collect()
}

/// A format in the names of its kernels.
fn name_of(dtype: StoredDType) -> String {
    dtype.to_string().to_lowercase()
}

fn load(module: &Arc<CudaModule>, name: &str, shared_bytes: u32) -> Result<Kernel, CudaError> {
    let function = module.load_function(name).map_err(failed("cuModuleGetFunction"))?;
    if shared_bytes > 0 {
        let most = CUfunction_attribute::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES;
        function.set_attribute(most, shared_bytes as i32).map_err(failed("cuFuncSetAttribute"))?;
    }
    Ok(Kernel { function, shared_bytes })
}

/// Machine code of `source`. The library's own wrapper makes PTX only, which the driver would compile once more.
fn compile(source: &str, options: &[String], target: &str) -> Result<Vec<u8>, CudaError> {
    let refused = |log: String| CudaError::Compile { target: target.to_owned(), log };
    let code = |error: nvrtc::NvrtcError| refused(format!("{:?}", error.0));
    let source = CString::new(source).map_err(|error| refused(error.to_string()))?;
    let program = nvrtc::create_program(&source, None).map_err(code)?;
    // SAFETY: the program was created above and is destroyed below, once.
    let machine_code = unsafe { machine_code(program, options) };
    // SAFETY: as above.
    unsafe { nvrtc::destroy_program(program) }.map_err(code)?;
    machine_code.map_err(refused)
}

/// # Safety
/// `program` was created and not destroyed.
unsafe fn machine_code(program: sys::nvrtcProgram, options: &[String]) -> Result<Vec<u8>, String> {
    // SAFETY: by the caller's promise, here and below.
    if let Err(error) = unsafe { nvrtc::compile_program(program, options) } {
        // SAFETY: see above.
        let log = unsafe { nvrtc::get_program_log(program) }.unwrap_or_default();
        let log: Vec<u8> = log.into_iter().map(|c| c as u8).take_while(|&c| c != 0).collect();
        return Err(format!("{:?}: {}", error.0, String::from_utf8_lossy(&log)));
    }
    let mut bytes = 0;
    // SAFETY: see above; writes one number.
    unsafe { sys::nvrtcGetCUBINSize(program, &mut bytes) }.result().map_err(|error| format!("{:?}", error.0))?;
    let mut cubin = vec![0_u8; bytes];
    // SAFETY: see above; `cubin` is as long as the compiler said.
    unsafe { sys::nvrtcGetCUBIN(program, cubin.as_mut_ptr().cast()) }
        .result()
        .map_err(|error| format!("{:?}", error.0))?;
    Ok(cubin)
}
