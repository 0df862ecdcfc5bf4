//! The decoder against a second one that is as plain as can be: f64, one loop after the other, the whole sequence at
//! once, sharing no code with the first. It is itself held against the oracles, then it is the oracle of what they
//! leave out: OLMoE, clamped projections, norms that are scaled to a sum or not, dynamic and long rotary scalings.
#![allow(clippy::unwrap_used, reason = "tests")]

mod common;

use common::{Oracle, Plain, PlainModel, TempDir, difference, runtime};
use overspill_infer::kernels::Activations;
use serde_json::{Value, json};

/// A sequence's states: `[tokens][width]`.
type Rows = Vec<Vec<f64>>;

struct Reference<'a> {
    model: &'a PlainModel,
    /// How long the sequence was when each token was computed.
    lengths: Vec<usize>,
}

impl Reference<'_> {
    fn number(&self, key: &str) -> Option<usize> {
        self.model.config.get(key).and_then(Value::as_u64).map(|n| n as usize)
    }

    fn tensor(&self, name: &str) -> &Plain {
        self.model.tensors.get(name).unwrap_or_else(|| panic!("{name}"))
    }

    fn multiply(&self, stem: &str, x: &Rows) -> Rows {
        let weight = self.tensor(&format!("{stem}.weight"));
        let bias = self.model.tensors.get(&format!("{stem}.bias"));
        let cols = weight.shape[1] as usize;
        let product = |x: &Vec<f64>| {
            let rows = weight.values.chunks(cols).enumerate();
            rows.map(|(r, row)| {
                let sum: f64 = row.iter().zip(x).map(|(w, x)| f64::from(*w) * x).sum();
                sum + bias.map_or(0.0, |b| f64::from(b.values[r]))
            })
            .collect()
        };
        x.iter().map(product).collect()
    }

    fn norm(&self, name: &str, x: &[f64]) -> Vec<f64> {
        let weight = &self.tensor(name).values;
        assert_eq!(weight.len(), x.len(), "{name}");
        let eps = self.model.config["rms_norm_eps"].as_f64().unwrap();
        let mean = x.iter().map(|x| x * x).sum::<f64>() / x.len() as f64;
        x.iter().zip(weight).map(|(x, w)| x / (mean + eps).sqrt() * f64::from(*w)).collect()
    }

    /// Angle per position of each pair, and the factor of sines and cosines.
    fn frequencies(&self, dim: usize, length: usize) -> (Vec<f64>, f64) {
        let rope = &self.model.config["rope_parameters"];
        let mut theta = rope["rope_theta"].as_f64().unwrap();
        let context = self.number("max_position_embeddings").unwrap() as f64;
        let original = rope.get("original_max_position_embeddings").and_then(Value::as_f64).unwrap_or(context);
        let factor = rope.get("factor").and_then(Value::as_f64).unwrap_or(1.0);
        let kind = rope["rope_type"].as_str().unwrap();
        let (length, width) = (length as f64, dim as f64);
        if kind == "dynamic" && length > original {
            theta *= ((factor * length / original) - (factor - 1.0)).powf(width / (width - 2.0));
        }
        let mut all: Vec<f64> = (0..dim / 2).map(|i| 1.0 / theta.powf(2.0 * i as f64 / width)).collect();
        let mut scale = 1.0;
        match kind {
            "default" | "dynamic" => {}
            "linear" => all.iter_mut().for_each(|f| *f /= factor),
            "llama3" => {
                let low = original / rope["low_freq_factor"].as_f64().unwrap();
                let high = original / rope["high_freq_factor"].as_f64().unwrap();
                for f in &mut all {
                    let wavelength = std::f64::consts::TAU / *f;
                    if wavelength > low {
                        *f /= factor;
                    } else if wavelength >= high {
                        let smooth = (original / wavelength - original / low) / (original / high - original / low);
                        *f = (1.0 - smooth) * *f / factor + smooth * *f;
                    }
                }
            }
            "yarn" => {
                let turns_at =
                    |turns: f64| width * (original / (turns * std::f64::consts::TAU)).ln() / (2.0 * theta.ln());
                let (low, high) = (turns_at(32.0).floor().max(0.0), turns_at(1.0).ceil().min(width - 1.0));
                for (i, f) in all.iter_mut().enumerate() {
                    let ramp = ((i as f64 - low) / (high - low).max(0.001)).clamp(0.0, 1.0);
                    *f = *f / factor * ramp + *f * (1.0 - ramp);
                }
                scale = 0.1 * factor.ln() + 1.0;
            }
            "longrope" => {
                let list = if length > original { "long_factor" } else { "short_factor" };
                let divisors = rope[list].as_array().unwrap();
                all.iter_mut().zip(divisors).for_each(|(f, d)| *f /= d.as_f64().unwrap());
                let stretch = rope.get("factor").and_then(Value::as_f64).unwrap_or(context / original);
                scale = (1.0 + stretch.ln() / original.ln()).sqrt();
            }
            other => panic!("{other}"),
        }
        (all, scale)
    }

    fn turn(&self, x: &mut [f64], head_dim: usize, position: usize) {
        let (frequencies, scale) = self.frequencies(head_dim, self.lengths[position]);
        for head in x.chunks_mut(head_dim) {
            for (i, f) in frequencies.iter().enumerate() {
                let (sin, cos) = (position as f64 * f).sin_cos();
                let (a, b) = (head[i], head[i + head_dim / 2]);
                head[i] = (a * cos - b * sin) * scale;
                head[i + head_dim / 2] = (b * cos + a * sin) * scale;
            }
        }
    }

    fn attention(&self, layer: usize, x: &Rows) -> Rows {
        let prefix = format!("model.layers.{layer}.self_attn.");
        let heads = self.number("num_attention_heads").unwrap();
        let kv_heads = self.number("num_key_value_heads").unwrap();
        let head_dim = self.number("head_dim").unwrap_or(self.number("hidden_size").unwrap() / heads);
        let [mut q, mut k, mut v] = ["q", "k", "v"].map(|p| self.multiply(&format!("{prefix}{p}_proj"), x));
        for (rows, name) in [(&mut q, "q_norm"), (&mut k, "k_norm")] {
            let name = format!("{prefix}{name}.weight");
            if let Some(weight) = self.model.tensors.get(&name) {
                for row in rows.iter_mut() {
                    *row = row.chunks(weight.values.len()).flat_map(|part| self.norm(&name, part)).collect();
                }
            }
        }
        if let Some(clip) = self.model.config.get("clip_qkv").and_then(Value::as_f64) {
            let all = q.iter_mut().chain(&mut k).chain(&mut v);
            all.flatten().for_each(|x| *x = x.clamp(-clip, clip));
        }
        for rows in [&mut q, &mut k] {
            rows.iter_mut().enumerate().for_each(|(p, row)| self.turn(row, head_dim, p));
        }
        let window = self.number("sliding_window").unwrap_or(usize::MAX);
        let mut out = vec![vec![0.0; heads * head_dim]; x.len()];
        for (position, out) in out.iter_mut().enumerate() {
            for head in 0..heads {
                let at = head * head_dim..(head + 1) * head_dim;
                let kv = head / (heads / kv_heads) * head_dim;
                let seen: Vec<usize> = (0..=position).filter(|p| position - p < window).collect();
                let dot = |p: &usize| {
                    let products = q[position][at.clone()].iter().zip(&k[*p][kv..]).map(|(q, k)| q * k);
                    products.sum::<f64>() / (head_dim as f64).sqrt()
                };
                let scores: Vec<f64> = seen.iter().map(dot).collect();
                for (p, weight) in seen.iter().zip(softmax(&scores)) {
                    out[at.clone()].iter_mut().zip(&v[*p][kv..]).for_each(|(o, v)| *o += weight * v);
                }
            }
        }
        self.multiply(&format!("{prefix}o_proj"), &out)
    }

    fn gated(&self, gate: &str, up: &str, down: &str, x: &Rows) -> Rows {
        let (gate, up) = (self.multiply(gate, x), self.multiply(up, x));
        let silu = |(g, u): (&f64, &f64)| g / (1.0 + (-g).exp()) * u;
        let both: Rows = gate.iter().zip(&up).map(|(g, u)| g.iter().zip(u).map(silu).collect()).collect();
        self.multiply(down, &both)
    }

    fn feed_forward(&self, layer: usize, x: &Rows) -> Rows {
        let prefix = format!("model.layers.{layer}.");
        let mixtral = self.model.tensors.contains_key(&format!("{prefix}block_sparse_moe.gate.weight"));
        let block = format!("{prefix}{}", if mixtral { "block_sparse_moe." } else { "mlp." });
        let name = |part: &str| format!("{block}{part}");
        if !self.model.tensors.contains_key(&name("gate.weight")) {
            return self.gated(&name("gate_proj"), &name("up_proj"), &name("down_proj"), x);
        }
        let used = self.number("num_experts_per_tok").unwrap();
        let scaled = mixtral || self.model.config.get("norm_topk_prob").and_then(Value::as_bool) == Some(true);
        let parts = if mixtral { ["w1", "w3", "w2"] } else { ["gate_proj", "up_proj", "down_proj"] };
        let scores = self.multiply(&name("gate"), x);
        let mut out = Vec::new();
        for (x, scores) in x.iter().zip(&scores) {
            let probabilities = softmax(scores);
            let mut order: Vec<usize> = (0..scores.len()).collect();
            order.sort_by(|a, b| probabilities[*b].total_cmp(&probabilities[*a]));
            order.truncate(used);
            let sum: f64 = order.iter().map(|e| probabilities[*e]).sum();
            let mut total = vec![0.0; x.len()];
            for expert in order {
                let [gate, up, down] = parts.map(|part| name(&format!("experts.{expert}.{part}")));
                let y = self.gated(&gate, &up, &down, &vec![x.clone()]);
                let weight = probabilities[expert] / if scaled { sum } else { 1.0 };
                total.iter_mut().zip(&y[0]).for_each(|(t, y)| *t += weight * y);
            }
            out.push(total);
        }
        out
    }

    /// The logits after each token.
    fn logits(&self, tokens: &[u32]) -> Vec<Vec<f32>> {
        let embeddings = self.tensor("model.embed_tokens.weight");
        let hidden = embeddings.shape[1] as usize;
        let row = |t: &u32| embeddings.values[*t as usize * hidden..][..hidden].iter().map(|x| f64::from(*x)).collect();
        let mut x: Rows = tokens.iter().map(row).collect();
        let add = |x: &mut Rows, y: Rows| {
            x.iter_mut().zip(y).for_each(|(x, y)| x.iter_mut().zip(y).for_each(|(x, y)| *x += y));
        };
        let norm = |name: String, x: &Rows| -> Rows { x.iter().map(|x| self.norm(&name, x)).collect() };
        for layer in 0..self.number("num_hidden_layers").unwrap() {
            let n = norm(format!("model.layers.{layer}.input_layernorm.weight"), &x);
            add(&mut x, self.attention(layer, &n));
            let n = norm(format!("model.layers.{layer}.post_attention_layernorm.weight"), &x);
            add(&mut x, self.feed_forward(layer, &n));
        }
        let n = norm("model.norm.weight".into(), &x);
        let tied = !self.model.tensors.contains_key("lm_head.weight");
        let logits = self.multiply(if tied { "model.embed_tokens" } else { "lm_head" }, &n);
        logits.into_iter().map(|row| row.into_iter().map(|x| x as f32).collect()).collect()
    }
}

