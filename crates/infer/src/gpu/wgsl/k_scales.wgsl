// Scale and minimum of sub-group `sub` (of 8), 6 bits each, packed into the 12 bytes from `b` on.
fn k_scales(b: u32, sub: u32) -> vec2<f32> {
    if (sub < 4u) {
        return vec2<f32>(f32(byte_at(b + sub) & 63u), f32(byte_at(b + sub + 4u) & 63u));
    }
    let both = byte_at(b + sub + 4u);
    let s = (both & 15u) | ((byte_at(b + sub - 4u) >> 6u) << 4u);
    let m = (both >> 4u) | ((byte_at(b + sub) >> 6u) << 4u);
    return vec2<f32>(f32(s), f32(m));
}
