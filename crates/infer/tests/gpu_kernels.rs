//! Every WGSL kernel against its twin in plain Rust, on whatever adapter there is (lavapipe will do). Without one,
//! every test is reported as ignored.
#![allow(clippy::unwrap_used, reason = "tests")]

#[cfg(not(feature = "gpu"))]
fn main() {
    println!("built without the feature `gpu`: nothing to test");
}

#[cfg(feature = "gpu")]
fn main() {
    with_gpu::main();
}

#[cfg(feature = "gpu")]
mod with_gpu {
    use libtest_mimic::{Arguments, Trial};
    use overspill::device::{Choice, GpuContext, adapters};
    use overspill::{BlockId, DType, Piece};
    use overspill_infer::backend::{
        AttentionShape, Backend, Buf, Leases, RopePairs, RopeShape, Route, RowRun, Source, Vector, View, Weights,
    };
    use overspill_infer::gpu::{GpuBackend, GpuKernels, Reduction, twin};
    use overspill_infer::kernels::dequantise;
    use std::sync::Arc;

    const TYPES: [DType; 11] = [
        DType::F32,
        DType::F16,
        DType::BF16,
        DType::Q4_0,
        DType::Q4_1,
        DType::Q5_0,
        DType::Q5_1,
        DType::Q8_0,
        DType::Q4_K,
        DType::Q5_K,
        DType::Q6_K,
    ];

    pub fn main() {
        let arguments = Arguments::from_args();
        let no_adapter = adapters().is_empty();
        let no_subgroups = no_adapter || GpuKernels::with_reduction(&context(), Reduction::Subgroup).is_err();
        let mut trials = Vec::new();
        let mut add = |name: String, ignored: bool, test: Box<dyn FnOnce() + Send>| {
            let run = move || {
                test();
                Ok(())
            };
            trials.push(Trial::test(name, run).with_ignored_flag(ignored));
        };
        for dtype in TYPES {
            for reduction in [Reduction::Barrier, Reduction::Subgroup] {
                let name = format!("matmul_{dtype}_{reduction:?}_equals_its_twin").to_lowercase();
                let ignored = no_adapter || (reduction == Reduction::Subgroup && no_subgroups);
                add(name, ignored, Box::new(move || matmul_equals_its_twin(dtype, reduction)));
            }
            let name = format!("matmul_{dtype}_has_the_same_bits_for_any_batch_cut_and_reduction");
            add(name, no_adapter, Box::new(move || same_bits(dtype, no_subgroups)));
        }
        let rest: [(&str, fn()); 10] = [
            ("columns_that_are_no_whole_unit_are_all_counted", columns_that_are_no_whole_unit),
            ("rms_norm_equals_its_twin", rms_norm),
            ("add_bias_add_limit_and_silu_mul_equal_their_twins", elementwise),
            ("rope_equals_its_twin", rope),
            ("attention_equals_its_twin", attention),
            ("attention_has_the_same_bits_for_any_chunk", attention_in_chunks),
            ("copy_rows_and_combine_equal_their_twins", rows_and_routes),
            ("a_long_write_arrives_and_operations_keep_their_order", writes_and_order),
            ("more_operations_than_a_submission_holds_are_all_done", many_operations),
            ("what_the_gpu_cannot_do_is_an_error", refusals),
        ];
        for (name, test) in rest {
            add(name.to_owned(), no_adapter, Box::new(test));
        }
        libtest_mimic::run(&arguments, trials).exit();
    }

    fn context() -> GpuContext {
        GpuContext::choose(Choice { name: None, allow_software: true }).unwrap()
    }

    fn kernels() -> Arc<GpuKernels> {
        GpuKernels::new(&context()).unwrap()
    }

    fn backend() -> GpuBackend {
        GpuBackend::new(&kernels(), None).unwrap()
    }

    /// Numbers in -1..1, the same every time.
    struct Random(u64);

    impl Random {
        fn bits(&mut self) -> u64 {
            self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            self.0 >> 33
        }

        fn unit(&mut self) -> f32 {
            self.bits() as f32 / (1u64 << 30) as f32 - 1.0
        }

