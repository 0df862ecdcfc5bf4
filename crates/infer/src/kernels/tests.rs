//! Every kernel against references written another way: elements by formula, products in f64, and the scalar twins.
#![allow(clippy::unwrap_used, reason = "tests")]

use super::table::Isa;
use super::*;
use core::sync::atomic::{AtomicUsize, Ordering};
use overspill::DType::{self, *};
use proptest::prelude::*;

const ALL: [DType; 11] = [F32, F16, BF16, Q4_0, Q4_1, Q5_0, Q5_1, Q8_0, Q4_K, Q5_K, Q6_K];

/// A small generator of our own, so that a seed means the same for ever.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d) >> 11
    }
    /// About normal, variance 1.
    fn float(&mut self) -> f32 {
        (0..12).map(|_| (self.next() % 65536) as f32 / 65536.0).sum::<f32>() - 6.0
    }
    fn floats(&mut self, n: usize) -> Vec<f32> {
        (0..n).map(|_| self.float()).collect()
    }
}

/// f32 to f16 by search among all f16: slow, and independent of the code under test.
fn f16_bits(value: f32) -> u16 {
    let magnitude = (0..0x7c00u16).min_by(|&a, &b| {
        let distance = |bits| (f16(bits) - f64::from(value.abs())).abs();
        distance(a).total_cmp(&distance(b))
    });
    magnitude.unwrap() | if value < 0.0 { 0x8000 } else { 0 }
}

/// An f16 by its definition.
fn f16(bits: u16) -> f64 {
    let (sign, exponent, mantissa) = (bits >> 15, (bits >> 10) & 31, f64::from(bits & 1023));
    let magnitude = match exponent {
        0 => mantissa * 2f64.powi(-24),
        31 if mantissa == 0.0 => f64::INFINITY,
        31 => f64::NAN,
        _ => (1024.0 + mantissa) * 2f64.powi(i32::from(exponent) - 25),
    };
    if sign == 1 { -magnitude } else { magnitude }
}

/// Random bytes of `elements` elements. Bits are random but for float exponents and scales, which stay sensible.
fn weights(dtype: DType, elements: usize, random: &mut Random) -> Vec<u8> {
    let info = dtype.info();
    let groups = elements / info.group_elements as usize;
    let scales: Vec<u16> = (0..16).map(|_| f16_bits(random.float() * 0.02)).collect();
    let mut bytes = Vec::new();
    for _ in 0..groups {
        let mut group: Vec<u8> = (0..info.group_bytes).map(|_| random.next() as u8).collect();
        let scale_at: &[usize] = match dtype {
            F32 | BF16 => {
                let bits = random.float().to_bits().to_le_bytes();
                group.copy_from_slice(if dtype == F32 { &bits } else { &bits[2..] });
                &[]
            }
            F16 | Q4_0 | Q5_0 | Q8_0 => &[0],
            Q4_1 | Q5_1 | Q4_K | Q5_K => &[0, 2],
            Q6_K => &[208],
            other => panic!("no test weights for {other}"),
        };
        for &at in scale_at {
            let scale = scales[random.next() as usize % scales.len()];
            group[at..at + 2].copy_from_slice(&scale.to_le_bytes());
        }
        bytes.extend(group);
    }
    bytes
}

fn bits(bytes: &[u8], bit: usize, width: usize) -> i32 {
    (0..width).map(|i| i32::from(bytes[(bit + i) / 8] >> ((bit + i) % 8) & 1) << i).sum()
}

