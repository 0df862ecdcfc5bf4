//! From TOML to [`Hardware`]: every key is looked at, none is passed over.

use super::{Disk, GIGA, Gpu, Hardware, HardwareError, Host, Price};
use std::cell::RefCell;
use std::collections::BTreeSet;
use toml::{Table, Value};

/// No profile comes near.
const TEXT_BYTES_MAX: usize = 1 << 20;
/// GPUs, or disks.
const PARTS_MAX: usize = 64;
/// No figure of a machine is larger, in the unit of its key; products stay within 64 bits.
const NUMBER_MAX: f64 = 1e9;
const GIB: f64 = (1u64 << 30) as f64;

/// A table whose keys are ticked off as they are read.
struct Keys<'a> {
    file: &'a str,
    /// What goes before its keys in errors: `gpu[0].`
    path: String,
    table: &'a Table,
    read: RefCell<BTreeSet<&'static str>>,
}

type Read<T> = Result<T, HardwareError>;

impl<'a> Keys<'a> {
    fn new(file: &'a str, path: String, table: &'a Table) -> Self {
        Self { file, path, table, read: RefCell::default() }
    }

    fn error(&self, key: &str, cause: impl Into<String>, cure: impl Into<String>) -> HardwareError {
        HardwareError {
            file: self.file.to_owned(),
            key: format!("{}{key}", self.path),
            cause: cause.into(),
            cure: cure.into(),
        }
    }

