//! Mixtures of experts: the router's choice, and the chosen experts one after the other.
//!
//! A chunk's tokens are sorted by expert, so that each expert is read once a chunk, and each token's shares are added
//! in the order of its router's scores, so that the sum does not depend on which tokens came along. Gates and what they
//! gate are asked for before the matrices that need their result. What is not here: the router's product.

use super::Pass;
use super::work::{ChosenExpert, Routing};
use crate::InferError;
use crate::arch::Experts;
use crate::backend::{Leases, Route, RowRun, View, Weights};
use crate::kernels::ops::softmax;
use crate::plan::{ExpertPieces, Group, half};
use overspill::{BlockId, Piece, StepId};

/// Some rows of one expert's matrix.
#[derive(Clone, Copy, Debug)]
pub(super) struct ExpertRun {
    expert: usize,
    /// 0 and 1 of the first half, or 0 of the second.
    matrix: usize,
    /// The pieces, by their places among the matrix's: the first, and the one after the last.
    begin: usize,
    end: usize,
    /// Whether it ends the half.
    last: bool,
}

/// What each half reads, in the order of the experts, and a set of it; kept between tokens.
#[derive(Debug, Default)]
pub(super) struct Halves {
    first: Vec<ExpertRun>,
    second: Vec<ExpertRun>,
    set: Vec<ExpertRun>,
}

impl ExpertRun {
    fn pieces<'a>(&self, half: &Half<'a>) -> &'a [Piece] {
        let expert = &half.pieces[self.expert];
        let matrix = if half.is_first { &expert.gate_up[self.matrix] } else { &expert.down };
        &matrix[self.begin..self.end]
    }
}

/// A half of an expert step: gates and ups, or downs.
#[derive(Clone, Copy)]
struct Half<'a> {
    experts: &'a Experts,
    step: StepId,
    /// By expert.
    pieces: &'a [ExpertPieces],
    is_first: bool,
}

impl Halves {
    /// Lists what the chosen experts read.
    fn fill(&mut self, routing: &Routing, pieces: &[ExpertPieces]) {
        self.first.clear();
        self.second.clear();
        let chosen = |expert: usize| routing.first[expert] < routing.first[expert + 1];
        for (expert, pieces) in pieces.iter().enumerate().filter(|(expert, _)| chosen(*expert)) {
            let matrices = pieces.gate_up.len();
            for (matrix, pieces) in pieces.gate_up.iter().enumerate() {
                let last = matrix + 1 == matrices;
                self.first.push(ExpertRun { expert, matrix, begin: 0, end: pieces.len(), last });
            }
            self.second.push(ExpertRun { expert, matrix: 0, begin: 0, end: pieces.down.len(), last: true });
        }
    }
}

