//! The device: choosing an adapter, opening it, and turning wgpu's ways of failing into errors.
//!
//! wgpu reports errors through scopes, callbacks and panics. [`GpuContext::guarded`] and [`GpuContext::wait`] are the
//! two places that know; everything else in the tier gets a `Result`.

use crate::error::GpuError;
use parking_lot::Mutex;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::time::{Duration, Instant};

/// Bindings stay below this, because kernels index words with 32 bits and some drivers count bytes with 31.
const BINDING_BYTES_MAX: u64 = (2 << 30) - 256;

/// Which adapter to open.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Choice<'a> {
    /// Part of the adapter's name, in any case. A named adapter may be a software one.
    pub name: Option<&'a str>,
    /// Whether a software adapter will do if there is no real GPU.
    pub allow_software: bool,
}

/// What is known of an adapter without opening it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct AdapterSummary {
    /// Its name.
    pub name: String,
    /// The graphics API (`vulkan`, `metal`, `dx12`).
    pub backend: String,
    /// `discrete`, `integrated`, `virtual`, `software` or `other`.
    pub kind: &'static str,
    /// Driver and its version.
    pub driver: String,
    /// Whether the CPU does the work.
    pub is_software: bool,
    /// Whether it shares its memory with the CPU.
    pub is_unified: bool,
    /// The largest buffer that it makes, in bytes.
    pub buffer_bytes_max: u64,
    /// The largest part of a buffer that a kernel can see at once, in bytes.
    pub binding_bytes_max: u64,
    /// Whether kernels can exchange values within a subgroup.
    pub has_subgroups: bool,
    /// Bytes of its memory, if its driver says.
    pub memory_bytes: Option<u64>,
}

impl AdapterSummary {
    fn of(adapter: &wgpu::Adapter) -> Self {
        let (info, limits) = (adapter.get_info(), adapter.limits());
        let kind = match info.device_type {
            wgpu::DeviceType::DiscreteGpu => "discrete",
            wgpu::DeviceType::IntegratedGpu => "integrated",
            wgpu::DeviceType::VirtualGpu => "virtual",
            wgpu::DeviceType::Cpu => "software",
            wgpu::DeviceType::Other => "other",
        };
        Self {
            backend: info.backend.to_string(),
            kind,
            driver: format!("{} {}", info.driver, info.driver_info).trim().to_owned(),
            is_software: is_software(&info),
            is_unified: info.device_type == wgpu::DeviceType::IntegratedGpu,
            buffer_bytes_max: limits.max_buffer_size,
            binding_bytes_max: limits.max_storage_buffer_binding_size,
            has_subgroups: adapter.features().contains(wgpu::Features::SUBGROUP),
            memory_bytes: crate::sys::memory_bytes(adapter),
            name: info.name,
        }
    }

    fn rank(&self) -> u32 {
        match self.kind {
            "discrete" => 0,
            "integrated" => 1,
            "virtual" => 2,
            "other" => 3,
            _ => 4,
        }
    }
}

fn is_software(info: &wgpu::AdapterInfo) -> bool {
    info.device_type == wgpu::DeviceType::Cpu
}

fn instance() -> Option<wgpu::Instance> {
    if wgpu::Instance::enabled_backend_features().is_empty() {
        return None; // Instance::new would panic.
    }
    let mut descriptor = wgpu::InstanceDescriptor::new_without_display_handle();
    // Validation layers only when asked for: they multiply the cost of every call.
    descriptor.flags = wgpu::InstanceFlags::empty().with_env();
    Some(wgpu::Instance::new(descriptor))
}

fn enumerate(instance: &wgpu::Instance) -> Vec<(AdapterSummary, wgpu::Adapter)> {
    let adapters = pollster::block_on(instance.enumerate_adapters(wgpu::Backends::all()));
    let mut found: Vec<_> = adapters.into_iter().map(|adapter| (AdapterSummary::of(&adapter), adapter)).collect();
    found.sort_by_key(|(summary, _)| summary.rank()); // stable: the system's order within a kind
    found
}

