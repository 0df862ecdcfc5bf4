// to[t][i] += the sum over ranks of weight * parts[row][i], made first, in the order of the ranks.

struct Params {
    width: u32,
    tokens: u32,
    ranks: u32,
    parts: u32,
    parts_stride: u32,
    to: u32,
    to_stride: u32,
    list: u32,          // pairs (row, bits of the weight), [tokens][ranks]
}

@group(0) @binding(0) var<uniform> p: Params;
@group(0) @binding(1) var<storage, read> parts: array<f32>;
@group(0) @binding(2) var<storage, read> lists: array<u32>;
@group(0) @binding(3) var<storage, read_write> to: array<f32>;

@compute @workgroup_size(64)
fn combine(@builtin(global_invocation_id) at: vec3<u32>) {
    if (at.x < p.width && at.y < p.tokens) {
        var sum = 0.0;
        for (var rank = 0u; rank < p.ranks; rank++) {
            let pair = p.list + 2u * (at.y * p.ranks + rank);
            sum = fma(bitcast<f32>(lists[pair + 1u]), parts[p.parts + lists[pair] * p.parts_stride + at.x], sum);
        }
        to[p.to + at.y * p.to_stride + at.x] += sum;
    }
}