fn softmax(x: &[f64]) -> Vec<f64> {
    let max = x.iter().fold(f64::NEG_INFINITY, |m, x| m.max(*x));
    let sum: f64 = x.iter().map(|x| (x - max).exp()).sum();
    x.iter().map(|x| (x - max).exp() / sum).collect()
}

#[test]
fn the_reference_meets_the_oracles() {
    let mut met = 0;
    for oracle in Oracle::all() {
        let Some(expected) = &oracle.all_prompt_logits else { continue };
        let model = PlainModel::read(&oracle.name);
        let reference = Reference { model: &model, lengths: vec![oracle.prompt.len(); oracle.prompt.len()] };
        for (got, expected) in reference.logits(&oracle.prompt).iter().zip(expected) {
            let off = difference(got, expected);
            assert!(off <= 1e-5, "{}: differs by {off}", oracle.name);
        }
        met += 1;
    }
    assert!(met >= 9);
}

/// Tokens enough to leave windows and trained lengths behind.
fn long_prompt(len: u32) -> Vec<u32> {
    (0..len).map(|i| (i * 37 + 11) % 320).collect()
}

/// The decoder and the reference agree on a model, in chunks of 7, and on 3 tokens that follow one by one.
fn assert_agrees(label: &str, model: &PlainModel, prompt: &[u32]) {
    let directory = TempDir::new("reference");
    model.write(&directory.0);
    let runtime = runtime(&directory.0, Activations::F32, 2, 7);
    let mut session = runtime.session(None).unwrap();
    let next = [3, 141, 59];
    let mut got = session.prefill_all(prompt, None).unwrap().to_vec();
    for token in next {
        got.extend(session.prefill(&[token], None).unwrap());
    }
    let tokens: Vec<u32> = prompt.iter().chain(&next).copied().collect();
    let lengths = (0..tokens.len()).map(|p| prompt.len().max(p + 1)).collect();
    let expected = Reference { model, lengths }.logits(&tokens);
    let vocab = expected[0].len();
    for (position, (got, expected)) in got.chunks(vocab).zip(&expected).enumerate() {
        let off = difference(got, expected);
        assert!(off <= 1e-4, "{label}: logits at position {position} differ by {off}");
    }
    assert_eq!(got.len(), tokens.len() * vocab, "{label}");
}

