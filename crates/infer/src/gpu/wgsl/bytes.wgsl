// Weights as they lie in a file: bytes, seen through 32-bit words. Any byte may begin a row; one word past the last
// may be read and is masked away.

fn byte_at(b: u32) -> u32 {
    return (weights[b >> 2u] >> ((b & 3u) * 8u)) & 255u;
}

// `lo` and `hi` are neighbouring words; the result begins `s` bits into `lo`.
fn join(lo: u32, hi: u32, s: u32) -> u32 {
    return select((lo >> s) | (hi << ((32u - s) & 31u)), lo, s == 0u);
}

fn word_at(b: u32) -> u32 {
    let i = b >> 2u;
    return join(weights[i], weights[i + 1u], (b & 3u) * 8u);
}

fn half_at(b: u32) -> f32 {
    return unpack2x16float(word_at(b)).x;
}

fn bytes_of(q: u32) -> vec4<u32> {
    return vec4<u32>(q, q >> 8u, q >> 16u, q >> 24u) & vec4<u32>(255u);
}

fn low_nibbles(q: u32) -> vec4<u32> {
    return bytes_of(q & 0x0f0f0f0fu);
}

fn high_nibbles(q: u32) -> vec4<u32> {
    return bytes_of((q >> 4u) & 0x0f0f0f0fu);
}

// Bits 0 to 3 of `h`, each as bit 4 of its element.
fn fifth_bits(h: u32) -> vec4<u32> {
    return (vec4<u32>(h << 4u, h << 3u, h << 2u, h << 1u)) & vec4<u32>(16u);
}
