fn decode(row: u32, unit: u32, w: ptr<function, array<vec4<f32>, UNIT4>>) {
    let b = row + 20u * unit;
    let dm = unpack2x16float(word_at(b));
    for (var j = 0u; j < 4u; j++) {
        let q = word_at(b + 4u + 4u * j);
        (*w)[j] = fma(vec4<f32>(dm.x), vec4<f32>(low_nibbles(q)), vec4<f32>(dm.y));
        (*w)[j + 4u] = fma(vec4<f32>(dm.x), vec4<f32>(high_nibbles(q)), vec4<f32>(dm.y));
    }
}