impl Pass<'_> {
    /// `x += Σ weight · expert(n)` over the experts that each token chooses, with `n` the normed state.
    pub(super) fn experts(
        &mut self,
        experts: &Experts,
        layer: usize,
        router: &Group,
        step: StepId,
        pieces: &[ExpertPieces],
    ) -> Result<(), InferError> {
        let (hidden, tokens) = (self.model.spec().hidden, self.tokens);
        let normed = View::rows(self.work.normed, hidden);
        let count = experts.experts.len();
        self.group(router, normed, tokens, &[View::rows(self.work.router, count)])?;
        self.work.values.resize(tokens * count, 0.0);
        self.backend.read(self.work.router, 0, &mut self.work.values)?;
        self.work.routing.choose(&mut self.work.values, count, experts);
        if let Some(record) = &mut self.work.record {
            let place = |(index, (expert, _)): (usize, &(u32, f32))| ChosenExpert {
                position: self.start + index / experts.used.max(1),
                layer,
                expert: *expert,
            };
            record.extend(self.work.routing.chosen.iter().enumerate().map(place));
        }

        let mut halves = std::mem::take(&mut self.work.halves);
        halves.fill(&self.work.routing, pieces);
        let first = Half { experts, step, pieces, is_first: true };
        let second = Half { is_first: false, ..first };
        self.work.blocks.clear();
        for (half, runs) in [(&first, &halves.first), (&second, &halves.second)] {
            self.work.blocks.extend(runs.iter().flat_map(|run| run.pieces(half).iter().map(|piece| piece.block)));
        }
        self.sequence.expect(step, &self.work.blocks, 1.0)?;
        self.half(&first, &halves.first, &mut halves.set)?;
        self.half(&second, &halves.second, &mut halves.set)?;
        self.work.halves = halves;
        let parts = View::rows(self.work.parts, hidden);
        let x = View::rows(self.work.x, hidden);
        self.backend.combine(parts, &self.work.routing.routes, tokens, hidden, x)
    }

    /// All chosen experts' gates and ups, or downs, in sets of as many blocks as may be leased at once.
    fn half(&mut self, half: &Half<'_>, runs: &[ExpertRun], set: &mut Vec<ExpertRun>) -> Result<(), InferError> {
        let room = self.model.plan().choice_max;
        let mut used = 0;
        set.clear();
        for run in runs {
            let mut rest = *run;
            while rest.end - rest.begin > room - used {
                let cut = rest.begin + room - used;
                if cut > rest.begin {
                    set.push(ExpertRun { end: cut, last: false, ..rest });
                }
                self.compute(half, set)?;
                set.clear();
                used = 0;
                rest.begin = cut;
            }
            used += rest.end - rest.begin;
            set.push(rest);
        }
        self.compute(half, set)
    }

    /// Leases what the runs read, and computes them.
    fn compute(&mut self, half: &Half<'_>, runs: &[ExpertRun]) -> Result<(), InferError> {
        if runs.is_empty() {
            return Ok(());
        }
        self.check_cancelled()?;
        let blocks: &mut Vec<BlockId> = &mut self.work.blocks;
        blocks.clear();
        blocks.extend(runs.iter().flat_map(|run| run.pieces(half).iter().map(|piece| piece.block)));
        let set = self.sequence.acquire_chosen(half.step, blocks)?;
        let mut first = 0;
        for run in runs {
            let leases = Leases::Set { set: &set, first };
            let pieces = run.pieces(half);
            first += pieces.len();
            if half.is_first {
                self.gate_up(half.experts, run, pieces, leases)?;
            } else {
                self.down(half.experts, run, pieces, leases)?;
            }
        }
        self.backend.release(set)
    }

    /// Rows of an expert: the first, and how many.
    fn rows(&self, expert: usize) -> (usize, usize) {
        let first = &self.work.routing.first;
        (first[expert] as usize, (first[expert + 1] - first[expert]) as usize)
    }

    fn gate_up(
        &mut self,
        experts: &Experts,
        run: &ExpertRun,
        pieces: &[Piece],
        leases: Leases<'_>,
    ) -> Result<(), InferError> {
        let mlp = &experts.experts[run.expert];
        let (hidden, width) = (self.model.spec().hidden, mlp.width);
        let (row, rows) = self.rows(run.expert);
        let starts = run.matrix == 0 && pieces.first().is_some_and(|piece| piece.row == 0);
        let x = self.expert_input(row, rows, hidden, starts)?;
        let gate = View::rows(self.work.gate_up, 2 * width);
        let up = View { offset: width, ..gate };
        let matrix = half(mlp, run.matrix);
        let weights = Weights { dtype: matrix.dtype, cols: matrix.cols, pieces, leases };
        self.backend.matmul(&weights, x, rows, if run.matrix == 0 { gate } else { up })?;
        if run.last {
            let gated = View { buf: self.work.gated, offset: row * width, stride: width };
            self.backend.silu_mul(gate, up, rows, width, gated)?;
        }
        Ok(())
    }

    /// The states of an expert's tokens: where they are, or gathered when the expert `starts`.
    fn expert_input(&mut self, row: usize, rows: usize, hidden: usize, starts: bool) -> Result<View, InferError> {
        let work = &mut *self.work;
        let normed = View::rows(work.normed, hidden);
        if rows == self.tokens {
            return Ok(normed);
        }
        let gathered = View::rows(work.gathered, hidden);
        if starts {
            work.runs.clear();
            for (to, &token) in work.routing.token[row..row + rows].iter().enumerate() {
                let from = token as usize;
                match work.runs.last_mut() {
                    Some(run) if run.from + run.rows == from => run.rows += 1,
                    _ => work.runs.push(RowRun { from, to, rows: 1 }),
                }
            }
            self.backend.copy_rows(normed, gathered, hidden, &work.runs)?;
        }
        Ok(gathered)
    }

    fn down(
        &mut self,
        experts: &Experts,
        run: &ExpertRun,
        pieces: &[Piece],
        leases: Leases<'_>,
    ) -> Result<(), InferError> {
        let mlp = &experts.experts[run.expert];
        let (hidden, width) = (self.model.spec().hidden, mlp.width);
        let (row, rows) = self.rows(run.expert);
        let gated = View { buf: self.work.gated, offset: row * width, stride: width };
        let part = View { buf: self.work.parts, offset: row * hidden, stride: hidden };
        let matrix = &mlp.down.matrix;
        let weights = Weights { dtype: matrix.dtype, cols: matrix.cols, pieces, leases };
        self.backend.matmul(&weights, gated, rows, part)
    }
}

