//! A model as far as its bytes and operations go.

/// What a part of a layer is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum PartKind {
    /// Queries, keys, values and the output.
    Attention,
    /// A network that all tokens use.
    Dense,
    /// What scores the experts.
    Router,
    /// Experts that all tokens use.
    SharedExperts,
    /// Experts of which a token uses some.
    Experts,
    /// The output head.
    Head,
}

impl PartKind {
    /// All of them, in the order of reports.
    pub const ALL: [Self; 6] =
        [Self::Attention, Self::Dense, Self::Router, Self::SharedExperts, Self::Experts, Self::Head];

    /// As reports say it.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Attention => "attention",
            Self::Dense => "dense network",
            Self::Router => "router",
            Self::SharedExperts => "shared experts",
            Self::Experts => "experts",
            Self::Head => "head",
        }
    }
}

/// Matrices that are used together, in the order of execution.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Part {
    /// What it is.
    pub kind: PartKind,
    /// Its layer; of the head, the number of layers.
    pub layer: u32,
    /// Bytes of one unit: of an expert, or of all there is.
    pub bytes: u64,
    /// Weights of one unit; a token multiplies and adds once for each.
    pub parameters: u64,
    /// Experts; 1 for what all tokens use.
    pub units: u32,
    /// How many of them a token uses.
    pub used: u32,
    /// Matrix products of a unit.
    pub products: u32,
    /// Slots that a unit takes in the engine; 0 if nobody knows, then [`ModelShape::padding`] counts.
    pub slots: u32,
}

/// What a layer remembers of each position.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct KvShape {
    /// Values of a position: keys and values of all heads.
    pub elements: u64,
    /// Positions that a token sees, if not all.
    pub window: Option<u64>,
    /// Elements of the queries of a token: what attention computes with for each position.
    pub query_elements: u64,
}

/// See the module.
#[derive(Clone, Debug, PartialEq)]
pub struct ModelShape {
    /// Its name, for people.
    pub label: String,
    /// The architecture's name.
    pub architecture: String,
    /// Weights of all tensors.
    pub parameters: u64,
    /// Bytes of all tensors, embeddings included.
    pub bytes: u64,
    /// Elements of a token's state.
    pub hidden: u64,
    /// Rows of the head.
    pub vocabulary: u64,
    /// Positions that the model was made for.
    pub context: u64,
    /// Layers.
    pub layers: u32,
    /// The parts, in the order of execution; the head is last.
    pub parts: Vec<Part>,
    /// Bytes of norms and biases, which are held all the time.
    pub standing_bytes: u64,
    /// Bytes of an embedding's row.
    pub row_bytes: u64,
    /// By layer.
    pub kv: Vec<KvShape>,
    /// Bytes of an element of the cache of keys and values.
    pub kv_element_bytes: u64,
    /// Bytes of activations for each token of a chunk.
    pub activation_bytes: u64,
    /// Bytes of a slot: the unit that the engine moves.
    pub slot_bytes: u64,
    /// Bytes of all slots over the bytes in them; 1 or more.
    pub padding: f64,
}

impl ModelShape {
    /// T: distinct weight bytes that one token's step reads.
    #[must_use]
    pub fn touched_bytes(&self) -> u64 {
        let parts = self.parts.iter().map(|part| part.bytes.saturating_mul(u64::from(part.used)));
        parts.fold(self.standing_bytes.saturating_add(self.row_bytes), u64::saturating_add)
    }

    /// Bytes of all blocks: everything but tables of which rows are gathered.
    #[must_use]
    pub fn block_bytes(&self) -> u64 {
        let parts = self.parts.iter().map(|part| part.bytes.saturating_mul(u64::from(part.units)));
        parts.fold(self.standing_bytes, u64::saturating_add)
    }

    /// Bytes of what every token uses.
    #[must_use]
    pub fn common_bytes(&self) -> u64 {
        let common = self.parts.iter().filter(|part| part.units == 1).map(|part| part.bytes);
        common.fold(self.standing_bytes, u64::saturating_add)
    }

    /// Bytes of experts of which a token uses some.
    #[must_use]
    pub fn expert_bytes(&self) -> u64 {
        self.block_bytes() - self.common_bytes()
    }

    /// Whether tokens choose what they use.
    #[must_use]
    pub fn is_mixture(&self) -> bool {
        self.parts.iter().any(|part| part.used < part.units)
    }

