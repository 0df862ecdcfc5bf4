//! The WGSL kernels: which there are, how their source is put together, and the pipelines made of them.
//!
//! Every kernel has its parameters at binding 0, then what it reads, then the one buffer that it writes. So there are
//! only as many layouts as numbers of read buffers. What is not here: when a kernel runs, and on what.

use crate::InferError;
use overspill::DType;
use overspill::device::{GpuContext, GpuError};
use overspill::wgpu;
use parking_lot::Mutex;
use std::collections::BTreeMap;
use std::sync::Arc;

/// Invocations of a workgroup that works through rows of elements.
pub(super) const GROUP: u32 = 64;
/// Tokens that share one decoding of weights in the wide matmul.
pub(super) const WIDE_TOKENS: u32 = 8;
/// The largest head that the attention kernel has room for.
pub(super) const HEAD_DIM_MAX: usize = 512;
/// Bytes of a dispatch's parameters.
pub(super) const PARAMS_BYTES: u64 = 64;
/// Most buffers that a kernel reads.
const READS_MAX: usize = 3;

/// A kernel.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(super) enum Kernel {
    Matmul { dtype: DType, wide: bool },
    RmsNorm,
    AddBias,
    Add,
    Limit,
    SiluMul,
    Rope,
    Attention,
    CopyRows,
    Combine,
}

impl Kernel {
    /// Buffers that it reads.
    pub(super) fn reads(self) -> usize {
        match self {
            Self::Limit => 0,
            Self::AddBias | Self::Add | Self::Rope => 1,
            Self::Matmul { .. } | Self::RmsNorm | Self::SiluMul | Self::CopyRows | Self::Combine => 2,
            Self::Attention => 3,
        }
    }

    fn entry(self) -> &'static str {
        match self {
            Self::Matmul { .. } => "matmul",
            Self::RmsNorm => "rms_norm",
            Self::AddBias => "add_bias",
            Self::Add => "add",
            Self::Limit => "limit",
            Self::SiluMul => "silu_mul",
            Self::Rope => "rope",
            Self::Attention => "attention",
            Self::CopyRows => "copy_rows",
            Self::Combine => "combine",
        }
    }
}

/// How lanes add their sums. Both ways give the same bits.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Reduction {
    /// Through memory of the workgroup, with barriers: every adapter can.
    Barrier,
    /// By exchange within a subgroup: faster, where subgroups have at least as many invocations as a row has lanes.
    Subgroup,
}

/// One row of the table of weight types.
struct WeightSource {
    dtype: DType,
    /// Columns that are decoded at once.
    unit: u32,
    /// Whether a row may end within a unit.
    has_tail: bool,
    decode: &'static [&'static str],
}

const fn float(dtype: DType, decode: &'static [&'static str]) -> WeightSource {
    WeightSource { dtype, unit: 8, has_tail: true, decode }
}

const fn quantised(dtype: DType, decode: &'static [&'static str]) -> WeightSource {
    WeightSource { dtype, unit: 32, has_tail: false, decode }
}

/// A new quantisation is one more row and one more file.
const WEIGHTS: &[WeightSource] = &[
    float(DType::F32, &[include_str!("wgsl/f32.wgsl")]),
    float(DType::F16, &[include_str!("wgsl/f16.wgsl")]),
    float(DType::BF16, &[include_str!("wgsl/bf16.wgsl")]),
    quantised(DType::Q4_0, &[include_str!("wgsl/q4_0.wgsl")]),
    quantised(DType::Q4_1, &[include_str!("wgsl/q4_1.wgsl")]),
    quantised(DType::Q5_0, &[include_str!("wgsl/q5_0.wgsl")]),
    quantised(DType::Q5_1, &[include_str!("wgsl/q5_1.wgsl")]),
    quantised(DType::Q8_0, &[include_str!("wgsl/q8_0.wgsl")]),
    quantised(DType::Q4_K, &[include_str!("wgsl/k_scales.wgsl"), include_str!("wgsl/q4_k.wgsl")]),
    quantised(DType::Q5_K, &[include_str!("wgsl/k_scales.wgsl"), include_str!("wgsl/q5_k.wgsl")]),
    quantised(DType::Q6_K, &[include_str!("wgsl/q6_k.wgsl")]),
];

fn weight_source(dtype: DType) -> Result<&'static WeightSource, InferError> {
    let row = WEIGHTS.iter().find(|row| row.dtype == dtype);
    row.ok_or_else(|| InferError::Device(format!("no GPU kernel multiplies {dtype}: use --device cpu")))
}

