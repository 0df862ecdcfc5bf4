//! A model's steps: which blocks each reads, in the order of execution, none larger than the budget likes.
//!
//! Matrices that are used next to each other form a group (queries, keys and values; the output; gate and up; down; the
//! router; the head), and a group's pieces are cut into steps. Experts form one step a layer from which a token's are
//! chosen. Norms and biases are held all the time. The engine gets the steps as a schedule; the decoder follows
//! [`Plan`], which says what each step's leases are for. What is not here: leases, and arithmetic.

use crate::arch::{Attention, Ffn, GateUp, Matrix, Mixer, Mlp, ModelSpec, VectorSpec};
use overspill::{BlockId, Catalog, Piece, Schedule, Step, StepId, TierId};

/// Some rows of one of a group's matrices, all in one step.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Run {
    /// Which of the group's matrices.
    pub matrix: usize,
    /// The first piece's place among the step's leases.
    pub first: usize,
    /// The pieces, ascending.
    pub pieces: Vec<Piece>,
}

/// A step of a group.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct GroupStep {
    /// Its number in the schedule.
    pub step: StepId,
    /// What its leases are for, in order.
    pub runs: Vec<Run>,
}

/// Matrices that are used next to each other, and the steps that read them.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Group {
    /// The matrices.
    pub matrices: Vec<Matrix>,
    /// The steps, in order.
    pub steps: Vec<GroupStep>,
}

/// The pieces of one expert: of gate and up (two matrices, or one), and of down.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ExpertPieces {
    /// Of each matrix of the first half.
    pub gate_up: Vec<Vec<Piece>>,
    /// Of the second half.
    pub down: Vec<Piece>,
}

/// The steps of a layer's mixer.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum MixerPlan {
    /// Attention: queries, keys and values; then the output.
    Attention {
        /// q, k, v.
        qkv: Group,
        /// o.
        o: Group,
    },
}

/// The steps of a layer's feed-forward network.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum FfnPlan {
    /// One network.
    Dense {
        /// Gate and up.
        gate_up: Group,
        /// Down.
        down: Group,
    },
    /// A router, then a choice of experts.
    Experts {
        /// The router.
        router: Group,
        /// The step whose blocks are all experts'.
        step: StepId,
        /// By expert.
        pieces: Vec<ExpertPieces>,
    },
}

/// The steps of a layer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LayerPlan {
    /// The mixer's.
    pub mixer: MixerPlan,
    /// The feed-forward network's.
    pub ffn: FfnPlan,
}

/// The steps of a model.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Plan {
    /// By layer.
    pub layers: Vec<LayerPlan>,
    /// The head.
    pub head: Group,
    /// Steps before the head's: those of a prompt chunk that needs no logits.
    pub steps_before_head: usize,
    /// All steps.
    pub steps: Vec<Step>,
    /// Blocks that are held all the time.
    pub standing: Vec<BlockId>,
    /// Most blocks that are chosen of an expert step at once.
    pub choice_max: usize,
}

impl Plan {
    /// Cuts a model into steps of at most `step_bytes` (or one block, if that is larger), computed in `tier`.
    #[must_use]
    pub fn new(spec: &ModelSpec, catalog: &Catalog, tier: TierId, step_bytes: u64) -> Self {
        let step_blocks = usize::try_from(step_bytes / catalog.slot_bytes().max(1)).unwrap_or(usize::MAX).max(1);
        let mut cutter = Cutter { catalog, tier, step_blocks, steps: Vec::new() };
        let layers = spec.layers.iter().map(|layer| cutter.layer(&layer.mixer, &layer.ffn)).collect();
        let steps_before_head = cutter.steps.len();
        let head = cutter.group(&[spec.head]);
        let steps = cutter.steps;
        Self { layers, head, steps_before_head, steps, standing: standing(spec, catalog), choice_max: step_blocks }
    }

    /// The schedule of a step that gives logits (`head`), or of a prompt chunk that gives none.
    #[must_use]
    pub fn schedule(&self, label: &str, head: bool) -> Schedule {
        let steps = if head { &self.steps[..] } else { &self.steps[..self.steps_before_head] };
        Schedule { label: label.to_owned(), cyclic: true, steps: steps.to_vec(), standing: self.standing.clone() }
    }
}

struct Cutter<'a> {
    catalog: &'a Catalog,
    tier: TierId,
    /// Most blocks of a step. A matrix's block takes one slot.
    step_blocks: usize,
    steps: Vec<Step>,
}

