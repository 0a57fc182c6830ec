//! That all ways to multiply give the same bits, for what becomes of a product, formats, and rows around the borders of tiles; and
//! that weights which are rounded on their way give those of the same weights in bf16. Runs where SIDA_CUDA_DEVICE names a device.

use bytemuck::cast_slice;
use rand::{Rng, SeedableRng, rngs::StdRng};
use sida_kernels::arbitrary;

use super::{
    arguments::{Kind, Product, Tile},
    buffer::DeviceBuffer,
    device::Gpu,
    kernels::{Kernel, Kernels, ProductKernels},
    ways::Way,
};
use crate::{Precision, StoredDType, block_matrix, expert_slot::Layout};

/// A value of bf16 between -2 and 2, with a mantissa of any bits.
fn value(random: &mut StdRng) -> u16 {
    random.random::<u16>() & 0x807f | random.random_range(120..128) << 7
}

fn values(random: &mut StdRng, count: usize) -> Vec<u16> {
    (0..count).map(|_| value(random)).collect()
}

/// A matrix of (rows, k) as it lies on a device; of formats whose weights are rounded, also these weights in bf16.
fn matrix(random: &mut StdRng, layout: Layout, rows: usize, k: usize) -> (Vec<u8>, Option<Vec<u8>>) {
    let Layout::Blocks(dtype) = layout else { return (cast_slice(&values(random, rows * k)).to_vec(), None) };
    let stored = arbitrary::blocks(dtype, rows * k, random.random::<u16>().into());
    let mut blocks = vec![0; block_matrix::bytes(dtype, rows * k)];
    block_matrix::arrange(&stored, dtype, k, &mut blocks);
    let is_rounded = !matches!(dtype, StoredDType::Q4_0 | StoredDType::Q8_0);
    let rounded = is_rounded.then(|| {
        let mut rounded = vec![0; rows * k * Precision::Bf16.size()];
        Precision::Bf16.narrow(&dtype.widen(&stored), &mut rounded);
        rounded
    });
    (blocks, rounded)
}

/// What both products of a kind are: the kernel, and how many bytes a result has.
fn kernel(kernels: &ProductKernels, layout: Layout, kind: Kind) -> (&Kernel, usize) {
    let kinds = kernels.kinds_in(layout).unwrap();
    let experts = kernels.experts_in(layout).unwrap();
    match kind {
        Kind::Store => (&kinds.store, 2),
        Kind::Relu => (&kinds.relu, 2),
        Kind::Gate => (&kinds.gate, 2),
        Kind::Add => (&kinds.add, 4),
        Kind::Logits => (&kinds.logits, 4),
        Kind::Gather => (&experts.gather, 2),
        Kind::GatherGate => (experts.gather_gate.as_ref().unwrap(), 2),
        Kind::Scatter => (&experts.scatter, 4),
        Kind::Each => (&experts.each, 4),
    }
}

/// The rows of each expert, whose matrices lie one after another.
fn tiles(groups: &[usize], tile: usize) -> Vec<Tile> {
    let (mut tiles, mut first) = (Vec::new(), 0);
    for (slot, &rows) in groups.iter().enumerate() {
        for at in (0..rows).step_by(tile) {
            let (first, rows) = ((first + at) as i32, tile.min(rows - at) as i32);
            tiles.push(Tile { slot: slot as i32, first, rows, unused: 0 });
        }
        first += rows;
    }
    tiles
}

