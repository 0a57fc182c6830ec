//! Sums and rectifiers of tensors, on the calling thread. The tensor library's own wake a pool that
//! spins beside ours: on two cores they took more than half of the time of a batch of 32.

use candle_core::{Result, Tensor};

use crate::tensor_rows::{from_rows, rows};

/// a + b, both (n, width)
pub fn add(a: &Tensor, b: &Tensor) -> Result<Tensor> {
    let width = same_width(a, b)?;
    let sum = rows(a, |a| rows(b, |b| a.iter().zip(b).map(|(a, b)| a + b).collect()))??;
    from_rows(sum, width)
}

/// sum += x, of one length
pub fn add_to(sum: &mut [f32], x: &[f32]) {
    assert_eq!(sum.len(), x.len());
    sum.iter_mut().zip(x).for_each(|(sum, x)| *sum += x);
}

/// max(x, 0) in place, and NaN of NaN: a broken activation must not turn into an answer.
pub fn relu(x: &mut [f32]) {
    x.iter_mut().for_each(|x| *x = if *x < 0.0 { 0.0 } else { *x });
}

fn same_width(a: &Tensor, b: &Tensor) -> Result<usize> {
    if a.dims2()? == b.dims2()? {
        return a.dim(1);
    }
    candle_core::bail!("cannot add {:?} and {:?}", a.shape(), b.shape())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn values(x: &Tensor) -> Vec<f32> {
        rows(x, <[f32]>::to_vec).unwrap()
    }

    /// Residuals or activations would be off, or tensors of two shapes be mixed.
    #[test]
    fn each_does_what_it_says() {
        let a = from_rows(vec![1.0, -2.0, 3.0, f32::NAN], 2).unwrap();
        let b = from_rows(vec![0.5; 4], 2).unwrap();
        assert_eq!(values(&add(&a, &b).unwrap())[..3], [1.5, -1.5, 3.5]);
        let mut x = values(&a);
        relu(&mut x);
        assert!(x[..3] == [1.0, 0.0, 3.0] && x[3].is_nan());
        add_to(&mut x[..3], &[1.0, 2.0, 3.0]);
        assert_eq!(x[..3], [2.0, 2.0, 6.0]);
        assert!(add(&a, &from_rows(vec![0.5; 4], 4).unwrap()).is_err());
    }
}