impl Cutter<'_> {
    fn pieces(&self, matrix: &Matrix) -> Vec<Piece> {
        self.catalog.pieces(matrix.tensor, matrix.unit)
    }

    fn push(&mut self, blocks: Vec<BlockId>, choice_max: u32) -> StepId {
        self.steps.push(Step { tier: self.tier, blocks, choice_max });
        StepId(self.steps.len() as u32 - 1)
    }

    fn group(&mut self, matrices: &[Matrix]) -> Group {
        let all: Vec<(usize, Piece)> = matrices
            .iter()
            .enumerate()
            .flat_map(|(m, matrix)| self.pieces(matrix).into_iter().map(move |p| (m, p)))
            .collect();
        // As even as can be, so that no small step is left over.
        let count = all.len().div_ceil(self.step_blocks).max(1);
        let mut steps = Vec::with_capacity(count);
        for part in all.chunks(all.len().div_ceil(count).max(1)) {
            let step = self.push(part.iter().map(|(_, piece)| piece.block).collect(), 0);
            let mut runs: Vec<Run> = Vec::new();
            for (place, &(matrix, piece)) in part.iter().enumerate() {
                match runs.last_mut() {
                    Some(run) if run.matrix == matrix => run.pieces.push(piece),
                    _ => runs.push(Run { matrix, first: place, pieces: vec![piece] }),
                }
            }
            steps.push(GroupStep { step, runs });
        }
        Group { matrices: matrices.to_vec(), steps }
    }

    fn layer(&mut self, mixer: &Mixer, ffn: &Ffn) -> LayerPlan {
        let mixer = match mixer {
            Mixer::Attention(Attention { q, k, v, o, .. }) => {
                let qkv = self.group(&[q.matrix, k.matrix, v.matrix]);
                MixerPlan::Attention { qkv, o: self.group(&[o.matrix]) }
            }
        };
        let ffn = match ffn {
            Ffn::Dense(mlp) => {
                let gate_up = self.group(&halves(mlp));
                FfnPlan::Dense { gate_up, down: self.group(&[mlp.down.matrix]) }
            }
            Ffn::Experts(experts) => {
                let router = self.group(&[experts.router]);
                let pieces: Vec<ExpertPieces> = (experts.experts.iter())
                    .map(|mlp| ExpertPieces {
                        gate_up: halves(mlp).iter().map(|matrix| self.pieces(matrix)).collect(),
                        down: self.pieces(&mlp.down.matrix),
                    })
                    .collect();
                let of =
                    |e: &ExpertPieces| e.gate_up.iter().flatten().chain(&e.down).map(|p| p.block).collect::<Vec<_>>();
                let blocks: Vec<BlockId> = pieces.iter().flat_map(of).collect();
                let choice_max = self.step_blocks.min(blocks.len());
                let step = self.push(blocks, u32::try_from(choice_max).unwrap_or(u32::MAX));
                FfnPlan::Experts { router, step, pieces }
            }
        };
        LayerPlan { mixer, ffn }
    }
}

/// The matrices of a network's first half.
#[must_use]
pub fn halves(mlp: &Mlp) -> Vec<Matrix> {
    match mlp.gate_up {
        GateUp::Separate { gate, up } => vec![gate.matrix, up.matrix],
        GateUp::Fused(matrix) => vec![matrix],
    }
}

/// One of [`halves`]; the last for an index beyond.
#[must_use]
pub(crate) fn half(mlp: &Mlp, index: usize) -> Matrix {
    match mlp.gate_up {
        GateUp::Separate { gate, up } => [gate.matrix, up.matrix][index.min(1)],
        GateUp::Fused(matrix) => matrix,
    }
}

/// The norms and biases of a model.
pub(crate) fn vectors(spec: &ModelSpec) -> Vec<VectorSpec> {
    let mut all = vec![spec.final_norm];
    for layer in &spec.layers {
        all.extend([layer.mixer_norm, layer.ffn_norm]);
        match &layer.mixer {
            Mixer::Attention(attention) => {
                all.extend(
                    [attention.q, attention.k, attention.v, attention.o].iter().filter_map(|linear| linear.bias),
                );
                all.extend(attention.qk_norm.iter().flat_map(|norm| [norm.q, norm.k]));
            }
        }
        match &layer.ffn {
            Ffn::Dense(mlp) => {
                if let GateUp::Separate { gate, up } = &mlp.gate_up {
                    all.extend([gate, up].iter().filter_map(|linear| linear.bias));
                }
                all.extend(mlp.down.bias);
            }
            // Experts of these architectures have no biases.
            Ffn::Experts(_) => {}
        }
    }
    all
}

fn standing(spec: &ModelSpec, catalog: &Catalog) -> Vec<BlockId> {
    let pieces = vectors(spec).into_iter().flat_map(|vector| catalog.pieces(vector.tensor, 0));
    let mut blocks: Vec<BlockId> = pieces.map(|piece| piece.block).collect();
    blocks.sort_unstable();
    blocks.dedup();
    blocks
}
