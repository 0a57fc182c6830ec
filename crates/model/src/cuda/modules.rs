//! The modules that kernels are in, compiled for the device that was found when a model is opened on it: by NVRTC, from the
//! sources under `kernels/`, for one dtype and one width of heads. What takes long, products, is a module by itself for each
//! way that weights lie; modules are compiled at once, on a thread each, and once in a process: a model's dense part and its experts
//! are of the same.

use std::{
    collections::HashMap,
    ffi::CString,
    sync::{Arc, LazyLock},
    thread,
};

use cudarc::{
    driver::CudaModule,
    nvrtc::{Ptx, result as nvrtc, sys},
};
use parking_lot::Mutex;

use super::{
    device::Gpu,
    error::{CudaError, failed},
    ways::RUN,
};
use crate::{Precision, StoredDType};

/// What a block of `many` is given: what product_tensor.cu cuts into stages.
pub(super) const MANY_SHARED_BYTES: u32 = 96 << 10;

/// And a block of `wide`, which a multiprocessor has one of.
pub(super) const WIDE_SHARED_BYTES: u32 = 222 << 10;

/// The devices with the instructions of `wide`: those of one generation only.
const WIDE_CAPABILITY: (i32, i32) = (9, 0);

/// `KEY_STAGES` of attention_tensor.cu.
const KEY_STAGES: usize = 4;

/// A file and its text.
type Source = (&'static str, &'static str);

macro_rules! sources {
    ($($name:literal),+ $(,)?) => { [$(($name, include_str!(concat!("kernels/", $name)))),+] };
}

/// What is done to rows, routers and attention; each in the order in which files build on each other.
const ROWS: [Source; 12] = sources![
    "numbers.cu",
    "rows.cu",
    "product.cu",
    "product_tensor.cu",
    "router.cu",
    "routing.cu",
    "attention.cu",
    "heads.cu",
    "attention_scalar.cu",
    "attention_tensor.cu",
    "attention_steps.cu",
    "mean.cu",
];

/// Products with plain weights, and with packed ones.
const PLAIN: [Source; 7] = sources![
    "numbers.cu",
    "product.cu",
    "product_scalar.cu",
    "product_tensor.cu",
    "product_packed.cu",
    "product_wide.cu",
    "products.cu",
];

/// Products with weights in a format of blocks.
const FORMAT: [Source; 8] = sources![
    "numbers.cu",
    "product.cu",
    "product_tensor.cu",
    "block_formats.cu",
    "product_blocks.cu",
    "product_wide.cu",
    "product_wide_blocks.cu",
    "products.cu",
];

/// Those of a model on a device.
pub(super) struct Modules {
    pub(super) rows: Arc<CudaModule>,
    pub(super) plain: Arc<CudaModule>,
    /// For each format of blocks that was asked for.
    pub(super) formats: Vec<(StoredDType, Arc<CudaModule>)>,
    /// Whether there are kernels of `wide`.
    pub(super) is_wide: bool,
    /// Bytes of shared memory that a block of attention is given in bf16.
    pub(super) attention_shared_bytes: u32,
}

impl Modules {
    /// Compiles what this process has not compiled yet.
    pub(super) fn compile(
        gpu: &Gpu,
        precision: Precision,
        formats: &[StoredDType],
        d_kv: usize,
    ) -> Result<Self, CudaError> {
        let (major, minor) = gpu.description().capability;
        let attention_shared_bytes = (KEY_STAGES * 2 * 32 * (d_kv + 8) * precision.size()) as u32;
        let is_bf16 = precision == Precision::Bf16;
        let is_wide = is_bf16 && (major, minor) == WIDE_CAPABILITY;
        let target = format!("sm_{major}{minor}{}", if is_wide { "a" } else { "" });
        let common = vec![
            format!("--gpu-architecture={target}"),
            "--std=c++17".to_owned(),
            format!("-DBF16={}", u8::from(is_bf16)),
            format!("-DWIDE={}", u8::from(is_wide)),
            format!("-DMULTIPROCESSORS={}", gpu.description().multiprocessors),
            format!("-DMANY_SHARED_BYTES={MANY_SHARED_BYTES}"),
            format!("-DWIDE_SHARED_BYTES={WIDE_SHARED_BYTES}"),
            "-DINFINITY=__int_as_float(0x7f800000)".to_owned(),
        ];
        let with = |own: &[String]| [&common[..], own].concat();
        let of_rows = with(&[
            format!("-DD_KV={d_kv}"),
            format!("-DRUN={RUN}"),
            format!("-DATTENTION_SHARED_BYTES={attention_shared_bytes}"),
        ]);
        let formats: Vec<StoredDType> =
            StoredDType::BLOCKS.into_iter().filter(|dtype| formats.contains(dtype)).collect();
        // A structure of block_formats.cu has the name of its format.
        let of_formats =
            formats.iter().map(|dtype| Wanted { sources: &FORMAT, options: with(&[format!("-DFORMAT={dtype}")]) });
        let mut wanted =
            vec![Wanted { sources: &ROWS, options: of_rows }, Wanted { sources: &PLAIN, options: common.clone() }];
        wanted.extend(of_formats);
        let compiled: Vec<Result<Arc<[u8]>, CudaError>> = thread::scope(|scope| {
            let threads: Vec<_> = wanted.iter().map(|wanted| scope.spawn(|| wanted.compiled(&target))).collect();
            threads.into_iter().map(|thread| thread.join().expect("nothing panics there")).collect()
        });
        let module = |compiled: Result<Arc<[u8]>, CudaError>| {
            gpu.context().load_module(Ptx::from_binary(compiled?.to_vec())).map_err(failed("cuModuleLoadData"))
        };
        let mut modules = compiled.into_iter().map(module);
        let mut next = || modules.next().expect("a module for each that is wanted");
        let (rows, plain) = (next()?, next()?);
        let formats = formats.into_iter().map(|dtype| Ok((dtype, next()?))).collect::<Result<_, CudaError>>()?;
        Ok(Self { rows, plain, formats, is_wide, attention_shared_bytes })
    }
}

/// A module that is wanted.
struct Wanted {
    sources: &'static [Source],
    options: Vec<String>,
}

/// Machine code by the files and options that it was made of.
type Compiled = HashMap<(Vec<&'static str>, Vec<String>), Arc<[u8]>>;

/// What this process has compiled.
static COMPILED: LazyLock<Mutex<Compiled>> = LazyLock::new(Mutex::default);

impl Wanted {
    /// Its machine code for a target.
    fn compiled(&self, target: &str) -> Result<Arc<[u8]>, CudaError> {
        let key = (self.sources.iter().map(|(name, _)| *name).collect(), self.options.clone());
        let known = COMPILED.lock().get(&key).cloned();
        if let Some(known) = known {
            return Ok(known);
        }
        let source: String = self.sources.iter().map(|(name, text)| format!("#line 1 \"{name}\"\n{text}")).collect();
        let machine_code: Arc<[u8]> = compile(&source, &self.options, target)?.into();
        COMPILED.lock().insert(key, machine_code.clone());
        Ok(machine_code)
    }
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