/// All adapters of this machine, real GPUs first. Empty if there is no driver, or no API in this build.
#[must_use]
pub fn adapters() -> Vec<AdapterSummary> {
    instance().map_or_else(Vec::new, |instance| enumerate(&instance).into_iter().map(|(s, _)| s).collect())
}

/// Pauses between two looks at the GPU.
const WAIT_PAUSE_MIN: Duration = Duration::from_micros(20);
const WAIT_PAUSE_MAX: Duration = Duration::from_micros(500);

/// What went wrong with the device since it was opened.
#[derive(Debug, Default)]
struct Faults {
    lost: Mutex<Option<String>>,
    /// The first error that no scope caught, not yet reported.
    uncaptured: Mutex<Option<GpuError>>,
}

/// An open device and what it can do. Clones share the device.
#[derive(Clone, Debug)]
pub struct GpuContext {
    /// The adapter.
    pub adapter: wgpu::Adapter,
    /// The device.
    pub device: wgpu::Device,
    /// Its only queue.
    pub queue: wgpu::Queue,
    /// Name, kind and driver.
    pub info: wgpu::AdapterInfo,
    /// The limits that the device was opened with.
    pub limits: wgpu::Limits,
    faults: Arc<Faults>,
    /// Held while something is submitted or polled, never while waiting. wgpu-core 30 reads the fence and then looks
    /// whether the queue is empty; a submission or poll of another thread between the two makes it panic.
    gate: Arc<Mutex<()>>,
}

impl GpuContext {
    /// Opens an adapter: real GPUs before software ones, discrete before integrated.
    ///
    /// # Errors
    /// [`GpuError::NoBackend`], [`GpuError::NoAdapter`] (which lists what there is), [`GpuError::NoDevice`].
    pub fn choose(choice: Choice<'_>) -> Result<Self, GpuError> {
        let instance = instance().ok_or(GpuError::NoBackend)?;
        let mut found = enumerate(&instance);
        let wanted = choice.name.map(str::to_lowercase);
        let position = found.iter().position(|(summary, _)| match &wanted {
            Some(name) => summary.name.to_lowercase().contains(name.as_str()),
            None => choice.allow_software || !summary.is_software,
        });
        let Some(position) = position else {
            let found = found.into_iter().map(|(summary, _)| summary.name).collect();
            return Err(GpuError::NoAdapter { wanted: choice.name.map(str::to_owned), found });
        };
        let (_, adapter) = found.swap_remove(position);
        Self::open(adapter)
    }

    fn open(adapter: wgpu::Adapter) -> Result<Self, GpuError> {
        let info = adapter.get_info();
        let descriptor = wgpu::DeviceDescriptor {
            label: Some("overspill"),
            required_features: adapter.features() & wgpu::Features::SUBGROUP,
            required_limits: adapter.limits(),
            // Slabs are large and long-lived; a sub-allocator that grabs more than they need would break the budget.
            memory_hints: wgpu::MemoryHints::MemoryUsage,
            ..Default::default()
        };
        let opened = catch_unwind(AssertUnwindSafe(|| pollster::block_on(adapter.request_device(&descriptor))));
        let message = match opened {
            Ok(Ok((device, queue))) => {
                let context = Self::from_parts(adapter, device, queue);
                let faults = Arc::clone(&context.faults);
                context.device.on_uncaptured_error(Arc::new(move |error| {
                    tracing::error!(%error, "an error of the GPU that no scope caught");
                    faults.uncaptured.lock().get_or_insert_with(|| refused("an operation", 0, &error));
                }));
                return Ok(context);
            }
            Ok(Err(error)) => error.to_string(),
            Err(_) => "the driver broke off while opening it".to_owned(),
        };
        Err(GpuError::NoDevice { adapter: info.name, message })
    }

    /// Takes a device that the caller opened. Its handler for uncaptured errors stays the caller's; its device-lost
    /// callback is replaced. A caller who needs that callback sets it afterwards, and calls [`Self::report_lost`].
    #[must_use]
    pub fn from_parts(adapter: wgpu::Adapter, device: wgpu::Device, queue: wgpu::Queue) -> Self {
        let faults = Arc::new(Faults::default());
        let lost = Arc::clone(&faults);
        device.set_device_lost_callback(move |reason, message| {
            let message = if message.is_empty() { format!("{reason:?}").to_lowercase() } else { message };
            lost.lost.lock().get_or_insert(message);
        });
        let (info, limits) = (adapter.get_info(), device.limits());
        Self { adapter, device, queue, info, limits, faults, gate: Arc::default() }
    }

