fn element(row: u32, i: u32) -> f32 {
    return half_at(row + 2u * i);
}

fn decode(row: u32, unit: u32, w: ptr<function, array<vec4<f32>, UNIT4>>) {
    let b = row + 16u * unit;
    for (var j = 0u; j < 2u; j++) {
        (*w)[j] = vec4<f32>(unpack2x16float(word_at(b + 8u * j)), unpack2x16float(word_at(b + 8u * j + 4u)));
    }
}