/// Columns of a unit, the part of a row that one lane decodes at once.
///
/// # Errors
/// [`InferError::Device`] for a type without a kernel.
pub(super) fn unit_columns(dtype: DType) -> Result<u32, InferError> {
    weight_source(dtype).map(|row| row.unit)
}

/// The pipelines of one device, compiled when first needed and shared by all sessions on it.
#[derive(Debug)]
pub struct GpuKernels {
    pub(super) context: GpuContext,
    lanes: u32,
    reduction: Reduction,
    layouts: Vec<(wgpu::BindGroupLayout, wgpu::PipelineLayout)>,
    pipelines: Mutex<BTreeMap<Kernel, wgpu::ComputePipeline>>,
}

pub(super) fn device_error(error: GpuError) -> InferError {
    match error {
        GpuError::OutOfMemory { what, bytes } => InferError::Memory {
            what,
            bytes,
            cause: "the GPU has none left".to_owned(),
            cure: "lower --vram or --ctx, or close what else uses the GPU".to_owned(),
        },
        other => InferError::Device(other.to_string()),
    }
}

impl GpuKernels {
    /// The kernels that suit the device best. Compiles nothing yet.
    ///
    /// # Errors
    /// [`InferError::Device`] if the device cannot bind what kernels need.
    pub fn new(context: &GpuContext) -> Result<Arc<Self>, InferError> {
        let reduction = if Self::can_exchange(context) { Reduction::Subgroup } else { Reduction::Barrier };
        Self::with_reduction(context, reduction)
    }

    /// As [`Self::new`], with the reduction given.
    ///
    /// # Errors
    /// [`InferError::Device`] if the device cannot do that.
    pub fn with_reduction(context: &GpuContext, reduction: Reduction) -> Result<Arc<Self>, InferError> {
        if reduction == Reduction::Subgroup && !Self::can_exchange(context) {
            return Err(InferError::Device(format!("{} has no subgroups that kernels can use", context.info.name)));
        }
        let layouts = context
            .guarded("kernel layouts", 0, || (0..=READS_MAX).map(|reads| layout(&context.device, reads)).collect())
            .map_err(device_error)?;
        Ok(Arc::new(Self {
            context: context.clone(),
            lanes: lanes(context),
            reduction,
            layouts,
            pipelines: Mutex::default(),
        }))
    }

    /// Whether subgroups are whole rows of lanes, and workgroups whole subgroups.
    fn can_exchange(context: &GpuContext) -> bool {
        let info = &context.info;
        context.has_subgroups() && info.subgroup_min_size >= lanes(context) && info.subgroup_max_size <= GROUP
    }

    /// How lanes add their sums.
    #[must_use]
    pub fn reduction(&self) -> Reduction {
        self.reduction
    }

    /// Lanes that share a row of a matrix; with the matrix's shape and type they fix the order of its sums.
    #[must_use]
    pub fn lanes(&self) -> u32 {
        self.lanes
    }

    /// Rows that a workgroup of matmul computes.
    pub(super) fn rows(&self) -> u32 {
        GROUP / self.lanes
    }

    pub(super) fn layout(&self, reads: usize) -> &wgpu::BindGroupLayout {
        &self.layouts[reads].0
    }

    /// The pipeline of a kernel.
    ///
    /// # Errors
    /// [`InferError::Device`] if the driver cannot compile it.
    pub(super) fn pipeline(&self, kernel: Kernel) -> Result<wgpu::ComputePipeline, InferError> {
        let mut pipelines = self.pipelines.lock();
        if let Some(pipeline) = pipelines.get(&kernel) {
            return Ok(pipeline.clone());
        }
        let source = self.source(kernel)?;
        let label = format!("{kernel:?}");
        let compile = || {
            let device = &self.context.device;
            let module = device.create_shader_module(wgpu::ShaderModuleDescriptor {
                label: Some(&label),
                source: wgpu::ShaderSource::Wgsl(source.into()),
            });
            device.create_compute_pipeline(&wgpu::ComputePipelineDescriptor {
                label: Some(&label),
                layout: Some(&self.layouts[kernel.reads()].1),
                module: &module,
                entry_point: Some(kernel.entry()),
                compilation_options: wgpu::PipelineCompilationOptions {
                    // Every kernel writes its workgroup memory before it reads it.
                    zero_initialize_workgroup_memory: false,
                    ..Default::default()
                },
                cache: None,
            })
        };
        let pipeline = self.context.guarded(&format!("kernel {label}"), 0, compile).map_err(device_error)?;
        pipelines.insert(kernel, pipeline.clone());
        Ok(pipeline)
    }

