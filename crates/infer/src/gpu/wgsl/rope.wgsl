// Turns pairs of each head by its token's angles, in place: (a, b) becomes (a cos - b sin, b cos + a sin).

struct Params {
    tokens: u32,
    heads: u32,
    head_dim: u32,
    half: u32,          // pairs of a head that turn
    neighbours: u32,    // 1: elements 2i and 2i + 1; 0: i and i + half
    x: u32,
    x_stride: u32,
}

@group(0) @binding(0) var<uniform> p: Params;
@group(0) @binding(1) var<storage, read> angles: array<f32>;
@group(0) @binding(2) var<storage, read_write> x: array<f32>;

@compute @workgroup_size(64)
fn rope(@builtin(global_invocation_id) at: vec3<u32>) {
    let head = at.x / p.half;
    let i = at.x % p.half;
    if (head < p.heads && at.y < p.tokens) {
        let c = angles[at.y * 2u * p.half + i];
        let s = angles[at.y * 2u * p.half + p.half + i];
        let base = p.x + at.y * p.x_stride + head * p.head_dim;
        let first = base + select(i, 2u * i, p.neighbours == 1u);
        let second = base + select(i + p.half, 2u * i + 1u, p.neighbours == 1u);
        let a = x[first];
        let b = x[second];
        x[first] = fma(a, c, -(b * s));
        x[second] = fma(b, c, a * s);
    }
}
