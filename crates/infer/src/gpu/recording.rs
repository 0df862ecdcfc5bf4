//! GPU work as data: a list of dispatches over numbered buffers, executed in one place.
//!
//! The backend records; [`Executor::run`] turns the list into one submission. Parameters and lists travel in two
//! buffers that are written once a submission. What is not here: what the work means.

use super::kernels::{GpuKernels, Kernel, PARAMS_BYTES, device_error};
use crate::InferError;
use crate::backend::Buf;
use overspill::wgpu;
use std::collections::HashMap;
use std::sync::mpsc::{RecvTimeoutError, sync_channel};
use std::sync::{Arc, Weak};
use std::time::{Duration, Instant};

/// Dispatches of one submission.
pub(super) const DISPATCHES_MAX: usize = 1024;
/// Words of the lists of one submission.
pub(super) const LIST_WORDS_MAX: usize = 256 << 10;
/// A GPU that needs longer for what a token asks for counts as hung.
const TIMEOUT: Duration = Duration::from_secs(600);
const WAIT_SLICE: Duration = Duration::from_millis(20);

/// A buffer that a dispatch binds.
#[derive(Clone, Debug)]
pub(super) enum Bound {
    /// One of the backend's own.
    Own(Buf),
    /// The recording's lists.
    Lists,
    /// A slab of the engine's.
    Slab(Arc<wgpu::Buffer>),
    /// Weights from plain memory, for this recording alone.
    Transient(wgpu::Buffer),
}

/// A kernel over some buffers: those that it reads, then the one that it writes.
#[derive(Clone, Debug)]
pub(super) struct Dispatch {
    pub kernel: Kernel,
    pub reads: [Option<Bound>; 3],
    pub writes: Buf,
    pub params: [u32; 12],
    pub groups: [u32; 3],
}

/// What the GPU is to do, in order.
#[derive(Clone, Debug)]
pub(super) enum Command {
    Dispatch(Dispatch),
    /// Copies words of the lists into a buffer.
    Fill {
        to: Buf,
        offset_bytes: u64,
        list_word: usize,
        words: usize,
    },
}

/// Work that has been asked for and not yet submitted.
#[derive(Debug, Default)]
pub(super) struct Recording {
    pub commands: Vec<Command>,
    pub lists: Vec<u32>,
    dispatches: usize,
}

impl Recording {
    /// Whether there is room for one more command and `words` more words.
    pub(super) fn has_room(&self, words: usize) -> bool {
        self.dispatches < DISPATCHES_MAX && self.lists.len() + words <= LIST_WORDS_MAX
    }

    pub(super) fn dispatch(&mut self, dispatch: Dispatch) {
        self.dispatches += 1;
        self.commands.push(Command::Dispatch(dispatch));
    }

    fn clear(&mut self) {
        self.commands.clear();
        self.lists.clear();
        self.dispatches = 0;
    }
}

/// A bound buffer, as part of a bind group's key.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
enum Key {
    None,
    Own(Buf),
    Lists,
    /// The address of the slab's `Arc`, which cannot be used again while a [`Weak`] to it is kept.
    Slab(usize),
}

struct Group {
    group: wgpu::BindGroup,
    /// Slabs that it shows. When the engine has given one back, the group must go, or the memory would stay.
    slabs: Vec<Weak<wgpu::Buffer>>,
}

/// Executes recordings.
pub(super) struct Executor {
    pub kernels: Arc<GpuKernels>,
    pub buffers: Vec<wgpu::Buffer>,
    params: wgpu::Buffer,
    params_stride: u64,
    params_bytes: Vec<u8>,
    lists: wgpu::Buffer,
    read_back: Option<wgpu::Buffer>,
    groups: HashMap<(usize, [Key; 4]), Group>,
    /// The last submission.
    pub last: Option<wgpu::SubmissionIndex>,
}

impl Executor {
    /// Bytes of GPU memory that an executor takes beside its buffers.
    pub(super) fn own_bytes(kernels: &GpuKernels) -> u64 {
        LIST_WORDS_MAX as u64 * 4 + DISPATCHES_MAX as u64 * params_stride(kernels)
    }