    fn get(&self, key: &'static str) -> Option<&'a Value> {
        self.read.borrow_mut().insert(key);
        self.table.get(key)
    }

    fn missing(&self, key: &str) -> HardwareError {
        self.error(key, "is missing", "add it; the shipped profiles show how")
    }

    fn text(&self, key: &'static str) -> Read<Option<String>> {
        match self.get(key) {
            None => Ok(None),
            Some(Value::String(text)) if !text.chars().any(char::is_control) => Ok(Some(text.clone())),
            Some(_) => Err(self.error(key, "is no text of one line", "write it in quotes")),
        }
    }

    fn flag(&self, key: &'static str) -> Read<bool> {
        match self.get(key) {
            None => Ok(false),
            Some(Value::Boolean(value)) => Ok(*value),
            Some(_) => Err(self.error(key, "is neither true nor false", "write true or false")),
        }
    }

    /// A number within 0 to [`NUMBER_MAX`].
    fn number(&self, key: &'static str, zero: bool) -> Read<Option<f64>> {
        let value = match self.get(key) {
            None => return Ok(None),
            Some(Value::Integer(value)) => *value as f64,
            Some(Value::Float(value)) => *value,
            Some(_) => return Err(self.error(key, "is no number", "write a number without quotes")),
        };
        if (zero && value == 0.0) || (value > 0.0 && value <= NUMBER_MAX) {
            return Ok(Some(value));
        }
        let least = if zero { "from 0" } else { "above 0" };
        Err(self.error(key, format!("is {value}"), format!("give a number {least} and up to {NUMBER_MAX}")))
    }

    /// A number above 0, scaled and at least 1.
    fn scaled(&self, key: &'static str, scale: f64) -> Read<Option<u64>> {
        Ok(self.number(key, false)?.map(|value| ((value * scale) as u64).max(1)))
    }

    fn needed(&self, key: &'static str, scale: f64) -> Read<u64> {
        self.scaled(key, scale)?.ok_or_else(|| self.missing(key))
    }

    /// Microseconds from 0 up, as nanoseconds.
    fn micros(&self, key: &'static str, default: f64) -> Read<u64> {
        Ok((self.number(key, true)?.unwrap_or(default) * 1000.0) as u64)
    }

    fn table(&self, key: &'static str) -> Read<Option<Self>> {
        match self.get(key) {
            None => Ok(None),
            Some(Value::Table(table)) => Ok(Some(Keys::new(self.file, format!("{}{key}.", self.path), table))),
            Some(_) => Err(self.error(key, "is no table", format!("write [{key}] and its keys below"))),
        }
    }

    fn tables(&self, key: &'static str) -> Read<Option<Vec<Self>>> {
        let Some(value) = self.get(key) else { return Ok(None) };
        let no_list = || self.error(key, "is no list", format!("write [[{key}]] and its keys below"));
        let list = value.as_array().ok_or_else(no_list)?;
        if list.len() > PARTS_MAX {
            return Err(self.error(
                key,
                format!("is there {} times, and at most {PARTS_MAX} are possible", list.len()),
                "describe fewer",
            ));
        }
        let table = |(index, value): (usize, &'a Value)| {
            let table = value.as_table().ok_or_else(no_list)?;
            Ok(Keys::new(self.file, format!("{}{key}[{index}].", self.path), table))
        };
        list.iter().enumerate().map(table).collect::<Read<Vec<_>>>().map(Some)
    }

    /// Refuses keys that nobody has read.
    fn finish(self) -> Read<()> {
        let read = self.read.borrow();
        match self.table.keys().find(|key| !read.contains(key.as_str())) {
            None => Ok(()),
            Some(key) => {
                let known: Vec<&str> = read.iter().copied().collect();
                let shown: String = key.chars().filter(|c| !c.is_control()).take(60).collect();
                Err(self.error(&shown, "is no key of a profile", format!("known here are {}", known.join(", "))))
            }
        }
    }
}

pub(super) fn hardware(file: &str, text: &str) -> Read<Hardware> {
    let plain = |cause: String, cure: &str| HardwareError {
        file: file.to_owned(),
        key: String::new(),
        cause,
        cure: cure.to_owned(),
    };
    if text.len() > TEXT_BYTES_MAX {
        return Err(plain("it is too long for a profile".into(), "check which file was named"));
    }
    let table: Table = text.parse().map_err(|error: toml::de::Error| {
        let line = error.span().map_or(0, |span| text[..span.start.min(text.len())].lines().count().max(1));
        plain(format!("line {line} is no TOML: {}", error.message()), "correct it; the shipped profiles show how")
    })?;
    let root = Keys::new(file, String::new(), &table);
    let name = root.text("name")?.ok_or_else(|| root.missing("name"))?;
    let description = root.text("description")?.unwrap_or_default();
    let unified_memory = root.flag("unified_memory")?;
    let gpus = root.tables("gpu")?.unwrap_or_default();
    let gpus = gpus.into_iter().map(|keys| gpu(keys, unified_memory)).collect::<Read<Vec<_>>>()?;
    if unified_memory && gpus.len() != 1 {
        let count = if gpus.is_empty() { "no gpu".to_owned() } else { "more than one gpu".to_owned() };
        return Err(root.error(
            "unified_memory",
            format!("is true but there is {count} to share it"),
            "describe one [[gpu]], or leave it out",
        ));
    }
    let host = host(root.table("host")?.ok_or_else(|| root.missing("host"))?)?;
    let disks = root.tables("disk")?.ok_or_else(|| root.missing("disk"))?;
    if disks.is_empty() {
        return Err(root.error("disk", "is empty, and weights must lie somewhere", "describe one [[disk]] at least"));
    }
    let disks = disks.into_iter().map(disk).collect::<Read<Vec<_>>>()?;
    let price = root.table("price")?.map(price).transpose()?;
    root.finish()?;
    Ok(Hardware { name, description, unified_memory, gpus, host, disks, price })
}

fn gpu(keys: Keys<'_>, shares: bool) -> Read<Gpu> {
    let name = keys.text("name")?.unwrap_or_else(|| "gpu".into());
    let (memory, link) = (keys.scaled("memory_gib", GIB)?, keys.scaled("link_gb_per_s", GIGA)?);
    for (key, value) in [("memory_gib", memory), ("link_gb_per_s", link)] {
        match (shares, value) {
            (true, Some(_)) => {
                return Err(keys.error(key, "is given though memory is unified", "give the host's memory only"));
            }
            (false, None) => return Err(keys.missing(key)),
            _ => {}
        }
    }
    let gpu = Gpu {
        name,
        memory_bytes: memory.unwrap_or(0),
        memory_bytes_per_s: keys.needed("memory_gb_per_s", GIGA)?,
        flops_per_s: keys.needed("tflops", 1e12)?,
        link_bytes_per_s: link.unwrap_or(0),
        link_latency_ns: keys.micros("link_latency_us", 10.0)?,
        layer_ns: keys.micros("layer_us", 60.0)?,
    };
    keys.finish()?;
    Ok(gpu)
}

fn host(keys: Keys<'_>) -> Read<Host> {
    let flops_per_s = keys.needed("tflops", 1e12)?;
    let host = Host {
        name: keys.text("name")?.unwrap_or_else(|| "host".into()),
        memory_bytes: keys.needed("memory_gib", GIB)?,
        memory_bytes_per_s: keys.needed("memory_gb_per_s", GIGA)?,
        flops_per_s,
        few_flops_per_s: keys.scaled("few_tflops", 1e12)?.unwrap_or(flops_per_s),
        attention_flops_per_s: keys.scaled("attention_tflops", 1e12)?.unwrap_or(flops_per_s),
        product_ns: keys.micros("product_us", 0.0)?,
        layer_ns: keys.micros("layer_us", 20.0)?,
    };
    keys.finish()?;
    Ok(host)
}

fn disk(keys: Keys<'_>) -> Read<Disk> {
    let disk = Disk {
        name: keys.text("name")?.unwrap_or_else(|| "disk".into()),
        capacity_bytes: keys.scaled("capacity_gb", GIGA)?.unwrap_or(u64::MAX),
        bytes_per_s: keys.needed("gb_per_s", GIGA)?,
        latency_ns: keys.micros("latency_us", 100.0)?,
        depth: keys.number("depth", false)?.map_or(32, |depth| (depth as u32).max(1)),
        burst_ns: keys.micros("burst_us", 0.0)?,
    };
    keys.finish()?;
    Ok(disk)
}

fn price(keys: Keys<'_>) -> Read<Price> {
    let price = Price {
        currency: keys.text("currency")?.unwrap_or_else(|| "USD".into()),
        per_hour: keys.number("per_hour", true)?.ok_or_else(|| keys.missing("per_hour"))?,
        per_gb_vram: keys.number("per_gb_vram", false)?,
        per_gb_ram: keys.number("per_gb_ram", false)?,
        per_gb_per_s_disk: keys.number("per_gb_per_s_disk", false)?,
    };
    keys.finish()?;
    Ok(price)
}
