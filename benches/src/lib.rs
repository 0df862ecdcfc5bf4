//! Benchmarks of overspill: see `benches/`. This library is empty; the benchmarks are the package's targets.
