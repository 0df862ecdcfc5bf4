// out[r][i] = gate[r][i] / (1 + e^-gate[r][i]) * up[r][i].

struct Params {
    width: u32,
    rows: u32,
    gate: u32,
    gate_stride: u32,
    up: u32,
    up_stride: u32,
    out: u32,
    out_stride: u32,
}

@group(0) @binding(0) var<uniform> p: Params;
@group(0) @binding(1) var<storage, read> gate: array<f32>;
@group(0) @binding(2) var<storage, read> up: array<f32>;
@group(0) @binding(3) var<storage, read_write> out: array<f32>;

@compute @workgroup_size(64)
fn silu_mul(@builtin(global_invocation_id) at: vec3<u32>) {
    if (at.x < p.width && at.y < p.rows) {
        let g = gate[p.gate + at.y * p.gate_stride + at.x];
        let u = up[p.up + at.y * p.up_stride + at.x];
        out[p.out + at.y * p.out_stride + at.x] = g / (1.0 + exp(-g)) * u;
    }
}