/// Element `i` of a group, by bit positions.
fn element(dtype: DType, group: &[u8], i: usize) -> f64 {
    let half = |at: usize| f16(u16::from_le_bytes([group[at], group[at + 1]]));
    // 32-element groups: the low half of the elements in low nibbles, the high half in high nibbles.
    let nibble32 = |at: usize| bits(&group[at..], 8 * (i % 16) + 4 * (i / 16), 4);
    // K-quants: 64 elements share 32 bytes.
    let nibble64 = |at: usize| bits(&group[at..], 8 * (32 * (i / 64) + i % 32) + 4 * (i / 32 % 2), 4);
    // 8 scales of 6 bits, then 8 minima: the low 4 (or 6) bits and the high 2 bits apart.
    let six = |which: usize, minimum: usize| {
        let packed = &group[4..16];
        f64::from(if which < 4 {
            bits(packed, 8 * (which + 4 * minimum), 6)
        } else {
            bits(packed, 8 * (which + 4) + 4 * minimum, 4) + 16 * bits(packed, 8 * (which - 4 + 4 * minimum) + 6, 2)
        })
    };
    match dtype {
        F32 => f64::from(f32::from_le_bytes(group.try_into().unwrap())),
        F16 => half(0),
        BF16 => f64::from(f32::from_le_bytes([0, 0, group[0], group[1]])),
        Q4_0 => half(0) * f64::from(nibble32(2) - 8),
        Q4_1 => half(0) * f64::from(nibble32(4)) + half(2),
        Q5_0 => half(0) * f64::from(nibble32(6) + 16 * bits(&group[2..6], i, 1) - 16),
        Q5_1 => half(0) * f64::from(nibble32(8) + 16 * bits(&group[4..8], i, 1)) + half(2),
        Q8_0 => half(0) * f64::from(group[2 + i] as i8),
        Q4_K => half(0) * six(i / 32, 0) * f64::from(nibble64(16)) - half(2) * six(i / 32, 1),
        Q5_K => {
            let q = nibble64(48) + 16 * bits(&group[16 + i % 32..], i / 32, 1);
            half(0) * six(i / 32, 0) * f64::from(q) - half(2) * six(i / 32, 1)
        }
        Q6_K => {
            let (part, within) = (i / 128, i % 128);
            let low = bits(&group[64 * part + within % 64..], 4 * (within / 64), 4);
            let high = bits(&group[128 + 32 * part + within % 32..], 2 * (within / 32), 2);
            half(208) * f64::from(group[192 + i / 16] as i8) * f64::from(low + 16 * high - 32)
        }
        other => panic!("no reference for {other}"),
    }
}

fn reference(dtype: DType, bytes: &[u8]) -> Vec<f64> {
    let info = dtype.info();
    bytes
        .chunks_exact(info.group_bytes as usize)
        .flat_map(|group| (0..info.group_elements as usize).map(|i| element(dtype, group, i)))
        .collect()
}

/// All that can run here, the twins too.
fn isas() -> Vec<Isa> {
    Isa::ALL.iter().copied().filter(|&isa| isa == Isa::Scalar || isa.is_here()).collect()
}

/// Those that must give the bits of the fused twin.
fn fused() -> Vec<Isa> {
    isas().into_iter().filter(|&isa| isa != Isa::Unfused).collect()
}

/// Columns that are whole groups, with an uneven tail where the type allows one.
fn cols_of(dtype: DType, hint: usize) -> usize {
    match dtype.info().group_elements {
        1 => hint,
        group => (hint / 8).max(1).div_ceil(8) * group as usize,
    }
}

struct Case {
    dtype: DType,
    rows: usize,
    cols: usize,
    batch: usize,
    bytes: Vec<u8>,
    x: Vec<f32>,
}

impl Case {
    fn new(dtype: DType, rows: usize, cols: usize, batch: usize, seed: u64) -> Self {
        let mut random = Random(seed | 1);
        // One byte in front, so that nothing is aligned.
        let mut bytes = vec![0xa5];
        bytes.extend(weights(dtype, rows * cols, &mut random));
        let x = random.floats(batch * cols);
        Self { dtype, rows, cols, batch, bytes, x }
    }

    fn weights(&self) -> &[u8] {
        &self.bytes[1..]
    }

    /// The output `[batch][rows + 3]`, untouched columns NaN.
    fn run(
        &self,
        isa: Isa,
        threads: usize,
        activations: Activations,
        cuts: &[usize],
        tokens: core::ops::Range<usize>,
    ) -> Vec<f32> {
        let pool = Pool::new(threads);
        let mut input = Input::new();
        let x = &self.x[tokens.start * self.cols..tokens.end * self.cols];
        input.prepare(&pool, x, tokens.len(), self.cols, self.dtype, activations);
        let row_bytes = self.dtype.row_bytes(self.cols as u64).unwrap() as usize;
        let mut edges = vec![0];
        edges.extend(cuts);
        edges.push(self.rows);
        let pieces: Vec<WeightRows<'_>> = edges
            .windows(2)
            .map(|e| WeightRows {
                row: e[0],
                rows: e[1] - e[0],
                bytes: &self.weights()[e[0] * row_bytes..e[1] * row_bytes],
            })
            .collect();
        let stride = self.rows + 3;
        let mut y = vec![f32::NAN; tokens.len() * stride];
        matmul_with(isa, &pool, self.dtype, self.cols, &pieces, &input, (&mut y, stride));
        for token in y.chunks_exact(stride) {
            assert!(token[..self.rows].iter().all(|y| y.is_finite()), "an output was left out");
            assert!(token[self.rows..].iter().all(|y| y.is_nan()), "written beyond the rows");
        }
        y.chunks_exact(stride).flat_map(|token| token[..self.rows].to_vec()).collect()
    }

