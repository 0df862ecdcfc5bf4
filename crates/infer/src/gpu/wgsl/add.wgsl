// to[r][i] += source[r][i].

struct Params {
    width: u32,
    rows: u32,
    to: u32,
    to_stride: u32,
    source: u32,
    source_stride: u32,
}

@group(0) @binding(0) var<uniform> p: Params;
@group(0) @binding(1) var<storage, read> source: array<f32>;
@group(0) @binding(2) var<storage, read_write> to: array<f32>;

@compute @workgroup_size(64)
fn add(@builtin(global_invocation_id) at: vec3<u32>) {
    if (at.x < p.width && at.y < p.rows) {
        to[p.to + at.y * p.to_stride + at.x] += source[p.source + at.y * p.source_stride + at.x];
    }
}
