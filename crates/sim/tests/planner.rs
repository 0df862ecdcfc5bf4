//! Plans against the closed form, coarse blocks against fine ones, and what a plan must say.
#![allow(clippy::unwrap_used, reason = "tests")]

use overspill_core::DType;
use overspill_sim::hardware::Hardware;
use overspill_sim::planner::{
    Budgets, Cut, Device, Machine, ModelShape, PartKind, Phase, PlanError, PlanOptions, Question,
};
use overspill_sim::planner::{Resources, cheapest, estimate, plan, predict};
use overspill_sim::{Bound, Habit, Options, RoutingTrace};
use serde_json::{Value, json};

fn llama(hidden: u64, width: u64, layers: u64, heads: u64) -> Value {
    json!({
        "model_type": "llama", "hidden_size": hidden, "intermediate_size": width, "num_hidden_layers": layers,
        "num_attention_heads": heads, "num_key_value_heads": 8, "vocab_size": 128_256,
        "max_position_embeddings": 8192
    })
}

fn dense_8b() -> ModelShape {
    ModelShape::from_config(&llama(4096, 14_336, 32, 32), DType::Q4_K).unwrap()
}

fn dense_70b() -> ModelShape {
    ModelShape::from_config(&llama(8192, 28_672, 80, 64), DType::Q4_K).unwrap()
}

fn mixture_30b() -> ModelShape {
    let config = json!({
        "model_type": "qwen3_moe", "hidden_size": 2048, "intermediate_size": 6144, "moe_intermediate_size": 768,
        "num_hidden_layers": 48, "num_attention_heads": 32, "num_key_value_heads": 4, "head_dim": 128,
        "num_experts": 128, "num_experts_per_tok": 8, "vocab_size": 151_936, "max_position_embeddings": 40_960
    });
    ModelShape::from_config(&config, DType::Q4_K).unwrap()
}

fn shipped(name: &str) -> Hardware {
    Hardware::shipped(name).unwrap().unwrap()
}

fn machine(name: &str, device: Device, vram_bytes: u64, ram_bytes: u64) -> Machine {
    Machine { hardware: shipped(name), device, budgets: Budgets { vram_bytes, ram_bytes } }
}

fn question(cut: Cut, habit: &Habit) -> Question<'_> {
    Question { context: 512, chunk: 64, phase: Phase { tokens: 1, past: 256 }, cut, habit, options: Options::default() }
}

fn close(what: &str, found: f64, wanted: f64, part: f64) {
    assert!((found - wanted).abs() <= wanted.abs() * part, "{what}: {found}, and {wanted} was expected");
}

const GIB: u64 = 1 << 30;

/// Disk bytes per token are T − (B − R), and a token takes as long as the slowest of disk, bus and computing.
#[test]
fn dense_plans_agree_with_the_closed_form() {
    let uniform = Habit::Uniform;
    for shape in [dense_8b(), dense_70b()] {
        let total = shape.block_bytes();
        for share in [10, 25, 50, 75, 90] {
            let part = total * share / 100;
            for machine in [
                machine("laptop", Device::Cpu, 0, part),
                machine("desktop-24gb", Device::Gpu, part / 2 + GIB, part / 2),
                machine("unified", Device::Gpu, part + GIB, 0),
            ] {
                let found = predict(&shape, &machine, &question(Cut::Coarse, &uniform)).unwrap();
                let wanted = estimate(&shape, &machine, 512, 64, &found.ring_bytes, found.compute_seconds);
                let what = format!("{} GiB, {share} % on {}", total / GIB, machine.hardware.name);
                println!(
                    "{what}: {:.3} s ({}), closed {:.3} s; disk {:.2} GB, closed {:.2} GB; bus {:.2}, closed {:.2}",
                    found.seconds_per_pass,
                    found.bound.name(),
                    wanted.seconds,
                    found.disk_bytes as f64 / 1e9,
                    wanted.disk_bytes / 1e9,
                    found.bus_bytes as f64 / 1e9,
                    wanted.bus_bytes / 1e9,
                );
                // To within a block of a coarse plan for each memory; with two, what one has in flight is of use to the
                // other, which the closed form does not count.
                let block = total as f64 / 400.0;
                let shared = if found.ring_bytes.len() > 1 { found.ring_bytes.iter().sum::<u64>() as f64 } else { 0.0 };
                let allowed = (2.0 * block).max(shared);
                assert!((found.disk_bytes as f64 - wanted.disk_bytes).abs() < allowed, "{what}");
                assert!((found.bus_bytes as f64 - wanted.bus_bytes).abs() < allowed, "{what}");
                close(&what, found.seconds_per_pass, wanted.seconds, 0.06);
                assert!(found.seconds_per_pass >= wanted.seconds * 0.97, "{what}: faster than physics");
            }
        }
    }
}

