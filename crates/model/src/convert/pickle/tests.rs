//! Pickles as PyTorch writes them, cut short, and made to do harm.

use proptest::prelude::*;

use super::*;

/// A pickle of one tensor `w` of shape (2, 3), as torch 2 writes it, with `global` as its function.
fn one_tensor(global: &str) -> Vec<u8> {
    let mut bytes = b"\x80\x02}q\x00".to_vec();
    bytes.extend(b"X\x01\x00\x00\x00wq\x01");
    bytes.extend(format!("c{global}\nq\x02").bytes());
    bytes.extend(b"((X\x07\x00\x00\x00storageq\x03ctorch\nHalfStorage\nX\x01\x00\x00\x000X\x03\x00\x00\x00cpuK\x06tQ");
    bytes.extend(b"K\x00K\x02K\x03\x86K\x03K\x01\x86\x89ccollections\nOrderedDict\n)RtRs.");
    bytes
}

/// The checkpoints that PyTorch writes could not be read.
#[test]
fn reads_a_state_dictionary() {
    let expected = PickledTensor {
        name: "w".to_owned(),
        storage: Storage { key: "0".to_owned(), values: Values::Weights(StoredDType::F16) },
        offset: 0,
        shape: vec![2, 3],
        stride: vec![3, 1],
    };
    assert_eq!(tensors(&one_tensor("torch._utils\n_rebuild_tensor_v2")), Ok(vec![expected]));
}

/// An attack would be taken for a broken file, or run.
#[test]
fn names_the_function_that_an_attack_calls() {
    let expected = PickleError::Global { module: "posix".to_owned(), name: "system".to_owned() };
    assert_eq!(tensors(&one_tensor("posix\nsystem")), Err(expected));
}

/// Deep nesting would overflow the stack, doubling would fill the memory, a claimed length would be allocated.
#[test]
fn survives_bombs() {
    let nested = [vec![b']'], vec![0x85; 1_000_000], vec![b'.']].concat();
    assert!(matches!(tensors(&nested), Err(PickleError::Malformed { .. })));
    let doubling = [b"]q\x00".to_vec(), b"h\x00h\x00\x86q\x00".repeat(100_000), vec![b'.']].concat();
    assert!(matches!(tensors(&doubling), Err(PickleError::Malformed { .. })));
    assert_eq!(tensors(b"X\xff\xff\xff\xffabc"), Err(PickleError::Truncated { at: 5 }));
}

/// A pickle cut short would be taken for a smaller model.
#[test]
fn refuses_every_prefix() {
    let whole = one_tensor("torch._utils\n_rebuild_tensor_v2");
    for len in 0..whole.len() {
        assert!(tensors(&whole[..len]).is_err(), "{len} bytes");
    }
}

proptest! {
    /// Bytes from outside could panic.
    #[test]
    fn never_panics(bytes in proptest::collection::vec(any::<u8>(), 0..200), at in 0usize..120, byte in any::<u8>()) {
        let _ = tensors(&bytes);
        let mut changed = one_tensor("torch._utils\n_rebuild_tensor_v2");
        changed[at] = byte;
        let _ = tensors(&changed);
    }
}
