// out[r][i] = x[r][i] / sqrt(mean of squares of x[r] + eps) * weight[i]; one workgroup a row.
//
// Lane l of 64 sums elements l, l + 64, ...; then the lanes are added as a tree.

struct Params {
    width: u32,
    eps: f32,
    x: u32,
    x_stride: u32,
    out: u32,
    out_stride: u32,
    weight: u32,    // byte
    kind: u32,
    rows: u32,
}

@group(0) @binding(0) var<uniform> p: Params;
@group(0) @binding(1) var<storage, read> x: array<f32>;
@group(0) @binding(2) var<storage, read> weights: array<u32>;
@group(0) @binding(3) var<storage, read_write> out: array<f32>;

var<workgroup> partial: array<f32, 64>;

@compute @workgroup_size(64)
fn rms_norm(
    @builtin(workgroup_id) group: vec3<u32>,
    @builtin(num_workgroups) groups: vec3<u32>,
    @builtin(local_invocation_index) lane: u32,
) {
    let row = group.y * groups.x + group.x;
    let begin = p.x + min(row, p.rows - 1u) * p.x_stride;
    var sum = 0.0;
    for (var i = lane; i < p.width; i += 64u) {
        let v = x[begin + i];
        sum = fma(v, v, sum);
    }
    partial[lane] = sum;
    for (var step = 32u; step > 0u; step /= 2u) {
        workgroupBarrier();
        if (lane < step) {
            partial[lane] += partial[lane + step];
        }
    }
    workgroupBarrier();
    let scale = 1.0 / sqrt(partial[0] / f32(p.width) + p.eps);
    if (row < p.rows) {
        for (var i = lane; i < p.width; i += 64u) {
            out[p.out + row * p.out_stride + i] = x[begin + i] * scale * vector_at(p.weight, p.kind, i);
        }
    }
}
