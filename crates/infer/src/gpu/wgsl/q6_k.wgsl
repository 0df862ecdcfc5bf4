fn decode(row: u32, unit: u32, w: ptr<function, array<vec4<f32>, UNIT4>>) {
    let b = row + 210u * (unit >> 3u);
    let half = (unit >> 2u) & 1u;
    let part = unit & 3u;
    let low = b + 64u * half + 32u * (part & 1u);
    let high = b + 128u + 32u * half;
    let d = half_at(b + 208u);
    for (var j = 0u; j < 8u; j++) {
        let scale = d * f32(unpack4xI8(byte_at(b + 192u + 8u * half + 2u * part + (j >> 2u))).x);
        let q = (word_at(low + 4u * j) >> (4u * (part >> 1u))) & 0x0f0f0f0fu;
        let h = (word_at(high + 4u * j) >> (2u * part)) & 0x03030303u;
        (*w)[j] = scale * (vec4<f32>(bytes_of(q | (h << 4u))) - 32.0);
    }
}