#[test]
fn olmoe_agrees_with_the_reference() {
    let mut model = PlainModel::read("tiny-olmoe");
    assert_agrees("plain", &model, &long_prompt(20));
    // The shapes of its norms are those of all heads together.
    assert_eq!(model.tensors["model.layers.0.self_attn.q_norm.weight"].shape, [64]);
    model.config["norm_topk_prob"] = json!(true);
    assert_agrees("scaled to a sum", &model, &long_prompt(20));
    model.config["clip_qkv"] = json!(0.3);
    assert_agrees("clamped", &model, &long_prompt(20));
}

#[test]
fn long_prompts_agree_with_the_reference() {
    for name in ["tiny-mistral-swa", "tiny-llama-yarn", "tiny-llama-tied-rope3", "tiny-qwen3moe", "tiny-mixtral"] {
        assert_agrees(name, &PlainModel::read(name), &long_prompt(60));
    }
}

#[test]
fn rotary_scalings_that_depend_on_the_length_agree_with_the_reference() {
    let mut model = PlainModel::read("tiny-llama");
    for prompt in [&long_prompt(20)[..], &long_prompt(31), &long_prompt(60)] {
        let rope = json!({"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 3.0, "original_max_position_embeddings": 32});
        model.config["rope_parameters"] = rope;
        assert_agrees("dynamic", &model, prompt);
        model.config["rope_parameters"] = json!({
            "rope_type": "longrope", "rope_theta": 10000.0, "original_max_position_embeddings": 32,
            "short_factor": [1.0, 1.1, 1.2, 1.3, 1.4, 1.5, 1.6, 1.7], "long_factor": [1.0, 1.5, 2.0, 3.0, 4.0, 5.0, 6.0, 8.0],
        });
        assert_agrees("longrope", &model, prompt);
    }
}

#[test]
fn biases_agree_with_the_reference() {
    let mut model = PlainModel::read("tiny-llama");
    model.config["attention_bias"] = json!(true);
    model.config["mlp_bias"] = json!(true);
    for layer in 0..4 {
        for (stem, len) in [
            ("self_attn.q_proj", 64),
            ("self_attn.k_proj", 32),
            ("self_attn.v_proj", 32),
            ("self_attn.o_proj", 64),
            ("mlp.gate_proj", 176),
            ("mlp.up_proj", 176),
            ("mlp.down_proj", 64),
        ] {
            let values = (0..len).map(|i| ((i * 29 + layer * 7) % 17) as f32 * 0.02 - 0.16).collect();
            let bias = Plain { shape: vec![len], values };
            model.tensors.insert(format!("model.layers.{layer}.{stem}.bias"), bias);
        }
    }
    assert_agrees("biases", &model, &long_prompt(20));
}
