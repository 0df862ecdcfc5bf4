// A vector of weights in any plain float type: `kind` is 0 for f32, 1 for f16, 2 for bf16.

fn vector_at(b: u32, kind: u32, i: u32) -> f32 {
    if (kind == 0u) {
        return bitcast<f32>(word_at(b + 4u * i));
    }
    let bits = word_at(b + 2u * i);
    if (kind == 1u) {
        return unpack2x16float(bits).x;
    }
    return bitcast<f32>(bits << 16u);
}