    /// Multiplications and additions of a token, attention over the past apart: two for each weight used.
    #[must_use]
    pub fn flops_per_token(&self) -> u64 {
        let parts = self.parts.iter().map(|p| p.parameters.saturating_mul(2 * u64::from(p.used)));
        parts.fold(0, u64::saturating_add)
    }

    /// Bytes of the cache of keys and values for so many positions, written in chunks of `chunk`.
    #[must_use]
    pub fn kv_bytes(&self, positions: u64, chunk: u64) -> u64 {
        let layer = |kv: &KvShape| {
            let rows = kv.window.map_or(positions, |w| positions.min(w.saturating_add(chunk.saturating_sub(1))));
            rows.saturating_mul(kv.elements).saturating_mul(self.kv_element_bytes)
        };
        self.kv.iter().map(layer).fold(0, u64::saturating_add)
    }

    /// The most positions whose cache takes no more than so many bytes, as far as the model was made for.
    #[must_use]
    pub fn positions_in(&self, bytes: u64, chunk: u64) -> u64 {
        let (mut low, mut high) = (0, self.context);
        while low < high {
            let middle = low + (high - low).div_ceil(2);
            if self.kv_bytes(middle, chunk) <= bytes { low = middle } else { high = middle - 1 }
        }
        low
    }

    /// Bytes of activations of a chunk, and of its last token's logits.
    #[must_use]
    pub fn scratch_bytes(&self, chunk: u64) -> u64 {
        self.activation_bytes.saturating_mul(chunk).saturating_add(self.vocabulary.saturating_mul(4))
    }

    /// Bytes of weights in a stretch of slots, as the brain fills a memory: first what all tokens use, the fullest slots
    /// before the emptier ones.
    #[must_use]
    pub fn bytes_in_slots(&self, from_bytes: u64, to_bytes: u64) -> u64 {
        let slot = self.slot_bytes.max(1) as f64;
        let fill = |part: &Part| match part.slots {
            0 => 1.0 / self.padding,
            slots => part.bytes as f64 / (f64::from(slots) * slot),
        };
        let mut parts: Vec<(bool, f64, f64)> = self
            .parts
            .iter()
            .map(|part| (part.units > 1, fill(part), part))
            .map(|(chosen, fill, part)| (chosen, fill, part.bytes as f64 * f64::from(part.units) / fill.max(1e-9)))
            .collect();
        parts.sort_by(|a, b| a.0.cmp(&b.0).then(b.1.total_cmp(&a.1)));
        let standing = (false, 1.0 / self.padding, self.standing_bytes as f64 * self.padding);
        let (mut at, mut bytes) = (0.0f64, 0.0f64);
        for (_, fill, length) in std::iter::once(standing).chain(parts) {
            let overlap = (at + length).min(to_bytes as f64) - at.max(from_bytes as f64);
            bytes += overlap.max(0.0) * fill;
            at += length;
        }
        bytes as u64
    }

    /// A budget of the host that holds all blocks, with the padding of their slots and the cache of rows.
    #[must_use]
    pub fn bytes_in_memory(&self) -> u64 {
        let blocks = ((self.block_bytes() as f64 * self.padding) as u64).saturating_add(self.slot_bytes);
        blocks.saturating_add((blocks / 63).min(1 << 20))
    }

    /// The fewest bytes of a tier that computes: what is held all the time, and a block.
    #[must_use]
    pub fn least_bytes(&self) -> u64 {
        let slots = self.standing_bytes.div_ceil(self.slot_bytes.max(1)).saturating_add(1);
        let blocks = slots.saturating_mul(self.slot_bytes);
        // The row cache takes a sixty-fourth, at most a MiB.
        blocks.saturating_add((blocks / 63).min(1 << 20))
    }

    /// The same model with its matrices stored in so many bytes together, each in proportion: for files that mix
    /// element types.
    #[must_use]
    pub fn scaled_to(&self, bytes: u64) -> Self {
        let factor = bytes as f64 / self.bytes.max(1) as f64;
        let scale = |value: u64| (value as f64 * factor) as u64;
        let mut scaled = Self { bytes, row_bytes: scale(self.row_bytes), ..self.clone() };
        scaled.standing_bytes = scale(self.standing_bytes);
        scaled.parts.iter_mut().for_each(|part| part.bytes = scale(part.bytes));
        scaled
    }
}
