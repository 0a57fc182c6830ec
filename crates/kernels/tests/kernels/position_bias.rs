//! A bias for each distance.

use sida_kernels::position_bias::PositionBias;

/// A key far from its query would get the bias of another distance.
#[test]
fn adds_the_bias_of_each_distance() {
    let reach = 3;
    let by_distance: Vec<f32> = (0..2).flat_map(|head| (0..7).map(move |d| (head * 100 + d) as f32 - 3.0)).collect();
    let bias = PositionBias::new(by_distance, reach);
    for position in 0..12 {
        for keys in 0..14 {
            let mut scores = vec![0.0; keys];
            bias.add_to(1, position, &mut scores);
            let expected: Vec<f32> =
                (0..keys as i64).map(|key| 100.0 + (key - position as i64).clamp(-3, 3) as f32).collect();
            assert_eq!(scores, expected, "position {position}");
        }
    }
}