    fn whole(&self, isa: Isa, activations: Activations) -> Vec<f32> {
        self.run(isa, 1, activations, &[], 0..self.batch)
    }

    /// (product, sum of magnitudes) in f64.
    fn exact(&self) -> Vec<(f64, f64)> {
        let w = reference(self.dtype, self.weights());
        let mut all = Vec::new();
        for x in self.x.chunks_exact(self.cols) {
            for w in w.chunks_exact(self.cols) {
                let products = w.iter().zip(x).map(|(w, x)| w * f64::from(*x));
                all.push((products.clone().sum(), products.map(f64::abs).sum()));
            }
        }
        all
    }
}

#[test]
fn dequantise_equals_the_formula_for_every_type() {
    decoding_equals_the_formula(&isas());
}

fn decoding_equals_the_formula(isas: &[Isa]) {
    let mut random = Random(7);
    for dtype in ALL {
        let n = 1024 + if dtype.is_float() { 5 } else { 0 };
        let bytes = weights(dtype, n, &mut random);
        let expected = reference(dtype, &bytes);
        for &isa in isas {
            let mut out = vec![f32::NAN; n];
            (isa.kernels(dtype).decode)(&bytes, &mut out);
            for (i, (got, want)) in out.iter().zip(&expected).enumerate() {
                assert_eq!(*got, *want as f32, "{dtype} element {i} with {isa:?}");
            }
        }
    }
}

#[test]
fn every_f16_decodes_exactly() {
    let bytes: Vec<u8> = (0..=u16::MAX).flat_map(u16::to_le_bytes).collect();
    for isa in isas() {
        let mut out = vec![0.0f32; 65536];
        (isa.kernels(F16).decode)(&bytes, &mut out);
        for bits in 0..=u16::MAX {
            let (got, want) = (out[bits as usize], f16(bits));
            assert!(f64::from(got) == want || got.is_nan() && want.is_nan(), "{bits:#x} with {isa:?}");
            assert_eq!(got.is_sign_negative(), bits >> 15 == 1, "{bits:#x}");
        }
    }
}

#[test]
fn f32_products_are_close_to_f64() {
    for dtype in ALL {
        for (cols, batch) in [(512, 1), (1000, 5), (2056, 33)] {
            let case = Case::new(dtype, 37, cols_of(dtype, cols), batch, cols as u64);
            let exact = case.exact();
            for isa in isas() {
                for (i, (got, (want, magnitude))) in case.whole(isa, Activations::F32).iter().zip(&exact).enumerate() {
                    let error = (f64::from(*got) - want).abs();
                    assert!(error <= 1e-6 * magnitude, "{dtype} output {i} with {isa:?}: {got} for {want}");
                }
            }
        }
    }
}

#[test]
fn eight_bit_products_are_near_f64() {
    for dtype in ALL {
        let case = Case::new(dtype, 37, cols_of(dtype, 512), 6, 3);
        let exact = case.exact();
        for isa in isas() {
            for (got, (want, magnitude)) in case.whole(isa, Activations::Q8).iter().zip(&exact) {
                // Half a step of 127 a group, which errors of both signs cross by less than 1 % of the magnitude.
                assert!((f64::from(*got) - want).abs() <= 0.01 * magnitude, "{dtype} with {isa:?}: {got} for {want}");
            }
        }
    }
}

#[test]
fn extreme_integers_do_not_saturate() {
    extreme_integers_give_the_bits_of_the_twin(&fused());
}