/// What coarse blocks cost: seconds per token against blocks as small as the engine's.
#[test]
fn coarse_blocks_cost_little() {
    let (mut errors, mut bytes) = (Vec::new(), Vec::new());
    for (shape, habit) in [(dense_8b(), Habit::Uniform), (mixture_30b(), Habit::Recency)] {
        for share in [10, 25, 50, 75, 95, 100] {
            let part = shape.block_bytes() * share / 100;
            for machine in [
                machine("laptop", Device::Cpu, 0, part),
                machine("desktop-24gb", Device::Gpu, part / 2 + GIB, part / 2),
            ] {
                let answer = |cut| predict(&shape, &machine, &question(cut, &habit)).unwrap();
                let (fine, coarse) = (answer(Cut::Fine), answer(Cut::Coarse));
                let apart = coarse.disk_bytes.abs_diff(fine.disk_bytes) as f64 / fine.touched_bytes as f64;
                bytes.push(apart);
                let (fine, coarse) = (fine.seconds_per_pass, coarse.seconds_per_pass);
                let error = coarse / fine - 1.0;
                println!(
                    "{} {share} % on {}: {fine:.4} s, coarse {:+.2} %, bytes {:.2} % of T",
                    shape.architecture,
                    machine.hardware.name,
                    error * 100.0,
                    apart * 100.0
                );
                errors.push(error.abs());
            }
        }
    }
    errors.sort_by(f64::total_cmp);
    let (median, worst) = (errors[errors.len() / 2], errors[errors.len() - 1]);
    println!("median {:.2} %, worst {:.2} %", median * 100.0, worst * 100.0);
    let most = bytes.iter().fold(0.0, |a: f64, b| a.max(*b));
    println!("bytes: at most {:.2} % of T", most * 100.0);
    assert!(median < 0.02 && worst < 0.08, "median {median}, worst {worst}");
    assert!(most < 0.02, "{most}");
}

#[test]
fn everything_has_a_place_and_more_memory_moves_it_up() {
    let shape = dense_70b();
    let options = PlanOptions { context: 2048, ..PlanOptions::default() };
    let plan = plan(&shape, &shipped("desktop-24gb"), &PlanOptions { device: Some(Device::Gpu), ..options }).unwrap();
    assert_eq!(plan.tiers, ["RTX 4090", "host"]);
    let placed: u64 = plan.placement.iter().flat_map(|p| &p.bytes).sum();
    close("all placed", placed as f64, (shape.block_bytes() - shape.standing_bytes) as f64, 0.001);
    let in_vram: u64 = plan.placement.iter().map(|p| p.bytes[0]).sum();
    assert!((19 * GIB..23 * GIB).contains(&in_vram), "{in_vram}");
    let on_disk: u64 = plan.placement.iter().map(|p| p.bytes[2]).sum();
    assert!(on_disk < GIB, "64 GB of RAM hold what VRAM does not: {on_disk}");
    assert_eq!(plan.decode.bound, Bound::Bus(overspill_core::TierId(0)));
    assert!(plan.decode.seconds_per_pass >= plan.physical_limit_seconds);
    let gain = |resource| plan.gains.0.iter().find(|gain| gain.resource == resource).unwrap();
    assert!(gain(Resources::Vram).tokens_per_s > 0.0 && gain(Resources::Vram).per_price.unwrap() > 0.0);
    assert_eq!((gain(Resources::Ram).tokens_per_s, gain(Resources::Disk).tokens_per_s), (0.0, 0.0));
    assert!(plan.prefill.tokens_per_s() > plan.decode.tokens_per_s() * 50.0);
    let cost = plan.per_million_tokens.unwrap();
    close("cost", cost, 0.22 / 3600.0 / plan.decode.tokens_per_s() * 1e6, 1e-9);
    assert_eq!(plan.context_max, 8192, "there is room for all that the model was made for");
}

