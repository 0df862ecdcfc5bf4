fn decode(row: u32, unit: u32, w: ptr<function, array<vec4<f32>, UNIT4>>) {
    let b = row + 22u * unit;
    let d = half_at(b);
    let h = word_at(b + 2u);
    for (var j = 0u; j < 4u; j++) {
        let q = word_at(b + 6u + 4u * j);
        (*w)[j] = d * (vec4<f32>(low_nibbles(q) | fifth_bits(h >> (4u * j))) - 16.0);
        (*w)[j + 4u] = d * (vec4<f32>(high_nibbles(q) | fifth_bits(h >> (4u * j + 16u))) - 16.0);
    }
}