fn extreme_integers_give_the_bits_of_the_twin(isas: &[Isa]) {
    // All bits one: the largest nibbles, scales and minima, and -1 in 8 bits; then the largest magnitudes of Q8_0.
    for dtype in ALL.into_iter().filter(|dtype| !dtype.is_float()) {
        for fill in [0xff, 0x7f, 0x80, 0x00] {
            let mut case = Case::new(dtype, 16, 1024, 9, 11);
            let group_bytes = dtype.info().group_bytes as usize;
            for group in case.bytes[1..].chunks_exact_mut(group_bytes) {
                let scales: &[usize] = match dtype {
                    Q6_K => &[208],
                    Q4_1 | Q5_1 | Q4_K | Q5_K => &[0, 2],
                    _ => &[0],
                };
                let kept: Vec<[u8; 2]> = scales.iter().map(|&at| [group[at], group[at + 1]]).collect();
                group.fill(fill);
                for (&at, kept) in scales.iter().zip(kept) {
                    group[at..at + 2].copy_from_slice(&kept);
                }
            }
            for (i, x) in case.x.iter_mut().enumerate() {
                *x = if i / 1024 % 3 == 1 || (i / 1024 % 3 == 2 && i % 2 == 0) { -1.0 } else { 1.0 };
            }
            let twin = case.whole(Isa::Scalar, Activations::Q8);
            for &isa in isas {
                assert_same((dtype, isa), &case.whole(isa, Activations::Q8), &twin);
            }
        }
    }
}

fn assert_same(what: impl core::fmt::Debug, got: &[f32], want: &[f32]) {
    assert_eq!(got.len(), want.len());
    for (i, (got, want)) in got.iter().zip(want).enumerate() {
        assert_eq!(got.to_bits(), want.to_bits(), "{what:?} output {i}: {got} for {want}");
    }
}

#[test]
fn every_tile_gives_the_bits_of_the_twin() {
    tiles_give_the_bits_of_the_twin(&fused());
}

/// Small shapes that reach every tile and more than one panel, so that an emulator is through with them in a minute.
fn tiles_give_the_bits_of_the_twin(isas: &[Isa]) {
    for dtype in ALL {
        let group = dtype.info().group_elements as usize;
        let (wide, narrow) = if group == 1 { (1101, 37) } else { ((1100 / group + 1) * group, group) };
        let shapes = (25..=32).map(|batch| (17, narrow, batch)).chain([(19, wide, 9), (19, wide, 27)]);
        for (rows, cols, batch) in shapes {
            let case = Case::new(dtype, rows, cols, batch, 31);
            for activations in [Activations::F32, Activations::Q8] {
                let twin = case.whole(Isa::Scalar, activations);
                for &isa in isas {
                    assert_same((dtype, batch, isa), &case.whole(isa, activations), &twin);
                }
            }
        }
    }
}

/// A test for each instruction set that many machines lack. It fails where it cannot run, so it is ignored (and shown
/// so) until it is asked for, as `.ci/emulate` does; what this machine has, the tests above try anyway.
#[cfg(target_arch = "x86_64")]
macro_rules! needs {
    ($($isa:ident, $name:ident, $what:literal;)*) => {$(
        #[test]
        #[ignore = $what]
        fn $name() {
            assert!(Isa::$isa.is_here(), $what);
            decoding_equals_the_formula(&[Isa::$isa]);
            extreme_integers_give_the_bits_of_the_twin(&[Isa::$isa]);
            tiles_give_the_bits_of_the_twin(&[Isa::$isa]);
        }
    )*};
}