    pub(super) fn new(kernels: Arc<GpuKernels>) -> Result<Self, InferError> {
        use wgpu::BufferUsages as Usage;
        let context = &kernels.context;
        let params_stride = params_stride(&kernels);
        let params_bytes = DISPATCHES_MAX as u64 * params_stride;
        let params = context.buffer("parameters", params_bytes, Usage::UNIFORM | Usage::COPY_DST);
        let lists_usage = Usage::STORAGE | Usage::COPY_DST | Usage::COPY_SRC;
        let lists = context.buffer("lists", LIST_WORDS_MAX as u64 * 4, lists_usage);
        Ok(Self {
            params: params.map_err(device_error)?,
            lists: lists.map_err(device_error)?,
            params_stride,
            params_bytes: Vec::new(),
            kernels,
            buffers: Vec::new(),
            read_back: None,
            groups: HashMap::new(),
            last: None,
        })
    }

    /// Submits a recording and empties it.
    pub(super) fn run(&mut self, recording: &mut Recording) -> Result<(), InferError> {
        if recording.commands.is_empty() {
            return Ok(());
        }
        self.submit(recording, None)
    }

    fn submit(&mut self, recording: &mut Recording, read: Option<(Buf, u64, u64)>) -> Result<(), InferError> {
        // Bind groups of slabs that the engine has given back.
        self.groups.retain(|_, group| group.slabs.iter().all(|slab| slab.strong_count() > 0));
        let result = self.encode(recording, read);
        recording.clear();
        self.last = Some(result?);
        Ok(())
    }

    fn encode(
        &mut self,
        recording: &Recording,
        read: Option<(Buf, u64, u64)>,
    ) -> Result<wgpu::SubmissionIndex, InferError> {
        let mut prepared = Vec::with_capacity(recording.commands.len());
        self.params_bytes.clear();
        for command in &recording.commands {
            let Command::Dispatch(dispatch) = command else { continue };
            let offset = self.params_bytes.len();
            self.params_bytes.extend(dispatch.params.iter().flat_map(|word| word.to_le_bytes()));
            self.params_bytes.resize(offset + self.params_stride as usize, 0);
            prepared.push((self.kernels.pipeline(dispatch.kernel)?, self.bind_group(dispatch)?, offset as u32));
        }
        let context = &self.kernels.context;
        let encode = || {
            if !self.params_bytes.is_empty() {
                context.queue.write_buffer(&self.params, 0, &self.params_bytes);
            }
            if !recording.lists.is_empty() {
                context.queue.write_buffer(&self.lists, 0, bytemuck::cast_slice(&recording.lists));
            }
            let mut encoder = context.device.create_command_encoder(&Default::default());
            let mut prepared = prepared.iter();
            let mut commands = recording.commands.iter().peekable();
            while let Some(command) = commands.next() {
                match command {
                    Command::Fill { to, offset_bytes, list_word, words } => {
                        let (from, bytes) = (*list_word as u64 * 4, *words as u64 * 4);
                        let to = &self.buffers[to.0 as usize];
                        encoder.copy_buffer_to_buffer(&self.lists, from, to, *offset_bytes, bytes);
                    }
                    Command::Dispatch(dispatch) => {
                        let mut pass = encoder.begin_compute_pass(&Default::default());
                        let mut next = Some(dispatch);
                        while let (Some(dispatch), Some((pipeline, group, offset))) = (next, prepared.next()) {
                            pass.set_pipeline(pipeline);
                            pass.set_bind_group(0, group, &[*offset]);
                            let [x, y, z] = dispatch.groups;
                            pass.dispatch_workgroups(x, y, z);
                            next = match commands.peek() {
                                Some(Command::Dispatch(following)) => {
                                    commands.next();
                                    Some(following)
                                }
                                _ => break,
                            };
                        }
                    }
                }
            }
            if let (Some((from, offset, bytes)), Some(read_back)) = (read, &self.read_back) {
                encoder.copy_buffer_to_buffer(&self.buffers[from.0 as usize], offset, read_back, 0, bytes);
            }
            context.submit_unguarded([encoder.finish()])
        };
        context.guarded("a step's work", 0, encode).map_err(device_error)
    }

    fn buffer<'a>(&'a self, bound: &'a Bound) -> &'a wgpu::Buffer {
        match bound {
            Bound::Own(buf) => &self.buffers[buf.0 as usize],
            Bound::Lists => &self.lists,
            Bound::Slab(slab) => slab,
            Bound::Transient(buffer) => buffer,
        }
    }

