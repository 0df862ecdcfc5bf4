fn decode(row: u32, unit: u32, w: ptr<function, array<vec4<f32>, UNIT4>>) {
    let b = row + 144u * (unit >> 3u);
    let sub = unit & 7u;
    let scale = unpack2x16float(word_at(b)) * k_scales(b + 4u, sub);
    let begin = b + 16u + 32u * (sub >> 1u);
    for (var j = 0u; j < 8u; j++) {
        let q = word_at(begin + 4u * j) >> (4u * (sub & 1u));
        (*w)[j] = fma(vec4<f32>(scale.x), vec4<f32>(low_nibbles(q)), vec4<f32>(-scale.y));
    }
}