#[cfg(target_arch = "x86_64")]
needs! {
    Avx512, avx512_gives_the_bits_of_the_twin, "needs AVX-512 F, BW, DQ and VL";
    Avx512Vnni, vnni_gives_the_bits_of_the_twin, "needs AVX-512 VNNI";
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 48, failure_persistence: None, ..ProptestConfig::default() })]

    /// The invariant "same answer everywhere", as far as kernels carry it: the twin, any batch, any cut, any number of
    /// threads give the same bits.
    #[test]
    fn batch_cut_threads_and_twin_give_the_same_bits(
        which in 0usize..11, rows in 1usize..70, hint in 1usize..600, batch in prop_oneof![1usize..14, 14usize..40], seed: u64,
        quantised: bool, cut in 0usize..70, threads in 1usize..4, from in 0usize..40,
    ) {
        let dtype = ALL[which];
        let activations = if quantised { Activations::Q8 } else { Activations::F32 };
        let case = Case::new(dtype, rows, cols_of(dtype, hint), batch, seed);
        let twin = case.whole(Isa::Scalar, activations);
        for isa in isas().into_iter().filter(|&isa| isa != Isa::Scalar) {
            let all = case.whole(isa, activations);
            if isa != Isa::Unfused {
                assert_same((dtype, isa), &all, &twin);
            }
            let cut = cut.min(rows);
            assert_same((dtype, isa), &case.run(isa, threads, activations, &[cut], 0..batch), &all);
            let from = from.min(batch - 1);
            let part = case.run(isa, threads, activations, &[], from..batch);
            assert_same((dtype, isa), &part, &all[from * rows..]);
            let one = case.run(isa, 1, activations, &[cut], from..from + 1);
            assert_same((dtype, isa), &one, &all[from * rows..(from + 1) * rows]);
        }
    }
}

/// Batches, matrices and rows longer than what kernels keep in their caches at a time, with odd remainders.
#[test]
fn long_batches_give_the_bits_of_single_tokens() {
    for (dtype, activations) in [(F16, Activations::F32), (Q4_K, Activations::F32), (Q4_0, Activations::Q8)] {
        let case = Case::new(dtype, 131, cols_of(dtype, 1043), 261, 31);
        let all = case.run(Isa::best(), 2, activations, &[70], 0..case.batch);
        for token in [0, 1, 127, 255, 256, 257, 260] {
            let one = case.run(Isa::best(), 1, activations, &[], token..token + 1);
            assert_same(dtype, &one, &all[token * case.rows..(token + 1) * case.rows]);
        }
    }
}

#[test]
fn quantising_rounds_to_nearest_and_shows_faults() {
    let pool = Pool::new(1);
    let mut random = Random(5);
    for (dtype, group) in [(Q8_0, 32), (Q4_K, 256)] {
        let mut x = random.floats(4 * group);
        x[group..2 * group].fill(0.0);
        x[2 * group + 3] = f32::INFINITY;
        x[3 * group + 5] = f32::NAN;
        let mut input = Input::new();
        input.prepare(&pool, &x, 1, 4 * group, dtype, Activations::Q8);
        let (q, scales, sums) = if group == 32 {
            let token = input.group32(0);
            assert!(token.wide.iter().zip(token.q).all(|(wide, q)| *wide == i16::from(*q)));
            (token.q, token.scales, token.sums.to_vec())
        } else {
            let token = input.group256(0);
            (token.q, token.scales, token.sums.iter().map(|&sum| i32::from(sum)).collect())
        };
        let width = q.len() / sums.len();
        for (sum, q) in sums.iter().zip(q.chunks_exact(width)) {
            assert_eq!(*sum, q.iter().map(|&q| i32::from(q)).sum::<i32>());
        }
        let largest = x[..group].iter().fold(0f32, |m, x| m.max(x.abs()));
        assert_eq!(scales[0], largest / 127.0);
        assert_eq!(q[..group].iter().map(|q| q.unsigned_abs()).max(), Some(127));
        for (x, q) in x[..group].iter().zip(q) {
            assert!((x / scales[0] - f32::from(*q)).abs() <= 0.5001, "{x} became {q}");
        }
        assert_eq!(scales[1], 0.0);
        assert!(scales[2].is_nan() && scales[3].is_nan());
    }
}

#[test]
fn the_pool_runs_each_task_once_however_often() {
    for threads in [1, 2, 3, 8] {
        let pool = Pool::new(threads);
        for round in 0..300 {
            let tasks = round % 40;
            let counts: Vec<AtomicUsize> = (0..tasks).map(|_| AtomicUsize::new(0)).collect();
            pool.run(tasks, &|task| {
                counts[task].fetch_add(1, Ordering::Relaxed);
            });
            assert!(counts.iter().all(|count| count.load(Ordering::Relaxed) == 1));
            if round % 100 == 0 {
                // Long enough for the workers to fall asleep.
                std::thread::sleep(std::time::Duration::from_millis(2));
            }
        }
    }
}

