//! How tokens are chosen: what the command line says, else what the model's authors recommend in
//! `generation_config.json`, else this program's own defaults. Prompts of ids are for comparing, so they are greedy
//! unless the command line says otherwise.

use crate::args::SamplingArgs;
use crate::errors::{Kind, Outcome, stop};
use overspill_formats::ModelFiles;
use overspill_infer::sampling::SamplingParams;
use serde_json::Value;

const TEMPERATURE_DEFAULT: f32 = 0.8;
const TOP_K_DEFAULT: u32 = 40;
const TOP_P_DEFAULT: f32 = 0.95;
const FILE: &str = "generation_config.json";

/// What a model recommends, as far as it does.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Recommended {
    temperature: Option<f32>,
    top_k: Option<u32>,
    top_p: Option<f32>,
}

impl Recommended {
    /// Reads a model's recommendations.
    ///
    /// # Errors
    /// Values that make no sense, with the file and the key.
    pub fn of(model: &ModelFiles) -> Outcome<Self> {
        let overspill_formats::Metadata::HuggingFace { generation: Some(generation), .. } = &model.metadata else {
            return Ok(Self::default());
        };
        Self::parse(generation).map_err(|(key, wanted)| {
            let file = model.path.join(FILE);
            let found = &generation[key];
            let message = format!("{}: {key} is {found} where {wanted} is wanted; correct it", file.display());
            stop(Kind::BadFile, message)
        })
    }

    /// `Err` has the key and what would be right.
    fn parse(generation: &Value) -> Result<Self, (&'static str, &'static str)> {
        let given = |key| generation.get(key).filter(|value| !value.is_null());
        let number = |key, wanted, fits: fn(f32) -> bool| match given(key) {
            None => Ok(None),
            Some(value) => value.as_f64().map(|n| n as f32).filter(|&n| fits(n)).map(Some).ok_or((key, wanted)),
        };
        // Some files say "all" with -1.
        let top_k = match given("top_k") {
            None => None,
            Some(value) if value.as_i64() == Some(-1) => Some(0),
            Some(value) => {
                let k = value.as_u64().and_then(|k| u32::try_from(k).ok());
                Some(k.ok_or(("top_k", "a whole number, 0 or more"))?)
            }
        };
        let temperature = number("temperature", "a number, 0 or more", |t| t.is_finite() && t >= 0.0)?;
        let top_p = number("top_p", "a number above 0 and up to 1", |p| p > 0.0 && p <= 1.0)?;
        // In these files' own terms a temperature counts only where sampling is on.
        let greedy = given("do_sample") == Some(&Value::Bool(false));
        Ok(Self { temperature: if greedy { Some(0.0) } else { temperature }, top_k, top_p })
    }
}

/// What holds in the end.
///
/// # Errors
/// Recommendations that make no sense, if they are asked for.
pub fn params(args: &SamplingArgs, model: &ModelFiles, ids: bool) -> Outcome<SamplingParams> {
    let recommended = if ids { Recommended::default() } else { Recommended::of(model)? };
    Ok(choose(args, recommended, ids))
}

fn choose(args: &SamplingArgs, recommended: Recommended, ids: bool) -> SamplingParams {
    let own = if ids { 0.0 } else { TEMPERATURE_DEFAULT };
    let temperature = args.temperature.or(recommended.temperature).unwrap_or(own);
    if temperature == 0.0 {
        return SamplingParams::greedy();
    }
    SamplingParams {
        temperature,
        top_k: args.top_k.or(recommended.top_k).unwrap_or(TOP_K_DEFAULT),
        top_p: args.top_p.or(recommended.top_p).unwrap_or(TOP_P_DEFAULT),
        seed: args.seed,
        ..SamplingParams::default()
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]
    use super::*;
    use serde_json::json;

    fn args(temperature: Option<f32>, top_k: Option<u32>, top_p: Option<f32>) -> SamplingArgs {
        SamplingArgs { temperature, top_k, top_p, seed: 3 }
    }

    fn drawn(temperature: f32, top_k: u32, top_p: f32) -> SamplingParams {
        SamplingParams { temperature, top_k, top_p, seed: 3, ..SamplingParams::default() }
    }

    #[test]
    fn the_command_line_wins_over_the_model_and_the_model_over_the_defaults() {
        let model = Recommended::parse(&json!({"temperature": 0.5, "top_k": 20, "do_sample": true})).unwrap();
        let nothing = args(None, None, None);
        assert_eq!(choose(&nothing, Recommended::default(), false), drawn(0.8, 40, 0.95));
        assert_eq!(choose(&nothing, model, false), drawn(0.5, 20, 0.95));
        assert_eq!(choose(&args(Some(1.5), None, Some(0.5)), model, false), drawn(1.5, 20, 0.5));
        assert_eq!(choose(&args(Some(0.0), None, None), model, false), SamplingParams::greedy());
        assert_eq!(choose(&nothing, Recommended::default(), true), SamplingParams::greedy());
        assert_eq!(choose(&args(Some(1.0), None, None), Recommended::default(), true), drawn(1.0, 40, 0.95));
    }

    #[test]
    fn files_say_greedy_and_all_in_their_own_ways() {
        let parse = |value| Recommended::parse(&value).unwrap();
        assert_eq!(parse(json!({"do_sample": false, "temperature": 0.6})).temperature, Some(0.0));
        assert_eq!(parse(json!({"temperature": null, "top_k": null, "top_p": null})), Recommended::default());
        assert_eq!(parse(json!({"top_k": -1, "top_p": 1})), parse(json!({"top_k": 0, "top_p": 1.0})));
        assert_eq!(parse(json!([])), Recommended::default());
    }

    #[test]
    fn nonsense_is_named() {
        for (value, key) in [
            (json!({"temperature": -0.1}), "temperature"),
            (json!({"temperature": "hot"}), "temperature"),
            (json!({"temperature": 1e300}), "temperature"),
            (json!({"top_k": 2.5}), "top_k"),
            (json!({"top_k": 5_000_000_000_u64}), "top_k"),
            (json!({"top_p": 0}), "top_p"),
            (json!({"top_p": 1.1}), "top_p"),
        ] {
            assert_eq!(Recommended::parse(&value).unwrap_err().0, key, "{value}");
        }
    }
}
