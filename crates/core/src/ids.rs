//! Newtypes for the things that the brain counts, so that mixing two of them up does not compile.

/// Nanoseconds since a start that the body chooses. The brain never asks for the time; it is told.
pub type Nanos = u64;

macro_rules! id {
    ($(#[$doc:meta])* $name:ident($inner:ty)) => {
        $(#[$doc])*
        #[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
        pub struct $name(pub $inner);

        impl $name {
            /// The id as an index into a dense table.
            #[must_use]
            pub const fn index(self) -> usize {
                self.0 as usize
            }
        }

        impl core::fmt::Display for $name {
            fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
                core::fmt::Display::fmt(&self.0, f)
            }
        }
    };
}

id!(
    /// A file of the model, in the order in which the catalog lists them.
    FileId(u32)
);
id!(
    /// A tensor of the catalog.
    TensorId(u32)
);
id!(
    /// A block: the unit that moves and is leased.
    BlockId(u32)
);
id!(
    /// A row table of the catalog (embeddings).
    TableId(u32)
);
id!(
    /// A caching tier (a GPU, host RAM). Disks are not tiers in this sense: they hold everything.
    TierId(u32)
);
id!(
    /// A slot: room for one block in a tier, numbered from 0 within the tier.
    SlotId(u32)
);
id!(
    /// A registered schedule.
    ScheduleId(u32)
);
id!(
    /// A step of a schedule, numbered from 0 in execution order.
    StepId(u32)
);
id!(
    /// A request's cursor through a schedule.
    SequenceId(u32)
);
id!(
    /// A waiting demand.
    Ticket(u64)
);
id!(
    /// A transfer (a read or an upload) that is under way.
    TransferId(u64)
);