#[test]
fn a_panic_reaches_the_caller_and_the_pool_lives_on() {
    let pool = Pool::new(3);
    for bad in 0..20 {
        let result = std::panic::catch_unwind(core::panic::AssertUnwindSafe(|| {
            pool.run(20, &|task| assert!(task != bad, "task {task} fails"));
        }));
        let message = *result.unwrap_err().downcast::<String>().unwrap();
        assert_eq!(message, format!("task {bad} fails"));
        let sum = AtomicUsize::new(0);
        pool.run(100, &|task| {
            sum.fetch_add(task, Ordering::Relaxed);
        });
        assert_eq!(sum.into_inner(), 4950);
    }
}

#[test]
fn jobs_nest_and_several_callers_share_a_pool() {
    let pool = Pool::new(2);
    let total = AtomicUsize::new(0);
    std::thread::scope(|scope| {
        for _ in 0..4 {
            scope.spawn(|| {
                for _ in 0..50 {
                    pool.run(6, &|_| {
                        pool.run(5, &|_| {
                            total.fetch_add(1, Ordering::Relaxed);
                        });
                    });
                }
            });
        }
    });
    assert_eq!(total.into_inner(), 4 * 50 * 30);
}

#[test]
#[should_panic(expected = "must ascend")]
fn overlapping_pieces_are_refused() {
    let pool = Pool::new(1);
    let mut input = Input::new();
    input.prepare(&pool, &[1.0; 4], 1, 4, F32, Activations::F32);
    let bytes = [0; 32];
    let pieces = [WeightRows { row: 0, rows: 2, bytes: &bytes }, WeightRows { row: 1, rows: 2, bytes: &bytes }];
    matmul(&pool, F32, 4, &pieces, &input, &mut [0.0; 8], 8);
}

#[test]
#[should_panic(expected = "do not fit")]
fn an_output_too_small_is_refused() {
    let pool = Pool::new(1);
    let mut input = Input::new();
    input.prepare(&pool, &[1.0; 8], 2, 4, F32, Activations::F32);
    matmul(&pool, F32, 4, &[WeightRows { row: 0, rows: 2, bytes: &[0; 32] }], &input, &mut [0.0; 3], 2);
}

fn close(got: f32, want: f64, tolerance: f64) {
    assert!((f64::from(got) - want).abs() <= tolerance * want.abs().max(1e-30), "{got} for {want}");
}

#[test]
fn exp_is_within_two_units_of_the_last_place() {
    let mut x = -87.3f32;
    while x < 88.3 {
        let (got, want) = (ops::body::exp::<true>(x), f64::from(x).exp());
        let unit = f64::from(f32::from_bits((want as f32).to_bits() + 1)) - f64::from(want as f32);
        assert!((f64::from(got) - want).abs() <= 2.0 * unit, "e^{x}: {got} for {want}");
        x += 0.0037;
    }
    assert_eq!(ops::body::exp::<true>(0.0), 1.0);
    assert_eq!(ops::body::exp::<true>(-1e9), 0.0);
    assert_eq!(ops::body::exp::<true>(f32::NEG_INFINITY), 0.0);
    assert!(ops::body::exp::<true>(1e9).is_finite());
    assert!(ops::body::exp::<true>(f32::NAN).is_nan());
}

#[test]
fn vector_operations_equal_their_formulas_and_twins() {
    let mut random = Random(17);
    for n in [1, 7, 8, 64, 100, 2048] {
        let (x, w) = (random.floats(n), random.floats(n));
        let wide = |x: &f32| f64::from(*x);
        let mut out = vec![0.0; n];
        ops::rms_norm(&x, &w, 1e-5, &mut out);
        let mean = x.iter().map(|x| wide(x).powi(2)).sum::<f64>() / n as f64;
        for i in 0..n {
            close(out[i], wide(&x[i]) / (mean + 1e-5).sqrt() * wide(&w[i]), 1e-6);
        }
        ops::silu_mul(&x, &w, &mut out);
        for i in 0..n {
            close(out[i], wide(&x[i]) / (1.0 + (-wide(&x[i])).exp()) * wide(&w[i]), 1e-6);
        }
        let magnitude: f64 = x.iter().zip(&w).map(|(a, b)| (wide(a) * wide(b)).abs()).sum();
        let exact: f64 = x.iter().zip(&w).map(|(a, b)| wide(a) * wide(b)).sum();
        assert!((f64::from(ops::dot(&x, &w)) - exact).abs() <= 1e-6 * magnitude);
        out.copy_from_slice(&x);
        ops::softmax(&mut out);
        let largest = x.iter().map(wide).fold(f64::MIN, f64::max);
        let sum: f64 = x.iter().map(|x| (wide(x) - largest).exp()).sum();
        for i in 0..n {
            close(out[i], (wide(&x[i]) - largest).exp() / sum, 2e-6);
        }
        if Isa::best() == Isa::Unfused {
            continue;
        }
        let mut twin = x.clone();
        ops::body::softmax::<true>(&mut twin);
        assert_same(F32, &out, &twin);
        ops::body::rms_norm::<true>(&x, &w, 1e-5, &mut twin);
        ops::rms_norm(&x, &w, 1e-5, &mut out);
        assert_same(F32, &out, &twin);
        ops::body::silu_mul::<true>(&x, &w, &mut twin);
        ops::silu_mul(&x, &w, &mut out);
        assert_same(F32, &out, &twin);
    }
}

