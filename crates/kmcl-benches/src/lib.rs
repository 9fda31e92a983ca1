//! Benchmarks beside crates that nothing else here may name, for orientation: see `benches/`.

#![forbid(unsafe_code)]
