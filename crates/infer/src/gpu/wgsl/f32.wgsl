fn element(row: u32, i: u32) -> f32 {
    return bitcast<f32>(word_at(row + 4u * i));
}

fn decode(row: u32, unit: u32, w: ptr<function, array<vec4<f32>, UNIT4>>) {
    let b = row + 32u * unit;
    for (var j = 0u; j < 2u; j++) {
        let a = b + 16u * j;
        (*w)[j] = bitcast<vec4<f32>>(vec4<u32>(word_at(a), word_at(a + 4u), word_at(a + 8u), word_at(a + 12u)));
    }
}