        fn vec(&mut self, n: usize) -> Vec<f32> {
            (0..n).map(|_| self.unit()).collect()
        }
    }

    fn half_bits(value: f32) -> [u8; 2] {
        half::f16::from_f32(value).to_le_bytes()
    }

    /// Bytes of random groups: every bit pattern of the integers, scales of sensible size, negative ones too.
    fn weights(random: &mut Random, dtype: DType, rows: usize, cols: usize) -> Vec<u8> {
        let info = dtype.info();
        let groups = rows * cols / info.group_elements as usize;
        let mut bytes = Vec::new();
        for _ in 0..groups {
            let mut group: Vec<u8> = (0..info.group_bytes).map(|_| random.bits() as u8).collect();
            let halves: &[usize] = match dtype {
                DType::F32 => {
                    group = random.unit().to_le_bytes().to_vec();
                    &[]
                }
                DType::BF16 => {
                    group = half::bf16::from_f32(random.unit()).to_le_bytes().to_vec();
                    &[]
                }
                DType::F16 | DType::Q4_0 | DType::Q5_0 | DType::Q8_0 => &[0],
                DType::Q6_K => &[208],
                _ => &[0, 2],
            };
            for &at in halves {
                group[at..at + 2].copy_from_slice(&half_bits(random.unit()));
            }
            bytes.extend(group);
        }
        bytes
    }

    fn piece(dtype: DType, cols: usize, row: usize, rows: usize) -> Piece {
        let bytes = dtype.row_bytes(cols as u64).unwrap() * rows as u64;
        Piece { block: BlockId(0), row: row as u64, rows: rows as u64, slot_offset: 0, bytes }
    }

    /// The product, with the matrix cut at the given rows.
    fn product(
        kernels: &Arc<GpuKernels>,
        dtype: DType,
        (rows, cols): (usize, usize),
        bytes: &[u8],
        x: &[f32],
        cuts: &[usize],
    ) -> Vec<f32> {
        let mut backend = GpuBackend::new(kernels, None).unwrap();
        let tokens = x.len() / cols;
        let (x_buf, y_buf) = (filled(&mut backend, x), backend.alloc("y", tokens * rows).unwrap());
        let row_bytes = bytes.len() / rows;
        let ends: Vec<usize> = cuts.iter().copied().chain([rows]).collect();
        let starts: Vec<usize> = [0].into_iter().chain(cuts.iter().copied()).collect();
        let pieces: Vec<Piece> = starts.iter().zip(&ends).map(|(&s, &e)| piece(dtype, cols, s, e - s)).collect();
        let parts: Vec<&[u8]> = starts.iter().zip(&ends).map(|(s, e)| &bytes[s * row_bytes..e * row_bytes]).collect();
        let matrix = Weights { dtype, cols, pieces: &pieces, leases: Leases::Host(&parts) };
        backend.matmul(&matrix, View::rows(x_buf, cols), tokens, View::rows(y_buf, rows)).unwrap();
        contents(&mut backend, y_buf, tokens * rows)
    }

    fn filled(backend: &mut GpuBackend, values: &[f32]) -> Buf {
        let buf = backend.alloc("test", values.len()).unwrap();
        backend.write(buf, 0, values).unwrap();
        buf
    }

    fn contents(backend: &mut GpuBackend, buf: Buf, n: usize) -> Vec<f32> {
        let mut values = vec![f32::NAN; n];
        backend.read(buf, 0, &mut values).unwrap();
        values
    }

    fn assert_close(got: &[f32], wanted: &[f32], tolerance: f32) {
        assert_eq!(got.len(), wanted.len());
        let size = wanted.iter().fold(1e-6f32, |a, b| a.max(b.abs()));
        for (i, (got, wanted)) in got.iter().zip(wanted).enumerate() {
            assert!((got - wanted).abs() <= tolerance * size, "element {i}: {got} instead of {wanted} (of {size})");
        }
    }

    fn shape_of(dtype: DType) -> (usize, usize) {
        // Rows that leave a workgroup part empty, and more units than lanes.
        if dtype.is_float() { (37, 200) } else { (37, 1280) }
    }