    fn bind_group(&mut self, dispatch: &Dispatch) -> Result<wgpu::BindGroup, InferError> {
        let mut keys = [Key::None; 4];
        let mut cached = true;
        for (key, bound) in keys.iter_mut().zip(dispatch.reads.iter().flatten()) {
            *key = match bound {
                Bound::Own(buf) => Key::Own(*buf),
                Bound::Lists => Key::Lists,
                Bound::Slab(slab) => Key::Slab(Arc::as_ptr(slab) as usize),
                Bound::Transient(_) => {
                    cached = false;
                    Key::None
                }
            };
        }
        keys[3] = Key::Own(dispatch.writes);
        let reads = dispatch.kernel.reads();
        if let Some(found) = self.groups.get(&(reads, keys)).filter(|_| cached) {
            return Ok(found.group.clone());
        }
        let params = wgpu::BufferBinding { buffer: &self.params, offset: 0, size: wgpu::BufferSize::new(PARAMS_BYTES) };
        let written = &self.buffers[dispatch.writes.0 as usize];
        let storage = dispatch.reads.iter().flatten().map(|bound| self.buffer(bound)).chain([written]);
        let resources = std::iter::once(wgpu::BindingResource::Buffer(params))
            .chain(storage.map(wgpu::Buffer::as_entire_binding))
            .enumerate();
        let entries: Vec<_> =
            resources.map(|(binding, resource)| wgpu::BindGroupEntry { binding: binding as u32, resource }).collect();
        let context = &self.kernels.context;
        let descriptor =
            wgpu::BindGroupDescriptor { label: None, layout: self.kernels.layout(reads), entries: &entries };
        let make = || context.device.create_bind_group(&descriptor);
        let group = context.guarded("a kernel's bindings", 0, make).map_err(device_error)?;
        if cached {
            let slabs = dispatch.reads.iter().flatten().filter_map(|bound| match bound {
                Bound::Slab(slab) => Some(Arc::downgrade(slab)),
                _ => None,
            });
            let slabs = slabs.collect();
            self.groups.insert((reads, keys), Group { group: group.clone(), slabs });
        }
        Ok(group)
    }

    /// Submits a recording, waits for it, and copies what is then in a buffer.
    pub(super) fn read(
        &mut self,
        recording: &mut Recording,
        from: Buf,
        offset: usize,
        values: &mut [f32],
    ) -> Result<(), InferError> {
        let bytes = size_of_val(values) as u64;
        if bytes == 0 {
            return self.run(recording);
        }
        let context = self.kernels.context.clone();
        if self.read_back.as_ref().is_none_or(|buffer| buffer.size() < bytes) {
            let usage = wgpu::BufferUsages::COPY_DST | wgpu::BufferUsages::MAP_READ;
            let size = bytes.next_power_of_two();
            self.read_back = Some(context.buffer("read back", size, usage).map_err(device_error)?);
        }
        self.submit(recording, Some((from, offset as u64 * 4, bytes)))?;
        let (Some(buffer), Some(submission)) = (&self.read_back, &self.last) else { return Ok(()) };
        // The callback may run in whichever thread polls first.
        let (send, mapped) = sync_channel(1);
        let map = || {
            buffer.map_async(wgpu::MapMode::Read, ..bytes, move |result| {
                let _ = send.send(result); // Fails only if the wait was given up.
            });
        };
        context.guarded("reading results", bytes, map).map_err(device_error)?;
        let start = Instant::now();
        let result = loop {
            context.wait(submission, WAIT_SLICE).map_err(device_error)?;
            match mapped.recv_timeout(if start.elapsed() < TIMEOUT { Duration::from_millis(1) } else { Duration::ZERO })
            {
                Ok(result) => break result,
                Err(RecvTimeoutError::Timeout) if start.elapsed() < TIMEOUT => {}
                Err(_) => {
                    let message = format!("{} did not finish a step in {} s", context.info.name, TIMEOUT.as_secs());
                    return Err(InferError::Device(message));
                }
            }
        };
        let device = |e: &dyn std::fmt::Display| InferError::Device(format!("results cannot be read: {e}"));
        result.map_err(|e| device(&e))?;
        let view = buffer.get_mapped_range(..bytes).map_err(|e| device(&e))?;
        bytemuck::cast_slice_mut(values).copy_from_slice(&view);
        drop(view);
        buffer.unmap();
        context.check().map_err(device_error)
    }
}

fn params_stride(kernels: &GpuKernels) -> u64 {
    u64::from(kernels.context.limits.min_uniform_buffer_offset_alignment).max(PARAMS_BYTES)
}