    /// Tells the tier that the device is lost.
    pub fn report_lost(&self, reason: &str) {
        self.faults.lost.lock().get_or_insert_with(|| reason.to_owned());
    }

    /// Whether the device still works.
    ///
    /// # Errors
    /// [`GpuError::DeviceLost`], from the loss on; an error that no scope caught, once.
    pub fn check(&self) -> Result<(), GpuError> {
        if let Some(reason) = self.faults.lost.lock().clone() {
            return Err(GpuError::DeviceLost { adapter: self.info.name.clone(), reason });
        }
        self.faults.uncaptured.lock().take().map_or(Ok(()), Err)
    }

    fn lost(&self) -> Option<GpuError> {
        let reason = self.faults.lost.lock().clone()?;
        Some(GpuError::DeviceLost { adapter: self.info.name.clone(), reason })
    }

    /// Whether the CPU does this device's work.
    #[must_use]
    pub fn is_software(&self) -> bool {
        is_software(&self.info)
    }

    /// Whether kernels may use subgroup operations.
    #[must_use]
    pub fn has_subgroups(&self) -> bool {
        self.device.features().contains(wgpu::Features::SUBGROUP)
    }

    /// Bytes of the GPU's memory (on unified systems, of the memory that it shares), as its driver reports them; where
    /// none does, the size of the largest buffer.
    #[must_use]
    pub fn memory_bytes(&self) -> u64 {
        crate::sys::memory_bytes(&self.adapter).unwrap_or(self.limits.max_buffer_size)
    }

    /// The longest range of a buffer that may be bound as storage, in bytes; a multiple of 256.
    #[must_use]
    pub fn binding_bytes_max(&self) -> u64 {
        let limit = self.limits.max_storage_buffer_binding_size.min(self.limits.max_buffer_size);
        limit.min(BINDING_BYTES_MAX) / 256 * 256
    }

    /// Runs `operation` and reports what wgpu found wrong with it. `what` and `bytes` name it in the error.
    ///
    /// # Errors
    /// [`GpuError::OutOfMemory`], [`GpuError::Refused`], [`GpuError::DeviceLost`].
    pub fn guarded<T>(&self, what: &str, bytes: u64, operation: impl FnOnce() -> T) -> Result<T, GpuError> {
        if let Some(lost) = self.lost() {
            return Err(lost);
        }
        let scopes = [wgpu::ErrorFilter::Internal, wgpu::ErrorFilter::Validation, wgpu::ErrorFilter::OutOfMemory]
            .map(|filter| self.device.push_error_scope(filter));
        let result = operation();
        let mut first = None;
        for scope in scopes.into_iter().rev() {
            let error = pollster::block_on(scope.pop());
            first = first.or(error);
        }
        match (self.lost(), first) {
            (Some(lost), _) => Err(lost),
            (None, Some(error)) => Err(refused(what, bytes, &error)),
            (None, None) => Ok(result),
        }
    }

    /// Makes a buffer.
    ///
    /// # Errors
    /// [`GpuError::OutOfMemory`] with the label and the size; [`GpuError::Refused`] beyond the device's limits;
    /// [`GpuError::DeviceLost`].
    pub fn buffer(&self, label: &str, bytes: u64, usage: wgpu::BufferUsages) -> Result<wgpu::Buffer, GpuError> {
        self.make_buffer(label, bytes, usage, false)
    }

    /// As [`Self::buffer`], mapped for writing.
    pub(crate) fn mapped_buffer(&self, label: &str, bytes: u64) -> Result<wgpu::Buffer, GpuError> {
        self.make_buffer(label, bytes, wgpu::BufferUsages::MAP_WRITE | wgpu::BufferUsages::COPY_SRC, true)
    }