#[test]
fn rope_turns_the_pairs_of_both_layouts() {
    let mut random = Random(23);
    let (head, rotary) = (20, 16);
    let x = random.floats(head);
    let theta: Vec<f64> = (0..rotary / 2).map(|i| f64::from(i) * 0.7 - 2.0).collect();
    let angles: Vec<f32> = theta.iter().map(|t| t.cos() as f32).chain(theta.iter().map(|t| t.sin() as f32)).collect();
    let half = rotary as usize / 2;
    for neighbours in [false, true] {
        let mut turned = x.clone();
        if neighbours {
            ops::rope_neighbours(&mut turned, &angles);
        } else {
            ops::rope_halves(&mut turned, &angles);
        }
        for (i, theta) in theta.iter().enumerate() {
            let (a, b) = if neighbours { (2 * i, 2 * i + 1) } else { (i, i + half) };
            let (xa, xb) = (f64::from(x[a]), f64::from(x[b]));
            assert!((f64::from(turned[a]) - (xa * theta.cos() - xb * theta.sin())).abs() < 1e-6);
            assert!((f64::from(turned[b]) - (xb * theta.cos() + xa * theta.sin())).abs() < 1e-6);
        }
        assert_eq!(turned[rotary as usize..], x[rotary as usize..]);
    }
}

#[test]
fn attention_equals_its_formula_and_twin_where_the_cache_wraps() {
    let mut random = Random(29);
    for (head_dim, heads, positions, capacity) in
        [(64, 4, 0..37, 64), (8, 1, 0..1, 1), (128, 3, 50..91, 48), (80, 5, 100..107, 33), (12, 2, 3..30, 27)]
    {
        let (stride, offset) = (2 * head_dim, head_dim);
        let (keys, values) = (random.floats(capacity * stride), random.floats(capacity * stride));
        let q = random.floats(heads * head_dim);
        let kv = ops::KeyValues { keys: &keys, values: &values, stride, offset, capacity };
        let (mut out, mut scratch) = (vec![f32::NAN; q.len()], Vec::new());
        ops::attend(&q, head_dim, &kv, positions.clone(), 0.2, &mut scratch, &mut out);
        for h in 0..heads {
            let row = |data: &[f32], p: usize, d: usize| f64::from(data[p % capacity * stride + offset + d]);
            let score = |p: usize| {
                (0..head_dim).map(|d| f64::from(q[h * head_dim + d]) * row(&keys, p, d)).sum::<f64>()
                    * f64::from(0.2f32)
            };
            let largest = positions.clone().map(score).fold(f64::MIN, f64::max);
            let sum: f64 = positions.clone().map(|p| (score(p) - largest).exp()).sum();
            for d in 0..head_dim {
                let want: f64 = positions.clone().map(|p| (score(p) - largest).exp() / sum * row(&values, p, d)).sum();
                assert!((f64::from(out[h * head_dim + d]) - want).abs() < 1e-5, "head {h} element {d}");
            }
        }
        if Isa::best() != Isa::Unfused {
            let mut twin = vec![f32::NAN; q.len()];
            ops::body::attend::<true>(&q, head_dim, &kv, positions, 0.2, &mut scratch, &mut twin);
            assert_same(F32, &out, &twin);
        }
    }
}
