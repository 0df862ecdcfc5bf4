fn decode(row: u32, unit: u32, w: ptr<function, array<vec4<f32>, UNIT4>>) {
    let b = row + 176u * (unit >> 3u);
    let sub = unit & 7u;
    let scale = unpack2x16float(word_at(b)) * k_scales(b + 4u, sub);
    let begin = b + 48u + 32u * (sub >> 1u);
    for (var j = 0u; j < 8u; j++) {
        let h = (word_at(b + 16u + 4u * j) >> sub) & 0x01010101u;
        let q = word_at(begin + 4u * j) >> (4u * (sub & 1u));
        let v = low_nibbles(q) | bytes_of(h << 4u);
        (*w)[j] = fma(vec4<f32>(scale.x), vec4<f32>(v), vec4<f32>(-scale.y));
    }
}
