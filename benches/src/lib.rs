//! Shared pieces of the benches: see `benches/`.