#[test]
fn what_does_not_fit_is_refused_with_the_smallest_that_does() {
    let shape = dense_8b();
    let uniform = Habit::Uniform;
    let ask = |machine: &Machine| predict(&shape, machine, &question(Cut::Coarse, &uniform));
    let mut gpu = machine("desktop-24gb", Device::Gpu, 1 << 20, GIB);
    let Err(PlanError::TooSmall { setting: "--vram", bytes_min, .. }) = ask(&gpu) else { panic!() };
    gpu.budgets.vram_bytes = bytes_min;
    ask(&gpu).unwrap();
    gpu.budgets.vram_bytes -= 1;
    ask(&gpu).unwrap_err();
    let mut cpu = machine("laptop", Device::Cpu, 0, 0);
    let Err(PlanError::TooSmall { setting: "--ram", bytes_min, .. }) = ask(&cpu) else { panic!() };
    cpu.budgets.ram_bytes = bytes_min;
    ask(&cpu).unwrap();
    let mut small = machine("laptop", Device::Cpu, 0, GIB);
    small.hardware.disks[0].capacity_bytes = GIB;
    assert!(matches!(ask(&small), Err(PlanError::NoDisk { capacity_bytes: GIB, .. })));
    let none = machine("laptop", Device::Gpu, GIB, GIB);
    assert!(matches!(ask(&none), Err(PlanError::NoGpu { .. })));
}

#[test]
fn a_mixture_is_cached_better_than_its_share_where_routing_is_recent() {
    let shape = mixture_30b();
    let machine = machine("laptop", Device::Cpu, 0, shape.common_bytes() + shape.expert_bytes() / 5);
    let read = |habit: &Habit| predict(&shape, &machine, &question(Cut::Coarse, habit)).unwrap().disk_bytes as f64;
    let chosen = (shape.touched_bytes() - shape.common_bytes() - shape.row_bytes) as f64;
    let (uniform, recent) = (read(&Habit::Uniform) / chosen, read(&Habit::Recency) / chosen);
    println!("of the chosen, read: uniform {uniform:.3}, recent {recent:.3}");
    assert!((0.72..0.9).contains(&uniform), "{uniform}");
    // A fifth of the experts answers about 73 % of what recorded routing asks.
    assert!((0.2..0.4).contains(&recent), "{recent}");
}

/// A chunk of a prompt asks of a mixture what its tokens choose together: fewer experts where they choose alike, and of
/// those it reads what memory does not hold, though it goes through them in order.
#[test]
fn a_prompt_reads_the_experts_that_its_tokens_choose() {
    let shape = mixture_30b();
    let [uniform, recent] = [Habit::Uniform, Habit::Recency].map(|habit| habit.distinct(128, 8, 64));
    assert!(uniform > 120 && recent < 120, "{uniform} {recent}");
    let machine = machine("laptop", Device::Cpu, 0, shape.block_bytes() / 2);
    let question = Question { phase: Phase { tokens: 64, past: 0 }, ..question(Cut::Coarse, &Habit::Uniform) };
    let question = Question { options: Options { passes_max: Some(6), ..question.options }, ..question };
    let found = predict(&shape, &machine, &question).unwrap();
    let read = found.disk_bytes as f64 / shape.expert_bytes() as f64;
    assert!((0.45..0.6).contains(&read), "{read}");
    let recorded = "turn,phase,step,layer,expert\n0,0,0,0,1\n0,0,1,0,1\n0,0,2,0,2\n0,1,3,0,5\n";
    let trace = Habit::Trace(RoutingTrace::parse(recorded).unwrap());
    assert_eq!((trace.distinct(8, 1, 2), trace.distinct(8, 1, 64)), (1, 2), "of the prompt, not of what came after it");
}

