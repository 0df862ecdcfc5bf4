// to[list[2r + 1]] = source[list[2r]], rows of `width` elements.

struct Params {
    width: u32,
    rows: u32,
    source: u32,
    source_stride: u32,
    to: u32,
    to_stride: u32,
    list: u32,
}

@group(0) @binding(0) var<uniform> p: Params;
@group(0) @binding(1) var<storage, read> source: array<f32>;
@group(0) @binding(2) var<storage, read> lists: array<u32>;
@group(0) @binding(3) var<storage, read_write> to: array<f32>;

@compute @workgroup_size(64)
fn copy_rows(@builtin(global_invocation_id) at: vec3<u32>) {
    if (at.x < p.width && at.y < p.rows) {
        let pair = p.list + 2u * at.y;
        to[p.to + lists[pair + 1u] * p.to_stride + at.x] = source[p.source + lists[pair] * p.source_stride + at.x];
    }
}