    fn matmul_equals_its_twin(dtype: DType, reduction: Reduction) {
        let kernels = GpuKernels::with_reduction(&context(), reduction).unwrap();
        let mut random = Random(dtype as u64 + 1);
        let (rows, cols) = shape_of(dtype);
        let bytes = weights(&mut random, dtype, rows, cols);
        for tokens in [1, 11] {
            let x = random.vec(tokens * cols);
            let got = product(&kernels, dtype, (rows, cols), &bytes, &x, &[]);
            assert_close(&got, &twin::matmul(dtype, kernels.lanes() as usize, cols, &bytes, &x), 1e-5);
        }
    }

    fn same_bits(dtype: DType, no_subgroups: bool) {
        let barrier = GpuKernels::with_reduction(&context(), Reduction::Barrier).unwrap();
        let mut random = Random(dtype as u64 + 100);
        let (rows, cols) = shape_of(dtype);
        let bytes = weights(&mut random, dtype, rows, cols);
        let x = random.vec(11 * cols);
        let all = product(&barrier, dtype, (rows, cols), &bytes, &x, &[]);
        assert!(all.iter().all(|v| v.is_finite()));
        assert_eq!(all, product(&barrier, dtype, (rows, cols), &bytes, &x, &[2, 16, 31]), "cut");
        for token in [0, 7, 10] {
            let one = &x[token * cols..(token + 1) * cols];
            let wanted = &all[token * rows..(token + 1) * rows];
            assert_eq!(wanted, product(&barrier, dtype, (rows, cols), &bytes, one, &[]), "token {token}");
        }
        if !no_subgroups {
            let subgroup = GpuKernels::with_reduction(&context(), Reduction::Subgroup).unwrap();
            assert_eq!(all, product(&subgroup, dtype, (rows, cols), &bytes, &x, &[]), "reduction");
        }
    }

    fn columns_that_are_no_whole_unit() {
        let kernels = kernels();
        for (dtype, cols) in [(DType::F32, 13), (DType::F16, 7), (DType::F16, 131), (DType::BF16, 65), (DType::F32, 1)]
        {
            let mut random = Random(cols as u64);
            let bytes = weights(&mut random, dtype, 5, cols);
            let x = random.vec(3 * cols);
            let got = product(&kernels, dtype, (5, cols), &bytes, &x, &[1]);
            assert_close(&got, &twin::matmul(dtype, kernels.lanes() as usize, cols, &bytes, &x), 1e-6);
        }
    }

