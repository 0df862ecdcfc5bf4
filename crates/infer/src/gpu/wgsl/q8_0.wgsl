fn decode(row: u32, unit: u32, w: ptr<function, array<vec4<f32>, UNIT4>>) {
    let b = row + 34u * unit;
    let d = half_at(b);
    for (var j = 0u; j < 8u; j++) {
        (*w)[j] = d * vec4<f32>(unpack4xI8(word_at(b + 2u + 4u * j)));
    }
}
