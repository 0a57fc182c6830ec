//! What is refused of predictors' files and of what they are asked, and how errors name it.

use super::*;

/// A file that a newer or a broken program wrote would end whoever opens it, or attend to the wrong places.
#[test]
fn refuses_heads_that_do_not_fit() {
    let (dir, path) = untrained(Net::Transformer, &recording(1, 1));
    let other = dir.path().join("other.safetensors");
    let refused = |tensor: &str, dimensions: &[usize], of: PredictorShape| {
        let mut tensors = PredictorFile::read(&path, shape(), MODEL).unwrap().into_tensors();
        tensors.floats(tensor, dimensions, &vec![0.0; dimensions.iter().product()]);
        tensors.write(&unmeasured(Net::Transformer), &other).unwrap();
        match open_shape(&other, of, MODEL) {
            Err(PredictorError::Tensor { tensor, reason, .. }) => format!("{tensor} {reason}"),
            _ => panic!("{tensor} {dimensions:?} is not refused"),
        }
    };
    for (part, dimensions, expected) in [
        ("decoder.input.query", &[4, 16][..], "expected (heads, head width, 32)"),
        ("decoder.input.query", &[0, 16, 32], "at most 64 heads"),
        ("decoder.input.query", &[65, 16, 32], "at most 64 heads"),
        ("decoder.input.query", &[4, 257, 32], "of at most 256"),
        ("decoder.input.values", &[2, 16, 8], "has 2 heads, and decoder.input.query has 4"),
        ("decoder.input.keys", &[4, 8, 8], "expected F16 [4, 16, 8]"),
        ("decoder.input.output", &[32, 32], "expected F16 [32, 64]"),
        ("decoder.input.query2", &[1], "is not part of this net"),
        ("encoder.input", &[32], "expected a width"),
        ("encoder.block.0.query", &[4, 8, 16], "expected (heads, head width, 32)"),
        ("encoder.block.0.values", &[2, 16, 32], "has 2 heads, and encoder.block.0.query has 4"),
        ("encoder.block.1.distances", &[4, 128], "expected (4, an odd number"),
        ("encoder.block.1.distances", &[4, 4097], "expected (4, an odd number"),
        ("encoder.block.1.up", &[9000, 32], "expected (at most"),
        ("encoder.block.1.down", &[32, 63], "expected F16 [32, 64]"),
        ("encoder.block.2.norm", &[1], "is not part of this net"),
    ] {
        let found = refused(part, dimensions, shape());
        assert!(found.contains(part) && found.contains(expected), "{found}");
    }
    let decoder_only = PredictorShape { encoder_width: None, ..shape() };
    assert!(refused("decoder.input.query", &[4, 16, 32], decoder_only).contains("no encoder"));
}

/// A wrong state, token or file would panic, or be taken for the right one.
#[test]
fn refuses_what_does_not_fit() {
    let (dir, path, _) = trained(Net::Lstm);
    let predictor = open(&path);
    assert!(matches!(predictor.encode(&[&[24]]), Err(PredictorError::Token { id: 24, .. })));
    let mut foreign = predictor.start(&[0.5; D_MODEL]).unwrap();
    foreign.values = vec![0.5; 7];
    assert!(matches!(predictor.decode(&mut [&mut foreign], &[&[1]]), Err(PredictorError::State { .. })));
    assert!(matches!(predictor.decode(&mut [], &[&[1]]), Err(PredictorError::States { .. })));
    let other = Digest([8; 32]);
    // Of another model, whatever else does not fit, and with what tells one from the other.
    let fewer = PredictorShape { num_experts: 2, encoder_layers: 0..1, decoder_layers: 1..2, ..shape() };
    for shape in [shape(), PredictorShape { vocab_size: 99, ..shape() }, fewer] {
        let error = open_shape(&path, shape, other).err().expect("refused");
        assert!(matches!(error, PredictorError::Model { .. }), "{error}");
        let made_for = "3 MoE layers, 4 experts in each, 24 tokens, an encoder of width 8";
        assert!(error.to_string().contains(made_for), "{error}");
    }
    let wider = PredictorShape { num_experts: 5, ..shape() };
    assert!(matches!(open_shape(&path, wider, MODEL), Err(PredictorError::Tensor { .. })));
    let whole = fs::read(&path).unwrap();
    let broken = dir.path().join("broken.safetensors");
    let refused = |bytes: &[u8]| {
        fs::write(&broken, bytes).unwrap();
        open_shape(&broken, shape(), MODEL).err().map(|error| error.to_string())
    };
    for len in [0, 7, 8, 100, whole.len() / 2, whole.len() - 1] {
        assert!(refused(&whole[..len]).is_some_and(|error| error.contains("broken.safetensors")));
    }
    let replaced = |from: &str, to: &str| {
        let at = whole.windows(from.len()).position(|window| window == from.as_bytes()).unwrap();
        let mut bytes = whole.clone();
        bytes[at..at + to.len()].copy_from_slice(to.as_bytes());
        refused(&bytes).unwrap()
    };
    assert!(replaced("sida-predictor-1", "sida-predictor-9").contains("format"));
    assert!(replaced("\"top_k\":\"3\"", "\"top_k\":\"5\"").contains("top_k"));
    assert!(replaced("encoder.head_bias", "encoder.head_boss").contains("head_bias"));
    let mut infinite = whole.clone();
    let last = infinite.len() - 2;
    infinite[last..].copy_from_slice(&half::f16::INFINITY.to_le_bytes());
    assert!(refused(&infinite).unwrap().contains("not finite"));
}