    fn vector(dtype: DType, len: usize, bytes: &[u8]) -> Vector<'_> {
        Vector { dtype, len, piece: piece(dtype, len, 0, 1), source: Source::Host(bytes) }
    }

    fn rms_norm() {
        let mut backend = backend();
        let mut random = Random(3);
        for (dtype, width, rows) in [(DType::F32, 200, 3), (DType::F16, 64, 70), (DType::BF16, 33, 2)] {
            let bytes = weights(&mut random, dtype, 1, width);
            let mut weight = vec![0.0; width];
            dequantise(dtype, &bytes, &mut weight);
            let x = random.vec(rows * width);
            let (from, to) = (filled(&mut backend, &x), backend.alloc("out", rows * width).unwrap());
            let vector = vector(dtype, width, &bytes);
            backend.rms_norm(View::rows(from, width), rows, &vector, 1e-5, View::rows(to, width)).unwrap();
            let got = contents(&mut backend, to, rows * width);
            assert_close(&got, &twin::rms_norm(&x, &weight, 1e-5), 1e-5);
        }
    }

    fn elementwise() {
        let mut backend = backend();
        let mut random = Random(4);
        let (rows, width) = (5, 130);
        let (a, b) = (random.vec(rows * width), random.vec(rows * width));
        let bias_bytes = weights(&mut random, DType::F16, 1, width);
        let mut bias = vec![0.0; width];
        dequantise(DType::F16, &bias_bytes, &mut bias);
        let (a_buf, b_buf) = (filled(&mut backend, &a), filled(&mut backend, &b));
        let out = backend.alloc("out", rows * width).unwrap();
        let view = |buf| View::rows(buf, width);
        backend.silu_mul(view(a_buf), view(b_buf), rows, width, view(out)).unwrap();
        assert_close(&contents(&mut backend, out, rows * width), &twin::silu_mul(&a, &b), 1e-5);
        // Views within wider rows: only columns 30..80 of rows 1..4 change.
        let part = |buf| View { buf, offset: width + 30, stride: width };
        backend.add(part(a_buf), part(b_buf), 3, 50).unwrap();
        backend.add_bias(view(a_buf), rows, &vector(DType::F16, width, &bias_bytes)).unwrap();
        backend.clamp(view(a_buf), rows, width, 0.75).unwrap();
        let mut wanted = a.clone();
        for row in 1..4 {
            let at = row * width + 30;
            twin::add(&mut wanted[at..at + 50], &b[at..at + 50]);
        }
        twin::add_bias(&mut wanted, &bias);
        twin::limit(&mut wanted, 0.75);
        assert_close(&contents(&mut backend, a_buf, rows * width), &wanted, 1e-6);
        // Gate and up may be two views of one buffer.
        let half = |offset| View { buf: b_buf, offset, stride: width };
        backend.silu_mul(half(0), half(65), rows, 65, View::rows(out, 65)).unwrap();
        let split = |from: usize| b.chunks(width).flat_map(|row| row[from..from + 65].to_vec()).collect::<Vec<_>>();
        assert_close(&contents(&mut backend, out, rows * 65), &twin::silu_mul(&split(0), &split(65)), 1e-5);
    }

    fn rope() {
        let mut random = Random(5);
        let mut backend = backend();
        for pairs in [RopePairs::Halves, RopePairs::Neighbours] {
            for rotary_dim in [48, 20] {
                let shape = RopeShape { tokens: 3, heads: 5, head_dim: 48, rotary_dim, pairs };
                let mut x = random.vec(3 * 5 * 48);
                let angles = random.vec(3 * rotary_dim);
                let (x_buf, angles_buf) = (filled(&mut backend, &x), filled(&mut backend, &angles));
                backend.rope(View::rows(x_buf, 5 * 48), &shape, angles_buf).unwrap();
                twin::rope(&mut x, &shape, &angles);
                assert_close(&contents(&mut backend, x_buf, 3 * 5 * 48), &x, 1e-6);
            }
        }
    }

    fn attend(backend: &mut GpuBackend, q: &[f32], keys: Buf, values: Buf, shape: &AttentionShape) -> Vec<f32> {
        let width = shape.heads * shape.head_dim;
        let (q_buf, out) = (filled(backend, q), backend.alloc("out", q.len()).unwrap());
        backend.attention(View::rows(q_buf, width), keys, values, shape, View::rows(out, width)).unwrap();
        contents(backend, out, q.len())
    }

    fn attention_shape(start: usize, tokens: usize, window: Option<usize>, capacity: usize) -> AttentionShape {
        AttentionShape { tokens, start, heads: 6, kv_heads: 2, head_dim: 80, window, capacity, scale: 0.3 }
    }

    fn attention() {
        let mut backend = backend();
        let mut random = Random(6);
        for (start, tokens, window, capacity) in
            [(0, 1, None, 200), (0, 9, None, 200), (150, 4, None, 200), (150, 9, Some(70), 100), (190, 3, Some(1), 3)]
        {
            let shape = attention_shape(start, tokens, window, capacity);
            let kv = capacity * 160;
            let (keys, values, q) = (random.vec(kv), random.vec(kv), random.vec(tokens * 480));
            let (k, v) = (filled(&mut backend, &keys), filled(&mut backend, &values));
            let got = attend(&mut backend, &q, k, v, &shape);
            assert_close(&got, &twin::attention(&q, &keys, &values, &shape), 1e-5);
        }
    }

    fn attention_in_chunks() {
        let mut backend = backend();
        let mut random = Random(7);
        let (keys, values, q) = (random.vec(200 * 160), random.vec(200 * 160), random.vec(130 * 480));
        let (k, v) = (filled(&mut backend, &keys), filled(&mut backend, &values));
        for window in [None, Some(77)] {
            let whole = attend(&mut backend, &q, k, v, &attention_shape(0, 130, window, 200));
            for (start, end) in [(0, 1), (1, 70), (70, 130)] {
                let shape = attention_shape(start, end - start, window, 200);
                let part = attend(&mut backend, &q[start * 480..end * 480], k, v, &shape);
                assert_eq!(part, whole[start * 480..end * 480], "{window:?} {start}..{end}");
            }
        }
    }

    fn rows_and_routes() {
        let mut backend = backend();
        let mut random = Random(8);
        let width = 70;
        let (from, mut to) = (random.vec(6 * width), random.vec(5 * width));
        let (from_buf, to_buf) = (filled(&mut backend, &from), filled(&mut backend, &to));
        let view = |buf| View::rows(buf, width);
        let runs = [RowRun { from: 4, to: 0, rows: 2 }, RowRun { from: 1, to: 3, rows: 1 }];
        backend.copy_rows(view(from_buf), view(to_buf), width, &runs).unwrap();
        twin::copy_rows(&from, &mut to, width, &[(4, 0), (5, 1), (1, 3)]);
        let routes: Vec<Route> = (0..15).map(|i| Route { row: (i * 7) % 6, weight: random.unit() }).collect();
        backend.combine(view(from_buf), &routes, 5, width, view(to_buf)).unwrap();
        twin::combine(&from, &routes, width, &mut to);
        assert_close(&contents(&mut backend, to_buf, 5 * width), &to, 1e-6);
    }

    fn writes_and_order() {
        let mut backend = backend();
        let mut random = Random(9);
        // More than fits the lists of one submission.
        let values = random.vec(700_001);
        let (a, b) = (filled(&mut backend, &values), backend.alloc("b", 700_001).unwrap());
        let view = |buf| View { buf, offset: 0, stride: 700_001 };
        backend.add(view(b), view(a), 1, 700_001).unwrap();
        backend.write(a, 3, &[5.0; 4]).unwrap();
        backend.add(view(b), view(a), 1, 700_001).unwrap();
        let mut wanted: Vec<f32> = values.iter().map(|v| v + v).collect();
        for i in 3..7 {
            wanted[i] = values[i] + 5.0;
        }
        assert!(contents(&mut backend, b, 700_001) == wanted);
        let mut part = [0.0; 2];
        backend.read(b, 6, &mut part).unwrap();
        assert_eq!(part, wanted[6..8]);
    }

    fn many_operations() {
        let mut backend = backend();
        let (one, sum) = (filled(&mut backend, &[1.0]), backend.alloc("sum", 1).unwrap());
        for _ in 0..3000 {
            backend.add(View::rows(sum, 1), View::rows(one, 1), 1, 1).unwrap();
        }
        assert_eq!(contents(&mut backend, sum, 1), [3000.0]);
    }

    fn refusals() {
        let mut backend = backend();
        let limit = usize::try_from(context().binding_bytes_max() / 4 + 1).unwrap();
        let error = backend.alloc("KV cache", limit).unwrap_err().to_string();
        assert!(error.contains("KV cache") && error.contains("--ctx"), "{error}");
        assert!(backend.alloc("KV cache", usize::MAX).is_err());
        let buf = backend.alloc("b", 4).unwrap();
        let shape = AttentionShape { head_dim: 1024, ..attention_shape(0, 1, None, 1) };
        assert!(backend.attention(View::rows(buf, 1), buf, buf, &shape, View::rows(buf, 1)).is_err());
        let bytes = [0; 18];
        let norm =
            Vector { dtype: DType::Q4_0, len: 32, piece: piece(DType::Q4_0, 32, 0, 1), source: Source::Host(&bytes) };
        assert!(backend.rms_norm(View::rows(buf, 1), 1, &norm, 1e-5, View::rows(buf, 1)).is_err());
        let wrong =
            Vector { dtype: DType::F32, len: 32, piece: piece(DType::F32, 32, 0, 1), source: Source::Host(&bytes) };
        assert!(backend.add_bias(View::rows(buf, 1), 1, &wrong).is_err());
    }
}
