//! What wgpu does not say and the graphics API below it does. Everything here is optional: callers have a fallback.

/// Bytes of the adapter's own memory (shared memory, on unified systems), as its driver reports them.
#[cfg(any(target_os = "linux", target_os = "android", target_os = "windows", target_os = "freebsd"))]
pub(crate) fn memory_bytes(adapter: &wgpu::Adapter) -> Option<u64> {
    const DEVICE_LOCAL: u32 = 1; // VK_MEMORY_HEAP_DEVICE_LOCAL_BIT
    // SAFETY: the guard is only read from, and nothing of it is destroyed or kept beyond this function.
    let vulkan = unsafe { adapter.as_hal::<wgpu::hal::api::Vulkan>() }?;
    let instance = vulkan.shared_instance().raw_instance();
    // SAFETY: the handle comes from this very instance, and the guard keeps both alive.
    let memory = unsafe { instance.get_physical_device_memory_properties(vulkan.raw_physical_device()) };
    let heaps = memory.memory_heaps.get(..memory.memory_heap_count as usize)?;
    heaps.iter().filter(|heap| heap.flags.as_raw() & DEVICE_LOCAL != 0).map(|heap| heap.size).max()
}

/// Unknown on other systems.
#[cfg(not(any(target_os = "linux", target_os = "android", target_os = "windows", target_os = "freebsd")))]
pub(crate) fn memory_bytes(_adapter: &wgpu::Adapter) -> Option<u64> {
    None
}
