// x[r][i] = min(max(x[r][i], -limit), limit).

struct Params {
    width: u32,
    rows: u32,
    x: u32,
    x_stride: u32,
    bound: f32,
}

@group(0) @binding(0) var<uniform> p: Params;
@group(0) @binding(1) var<storage, read_write> x: array<f32>;

@compute @workgroup_size(64)
fn limit(@builtin(global_invocation_id) at: vec3<u32>) {
    if (at.x < p.width && at.y < p.rows) {
        let i = p.x + at.y * p.x_stride + at.x;
        x[i] = min(max(x[i], -p.bound), p.bound);
    }
}