    fn source(&self, kernel: Kernel) -> Result<String, InferError> {
        const BYTES: &str = include_str!("wgsl/bytes.wgsl");
        const VECTOR: &str = include_str!("wgsl/vector.wgsl");
        let parts: &[&str] = match kernel {
            Kernel::Matmul { dtype, wide } => return self.matmul_source(dtype, wide),
            Kernel::RmsNorm => &[BYTES, VECTOR, include_str!("wgsl/rms_norm.wgsl")],
            Kernel::AddBias => &[BYTES, VECTOR, include_str!("wgsl/add_bias.wgsl")],
            Kernel::Add => &[include_str!("wgsl/add.wgsl")],
            Kernel::Limit => &[include_str!("wgsl/limit.wgsl")],
            Kernel::SiluMul => &[include_str!("wgsl/silu_mul.wgsl")],
            Kernel::Rope => &[include_str!("wgsl/rope.wgsl")],
            Kernel::Attention => &[include_str!("wgsl/attention.wgsl")],
            Kernel::CopyRows => &[include_str!("wgsl/copy_rows.wgsl")],
            Kernel::Combine => &[include_str!("wgsl/combine.wgsl")],
        };
        Ok(parts.concat())
    }

    fn matmul_source(&self, dtype: DType, wide: bool) -> Result<String, InferError> {
        let weights = weight_source(dtype)?;
        let tokens = if wide { WIDE_TOKENS } else { 1 };
        let consts = format!(
            "const LANES: u32 = {}u;\nconst ROWS: u32 = {}u;\nconst TOKENS: u32 = {tokens}u;\nconst UNIT4: u32 = {}u;\n",
            self.lanes,
            self.rows(),
            weights.unit / 4,
        );
        let tail = if weights.has_tail { include_str!("wgsl/tail.wgsl") } else { "" };
        // A subgroup's place in its workgroup is asked for, not derived: nothing promises that they follow the
        // invocations' own order.
        let (shared, builtins, index, reduce) = match self.reduction {
            Reduction::Barrier => (
                "var<workgroup> partial: array<f32, TOKENS * LANES * ROWS>;\n",
                "@builtin(local_invocation_index) invocation: u32,",
                "invocation",
                include_str!("wgsl/reduce_barrier.wgsl"),
            ),
            Reduction::Subgroup => (
                "",
                "@builtin(subgroup_id) subgroup: u32,\n    @builtin(subgroup_size) subgroup_size: u32,\n    \
                 @builtin(subgroup_invocation_id) invocation: u32,",
                "subgroup * subgroup_size + invocation",
                include_str!("wgsl/reduce_subgroup.wgsl"),
            ),
        };
        let body = include_str!("wgsl/matmul.wgsl")
            .replace("INDEX_BUILTINS", builtins)
            .replace("= INDEX;", &format!("= {index};"))
            .replace("TAIL", tail)
            .replace("REDUCE", reduce);
        Ok([&consts, shared, include_str!("wgsl/bytes.wgsl"), &weights.decode.concat(), &body].concat())
    }
}

/// Lanes of a row: as many as the smallest subgroup has, of the two numbers that real hardware has.
fn lanes(context: &GpuContext) -> u32 {
    if context.info.subgroup_min_size >= 32 { 32 } else { 8 }
}

fn layout(device: &wgpu::Device, reads: usize) -> (wgpu::BindGroupLayout, wgpu::PipelineLayout) {
    let entry = |binding: u32, ty, has_dynamic_offset| wgpu::BindGroupLayoutEntry {
        binding,
        visibility: wgpu::ShaderStages::COMPUTE,
        ty: wgpu::BindingType::Buffer { ty, has_dynamic_offset, min_binding_size: None },
        count: None,
    };
    let storage = |read_only| wgpu::BufferBindingType::Storage { read_only };
    let mut entries = vec![entry(0, wgpu::BufferBindingType::Uniform, true)];
    entries.extend((0..reads as u32).map(|read| entry(1 + read, storage(true), false)));
    entries.push(entry(1 + reads as u32, storage(false), false));
    let group = device.create_bind_group_layout(&wgpu::BindGroupLayoutDescriptor { label: None, entries: &entries });
    let pipeline = device.create_pipeline_layout(&wgpu::PipelineLayoutDescriptor {
        label: None,
        bind_group_layouts: &[Some(&group)],
        immediate_size: 0,
    });
    (group, pipeline)
}
