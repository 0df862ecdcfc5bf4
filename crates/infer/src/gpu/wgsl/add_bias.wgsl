// x[r][i] += bias[i].

struct Params {
    width: u32,
    rows: u32,
    x: u32,
    x_stride: u32,
    bias: u32,      // byte
    kind: u32,
}

@group(0) @binding(0) var<uniform> p: Params;
@group(0) @binding(1) var<storage, read> weights: array<u32>;
@group(0) @binding(2) var<storage, read_write> x: array<f32>;

@compute @workgroup_size(64)
fn add_bias(@builtin(global_invocation_id) at: vec3<u32>) {
    if (at.x < p.width && at.y < p.rows) {
        x[p.x + at.y * p.x_stride + at.x] += vector_at(p.bias, p.kind, at.x);
    }
}