    fn make_buffer(
        &self,
        label: &str,
        bytes: u64,
        usage: wgpu::BufferUsages,
        mapped_at_creation: bool,
    ) -> Result<wgpu::Buffer, GpuError> {
        if bytes > self.limits.max_buffer_size {
            let message = format!("{bytes} bytes in one buffer, the device allows {}", self.limits.max_buffer_size);
            return Err(GpuError::Refused { what: label.to_owned(), message });
        }
        let descriptor = wgpu::BufferDescriptor { label: Some(label), size: bytes, usage, mapped_at_creation };
        self.guarded(label, bytes, || self.device.create_buffer(&descriptor))
    }

    /// Submits command buffers.
    ///
    /// # Errors
    /// [`GpuError::Refused`] (an invalid command), [`GpuError::OutOfMemory`], [`GpuError::DeviceLost`].
    pub fn submit(
        &self,
        what: &str,
        commands: impl IntoIterator<Item = wgpu::CommandBuffer>,
    ) -> Result<wgpu::SubmissionIndex, GpuError> {
        self.guarded(what, 0, || self.submit_unguarded(commands))
    }

    /// Submits command buffers, leaving errors to whoever guards the call ([`Self::guarded`]). All submissions of this
    /// device must come through here or [`Self::submit`].
    pub fn submit_unguarded(&self, commands: impl IntoIterator<Item = wgpu::CommandBuffer>) -> wgpu::SubmissionIndex {
        let _gate = self.gate.lock();
        self.queue.submit(commands)
    }

    /// Waits for a submission, at most `timeout`, and runs wgpu's callbacks. `Ok(false)`: it is not done yet.
    ///
    /// # Errors
    /// [`GpuError::DeviceLost`]; [`GpuError::Refused`] for a submission that never succeeded.
    pub fn wait(&self, submission: &wgpu::SubmissionIndex, timeout: Duration) -> Result<bool, GpuError> {
        let deadline = Instant::now() + timeout;
        let mut pause = WAIT_PAUSE_MIN;
        loop {
            // Only looks: a wait inside wgpu would have to hold the gate, and nobody could submit meanwhile.
            let submission_index = Some(submission.clone());
            if self.poll(wgpu::PollType::Wait { submission_index, timeout: Some(Duration::ZERO) })? {
                return Ok(true);
            }
            if Instant::now() >= deadline {
                return Ok(false);
            }
            std::thread::sleep(pause);
            pause = (pause * 2).min(WAIT_PAUSE_MAX);
        }
    }

    /// Runs the callbacks of what is done, without waiting.
    ///
    /// # Errors
    /// [`GpuError::DeviceLost`].
    pub fn poll_once(&self) -> Result<(), GpuError> {
        self.poll(wgpu::PollType::Poll).map(|_| ())
    }

    fn poll(&self, poll: wgpu::PollType) -> Result<bool, GpuError> {
        if let Some(lost) = self.lost() {
            return Err(lost);
        }
        // wgpu panics when the device is lost during a poll; that is an error like any other.
        let polled = {
            let _gate = self.gate.lock();
            catch_unwind(AssertUnwindSafe(|| self.device.poll(poll)))
        };
        match polled {
            Ok(Ok(_)) => Ok(true),
            Ok(Err(wgpu::PollError::Timeout)) => self.lost().map_or(Ok(false), Err),
            Ok(Err(error)) => Err(self.lost().unwrap_or_else(|| GpuError::Refused {
                what: "a wait for a submission".to_owned(),
                message: error.to_string(),
            })),
            Err(_) => {
                self.report_lost("the driver failed while waiting for it");
                self.check().map(|()| false)
            }
        }
    }
}

fn refused(what: &str, bytes: u64, error: &wgpu::Error) -> GpuError {
    match error {
        wgpu::Error::OutOfMemory { .. } => GpuError::OutOfMemory { what: what.to_owned(), bytes },
        wgpu::Error::Validation { description, .. } | wgpu::Error::Internal { description, .. } => {
            let message = description.split_whitespace().collect::<Vec<_>>().join(" ");
            GpuError::Refused { what: what.to_owned(), message }
        }
    }
}
