//! What others have measured on hardware that is not at hand, against the limit: nobody may be faster.
//!
//! The data are in `docs/benchmarks/published.toml`, the table in `planned-vs-published.md` beside it. If the data
//! change, `OVERSPILL_WRITE=1 cargo test -p overspill-sim --test published` writes the table anew.
#![allow(clippy::unwrap_used, reason = "tests")]

use overspill_core::DType;
use overspill_sim::hardware::Hardware;
use overspill_sim::planner::{Budgets, KeptCurve, ModelShape, Phase, physical_limit};
use std::fmt::Write as _;
use std::path::PathBuf;
use toml::{Table, Value};

fn docs(name: &str) -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../../docs/benchmarks").join(name)
}

fn number(table: &Table, key: &str) -> f64 {
    match &table[key] {
        Value::Integer(value) => *value as f64,
        Value::Float(value) => *value,
        other => panic!("{key}: {other:?}"),
    }
}

fn text<'a>(table: &'a Table, key: &str) -> &'a str {
    table[key].as_str().unwrap()
}

fn hardware(name: &str, machine: &Table) -> Hardware {
    let unified = machine.contains_key("unified");
    let memory = |gib: f64| format!("memory_gib = {gib}\nlink_gb_per_s = 64\n");
    let profile = format!(
        "name = \"{name}\"\nunified_memory = {unified}\n[[gpu]]\nmemory_gb_per_s = {}\ntflops = {}\n{}[host]\n\
         memory_gib = {}\nmemory_gb_per_s = {}\ntflops = {}\n[[disk]]\ngb_per_s = {}\n",
        number(machine, "gpu_gb_per_s"),
        number(machine, "gpu_tflops"),
        if unified { String::new() } else { memory(number(machine, "gpu_gib")) },
        number(machine, "host_gib"),
        number(machine, "host_gb_per_s"),
        number(machine, "host_tflops"),
        number(machine, "disk_gb_per_s"),
    );
    Hardware::parse(name, &profile).unwrap()
}

fn shape(measured: &Table, models: &Table) -> ModelShape {
    let config = serde_json::to_value(models[text(measured, "model")].as_table().unwrap()).unwrap();
    match measured.get("dtype").and_then(Value::as_str) {
        Some(dtype) => ModelShape::from_config(&config, DType::from_name(dtype).unwrap()).unwrap(),
        None => {
            let bytes = (number(measured, "gigabytes") * 1e9) as u64;
            ModelShape::from_config(&config, DType::Q4_K).unwrap().scaled_to(bytes)
        }
    }
}

/// The table, and each measurement's distance: its time over the limit's.
fn table(data: &Table) -> (String, Vec<(String, f64)>) {
    let (models, machines) = (data["model"].as_table().unwrap(), data["machine"].as_table().unwrap());
    let mut lines = String::from(
        "| engine | model | weights | machine | batch | published tokens/s | limit tokens/s | bound by | times the limit |\n\
         | --- | --- | ---: | --- | ---: | ---: | ---: | --- | ---: |\n",
    );
    let mut distances = Vec::new();
    for measured in data["measured"].as_array().unwrap().iter().map(|m| m.as_table().unwrap()) {
        let shape = shape(measured, models);
        let machine = text(measured, "machine");
        let hardware = hardware(machine, machines[machine].as_table().unwrap());
        let batch = number(measured, "batch") as u64;
        let budgets = Budgets { vram_bytes: hardware.vram_bytes(), ram_bytes: hardware.host.memory_bytes };
        let curve = KeptCurve::best_seen();
        let (seconds, bound) = physical_limit(&shape, &hardware, budgets, Phase { tokens: batch, past: 0 }, &curve);
        let (limit, published) = (batch as f64 / seconds, number(measured, "tokens_per_s"));
        let weights = match measured.get("dtype").and_then(Value::as_str) {
            Some(dtype) => format!("{dtype}, {:.1} GB", shape.bytes as f64 / 1e9),
            None => format!("{:.1} GB", shape.bytes as f64 / 1e9),
        };
        let (engine, model, source) = (text(measured, "engine"), text(measured, "model"), text(measured, "source"));
        writeln!(
            lines,
            "| [{engine}]({source}) | {model} | {weights} | {machine} | {batch} | {published} | {limit:.2} | {} | {:.2} |",
            bound.name(),
            limit / published
        )
        .unwrap();
        distances.push((format!("{engine}, {model} on {machine}"), limit / published));
    }
    (lines, distances)
}

fn median(values: impl Iterator<Item = f64>) -> f64 {
    let mut values: Vec<f64> = values.collect();
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}

#[test]
fn nobody_has_published_anything_faster_than_the_limit() {
    let data: Table = std::fs::read_to_string(docs("published.toml")).unwrap().parse().unwrap();
    let (lines, distances) = table(&data);
    println!("{lines}");
    assert!(distances.len() >= 20, "{}", distances.len());
    for (what, distance) in &distances {
        assert!(*distance >= 1.0, "{what} is {distance:.3} times the limit: faster than physics allows");
    }
    let single = |(line, _): &(&str, &(String, f64))| line.contains("| 1 |");
    let pairs: Vec<(&str, &(String, f64))> = lines.lines().skip(2).zip(&distances).collect();
    let all = median(distances.iter().map(|(_, distance)| *distance));
    let one = median(pairs.iter().filter(|pair| single(pair)).map(|(_, (_, distance))| *distance));
    let summary = format!(
        "{} measurements: none is faster than the limit. Median distance: {all:.2} times the limit; of those that decode one \
         sequence, {one:.2}.\n",
        distances.len()
    );
    let path = docs("planned-vs-published.md");
    let page = std::fs::read_to_string(&path).unwrap();
    let (begin, end) = ("<!-- computed -->\n", "<!-- end -->");
    let (head, rest) = page.split_once(begin).unwrap();
    let (_, tail) = rest.split_once(end).unwrap();
    let wanted = format!("{head}{begin}{summary}\n{lines}{end}{tail}");
    if std::env::var_os("OVERSPILL_WRITE").is_some() {
        std::fs::write(&path, &wanted).unwrap();
    }
    assert!(page == wanted || std::env::var_os("OVERSPILL_WRITE").is_some(), "the page is not what the data give");
}
