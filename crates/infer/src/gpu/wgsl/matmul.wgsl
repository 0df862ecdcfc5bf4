// y[t][row] = sum over columns of weights[row][c] * x[t][c], for rows that lie one after the other.
//
// LANES invocations share a row. Lane l takes units l, l + LANES, l + 2 LANES, ... of UNIT columns and adds them into
// four sums; the four are added, then the lanes as a tree. Every product is added by fma, so that a compiler has
// nothing left to fuse, and an output's bits depend on its row and token alone. TOKENS tokens share one decoding.

struct Params {
    weights: u32,   // byte of the first row
    row_bytes: u32,
    rows: u32,
    units: u32,     // whole units of a row
    tail: u32,      // columns after them
    x: u32,         // element of the first token
    x_stride: u32,
    y: u32,         // element of the first token's first row
    y_stride: u32,
    tokens: u32,
}

@group(0) @binding(0) var<uniform> p: Params;
@group(0) @binding(1) var<storage, read> weights: array<u32>;
@group(0) @binding(2) var<storage, read> x: array<f32>;
@group(0) @binding(3) var<storage, read_write> y: array<f32>;

const WIDTH: u32 = LANES * ROWS;

@compute @workgroup_size(LANES * ROWS)
fn matmul(
    @builtin(workgroup_id) group: vec3<u32>,
    @builtin(num_workgroups) groups: vec3<u32>,
    INDEX_BUILTINS
) {
    let index = INDEX;
    let lane = index % LANES;
    let row = (group.y * groups.x + group.x) * ROWS + index / LANES;
    let first = group.z * TOKENS;
    let base = p.weights + min(row, p.rows - 1u) * p.row_bytes;

    var sums: array<vec4<f32>, TOKENS>;
    var w: array<vec4<f32>, UNIT4>;
    for (var unit = lane; unit < p.units; unit += LANES) {
        decode(base, unit, &w);
        for (var t = 0u; t < TOKENS; t++) {
            if (first + t < p.tokens) {
                let at = p.x + (first + t) * p.x_stride + unit * (4u * UNIT4);
                var sum = sums[t];
                for (var j = 0u; j < UNIT4; j++) {
                    let a = at + 4u * j;
                    sum = fma(w[j], vec4<f32>(x[a], x[a + 1u], x[a + 2u], x[a + 3u]), sum);
                }
                sums[t] = sum;
            }
        }
    }
    TAIL
    var lanes: array<f32, TOKENS>;
    for (var t = 0u; t < TOKENS; t++) {
        lanes[t] = (sums[t].x + sums[t].z) + (sums[t].y + sums[t].w);
    }
    REDUCE
    if (lane == 0u && row < p.rows) {
        for (var t = 0u; t < TOKENS; t++) {
            if (first + t < p.tokens) {
                y[p.y + (first + t) * p.y_stride + row] = lanes[t];
            }
        }
    }
}
