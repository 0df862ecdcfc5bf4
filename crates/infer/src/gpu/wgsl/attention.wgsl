// out[t][h] = softmax over the positions that t sees of (scale q[t][h] . keys[p]) . values[p]; one workgroup for each
// head of each token.
//
// Positions are taken 64 at a time from the first that the token sees, with a running maximum (Milakov & Gimelshein,
// "Online normalizer calculation for softmax"), so the order of all sums depends on that first position and the
// token's own alone, never on how a prompt is cut into chunks.

const TILE: u32 = 64u;
const HEAD_MAX: u32 = 512u;

struct Params {
    start: u32,         // position of token 0
    heads: u32,
    group: u32,         // query heads of a key head
    head_dim: u32,
    window: u32,        // positions that a token sees, itself included
    capacity: u32,
    kv_stride: u32,
    scale: f32,
    q: u32,
    q_stride: u32,
    out: u32,
    out_stride: u32,
}

@group(0) @binding(0) var<uniform> p: Params;
@group(0) @binding(1) var<storage, read> q: array<f32>;
@group(0) @binding(2) var<storage, read> keys: array<f32>;
@group(0) @binding(3) var<storage, read> values: array<f32>;
@group(0) @binding(4) var<storage, read_write> out: array<f32>;

var<workgroup> query: array<f32, 512>;
var<workgroup> weight: array<f32, 64>;
var<workgroup> partial: array<f32, 64>;

@compute @workgroup_size(64)
fn attention(@builtin(workgroup_id) at: vec3<u32>, @builtin(local_invocation_index) lane: u32) {
    let head = at.x;
    let token = at.y;
    let position = p.start + token;
    let first = position + 1u - min(p.window, position + 1u);
    let kv = (head / p.group) * p.head_dim;
    for (var d = lane; d < p.head_dim; d += TILE) {
        query[d] = q[p.q + token * p.q_stride + head * p.head_dim + d];
    }
    var largest = -3.0e38;
    var total = 0.0;
    var sums: array<f32, 8>;
    for (var tile = first; tile <= position; tile += TILE) {
        workgroupBarrier();
        let seen = min(TILE, position + 1u - tile);
        var score = -3.0e38;
        if (lane < seen) {
            let begin = ((tile + lane) % p.capacity) * p.kv_stride + kv;
            var dot = 0.0;
            for (var d = 0u; d < p.head_dim; d++) {
                dot = fma(query[d], keys[begin + d], dot);
            }
            score = dot * p.scale;
        }
        partial[lane] = score;
        for (var step = TILE / 2u; step > 0u; step /= 2u) {
            workgroupBarrier();
            if (lane < step) {
                partial[lane] = max(partial[lane], partial[lane + step]);
            }
        }
        workgroupBarrier();
        let larger = max(largest, partial[0]);
        let shrink = exp(largest - larger);
        largest = larger;
        weight[lane] = select(0.0, exp(score - larger), lane < seen);
        workgroupBarrier();
        total *= shrink;
        for (var i = 0u; i < seen; i++) {
            total += weight[i];
        }
        for (var k = 0u; k < 8u; k++) {
            let d = lane + TILE * k;
            if (d < p.head_dim) {
                var sum = sums[k] * shrink;
                for (var i = 0u; i < seen; i++) {
                    sum = fma(weight[i], values[((tile + i) % p.capacity) * p.kv_stride + kv + d], sum);
                }
                sums[k] = sum;
            }
        }
    }
    for (var k = 0u; k < 8u; k++) {
        let d = lane + TILE * k;
        if (d < p.head_dim) {
            out[p.out + token * p.out_stride + head * p.head_dim + d] = sums[k] / total;
        }
    }
}
