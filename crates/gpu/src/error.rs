//! What can go wrong with a GPU. No retrying and no fallback here: the engine decides that.

/// Why the GPU tier cannot do what it was asked for.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum GpuError {
    /// This build has no graphics API for this system.
    #[error("this build of overspill has no graphics API for this system: use --device cpu, or a build with Vulkan")]
    NoBackend,
    /// No adapter, or none of the wanted name.
    #[error("{}", no_adapter(wanted.as_deref(), found))]
    NoAdapter {
        /// The name asked for.
        wanted: Option<String>,
        /// What there is.
        found: Vec<String>,
    },
    /// The adapter gives no device.
    #[error("adapter '{adapter}' gives no device: {message}; update its driver, or choose another with --adapter")]
    NoDevice {
        /// The adapter.
        adapter: String,
        /// What wgpu says.
        message: String,
    },
    /// The GPU has no memory left.
    #[error("the GPU is out of memory at {what} ({bytes} bytes): lower --vram, or close what else uses the GPU")]
    OutOfMemory {
        /// What was being allocated.
        what: String,
        /// How much.
        bytes: u64,
    },
    /// The device is gone: reset, unplugged, or its driver crashed.
    #[error("the GPU '{adapter}' was lost: {reason}; restart, and look at the system log for driver errors")]
    DeviceLost {
        /// The adapter.
        adapter: String,
        /// What the driver says.
        reason: String,
    },
    /// wgpu refused an operation: a bug of ours, or a limit of the adapter that was not foreseen.
    #[error("the GPU refused {what}: {message}")]
    Refused {
        /// The operation.
        what: String,
        /// What wgpu says.
        message: String,
    },
    /// A range that does not lie within its buffer, or is not made of whole words.
    #[error("upload of {len} bytes to offset {offset} does not fit: {cause}")]
    Range {
        /// Where it was to begin, in the destination.
        offset: u64,
        /// Its length.
        len: u64,
        /// Which rule it breaks.
        cause: &'static str,
    },
    /// The operation was cancelled before it began.
    #[error("the upload was cancelled before it began")]
    Cancelled,
    /// The tier is being shut down.
    #[error("the GPU tier is closed")]
    Closed,
}

fn no_adapter(wanted: Option<&str>, found: &[String]) -> String {
    let have = if found.is_empty() { "none at all".to_owned() } else { found.join(", ") };
    match wanted {
        Some(name) => format!("no GPU adapter's name contains '{name}'; there is: {have}"),
        None if found.is_empty() => "no GPU adapter: install a Vulkan driver, or use --device cpu".to_owned(),
        None => format!(
            "no real GPU, only software adapters ({have}), which are slower than the CPU: use --device cpu, or name \
             one with --adapter"
        ),
    }
}
