fn decode(row: u32, unit: u32, w: ptr<function, array<vec4<f32>, UNIT4>>) {
    let b = row + 24u * unit;
    let dm = unpack2x16float(word_at(b));
    let h = word_at(b + 4u);
    for (var j = 0u; j < 4u; j++) {
        let q = word_at(b + 8u + 4u * j);
        let low = vec4<f32>(low_nibbles(q) | fifth_bits(h >> (4u * j)));
        let high = vec4<f32>(high_nibbles(q) | fifth_bits(h >> (4u * j + 16u)));
        (*w)[j] = fma(vec4<f32>(dm.x), low, vec4<f32>(dm.y));
        (*w)[j + 4u] = fma(vec4<f32>(dm.x), high, vec4<f32>(dm.y));
    }
}
