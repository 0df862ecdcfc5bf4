fn element(row: u32, i: u32) -> f32 {
    return bitcast<f32>(word_at(row + 2u * i) << 16u);
}

fn decode(row: u32, unit: u32, w: ptr<function, array<vec4<f32>, UNIT4>>) {
    let b = row + 16u * unit;
    for (var j = 0u; j < 2u; j++) {
        let p = word_at(b + 8u * j);
        let q = word_at(b + 8u * j + 4u);
        (*w)[j] = bitcast<vec4<f32>>(vec4<u32>(p << 16u, p & 0xffff0000u, q << 16u, q & 0xffff0000u));
    }
}