impl Routing {
    /// Chooses each token's experts by `scores` (`[tokens][count]`, which become probabilities), and sorts tokens by
    /// expert.
    fn choose(&mut self, scores: &mut [f32], count: usize, experts: &Experts) {
        self.chosen.clear();
        for scores in scores.chunks_exact_mut(count) {
            softmax(scores);
            let begin = self.chosen.len();
            for _ in 0..experts.used {
                // The highest, the first among equals; what is no number comes last.
                let taken = &self.chosen[begin..];
                let mut best: Option<(u32, f32)> = None;
                for (expert, &score) in (0u32..).zip(&*scores) {
                    let higher = best.is_none_or(|(_, b)| score > b || (b.is_nan() && !score.is_nan()));
                    if higher && !taken.iter().any(|(other, _)| *other == expert) {
                        best = Some((expert, score));
                    }
                }
                self.chosen.extend(best);
            }
            if experts.normalise {
                let sum: f32 = self.chosen[begin..].iter().map(|(_, weight)| weight).sum();
                self.chosen[begin..].iter_mut().for_each(|(_, weight)| *weight /= sum);
            }
        }
        self.sort(count, experts.used);
    }

    fn sort(&mut self, count: usize, used: usize) {
        self.first.clear();
        self.first.resize(count + 1, 0);
        for (expert, _) in &self.chosen {
            self.first[*expert as usize + 1] += 1;
        }
        for expert in 0..count {
            self.first[expert + 1] += self.first[expert];
        }
        // `first[e]` serves as the next free row of expert `e`, and is then put back.
        self.token.clear();
        self.token.resize(self.chosen.len(), 0);
        self.routes.clear();
        for (index, &(expert, weight)) in self.chosen.iter().enumerate() {
            let row = self.first[expert as usize];
            self.first[expert as usize] += 1;
            self.token[row as usize] = (index / used) as u32;
            self.routes.push(Route { row, weight });
        }
        self.first.rotate_right(1);
        self.first[0] = 0;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::arch::Matrix;
    use overspill::{DType, TensorId};

    fn experts(used: usize, normalise: bool) -> Experts {
        let router = Matrix { tensor: TensorId(0), unit: 0, dtype: DType::F32, rows: 4, cols: 1 };
        Experts { router, experts: Vec::new(), used, normalise }
    }

    #[test]
    fn tokens_are_sorted_by_expert_and_shares_by_score() {
        let mut routing = Routing::default();
        // Softmax keeps the order; equal scores go to the lower number.
        let mut scores = [0.0, 3.0, 1.0, 2.0, 5.0, 5.0, 0.0, 0.0, 0.0, 9.0, 0.0, 8.0];
        routing.choose(&mut scores, 4, &experts(2, true));
        let experts: Vec<u32> = routing.chosen.iter().map(|c| c.0).collect();
        assert_eq!(experts, [1, 3, 0, 1, 1, 3]);
        assert_eq!(routing.first, [0, 1, 4, 4, 6]);
        assert_eq!(routing.token, [1, 0, 1, 2, 0, 2]);
        let rows: Vec<u32> = routing.routes.iter().map(|r| r.row).collect();
        assert_eq!(rows, [1, 4, 0, 2, 3, 5]);
        assert_eq!(routing.routes[2].weight, 0.5);
        for token in routing.routes.chunks(2) {
            assert!((token[0].weight + token[1].weight - 1.0).abs() < 1e-6);
        }
    }

    #[test]
    fn without_normalisation_weights_are_probabilities() {
        let mut routing = Routing::default();
        routing.choose(&mut [0.0; 4], 4, &experts(2, false));
        assert_eq!(routing.chosen, [(0, 0.25), (1, 0.25)]);
    }

    #[test]
    fn scores_that_are_no_numbers_still_choose_experts_that_exist() {
        let mut routing = Routing::default();
        routing.choose(&mut [f32::NAN; 4], 4, &experts(2, true));
        assert_eq!(routing.first, [0, 1, 2, 2, 2]);
    }
}