#[test]
fn two_cards_share_the_layers() {
    let shape = dense_70b();
    let options = PlanOptions { device: Some(Device::Gpu), context: 2048, gains: false, ..PlanOptions::default() };
    let two = plan(&shape, &shipped("two-cards"), &options).unwrap();
    assert_eq!(two.tiers.len(), 3);
    let on = |tier: usize| two.placement.iter().map(|p| p.bytes[tier]).sum::<u64>() as f64;
    close("both hold their half", on(0), on(1), 0.1);
    assert_eq!(two.decode.disk_bytes, 0);
    let mut one = shipped("two-cards");
    one.gpus.truncate(1);
    let one = plan(&shape, &one, &options).unwrap();
    assert!(two.decode.tokens_per_s() > one.decode.tokens_per_s() * 1.5);
}

#[test]
fn the_cheapest_that_is_fast_enough_is_found() {
    let machines: Vec<Hardware> = ["cloud-h100", "laptop", "desktop-24gb"].into_iter().map(shipped).collect();
    let options = PlanOptions { gains: false, ..PlanOptions::default() };
    let (offers, best) = cheapest(&dense_8b(), &machines, &options, 60.0);
    let speeds: Vec<f64> = offers.iter().map(|o| o.plan.as_ref().unwrap().decode.tokens_per_s()).collect();
    assert_eq!(best, Some(2), "{speeds:?}");
    assert_eq!(cheapest(&dense_8b(), &machines, &options, 5.0).1, Some(1));
    assert_eq!(cheapest(&dense_8b(), &machines, &options, 1e6).1, None);
}

#[test]
fn parts_are_named_apart() {
    let names: std::collections::BTreeSet<_> = PartKind::ALL.iter().map(|kind| kind.name()).collect();
    assert_eq!(names.len(), PartKind::ALL.len());
}

/// Small budgets give the ring half of themselves: what is kept grows with them all the same.
#[test]
fn small_models_obey_the_closed_form_too() {
    let shape = ModelShape::from_config(&llama(256, 1024, 8, 8), DType::F16).unwrap();
    let total = shape.block_bytes();
    let mut before = u64::MAX;
    for share in [20, 40, 60, 80] {
        let machine = machine("laptop", Device::Cpu, 0, total * share / 100);
        let found = predict(&shape, &machine, &question(Cut::Fine, &Habit::Uniform)).unwrap();
        let wanted = estimate(&shape, &machine, 512, 64, &found.ring_bytes, found.compute_seconds);
        println!("{share} %: {} bytes, closed {}", found.disk_bytes, wanted.disk_bytes);
        close("disk bytes", found.disk_bytes as f64, wanted.disk_bytes, 0.05);
        assert!(found.disk_bytes < before, "{share} %");
        before = found.disk_bytes;
    }
}

