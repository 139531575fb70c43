//! `replica`: the agent on a protected machine and the operator's command line.

fn main() {}