/// Rows would have other bits in a larger batch, or with more rows of the same expert.
#[test]
fn all_ways_give_the_same_bits() {
    let Ok(ordinal) = std::env::var("SIDA_CUDA_DEVICE") else {
        return println!("SIDA_CUDA_DEVICE is not set: nothing is compared");
    };
    let gpu = Gpu::open(ordinal.parse().unwrap()).unwrap();
    let kernels = Kernels::compile(&gpu, Precision::Bf16, &StoredDType::BLOCKS, 64).unwrap();
    println!("wide: {}", kernels.wide.is_some());
    let seed = rand::rng().random();
    println!("seed {seed}");
    let mut random = StdRng::seed_from_u64(seed);
    let (inputs, outputs) = (768, 256);
    let groups: [&[usize]; 9] =
        [&[1], &[33], &[63, 0, 64], &[65], &[127, 3], &[128], &[129], &[1, 200, 64], &[31, 257, 96, 130, 5, 128]];
    let layouts = StoredDType::BLOCKS.map(Layout::Blocks);
    for layout in std::iter::once(Layout::Plain).chain(layouts) {
        for kind in [
            Kind::Store,
            Kind::Relu,
            Kind::Gate,
            Kind::Add,
            Kind::Logits,
            Kind::Gather,
            Kind::GatherGate,
            Kind::Scatter,
            Kind::Each,
        ] {
            let w_rows = if matches!(kind, Kind::Gate | Kind::GatherGate) { 2 * outputs } else { outputs };
            let experts: Vec<_> = (0..6).map(|_| matrix(&mut random, layout, w_rows, inputs)).collect();
            let (blocks, rounded): (Vec<_>, Vec<_>) = experts.into_iter().unzip();
            let rounded: Option<Vec<Vec<u8>>> = rounded.into_iter().collect();
            let on_device = |experts: Vec<Vec<u8>>| gpu.allocate_with("weights", &experts.concat()).unwrap();
            let (w, rounded) = (on_device(blocks), rounded.map(on_device));
            // Each way with the weights as they lie, and where they are rounded, one with them in bf16.
            let with_weights = [Way::Few, Way::Many, Way::Wide].map(|way| (way, layout, &w));
            let in_bf16 = rounded.as_ref().map(|rounded| (Way::Few, Layout::Plain, rounded));
            for groups in groups {
                let rows = groups.iter().sum::<usize>();
                let x = gpu.allocate_with("x", &values(&mut random, rows * inputs)).unwrap();
                // Every place takes another row than its own, and goes to another.
                let order: Vec<u32> = (0..rows as u32).rev().collect();
                let order = gpu.allocate_with("order", &order).unwrap();
                let factors: Vec<f32> = (0..rows).map(|_| random.random()).collect();
                let factors = gpu.allocate_with("factors", &factors).unwrap();
                let mut found: Vec<Vec<u8>> = Vec::new();
                for (way, layout, w) in with_weights.into_iter().chain(in_bf16) {
                    let kernels = kernels.of(way);
                    let (kernel, bytes) = kernel(kernels, layout, kind);
                    let list = tiles(groups, kernels.blocks.tile.1);
                    // What is added to is 1.0, and anything else must be overwritten.
                    let before = vec![1.0_f32; rows * outputs * bytes / 4];
                    let out: DeviceBuffer<f32> = gpu.allocate_with("results", &before).unwrap();
                    let list_at = gpu.allocate_with("tiles", &list).unwrap();
                    let count = gpu.allocate_with("tiles", &[list.len() as i32]).unwrap();
                    let product = Product {
                        x: x.address(),
                        w: w.address(),
                        out: out.address(),
                        rows: rows as i32,
                        k: inputs as i32,
                        outputs: outputs as i32,
                        tiles: list_at.address(),
                        tile_count: count.address(),
                        order: order.address(),
                        to: order.address(),
                        alpha: factors.address(),
                        slot_stride: (w.len() / 6) as u64,
                        kind: kind as i32,
                        ..Product::default()
                    };
                    let of_experts = kind as i32 >= Kind::Gather as i32;
                    let down = if of_experts { list.len() } else { rows.div_ceil(kernels.blocks.tile.1) };
                    let grid = kernels.grid(w_rows, down);
                    // SAFETY: the structure is of these kernels, and memory as large as it says lives until the read below is done.
                    unsafe { gpu.launch(kernel, grid, kernels.blocks.threads, &product) }.unwrap();
                    let mut results = vec![0.0_f32; out.len()];
                    gpu.read(out.all(), &mut results).unwrap();
                    found.push(cast_slice(&results).to_vec());
                }
                let differ = |a: &[u8], b: &[u8]| a.iter().zip(b).filter(|(a, b)| a != b).count();
                for (other, results) in found.iter().enumerate() {
                    let differ = differ(&found[0], results);
                    assert_eq!(differ, 0, "{layout:?} {kind:?}, groups {groups:?}: bytes of {other} differ from few's");
                }
                assert!(found[0].iter().any(|&byte| byte != found[0][0]), "{kind:?} wrote nothing");
            }
        }
    }
}