/// Experts that are hardly ever chosen are not read from disk for ever where memory holds all of them. Where two memories
/// share them, what the GPU's gives up is on disk alone, since tiers are exclusive and nothing is downloaded.
#[test]
fn a_mixture_that_memory_holds_is_not_read_from_disk() {
    let shape = mixture_30b();
    for machine in [
        machine("laptop", Device::Cpu, 0, shape.block_bytes() * 11 / 10),
        machine("desktop-24gb", Device::Gpu, shape.block_bytes() / 2, shape.block_bytes() * 7 / 10),
    ] {
        let found = predict(&shape, &machine, &question(Cut::Coarse, &Habit::Recency)).unwrap();
        let name = &machine.hardware.name;
        println!("{name}: disk {} of {} bytes", found.disk_bytes, found.touched_bytes);
        if machine.device == Device::Cpu {
            assert_ne!(found.bound, Bound::Disk);
            assert_eq!(found.disk_bytes, 0);
            assert!(found.places.iter().all(|(_, bytes)| bytes.last() == Some(&0)), "{:?}", found.places);
        }
        assert!(found.disk_bytes * 20 < found.touched_bytes, "{name}: {}", found.disk_bytes);
    }
}

/// Prompts of a mixture came half as slow again as planned: its experts meet a few tokens each, which kernels are slower at.
#[test]
fn experts_of_a_prompt_meet_few_tokens() {
    let habit = Habit::Uniform;
    let seconds = |shape: &ModelShape, few_flops_per_s: u64, tokens: u64| {
        let mut machine = machine("laptop", Device::Cpu, 0, 64 * GIB);
        machine.hardware.host.few_flops_per_s = few_flops_per_s;
        let phase = Phase { tokens, past: 0 };
        let question = Question { phase, chunk: tokens, ..question(Cut::Coarse, &habit) };
        predict(shape, &machine, &question).unwrap().compute_seconds
    };
    let many = shipped("laptop").host.flops_per_s;
    let (mixture, dense) = (mixture_30b(), dense_8b());
    assert!(seconds(&mixture, many / 4, 64) > 1.5 * seconds(&mixture, many, 64));
    close("a token", seconds(&mixture, many / 4, 1), seconds(&mixture, many, 1), 1e-9);
    close("a dense model's chunk", seconds(&dense, many / 4, 64), seconds(&dense, many, 64), 1e-9);
    assert!(seconds(&dense, many / 4, 16) > 1.1 * seconds(&dense, many, 16));
}

/// A q4_0 mixture took half as long again as its plan said: its many small products, and attention in single precision,
/// had been planned at the speed of large products.
#[test]
fn products_and_attention_cost_beside_the_weights() {
    let habit = Habit::Uniform;
    let shape = mixture_30b();
    let seconds = |product_ns: u64, attention_flops_per_s: u64, past: u64| {
        let mut machine = machine("laptop", Device::Cpu, 0, 64 * GIB);
        machine.hardware.host.product_ns = product_ns;
        machine.hardware.host.attention_flops_per_s = attention_flops_per_s;
        let phase = Phase { tokens: 1, past };
        predict(&shape, &machine, &Question { phase, ..question(Cut::Coarse, &habit) }).unwrap().compute_seconds
    };
    let fast = shipped("laptop").host.attention_flops_per_s;
    let base = seconds(0, fast, 0);
    // In each of 48 layers: q, k, v, o, the router, and three of each of eight experts; and the head.
    close("products", seconds(5000, fast, 0) - base, f64::from(48 * (4 + 1 + 3 * 8) + 1) * 5e-6, 0.01);
    // Two multiplications and two additions for each position and element of the 32 queries of 128 elements.
    let (attention, past) = (10_000_000_000u64, 1000u64);
    let slow = seconds(0, attention, past) - seconds(0, attention, 0);
    close("attention", slow, 48.0 * 4.0 * (past * 32 * 128) as f64 / attention as f64, 0.01);
    // Where arithmetic is fast, the past costs what reading it costs: 4 heads' keys and values of 4 bytes.
    let read = seconds(0, u64::MAX, past) - seconds(0, u64::MAX, 0);
    let host = shipped("laptop").host.memory_bytes_per_s;
    close("reading the past", read, 48.0 * (past * 2 * 4 * 128 * shape.kv_element_bytes) as f64 / host as f64, 0.01);
}
